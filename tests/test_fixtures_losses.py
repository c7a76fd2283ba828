"""Losses, forms and both readings of S_u against numbers that other people's code computed.

Everything here is a per-position function of jaxopd; temperature, masks and reductions are applied in the test.
Errors are relative to the largest entry of the array compared.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopd.alignment import alignment, teacher_advantage
from jaxopd.gradients import (
    Position,
    dr_grpo,
    dr_grpo_std,
    forward_kl,
    forward_kl_loss,
    gradient,
    ideal,
    jsd,
    jsd_loss,
    logit_gradient,
    minillm,
    renormalize,
    reverse_kl,
    reverse_kl_loss,
    score_function,
    single_sample,
)
from jaxopd.train.rewards import returns_to_go

pytestmark = pytest.mark.fixtures

BETAS = {"0": 0.0, "0.1": 0.1, "0.5": 0.5, "0.9": 0.9, "1": 1.0}
LOSSES = {
    "rkl": (reverse_kl_loss, reverse_kl),
    "fkl": (forward_kl_loss, forward_kl),
    **{f"jsd{b}": (lambda p, q, b=b: jsd_loss(p, q, b), jsd(b)) for b in (0.1, 0.5, 0.9)},
}


@dataclass(frozen=True)
class Precision:
    dtype: str
    tolerance: float

    def array(self, x: np.ndarray) -> jax.Array:
        return jnp.asarray(x, self.dtype)

    def close(self, actual: jax.Array, expected: np.ndarray) -> None:
        assert np.asarray(actual).dtype == self.dtype, "computed in another precision than the test claims"
        error = np.max(np.abs(np.asarray(actual, np.float64) - expected), initial=0.0)
        assert error <= self.tolerance * np.max(np.abs(expected)), f"absolute error {error}"


@pytest.fixture(params=["float64", "float32"])
def precision(request: pytest.FixtureRequest) -> Iterator[Precision]:
    with jax.enable_x64(request.param == "float64"):
        yield Precision(request.param, {"float64": 1e-10, "float32": 1e-5}[request.param])


@pytest.fixture(scope="module")
def data(shared) -> dict[str, np.ndarray]:
    """All keys of the files this module reads, prefixed by nothing: they do not collide."""
    folder = shared / "fixtures" / "losses"
    return {k: v for name in ("inputs_s0", "grads_s0", "trl_s0") for k, v in np.load(folder / f"{name}.npz").items()}


def log_probs(data: dict, precision: Precision, temperature: float = 1.0) -> tuple[jax.Array, jax.Array]:
    student, teacher = (precision.array(data[f"{who}_logits"] / temperature) for who in ("student", "teacher"))
    return jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)


def over_tokens(function):
    """Lift a function of one position to [B, T]."""
    return jax.vmap(jax.vmap(function))


def descent(form, positions: Position) -> jax.Array:
    """Gradient of the loss behind a form in the student's logits, [B, T, V]."""
    return over_tokens(lambda position: -logit_gradient(position.log_p, form(position)))(positions)


def masked(data: dict, precision: Precision) -> tuple[jax.Array, jax.Array]:
    mask = precision.array(data["mask"])
    return mask, jnp.sum(mask)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", LOSSES)
def test_autograd_losses(data, precision, name, temperature):
    loss, form = LOSSES[name]
    log_p, log_q = log_probs(data, precision, temperature)
    mask, n_tokens = masked(data, precision)
    value = jnp.sum(loss(log_p, log_q) * mask) / n_tokens
    precision.close(value, data[f"grad/{name}/T{temperature}/loss"])
    ascent = descent(form, Position.create(log_p, log_q)) * mask[..., None] / (n_tokens * temperature)
    precision.close(ascent, data[f"grad/{name}/T{temperature}/grad"])


def test_per_token_divergences(data, precision):
    log_p, log_q = log_probs(data, precision)
    precision.close(reverse_kl_loss(log_p, log_q), data["per_token/rkl_student_teacher"])
    precision.close(forward_kl_loss(log_p, log_q), data["per_token/fkl_teacher_student"])


def test_closed_form_eq_2_8(data, precision):
    log_p, log_q = log_probs(data, precision)
    closed = descent(reverse_kl, Position.create(log_p, log_q))
    precision.close(closed, data["grad/rkl_closed_form_eq2.8_per_token"])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("beta", BETAS)
def test_trl_generalized_jsd(data, precision, beta, temperature):
    key = f"gkd/beta{beta}/T{temperature}"
    log_p, log_q = log_probs(data, precision, temperature)
    valid = precision.array(data["labels"] != -100)
    n_valid, vocabulary = jnp.sum(valid), log_p.shape[-1]
    value = jsd_loss(log_p, log_q, BETAS[beta])
    total = jnp.sum(value * valid)
    precision.close(value, data[f"{key}/per_token"])
    precision.close(total, data[f"{key}/labels1/sum"])
    precision.close(total / n_valid, data[f"{key}/labels1/batchmean"])
    precision.close(total / (n_valid * vocabulary), data[f"{key}/labels1/mean"])
    precision.close(total / 40, data[f"{key}/labels1/num_items40"])
    precision.close(jnp.sum(value), data[f"{key}/labels0/sum"])
    precision.close(jnp.sum(value) / len(value), data[f"{key}/labels0/batchmean"])
    precision.close(jnp.mean(value) / vocabulary, data[f"{key}/labels0/mean"])
    ascent = descent(jsd(BETAS[beta]), Position.create(log_p, log_q))
    scaled = ascent * valid[..., None] / (n_valid * temperature)
    precision.close(scaled, data[f"{key}/labels1/grad_student_logits"])


@pytest.mark.parametrize("beta", BETAS)
def test_extreme_logits(shared, precision, beta):
    """Logits to 3e3 and masked entries of -1e9: values, forms and autodiff all follow the float64 truth."""
    inputs, truth = (np.load(shared / "fixtures" / "losses" / f"{n}.npz") for n in ("inputs_extreme_s0", "extreme_s0"))
    student, teacher = (precision.array(inputs[f"{who}_logits"]) for who in ("student", "teacher"))
    log_p, log_q = jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)
    precision.close(jsd_loss(log_p, log_q, BETAS[beta]), truth[f"beta{beta}/float64/per_row"])
    if beta == "1":  # f spans 2e3 nats, so float32 keeps 2e3 eps of it; the peer's own float32 error is 6e-5
        precision = replace(precision, tolerance=precision.tolerance * 24)
    gradients = -logit_gradient(log_p, jax.vmap(jsd(BETAS[beta]))(Position.create(log_p, log_q)))
    precision.close(gradients, truth[f"beta{beta}/float64/grad"])
    by_autodiff = jax.grad(lambda z: jnp.sum(jsd_loss(jax.nn.log_softmax(z), log_q, BETAS[beta])))(student)
    precision.close(by_autodiff, truth[f"beta{beta}/float64/grad"])


def sampled_positions(data: dict, precision: Precision, **known) -> Position:
    """One sample a position: the token that the fixture drew."""
    log_p, log_q = log_probs(data, precision)
    taken = jax.nn.one_hot(data["tokens"], log_p.shape[-1], dtype=log_p.dtype)
    ones = jnp.ones(taken.shape[:-1], log_p.dtype)
    return Position.create(log_p, log_q, counts=taken, n_samples=ones, **known)


def sampled_log_ratio(data: dict, precision: Precision) -> jax.Array:
    log_p, log_q = log_probs(data, precision)
    return jnp.take_along_axis(log_q - log_p, jnp.asarray(data["tokens"])[..., None], axis=-1)[..., 0]


def test_single_sample_eq_2_9(data, precision):
    positions = sampled_positions(data, precision)
    mask, n_tokens = masked(data, precision)
    ascent = -descent(single_sample, positions)
    precision.close(ascent, data["grad/sampled_eq2.9_ascent_per_token"])
    loss_gradient = -ascent * mask[..., None] / n_tokens
    precision.close(loss_gradient, data["grad/sampled_pg_minus1_eq2.9/grad_of_loss"])


def test_sampled_policy_gradient_without_minus_one(data, precision):
    positions = sampled_positions(data, precision)
    mask, n_tokens = masked(data, precision)
    ratio = sampled_log_ratio(data, precision)
    precision.close(-ratio, data["per_token/sampled_kl"])
    loss_gradient = descent(lambda p: score_function(p, p.log_q - p.log_p), positions) * mask[..., None] / n_tokens
    precision.close(loss_gradient, data["grad/sampled_pg/grad"])


@pytest.mark.parametrize("gamma", [0.95, 1.0])
def test_minillm_reward_to_go(data, precision, gamma):
    mask, n_tokens = masked(data, precision)
    future = returns_to_go(np.asarray(sampled_log_ratio(data, precision)), mask > 0, gamma)
    precision.close(future, data[f"minillm/reward_to_go/gamma{gamma}"])
    positions = sampled_positions(data, precision, reward_to_go=jnp.broadcast_to(future[..., None], (6, 9, 53)))
    loss_gradient = descent(minillm, positions) * mask[..., None] / n_tokens
    precision.close(loss_gradient, data[f"grad/minillm_rtg/gamma{gamma}/minus1/grad"])
    plain = descent(lambda p: score_function(p, p.reward_to_go), positions) * mask[..., None] / n_tokens
    precision.close(plain, data[f"grad/minillm_rtg/gamma{gamma}/minus0/grad"])


def test_minillm_eq_2_10_is_a_descent_direction(data, precision):
    mask, _ = masked(data, precision)
    future = returns_to_go(np.asarray(sampled_log_ratio(data, precision)), mask > 0)
    positions = sampled_positions(data, precision, reward_to_go=jnp.broadcast_to(future[..., None], (6, 9, 53)))
    precision.close(descent(minillm, positions) * mask[..., None], data["grad/minillm_eq2.10_per_token"])


@pytest.mark.parametrize("reduction", ["sum_over_B", "token_mean", "seq_mean", "max_len12"])
@pytest.mark.parametrize("variant", ["center", "center_std_ddof1", "center_std_ddof0"])
def test_dr_grpo_variants(data, precision, variant, reduction):
    groups = data["rewards"].reshape(2, 3)
    centered = (groups - groups.mean(-1, keepdims=True)).reshape(-1)
    ddof = 0 if variant.endswith("ddof0") else 1
    std = np.repeat(groups.std(-1, ddof=ddof), 3)
    form = dr_grpo if variant == "center" else dr_grpo_std
    np.testing.assert_allclose(
        centered / (1 if variant == "center" else std), data[f"drgrpo/adv/{variant}"], rtol=1e-12
    )
    mask, n_tokens = masked(data, precision)
    positions = sampled_positions(
        data,
        precision,
        advantage=np.broadcast_to(centered[:, None, None], (6, 9, 53)),
        advantage_std=np.broadcast_to(std[:, None], (6, 9)),
    )
    per_token = descent(form, positions) * mask[..., None]
    lengths = jnp.sum(mask, axis=-1)[:, None, None]
    weight = {"sum_over_B": 1 / 6, "token_mean": 1 / n_tokens, "seq_mean": 1 / (6 * lengths), "max_len12": 1 / 72}
    precision.close(per_token * weight[reduction], data[f"grad/drgrpo/{variant}/{reduction}/grad"])


@pytest.mark.parametrize("n_sig", [1, 20, 40])
def test_tree_node_in_both_readings(data, precision, n_sig):
    log_p, log_q = (jax.nn.log_softmax(precision.array(data[f"node_{who}_logits"])) for who in ("student", "teacher"))
    visits = data["node_visits"]
    success = data["node_successes"] / np.maximum(visits, 1)
    node, key = Position.create(log_p, log_q, support=visits >= n_sig, success=success), f"node/nsig{n_sig}"
    support = data[f"{key}/S"]
    np.testing.assert_array_equal(np.flatnonzero(node.support), support)
    precision.close(teacher_advantage(node), data[f"{key}/teacher_advantage_eq2.1"])
    for reading, name in (("renormalized", "renorm"), ("restricted", "fullvocab")):
        precision.close(gradient(ideal, node, reading)[support], data[f"{key}/{name}/g_ideal"])
        precision.close(gradient(reverse_kl, node, reading)[support], data[f"{key}/{name}/g_gkd_ascent"])
        precision.close(alignment(node, reverse_kl, reading), data[f"{key}/{name}/align"])


@pytest.mark.parametrize("support", ["student_topk", "teacher_topk", "overlap", "union", "symdiff"])
@pytest.mark.parametrize("k", [1, 4, 16])
def test_renormalised_reverse_kl_on_top_k(data, precision, k, support):
    """Eq. 5 of paper B is the renormalised reading of reverse KL on another support."""
    log_p, log_q = log_probs(data, precision)
    _, n_tokens = masked(data, precision)
    student, teacher = (
        np.argsort(np.argsort(-data[f"{who}_logits"], axis=-1), axis=-1) < k for who in ("student", "teacher")
    )
    chosen = {
        "student_topk": student,
        "teacher_topk": teacher,
        "overlap": student & teacher,
        "union": student | teacher,
        "symdiff": student ^ teacher,
    }[support]
    chosen &= data["mask"].astype(bool)[..., None]
    ascent = over_tokens(lambda p: gradient(reverse_kl, p))(Position.create(log_p, log_q, support=chosen))
    key = f"grad/topk_renorm_rkl/k{k}/{support}"
    if np.any(data[f"{key}/grad"]):
        precision.close(-ascent / n_tokens, data[f"{key}/grad"])
        value = reverse_kl_loss(renormalize(log_p, jnp.asarray(chosen)), renormalize(log_q, jnp.asarray(chosen)))
        precision.close(jnp.sum(value) / n_tokens, data[f"{key}/loss"])
    else:  # one token is renormalised to probability 1: no signal at all
        assert k == 1
        assert not np.any(np.abs(ascent) > precision.tolerance * 1e-3)
