"""Objectives, rewards and metrics in float64 against numbers that other people's code computed.

Errors are relative to the largest entry of the array compared. Where a peer computed in float32 or adds a constant to
a denominator, the tolerance says so.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopd.gradients import Position, clipped_surrogate, kl_estimate
from jaxopd.train.metrics import Scored, entropy_metrics, overlap_metrics
from jaxopd.train.objectives import ObjectiveConfig, frozen_advantage, make_objective, position_loss
from jaxopd.train.rewards import group_advantages, returns_to_go, token_weights
from jaxopd.train.supports import support_mask

pytestmark = pytest.mark.fixtures

STRATEGIES = {
    "only_stu": "student",
    "only_tch": "teacher",
    "intersection": "overlap",
    "union": "union",
    "union-intersection": "non_overlap",
}
# Where the support holds all but 1e-7 of the mass the tail is clamped; the peer's gradient then does not sum to zero.
TAIL = 1e-8
WEIGHTINGS = {"student_p": "student", "teacher_p": "teacher", "none": "uniform"}


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def data(shared) -> dict[str, np.ndarray]:
    folder = shared / "fixtures" / "losses"
    names = ("inputs_s0", "grads_s0", "trl_s0", "verl_minillm_s0", "opd_s0")
    return {key: value for name in names for key, value in np.load(folder / f"{name}.npz").items()}


def close(actual, expected, tolerance: float = 1e-9) -> None:
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == np.float64, "computed in another precision than the test claims"
    assert np.max(np.abs(actual - expected), initial=0) <= tolerance * np.max(np.abs(expected), initial=1e-3)


def mask_of(data) -> np.ndarray:
    return data["mask"].astype(bool)


def token_mean(data) -> np.ndarray:
    return token_weights(data["mask"].astype(float), "token_mean")


def candidates(log_p, log_q, k):
    """The 2k candidates of every position."""
    return jax.lax.top_k(log_p, k)[1], jax.lax.top_k(log_q, k)[1]


def positions(log_p, log_q, config) -> Position:
    student, teacher = candidates(log_p, log_q, config.k)
    ids = jnp.concatenate([student, teacher], -1)
    at = (jnp.take_along_axis(x, ids, -1) for x in (log_p, log_q))
    return Position.create(*at, support=support_mask(student, teacher, config.support))


def over_tokens(function):
    return jax.vmap(jax.vmap(function))


def losses(data, config: ObjectiveConfig, z) -> jax.Array:
    """The loss of a top-k objective at every position, of the student's logits."""
    log_p, log_q = jax.nn.log_softmax(z), jax.nn.log_softmax(jnp.asarray(data["teacher_logits"]))
    objective = make_objective(config)
    return over_tokens(lambda p: position_loss(objective, p))(positions(log_p, log_q, config))


def value_and_gradient(data, config: ObjectiveConfig, weights):
    return jax.value_and_grad(lambda z: jnp.sum(losses(data, config, z) * weights))(jnp.asarray(data["student_logits"]))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("k", [1, 4, 16])
def test_opd_code(data, k, strategy, weighting):
    """Advantages, loss and gradient of paper B's own code: 5 supports, 3 weights."""
    key = f"opd/k{k}/{strategy}/{weighting}"
    config = ObjectiveConfig("topk_thunlp", k=k, support=STRATEGIES[strategy], weighting=WEIGHTINGS[weighting])
    loss, gradient = value_and_gradient(data, config, token_mean(data))
    close(loss, data[f"{key}/pg_loss"])
    close(gradient, data[f"{key}/pg_grad"])
    log_p, log_q = (jax.nn.log_softmax(jnp.asarray(data[f"{who}_logits"])) for who in ("student", "teacher"))
    objective = make_objective(config)
    advantage = over_tokens(lambda p: frozen_advantage(objective, p))(positions(log_p, log_q, config))
    side = {"only_stu": slice(0, k), "intersection": slice(0, k), "only_tch": slice(k, 2 * k)}
    kept = np.where(mask_of(data)[..., None], advantage[..., side.get(strategy, slice(None))], 0)
    close(kept, np.where(mask_of(data)[..., None], data[f"{key}/rm_scores"], 0))


def scored(data, k) -> Scored:
    log_p, log_q = (jax.nn.log_softmax(jnp.asarray(data[f"{who}_logits"])) for who in ("student", "teacher"))
    student, teacher = candidates(log_p, log_q, k)
    ids, tokens = jnp.concatenate([student, teacher], -1), data["tokens"][..., None]
    entropy = [-jnp.sum(jnp.exp(x) * x, -1) for x in (log_p, log_q)]
    arrays = (
        student,
        teacher,
        *(jnp.take_along_axis(x, ids, -1) for x in (log_p, log_q)),
        *(jnp.take_along_axis(x, tokens, -1)[..., 0] for x in (log_p, log_q)),
        *entropy,
        jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1),
    )
    return Scored(*map(np.asarray, arrays), mask_of(data))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("k", [1, 4, 16])
def test_opd_metrics(data, k, strategy, weighting):
    key = f"opd/k{k}/{strategy}/{weighting}/metric"
    config = ObjectiveConfig("topk_thunlp", k=k, support=STRATEGIES[strategy], weighting=WEIGHTINGS[weighting])
    log_p, log_q = (jax.nn.log_softmax(jnp.asarray(data[f"{who}_logits"])) for who in ("student", "teacher"))
    at = positions(log_p, log_q, config)
    advantage = np.asarray(over_tokens(lambda p: frozen_advantage(make_objective(config), p))(at))
    found = overlap_metrics(scored(data, k), advantage)
    np.testing.assert_allclose(found["overlap/ratio"], data[f"{key}/val-topk/overlap_ratio"], rtol=1e-7)  # a float32
    close(np.float64(found["overlap/advantage_thunlp"]), data[f"{key}/val-topk/adv_intersection"])
    if strategy != "only_tch":  # there the code sums no probabilities
        close(np.float64(found["overlap/mass_student_thunlp"]), data[f"{key}/val-topk/student_p_sum_intersection"])
        close(np.float64(found["overlap/mass_teacher_thunlp"]), data[f"{key}/val-topk/teacher_p_sum_intersection"])


@pytest.mark.parametrize("k", [1, 4, 16])
def test_paper_metrics(data, k):
    found = overlap_metrics(scored(data, k))
    close(np.float64(found["overlap/ratio"]), data[f"metrics/k{k}/overlap_ratio_eq6"])
    close(np.float64(found["overlap/advantage_paper"]), data[f"metrics/k{k}/overlap_adv_eq7_skip_empty"])
    close(np.float64(found["overlap/mass_student_paper"]), data[f"metrics/k{k}/overlap_mass_student_eq9"])
    close(np.float64(found["overlap/mass_teacher_paper"]), data[f"metrics/k{k}/overlap_mass_teacher_eq10"])


def test_entropies(data):
    kept, found = mask_of(data), entropy_metrics(scored(data, 1))
    close(np.float64(found["entropy/student"]), data["student_entropy"][kept].mean())
    close(np.float64(found["entropy/teacher"]), data["teacher_entropy"][kept].mean())
    close(np.float64(found["entropy/gap_paper"]), data["per_token/entropy_gap"][kept].mean())


@pytest.mark.parametrize(
    ("fixture", "support"),
    [
        ("student_topk", "student"),
        ("teacher_topk", "teacher"),
        ("overlap", "overlap"),
        ("union", "union"),
        ("symdiff", "non_overlap"),
    ],
)
@pytest.mark.parametrize("k", [1, 4, 16])
def test_eq_5(data, k, fixture, support):
    config = ObjectiveConfig("topk_paper", k=k, support=support)
    loss, gradient = value_and_gradient(data, config, token_mean(data))
    close(loss, data[f"grad/topk_renorm_rkl/k{k}/{fixture}/loss"])
    close(gradient, data[f"grad/topk_renorm_rkl/k{k}/{fixture}/grad"])


@pytest.mark.parametrize("tail", [0, 1])
@pytest.mark.parametrize("k", [1, 4, 16])
@pytest.mark.parametrize("beta", ["0", "0.5", "1"])
def test_trl_top_k(data, beta, k, tail):
    """IW-OPD without its weights: forward KL on the teacher's top k, reverse on the student's, JSD on their union."""
    key = f"iwopd_topk/beta{beta}/k{k}/tail{tail}"
    support = {"0": "teacher", "0.5": "union", "1": "student"}[beta]
    options = {"divergence": "jsd", "beta": float(beta), "mass": "tail" if tail else "renormalized"}
    config = ObjectiveConfig("topk_paper", k=k, support=support, **options)
    loss, gradient = value_and_gradient(data, config, token_mean(data))
    close(loss, data[f"{key}/loss"])
    close(gradient, data[f"{key}/grad"], TAIL if tail else 1e-9)


@pytest.mark.parametrize("tail", [0, 1])
@pytest.mark.parametrize("k", [1, 4, 16])
@pytest.mark.parametrize("alpha", ["0.0", "0.5", "1.0"])
def test_trl_self_distillation(data, alpha, k, tail):
    key = f"sdft_topk/alpha{alpha}/k{k}/tail{tail}"
    options = {"divergence": "jsd", "beta": float(alpha), "mass": "tail" if tail else "renormalized"}
    config = ObjectiveConfig("topk_paper", k=k, **options)
    close(losses(data, config, jnp.asarray(data["student_logits"])), data[f"{key}/per_token"])
    close(value_and_gradient(data, config, token_mean(data))[1], data[f"{key}/grad"], TAIL if tail else 1e-9)


@pytest.mark.parametrize("k", [1, 4, 16])
def test_tinker_teacher_top_k(data, k):
    config = ObjectiveConfig("topk_paper", k=k, support="teacher")
    loss, gradient = value_and_gradient(data, config, data["mask"].astype(float))
    close(loss, data[f"tinker/sdft_rkl_teacher_top{k}/loss_sum"])
    close(gradient, data[f"tinker/sdft_rkl_teacher_top{k}/grad_sum"])


# Sampled tokens ---------------------------------------------------------------------------------------------------


def sampled(data, z):
    return jnp.take_along_axis(jax.nn.log_softmax(z), jnp.asarray(data["tokens"])[..., None], -1)[..., 0]


def log_probs_of(data, who: str) -> np.ndarray:
    return np.asarray(sampled(data, jnp.asarray(data[f"{who}_logits"])))


def sampled_loss(data, objective, weights, z, **known):
    """A sampled-token objective: one candidate a position, drawn once."""
    log_p, log_q = sampled(data, z)[..., None], jnp.asarray(log_probs_of(data, "teacher"))[..., None]
    ones = jnp.ones(log_p.shape[:-1])
    position = Position.create(log_p, log_q, counts=jnp.ones(log_p.shape), n_samples=ones, **known)
    return jnp.sum(over_tokens(lambda p: position_loss(objective, p))(position) * weights)


def reward(data) -> np.ndarray:
    return log_probs_of(data, "teacher") - log_probs_of(data, "student")


@pytest.mark.parametrize("key", ["opd/k0/pg", "grad/sampled_pg/"])
def test_sampled_token(data, key):
    objective, known = make_objective(ObjectiveConfig("sampled")), {"reward_to_go": reward(data)[..., None]}
    z = jnp.asarray(data["student_logits"])
    gradient = jax.grad(lambda z: sampled_loss(data, objective, token_mean(data), z, **known))(z)
    expected = data["opd/k0/pg_grad" if key.startswith("opd") else "grad/sampled_pg/grad"]
    close(gradient, expected, 1e-9 if key.startswith("grad") else 1e-8)  # the code divides by the token count + 1e-8
    loss = sampled_loss(data, objective, token_mean(data), z, **known)
    close(loss, data["opd/k0/pg_loss"], 1e-8)


def test_trl_sampled_self_distillation(data):
    objective, known = make_objective(ObjectiveConfig("sampled")), {"reward_to_go": reward(data)[..., None]}
    z = jnp.asarray(data["student_logits"])
    gradient = jax.grad(lambda z: sampled_loss(data, objective, token_mean(data), z, **known))(z)
    close(gradient, data["sdft_sampled/grad"])
    close(-reward(data) * log_probs_of(data, "student"), data["sdft_sampled/per_token"])


@pytest.mark.parametrize("gamma", [0.95, 1.0])
@pytest.mark.parametrize("name", ["sampled", "minillm"])
def test_reward_to_go(data, gamma, name):
    future = returns_to_go(reward(data), mask_of(data), gamma)
    close(future, data[f"minillm/reward_to_go/gamma{gamma}"])
    key = f"grad/minillm_rtg/gamma{gamma}/minus{int(name == 'minillm')}"
    objective, z = make_objective(ObjectiveConfig(name)), jnp.asarray(data["student_logits"])
    gradient = jax.grad(lambda z: sampled_loss(data, objective, token_mean(data), z, reward_to_go=future[..., None]))(z)
    close(gradient, data[f"{key}/grad"])


@pytest.mark.parametrize("discount", [0.0, 0.5, 1.0])
def test_tinker_discounted_rewards(data, discount):
    close(returns_to_go(reward(data), mask_of(data), discount), data[f"tinker/kl_advantages/discount{discount}"])


@pytest.mark.parametrize("normalized", [False, True])
def test_minillm_returns_of_peers(data, normalized):
    """gamma 1, where TRL's absolute exponents do no harm; TRL counts padding, so full rows alone are compared."""
    full = mask_of(data).all(-1)
    ours = returns_to_go(reward(data), mask_of(data), 1.0, normalized=normalized)
    theirs = data[f"minillm_trl/adv/gamma1.0/lennorm{int(normalized)}"]
    close(ours[full], theirs[full], 2e-7 if normalized else 1e-9)  # the peer normalises in float32
    if normalized:
        lmops = data["lmops/adv/gamma1.0/whiten0"]
        np.testing.assert_allclose(ours[full], lmops[full], rtol=1e-4, atol=1e-5)  # the peer computes in float32


def test_trl_minillm_discounts_by_absolute_position(data):
    """The peer's known fault, as a relation: its return at t is gamma^t times the true one."""
    true = returns_to_go(reward(data), mask_of(data), 0.9)[0]
    close(true * 0.9 ** np.arange(9), data["minillm_trl/adv/gamma0.9/lennorm0"][0], 2e-7)  # powers in float32


# Outcome rewards --------------------------------------------------------------------------------------------------


def test_group_advantages(data):
    centered, std = group_advantages(data["rewards"], data["group"])
    close(centered, data["drgrpo/adv/center"])
    close(centered / std, data["drgrpo/adv/center_std_ddof1"])
    close(centered, data["r1zero/adv/drgrpo_groups_of_3_in_order"])
    mask = data["mask"].astype(float)
    close((centered / (std + 1e-6))[:, None] * mask, data["verl/adv/grpo"] * mask)
    close(centered[:, None] * mask, data["verl/adv/drgrpo"] * mask)


def ppo(data, advantage, weights, old, **bounds):
    """Loss and gradient of the clipped policy gradient on the sampled tokens."""
    before = jnp.asarray(log_probs_of(data, "old" if old else "student"))[..., None]
    advantage = jnp.asarray(np.broadcast_to(advantage[:, None], data["mask"].shape))[..., None]

    def loss(z):
        return jnp.sum(clipped_surrogate(sampled(data, z)[..., None], before, advantage, **bounds) * weights)

    return jax.value_and_grad(loss)(jnp.asarray(data["student_logits"]))


TRL = {"grpo": "sequence_mean", "bnpo": "token_mean", "dapo": "token_mean", "dr_grpo": "fixed_length"}


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("old", [0, 1])
@pytest.mark.parametrize("kind", TRL)
def test_trl_grpo(data, kind, old, beta):
    key = f"trl_grpo/{kind}/old{old}/beta{beta}"
    weights = token_weights(data["mask"].astype(float), TRL[kind], 12)
    loss, gradient = ppo(data, data["trl_grpo/advantages_used"], weights, old)
    reference = jnp.asarray(log_probs_of(data, "ref"))

    def penalty(z):
        return beta * jnp.sum(kl_estimate(sampled(data, z), reference, "k3") * weights)

    more, toward = jax.value_and_grad(penalty)(jnp.asarray(data["student_logits"]))
    close(loss + more, data[f"{key}/loss"])
    close(gradient + toward, data[f"{key}/grad"])


VERL = {"token-mean": "token_mean", "seq-mean-token-sum": "sequence_sum", "seq-mean-token-mean": "sequence_mean"}


@pytest.mark.parametrize("old", ["onpolicy", "old"])
@pytest.mark.parametrize("mode", VERL)
def test_verl_policy_loss(data, mode, old):
    weights = token_weights(data["mask"].astype(float), VERL[mode])
    advantage = data["trl_grpo/advantages_used"]
    loss, gradient = ppo(data, advantage, weights, old == "old", high=0.28, dual=3.0)
    tolerance = 1e-5 if mode == "seq-mean-token-mean" else 1e-9  # verl adds 1e-8 to a length; the loss is near 0
    close(loss, data[f"verl/ppo/{mode}/{old}/loss"], tolerance)
    close(gradient, data[f"verl/ppo/{mode}/{old}/grad"], tolerance)


def test_dr_grpo_authors(data):
    weights = token_weights(data["mask"].astype(float), "fixed_length", 12)
    centered, _ = group_advantages(data["rewards"], data["group"])
    loss, gradient = ppo(data, centered, weights, old=False)
    close(loss, data["r1zero/loss/drgrpo_maxlen12/loss"])
    close(gradient, data["r1zero/loss/drgrpo_maxlen12/grad"])


@pytest.mark.parametrize("name", ["grpo", "dr_grpo"])
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "max_len12"])
def test_grpo_forms_as_losses(data, name, reduction):
    """The diagnosis's forms, used as losses, have the gradient that float64 autograd gave."""
    centered, std = group_advantages(data["rewards"], data["group"])
    known = {
        "advantage": np.broadcast_to(centered[:, None, None], (6, 9, 1)),
        "advantage_std": np.broadcast_to(std[:, None], (6, 9)),
    }
    weighting = {"token_mean": "token_mean", "sequence_mean": "sequence_mean", "max_len12": "fixed_length"}
    weights = token_weights(data["mask"].astype(float), weighting[reduction], 12)
    objective, z = make_objective(ObjectiveConfig(name)), jnp.asarray(data["student_logits"])
    gradient = jax.grad(lambda z: sampled_loss(data, objective, weights, z, **known))(z)
    variant = {"grpo": "center_std_ddof1", "dr_grpo": "center"}[name]
    fixture = {"token_mean": "token_mean", "sequence_mean": "seq_mean", "max_len12": "max_len12"}[reduction]
    close(gradient, data[f"grad/drgrpo/{variant}/{fixture}/grad"])


@pytest.mark.parametrize(("kind", "theirs"), [("k1", "k1"), ("abs", "abs"), ("k2", "mse"), ("k3", "low_var_kl")])
def test_kl_estimates(data, kind, theirs):
    mask = data["mask"].astype(float)
    reference, z = jnp.asarray(log_probs_of(data, "ref")), jnp.asarray(data["student_logits"])
    ours = kl_estimate(sampled(data, z), reference, kind)
    close(ours * mask, data[f"verl/kl/{theirs}"] * mask)
    log_ratio = jnp.asarray(data["kl_big_input_logp_minus_ref"])
    close(kl_estimate(log_ratio, jnp.zeros_like(log_ratio), kind), data[f"verl/kl_big/{theirs}"])


def test_likelihood_is_the_gradient_of_cross_entropy(data):
    z, weights = jnp.asarray(data["student_logits"]), token_mean(data)
    objective = make_objective(ObjectiveConfig("sft"))
    loss, gradient = jax.value_and_grad(lambda z: sampled_loss(data, objective, weights, z))(z)
    expected, direct = jax.value_and_grad(lambda z: -jnp.sum(sampled(data, z) * weights))(z)
    close(loss, expected)
    close(gradient, direct)
