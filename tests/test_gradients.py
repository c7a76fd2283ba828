"""The contract of every gradient form, against autodiff, enumeration of all draws and the definitions.

A new form needs one line in FORMS to be tested here.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxopd.errors import InputError
from jaxopd.gradients import (
    FORMS,
    READINGS,
    Position,
    dr_grpo,
    dr_grpo_std,
    forward_kl,
    gradient,
    ideal,
    logit_gradient,
    minillm,
    renormalize,
    reverse_kl,
    single_sample,
    surrogate,
)

K = 7
DISTILLATION = [name for name in FORMS if name not in ("ideal", "dr_grpo", "dr_grpo_std")]
forms = pytest.mark.parametrize("name", FORMS)
readings = pytest.mark.parametrize("reading", READINGS)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def make_position(seed: int = 0, dtype: str = "float64", **known) -> Position:
    """A position with every field set; token 2 is outside the support."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 9, K).astype(float)
    fields = {
        "log_p": log_softmax(rng.normal(size=K) * 2),
        "log_q": log_softmax(rng.normal(size=K) * 2),
        "support": np.arange(K) != 2,
        "success": rng.uniform(size=K),
        "counts": counts,
        "n_samples": counts.sum(),
        "reward_to_go": rng.normal(size=K),
        "advantage": rng.normal(size=K),
        "advantage_std": 0.4,
    } | known
    return Position.create(**{k: v if k == "support" else np.asarray(v, dtype) for k, v in fields.items()})


def stack(positions: list[Position]) -> Position:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *positions)


# The contract, for every form -------------------------------------------------------------------------------------


@forms
@readings
def test_gradient_sums_to_zero(x64, name, reading):
    position = make_position(support=np.ones(K, bool))
    ascent = gradient(FORMS[name], position, reading)
    assert ascent.shape == (K,)
    assert np.max(np.abs(ascent)) > 1e-3
    assert abs(np.sum(ascent)) < 1e-15


@forms
@readings
def test_tokens_outside_the_support_get_zero(x64, name, reading):
    position = make_position()
    assert gradient(FORMS[name], position, reading)[2] == 0
    spoiled = make_position(success=np.where(np.arange(K) == 2, np.nan, np.asarray(position.success)))
    assert_array_equal(gradient(FORMS[name], spoiled, reading), gradient(FORMS[name], position, reading))


@forms
def test_a_constant_added_to_f_changes_nothing(x64, name):
    position = make_position()
    shifted = gradient(lambda p: FORMS[name](p) + 3.0, position)
    assert_allclose(shifted, gradient(FORMS[name], position), atol=1e-15)


@forms
@readings
def test_autodiff_of_the_surrogate_is_minus_the_gradient(x64, name, reading):
    position = make_position(support=np.ones(K, bool))
    f = FORMS[name](position)

    def loss(logits):
        return surrogate(jax.nn.log_softmax(logits), f)

    value, by_autodiff = jax.value_and_grad(loss)(position.log_p + 1.7)
    assert_allclose(by_autodiff, -gradient(FORMS[name], position, reading), atol=1e-14)
    assert_allclose(value, -np.sum(np.exp(position.log_p) * f), rtol=1e-13)


@forms
@readings
def test_vmapped_equals_unbatched(x64, name, reading):
    positions = [make_position(seed) for seed in range(4)]
    batched = jax.vmap(lambda p: gradient(FORMS[name], p, reading))(stack(positions))
    alone = [gradient(FORMS[name], p, reading) for p in positions]
    assert_allclose(batched, np.stack(alone), atol=1e-15)


@forms
@readings
def test_float32_is_near_float64(name, reading):
    with jax.enable_x64(True):
        exact = np.asarray(gradient(FORMS[name], make_position(), reading))
    single = gradient(FORMS[name], make_position(dtype="float32"), reading)
    assert single.dtype == jnp.float32
    assert_allclose(single, exact, atol=1e-6 * np.max(np.abs(exact)))


@forms
@readings
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_impossible_tokens_stay_finite(name, reading, dtype):
    """log 0 for the student, for the teacher, for both; probabilities that underflow; a teacher with no mass on S_u."""
    with jax.enable_x64(dtype == "float64"):
        log_p = log_softmax(np.array([0.5, -np.inf, 0.1, -np.inf, 0.0, -200.0, -1e9]))
        log_q = log_softmax(np.array([0.5, 1.0, -np.inf, -np.inf, 0.0, 0.3, 0.2]))
        counts = np.array([3.0, 0, 1, 0, 2, 0, 0])
        rest = {"counts": counts, "n_samples": counts.sum(), "support": np.ones(K, bool), "dtype": dtype}
        disjoint = np.where(np.arange(K) == 2, 0.0, -np.inf)
        for teacher, support in ((log_q, np.ones(K, bool)), (disjoint, np.arange(K) != 2), (log_q, np.zeros(K, bool))):
            position = make_position(**rest | {"log_p": log_p, "log_q": teacher, "support": support})
            ascent = gradient(FORMS[name], position, reading)
            assert np.all(np.isfinite(ascent))
            assert_array_equal(np.asarray(ascent)[[1, 3]], 0)
            loss = jax.grad(lambda z, p=position: surrogate(jax.nn.log_softmax(z), FORMS[name](p)))
            assert np.all(np.isfinite(loss(position.log_p)))


@pytest.mark.parametrize("name", DISTILLATION)
@readings
def test_a_teacher_equal_to_the_student_has_nothing_to_say(x64, name, reading):
    """Sampled forms say nothing on average: counts in proportion to P stand for the expectation."""
    p = np.exp(make_position().log_p)
    known = {"log_q": np.log(p), "counts": p, "n_samples": 1.0, "reward_to_go": np.zeros(K)}
    known["support"] = np.arange(K) != 2 if reading == "renormalized" else np.ones(K, bool)
    assert_allclose(gradient(FORMS[name], make_position(**known), reading), 0, atol=1e-15)


# The waist --------------------------------------------------------------------------------------------------------


def test_logit_gradient_is_the_softmax_jacobian(x64):
    rng = np.random.default_rng(3)
    logits, f = rng.normal(size=(2, 3, K)), rng.normal(size=(2, 3, K))
    expected = jax.grad(lambda z: jnp.sum(jax.nn.softmax(z) * f))(jnp.asarray(logits))
    assert_allclose(logit_gradient(log_softmax(logits), f), expected, atol=1e-15)
    assert_allclose(logit_gradient(log_softmax(logits), np.full_like(f, 2.5)), 0, atol=1e-15)


def test_fbar_of_the_whole_vocabulary_can_be_given(x64):
    position = make_position(support=np.ones(K, bool))
    f = reverse_kl(position)
    fbar = jnp.sum(jnp.exp(position.log_p) * f)
    some = jnp.array([5, 0, 3])
    candidates = jax.tree.map(lambda x: x[some] if x.ndim else x, position)
    kept = gradient(reverse_kl, candidates, "restricted", known=(f[some], fbar))
    assert_allclose(kept, gradient(reverse_kl, position, "restricted")[some], rtol=1e-13)
    assert np.max(np.abs(gradient(reverse_kl, candidates, "restricted") - kept)) > 1e-3  # fbar of the candidates alone


def test_surrogate_of_candidates_moves_the_whole_vocabulary(x64):
    """With log_p gathered at one sampled token and f = w / P, its gradient is -w (delta - P) over all logits."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=K))

    def loss(z, token=4, weight=1.3):
        log_p = jax.nn.log_softmax(z)[jnp.array([token])]
        return surrogate(log_p, weight / jnp.exp(jax.lax.stop_gradient(log_p)))

    expected = -1.3 * (np.eye(K)[4] - jax.nn.softmax(logits))
    assert_allclose(jax.grad(loss)(logits), expected, atol=1e-15)


def test_surrogate_survives_underflow_of_the_student():
    """Forward KL pulls by Q - P also where P is far below the smallest float32."""
    logits, log_q = jnp.array([0.0, -300.0]), jnp.log(jnp.array([0.4, 0.6]))
    position = Position.create(jax.nn.log_softmax(logits), log_q)
    pull = jax.grad(lambda z: surrogate(jax.nn.log_softmax(z), forward_kl(position)))(logits)
    assert_allclose(pull, [0.6, -0.6], rtol=1e-6)
    assert_allclose(gradient(forward_kl, position, "restricted"), [-0.6, 0.6], rtol=1e-6)


def test_renormalize(x64):
    position = make_position()
    inside = np.exp(renormalize(position.log_p, position.support))
    p = np.where(position.support, np.exp(position.log_p), 0)
    assert_allclose(inside, p / p.sum(), rtol=1e-14)
    assert not np.any(np.isnan(renormalize(position.log_p, np.zeros(K, bool))))
    top = jax.grad(lambda z: jnp.sum(jnp.exp(renormalize(jax.nn.log_softmax(z), position.support)) * position.success))
    assert_allclose(top(position.log_p), gradient(ideal, position), atol=1e-15)


def test_an_unknown_reading_is_named():
    with pytest.raises(InputError, match="reading: found 'full', expected one of renormalized, restricted"):
        gradient(ideal, make_position(dtype="float32"), "full")


# Sampled forms against enumeration ----------------------------------------------------------------------------------


def by_definition(position: Position, weight: np.ndarray) -> np.ndarray:
    """(1/N) sum_i w_i (delta_{r_i} - P), one sample after the other."""
    p, total = np.exp(position.log_p), np.zeros(K)
    for k, count in enumerate(np.asarray(position.counts)):
        for _ in range(int(count)):
            total += weight[k] * (np.eye(K)[k] - p)
    return total / float(position.n_samples)


def test_sampled_forms_are_their_definition(x64):
    position = make_position(support=np.ones(K, bool))
    ratio = np.asarray(position.log_q - position.log_p)
    weights = {
        "single_sample": ratio - 1,
        "minillm": np.asarray(position.reward_to_go) - 1,
        "dr_grpo": np.asarray(position.advantage),
        "dr_grpo_std": np.asarray(position.advantage) / 0.4,
    }
    for name, weight in weights.items():
        for reading in READINGS:
            ascent = gradient(FORMS[name], position, reading)
            assert_allclose(ascent, by_definition(position, weight), atol=1e-14, err_msg=name)


@pytest.mark.parametrize("n", [1, 2])
def test_expectation_of_the_sampled_forms_by_enumeration(x64, n):
    """Over all draws of n tokens, single-sample (and MiniLLM without a future) is the full reverse-KL gradient."""
    position = make_position(support=np.ones(K, bool))
    p, ratio = np.exp(position.log_p), position.log_q - position.log_p
    mean = {"single_sample": 0.0, "minillm": 0.0}
    for draw in itertools.product(range(K), repeat=n):
        counts = np.bincount(draw, minlength=K).astype(float)
        seen = make_position(support=np.ones(K, bool), counts=counts, n_samples=n, reward_to_go=ratio)
        for name in mean:
            mean[name] += np.prod(p[list(draw)]) * gradient(FORMS[name], seen, "restricted")
    for value in mean.values():
        assert_allclose(value, gradient(reverse_kl, position, "restricted"), atol=1e-14)


def test_expectation_of_dr_grpo_is_the_ideal(x64):
    """Over the token and its binary reward, whatever the baseline; with the standard deviation, in proportion to it."""
    position = make_position(support=np.ones(K, bool))
    p, success, baseline = np.exp(position.log_p), np.asarray(position.success), 0.3
    mean, mean_std = 0.0, 0.0
    for k, reward in itertools.product(range(K), (0.0, 1.0)):
        chance = p[k] * (success[k] if reward else 1 - success[k])
        advantage = np.where(np.arange(K) == k, reward - baseline, np.nan)  # unknown for tokens not drawn
        seen = make_position(support=np.ones(K, bool), counts=np.eye(K)[k], n_samples=1, advantage=advantage)
        mean += chance * gradient(dr_grpo, seen, "restricted")
        mean_std += chance * gradient(dr_grpo_std, seen, "restricted")
    exact = gradient(ideal, position, "restricted")
    assert_allclose(mean, exact, atol=1e-15)
    assert_allclose(mean_std, exact / 0.4, atol=1e-15)


def test_samples_outside_the_candidates_shrink_the_restricted_estimate(x64):
    position = make_position()
    more = make_position(n_samples=2 * float(position.n_samples))
    half = gradient(dr_grpo, more, "restricted")
    assert_allclose(half, gradient(dr_grpo, position, "restricted") / 2, atol=1e-15)
    assert_allclose(gradient(dr_grpo, more), gradient(dr_grpo, position), atol=1e-15)  # conditioned on S_u


@readings
def test_minillm_at_the_last_token_is_the_single_sample(x64, reading):
    position = make_position()
    last = make_position(reward_to_go=position.log_q - position.log_p)
    assert_allclose(gradient(minillm, last, reading), gradient(single_sample, last, reading), atol=1e-14)


def test_no_spread_of_rewards_means_no_dr_grpo_signal(x64):
    assert_array_equal(gradient(dr_grpo_std, make_position(advantage_std=0.0)), 0)
