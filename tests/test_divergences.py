"""Divergences: each loss against its form, autodiff, finite differences, and numbers worked out elsewhere.

goldens/gradients.npz holds five positions (V = 53) and one tree node: values and gradients computed in float64 by TRL's
GKD loss and by plain autograd.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxopd.errors import InputError
from jaxopd.gradients import (
    READINGS,
    Position,
    forward_kl,
    forward_kl_loss,
    from_loss,
    gradient,
    jsd,
    jsd_loss,
    reverse_kl,
    reverse_kl_loss,
    single_sample,
)

GOLDEN = Path(__file__).parent / "goldens" / "gradients.npz"
K = 7
readings = pytest.mark.parametrize("reading", READINGS)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def make_position(**known) -> Position:
    log_p, log_q = log_softmax(2 * np.random.default_rng(0).normal(size=(2, K)))
    return Position.create(log_p, log_q, **known)


BETAS = (0.0, 0.1, 0.25, 0.5, 0.9, 1.0)


@pytest.mark.parametrize("beta", BETAS)
def test_form_of_jsd_is_minus_the_gradient_of_its_loss(x64, beta):
    position = make_position()
    by_autodiff = jax.grad(lambda z: jsd_loss(jax.nn.log_softmax(z), position.log_q, beta))(position.log_p)
    assert_allclose(gradient(jsd(beta), position, "restricted"), -by_autodiff, atol=1e-15)


def probability_jsd(beta):
    def loss(p, q):
        m = beta * q + (1 - beta) * p
        return jnp.sum(beta * q * jnp.log(q / m) + (1 - beta) * p * jnp.log(p / m))

    return loss


@readings
@pytest.mark.parametrize(
    "form, loss",
    [
        (reverse_kl, lambda p, q: jnp.sum(p * jnp.log(p / q))),
        (forward_kl, lambda p, q: jnp.sum(q * jnp.log(q / p))),
        (jsd(0.3), probability_jsd(0.3)),
    ],
)
def test_from_loss_equals_the_closed_form(x64, form, loss, reading):
    position = make_position(support=np.arange(K) != 2)
    assert_allclose(gradient(from_loss(loss), position, reading), gradient(form, position, reading), atol=1e-14)


def test_from_loss_of_a_loss_of_ones_own(x64):
    """Squared Hellinger distance, against central differences in the logits."""
    position = make_position()
    logits, q, step = np.asarray(position.log_p), np.exp(position.log_q), 1e-5

    def hellinger(p, q):
        return jnp.sum((jnp.sqrt(p) - jnp.sqrt(q)) ** 2)

    def along(k, sign):
        return hellinger(np.exp(log_softmax(logits + sign * step * np.eye(K)[k])), q)

    slopes = [(along(k, 1) - along(k, -1)) / (2 * step) for k in range(K)]
    assert_allclose(gradient(from_loss(hellinger), position), -np.array(slopes), atol=1e-9)


@pytest.mark.parametrize("beta", [0.1, 0.25, 0.5])
def test_jsd_swaps_student_and_teacher_at_one_minus_beta(x64, beta):
    position = make_position()
    p, q = position.log_p, position.log_q
    assert_allclose(jsd_loss(p, q, beta), jsd_loss(q, p, 1 - beta), rtol=1e-13)
    assert jsd_loss(p, p, beta) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("zero_of", ["student", "teacher", "both"])
def test_losses_and_their_derivatives_are_finite_at_log_zero(beta, zero_of):
    z = jnp.array([0.3, -1.0, 0.8])
    cut = z.at[1].set(-jnp.inf)
    student = z if zero_of == "teacher" else cut
    log_q = jax.nn.log_softmax(z[::-1] if zero_of == "student" else cut)
    value, slope = jax.value_and_grad(lambda z: jsd_loss(jax.nn.log_softmax(z), log_q, beta))(student)
    assert np.isfinite(value)
    assert np.all(np.isfinite(slope))


@pytest.mark.parametrize("beta", [-0.1, 1.5])
def test_beta_outside_the_unit_interval_is_named(beta):
    with pytest.raises(InputError, match=f"jsd beta: found {beta}"):
        jsd(beta)
    with pytest.raises(InputError, match=f"jsd beta: found {beta}"):
        jsd_loss(jnp.zeros(1), jnp.zeros(1), beta)


# Numbers from elsewhere


@pytest.mark.parametrize(
    "p, q, values",
    [
        ([0.1, 0.9], [0.9, 0.1], {0: 1.757779662, 1: 1.757779662, 0.1: 0.146310513, 0.9: 0.146310513}),
        ([0.1, 0.9], [0.9, 0.1], {0.25: 0.285781329, 0.5: 0.368064207}),
        ([0.5, 0.3, 0.2], [0.2, 0.6, 0.2], {0: 0.232630162, 0.25: 0.043549254, 0.5: 0.058692013, 1: 0.250201212}),
        ([0.6, 0.3, 0.1], [0.5, 0.4, 0.1], {0.5: 0.005859545}),
        ([0.25] * 4, [0.25] * 4, dict.fromkeys((0, 0.3, 0.5, 1), 0.0)),
    ],
)
def test_generalised_jsd_as_trl_defines_it(x64, p, q, values):
    for beta, expected in values.items():
        assert_allclose(jsd_loss(jnp.log(jnp.array(p)), jnp.log(jnp.array(q)), beta), expected, atol=5e-10)


def test_full_kl_on_the_worked_example(x64):
    p = jnp.array([[0.5, 0.3, 0.1, 0.06, 0.04], [0.25, 0.05, 0.4, 0.2, 0.1], [0.6, 0.3, 0.04, 0.03, 0.03]])
    q = jnp.array([[0.1, 0.4, 0.05, 0.35, 0.1], [0.25, 0.1, 0.45, 0.05, 0.15], [0.02, 0.03, 0.05, 0.5, 0.4]])
    assert_allclose(reverse_kl_loss(jnp.log(p), jnp.log(q)), [0.645262, 0.154942, 2.560458], atol=5e-7)
    assert_allclose(forward_kl_loss(jnp.log(p), jnp.log(q)), [0.628357, 0.113822, 2.316868], atol=5e-7)
    positions = Position.create(jnp.log(p), jnp.log(q))
    descent = -jax.vmap(lambda x: gradient(reverse_kl, x, "restricted"))(positions)
    assert_allclose(descent[0], [0.482088, -0.279883, 0.004789, -0.144531, -0.062462], atol=6e-7)  # printed figures
    ascent = jax.vmap(lambda x: gradient(forward_kl, x, "restricted"))(positions)
    assert_allclose(ascent, q - p, atol=1e-15)
    first_two = np.arange(5) < 2
    on_top_two = -gradient(reverse_kl, Position.create(jnp.log(p[0]), jnp.log(q[0]), support=first_two))
    assert_allclose(on_top_two, [0.444637, -0.444637, 0, 0, 0], atol=5e-7)


@pytest.mark.parametrize("beta", ["0", "0.1", "0.5", "0.9", "1"])
def test_golden_of_trl(x64, beta):
    golden = np.load(GOLDEN)
    log_p, log_q = log_softmax(golden["student_logits"]), log_softmax(golden["teacher_logits"])
    assert_allclose(jsd_loss(log_p, log_q, float(beta)), golden[f"gkd/beta{beta}/value"], rtol=1e-10)
    ascent = jax.vmap(lambda x: gradient(jsd(float(beta)), x, "restricted"))(Position.create(log_p, log_q))
    expected = golden[f"gkd/beta{beta}/grad"]
    assert_allclose(-ascent, expected, atol=1e-10 * np.max(np.abs(expected)))


def test_golden_of_eq_2_8_and_2_9(x64):
    golden = np.load(GOLDEN)
    log_p, log_q = log_softmax(golden["student_logits"]), log_softmax(golden["teacher_logits"])
    counts, n = np.eye(log_p.shape[-1])[golden["tokens"]], np.ones(len(log_p))
    positions = Position.create(log_p, log_q, counts=counts, n_samples=n)
    ascent = jax.vmap(lambda x: gradient(reverse_kl, x, "restricted"))(positions)
    assert_allclose(-ascent, golden["rkl_closed_form_eq2.8_per_token"], atol=1e-12)
    ascent = jax.vmap(lambda x: gradient(single_sample, x, "restricted"))(positions)
    assert_allclose(ascent, golden["sampled_eq2.9_ascent_per_token"], atol=1e-12)
