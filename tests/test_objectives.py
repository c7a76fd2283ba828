"""Objectives on numbers worked out by hand or published by peers' tests, in float64.

The three positions below have k = 2: the overlap is one token, both, none.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxopd.errors import InputError
from jaxopd.gradients import (
    Position,
    clipped_surrogate,
    is_clipped,
    logit_gradient,
)
from jaxopd.train.objectives import (
    ObjectiveConfig,
    frozen_advantage,
    importance_correction,
    make_objective,
    position_loss,
)
from jaxopd.train.rewards import group_advantages, returns_to_go, token_weights
from jaxopd.train.supports import support_mask, with_mass

P = np.array([[0.5, 0.3, 0.1, 0.06, 0.04], [0.25, 0.05, 0.4, 0.2, 0.1], [0.6, 0.3, 0.04, 0.03, 0.03]])
Q = np.array([[0.1, 0.4, 0.05, 0.35, 0.1], [0.25, 0.1, 0.45, 0.05, 0.15], [0.02, 0.03, 0.05, 0.5, 0.4]])
TOP_P, TOP_Q = np.array([[0, 1], [2, 0], [0, 1]]), np.array([[1, 3], [2, 0], [3, 4]])
IDS = np.concatenate([TOP_P, TOP_Q], -1)
ROUNDED = {"atol": 6e-7, "rtol": 0}  # the published numbers have six digits


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def candidates(z, support="student", q=Q) -> Position:
    """The four candidates of each position, from the student's logits."""
    log_p, log_q = (jnp.take_along_axis(jax.nn.log_softmax(x), jnp.asarray(IDS), -1) for x in (z, jnp.log(q)))
    return Position.create(log_p, log_q, support=support_mask(TOP_P, TOP_Q, support))


def losses(config: ObjectiveConfig, z=None, q=Q):
    """The loss at each position; full objectives see the vocabulary."""
    objective, z = make_objective(config), jnp.log(P) if z is None else z
    positions = candidates(z, config.support, q)
    if objective.reach == "full":
        positions = Position.create(jax.nn.log_softmax(z), jnp.log(q))
    return jax.vmap(lambda p: position_loss(objective, p))(positions)


def gradients(config: ObjectiveConfig, q=Q):
    return jax.grad(lambda z: jnp.sum(losses(config, z, q)))(jnp.log(P))


def thunlp(support="student", weighting="student") -> ObjectiveConfig:
    return ObjectiveConfig("topk_thunlp", k=2, support=support, weighting=weighting)


# The example of three positions -----------------------------------------------------------------------------------

ADVANTAGES = {
    ("student", "student"): [[-1.005899, 0.107881], [0.072482, 0], [-2.267465, -0.767528]],
    ("student", "teacher"): [[-0.321888, 0.230146], [0.075718, 0], [-1.360479, -1.381551]],
    ("student", "uniform"): [[-0.804719, 0.143841], [0.058892, 0], [-1.700599, -1.151293]],
    ("teacher", "student"): [[0.239735, 0.293931], [0.072482, 0], [1.406705, 1.295134]],
    ("teacher", "teacher"): [[0.153430, 0.823008], [0.075718, 0], [1.563006, 1.151230]],
    ("overlap", "student"): [[0, 0.287682], [0.072482, 0], [0, 0]],
    ("union", "student"): [
        [-0.935720, 0.100354, 0, 0.123041], [0.072482, 0, 0, 0], [-2.125748, -0.719558, 0.087919, 0.080946],
    ],
    ("non_overlap", "student"): [
        [-0.804719, 0, 0, 0.105815], [0, 0, 0, 0], [-2.040718, -0.690776, 0.084402, 0.077708],
    ],
    ("non_overlap", "uniform"): [
        [-1.609438, 0, 0, 1.763589], [0, 0, 0, 0], [-3.401197, -2.302585, 2.813411, 2.590267],
    ],
}  # fmt: skip


@pytest.mark.parametrize(("support", "weighting"), ADVANTAGES)
def test_advantages_of_the_papers_code(support, weighting):
    objective = make_objective(thunlp(support, weighting))
    found = jax.vmap(lambda p: frozen_advantage(objective, p))(candidates(jnp.log(P), support))
    expected = ADVANTAGES[support, weighting]
    side = {"student": slice(0, 2), "overlap": slice(0, 2), "teacher": slice(2, 4)}.get(support, slice(None))
    assert_allclose(found[:, side], expected, **ROUNDED)
    assert_allclose(losses(thunlp(support, weighting)), -np.sum(expected, -1), atol=2e-6)


def test_losses_of_the_example():
    assert_allclose(losses(thunlp()), [0.898018, -0.072482, 3.034993], **ROUNDED)
    assert_allclose(losses(ObjectiveConfig("topk_paper", k=2)), [0.428014, 0.001626, 0.144622], **ROUNDED)
    assert_allclose(losses(ObjectiveConfig("full")), [0.645262, 0.154942, 2.560458], **ROUNDED)
    assert_allclose(losses(ObjectiveConfig("forward_kl")), [0.628357, 0.113822, 2.316868], **ROUNDED)
    tail = ObjectiveConfig("topk_paper", k=2, mass="tail")
    assert_allclose(losses(tail), [0.535156, 0.006840, 2.506365], **ROUNDED)
    tail = ObjectiveConfig("topk_paper", k=2, mass="tail", support="teacher", divergence="forward_kl")
    assert_allclose(losses(tail), [0.497327, 0.006757, 2.218741], **ROUNDED)
    verl = ObjectiveConfig("topk_paper", k=2, mass="raw", support="teacher", divergence="forward_kl")
    assert_allclose(losses(verl), [0.732329, 0.053002, 2.442812], **ROUNDED)


def test_gradients_of_the_example():
    code, paper = gradients(thunlp()), gradients(ObjectiveConfig("topk_paper", k=2))
    full = gradients(ObjectiveConfig("full"))
    assert_allclose(code[0], [0.556890, -0.377286, -0.089802, -0.053881, -0.035921], **ROUNDED)
    assert_allclose(code[2], [0.446469, -0.142970, -0.121400, -0.091050, -0.091050], **ROUNDED)
    assert_allclose(paper[0], [0.444637, -0.444637, 0, 0, 0], **ROUNDED)
    assert_allclose(full[0], [0.482088, -0.279883, 0.004789, -0.144531, -0.062462], **ROUNDED)
    assert_allclose(gradients(ObjectiveConfig("forward_kl")), P - Q, atol=1e-15)

    def cosine(a, b):
        return np.sum(a * b, -1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)

    assert_allclose(cosine(code, full), [0.971564, 0.502322, 0.978516], **ROUNDED)
    assert_allclose(cosine(paper, full), [0.930123, 0.177008, 0.724193], **ROUNDED)


def test_verl_top_k_gradient():
    """m_A p - q 1[A], m_A the teacher's mass on its top k."""
    found = gradients(ObjectiveConfig("topk_paper", k=2, mass="raw", support="teacher", divergence="forward_kl"))
    inside = np.zeros_like(Q)
    np.put_along_axis(inside, TOP_Q, 1.0, -1)
    assert_allclose(found, (Q * inside).sum(-1, keepdims=True) * P - Q * inside, atol=1e-14)


# Properties -------------------------------------------------------------------------------------------------------

SAMPLED_OBJECTIVES = ["sampled", "sampled_paper", "minillm"]
SUPPORT_CONFIGS = [
    *(thunlp(support) for support in ("student", "teacher", "overlap", "union", "non_overlap")),
    *(
        ObjectiveConfig("topk_paper", k=2, support=support, mass=mass, divergence=divergence)
        for support in ("student", "teacher", "overlap", "union", "non_overlap")
        for mass in ("renormalized", "tail")
        for divergence in ("reverse_kl", "forward_kl", "jsd")
    ),
    ObjectiveConfig("full"),
    ObjectiveConfig("gkd", beta=0.3),
    ObjectiveConfig("forward_kl"),
]


@pytest.mark.parametrize("config", SUPPORT_CONFIGS, ids=lambda c: f"{c.objective}-{c.support}-{c.mass}-{c.divergence}")
def test_a_teacher_equal_to_the_student_changes_nothing(config):
    assert_allclose(losses(config, q=P), 0, atol=1e-15)
    assert_allclose(gradients(config, q=P), 0, atol=1e-15)


@pytest.mark.parametrize("name", SAMPLED_OBJECTIVES)
def test_a_sampled_teacher_equal_to_the_student_changes_nothing_on_average(name):
    objective = make_objective(ObjectiveConfig(name))

    def loss(z, token):
        log_p = jax.nn.log_softmax(z)[token][None]
        known = {"counts": [1.0], "n_samples": 1.0, "reward_to_go": [0.0]}
        return position_loss(objective, Position.create(log_p, jax.lax.stop_gradient(log_p), **known))

    mean = sum(P[0, t] * jax.grad(loss)(jnp.log(P[0]), t) for t in range(5))
    assert_allclose(mean, 0, atol=1e-15)


@pytest.mark.parametrize(
    "config",
    [c for c in SUPPORT_CONFIGS if c.objective != "topk_thunlp"],
    ids=lambda c: f"{c.objective}-{c.support}-{c.mass}-{c.divergence}",
)
def test_the_gradient_is_that_of_the_reported_divergence(config):
    """Autodiff of the value itself, no form and no surrogate."""
    objective = make_objective(config)

    def value(z):
        positions = candidates(z, config.support)
        if objective.reach == "full":
            positions = Position.create(jax.nn.log_softmax(z), jnp.log(Q))
            return jnp.sum(objective.loss(positions.log_p, positions.log_q))
        seen = jax.vmap(lambda p: with_mass(p, config.mass))(positions)
        return jnp.sum(objective.loss(seen.log_p, seen.log_q))

    assert_allclose(gradients(config), jax.grad(value)(jnp.log(P)), atol=1e-13)


def test_all_tokens_are_the_full_divergence():
    """k = V: the renormalised and the tail reading, and the code's form, all become the full reverse KL."""
    log_p, log_q = jnp.log(P), jnp.log(Q)
    full = gradients(ObjectiveConfig("full"))
    for config in (
        ObjectiveConfig("topk_paper", k=5),
        ObjectiveConfig("topk_paper", k=5, mass="tail"),
        ObjectiveConfig("topk_thunlp", k=5),
    ):
        objective = make_objective(config)

        def total(z, objective=objective):
            position = Position.create(jax.nn.log_softmax(z), log_q)
            return jnp.sum(jax.vmap(lambda p: position_loss(objective, p))(position))

        # A full support leaves a tail of 1e-7 by construction.
        assert_allclose(jax.grad(total)(log_p), full, atol=1e-6 if config.mass == "tail" else 1e-14)


def test_one_token():
    """At k = 1 Eq. 5 has no signal at all and the code's form has one."""
    z = jnp.log(P[:1])

    def total(config):
        def loss(z):
            log_p = jax.nn.log_softmax(z)[:, :1]
            position = Position.create(log_p, jnp.log(Q[:1, :1]))
            return jnp.sum(jax.vmap(lambda p: position_loss(make_objective(config), p))(position))

        return jax.grad(loss)(z)

    assert_allclose(total(ObjectiveConfig("topk_paper", k=1)), 0, atol=1e-15)
    advantage = np.log(Q[0, 0] / P[0, 0])
    assert_allclose(total(ObjectiveConfig("topk_thunlp", k=1))[0], -advantage * (np.eye(5)[0] - P[0]), atol=1e-14)


def test_supports_are_sets():
    rng = np.random.default_rng(0)
    top_p, top_q = (np.stack([rng.permutation(9)[:4] for _ in range(20)]) for _ in range(2))
    ids = np.concatenate([top_p, top_q], -1)

    def chosen(support):
        mask = np.asarray(support_mask(top_p, top_q, support))
        listed = [row[kept] for row, kept in zip(ids, mask)]
        assert all(len(set(row)) == len(row) for row in listed), "a token twice"
        return [set(row.tolist()) for row in listed]

    for p, q, *others in zip(top_p, top_q, *map(chosen, ("student", "teacher", "overlap", "union", "non_overlap"))):
        student, teacher = set(p.tolist()), set(q.tolist())
        assert others == [student, teacher, student & teacher, student | teacher, student ^ teacher]


@pytest.mark.parametrize("name", ["sampled", "sampled_paper"])
def test_the_mean_of_the_sampled_form_is_the_full_gradient(name):
    """Over all tokens exactly, and over many draws within their error."""
    objective = make_objective(ObjectiveConfig(name))

    def loss(z, token):
        log_p = jax.nn.log_softmax(z)[token][None]
        log_q = jnp.log(Q[0])[token][None]
        reward = jax.lax.stop_gradient(log_q - log_p)
        return position_loss(objective, Position.create(log_p, log_q, counts=[1.0], n_samples=1.0, reward_to_go=reward))

    each = np.stack([jax.grad(loss)(jnp.log(P[0]), token) for token in range(5)])
    full = np.asarray(gradients(ObjectiveConfig("full"))[0])
    assert_allclose(P[0] @ each, full, atol=1e-15)
    drawn = each[np.random.default_rng(0).choice(5, size=20000, p=P[0])]
    assert np.all(np.abs(drawn.mean(0) - full) < 5 * drawn.std(0) / np.sqrt(len(drawn)))


def test_an_impossible_teacher_token_keeps_gradients_finite():
    q = np.array([[0.5, 0.5, 0, 0, 0.0]] * 3)
    for config in SUPPORT_CONFIGS:
        with np.errstate(divide="ignore"):
            assert np.all(np.isfinite(gradients(config, q)))


def test_clipping():
    """Beyond the clip a gain stops; below P_old / dual a negative advantage stops too; at rho = 1 nothing happens."""
    old, advantage = jnp.zeros((3, 1)), jnp.array([[1.0], [-1.0], [-1.0]])
    new = jnp.log(jnp.array([[2.0], [2.0], [9.0]]))
    assert_allclose(clipped_surrogate(new, old, advantage, dual=3.0), [-1.2, 2.0, 3.0])
    slope = jax.grad(lambda x: jnp.sum(clipped_surrogate(x, old, advantage, dual=3.0)))
    assert_allclose(slope(new)[:, 0], [0, 2, 0])
    assert_allclose(slope(old)[:, 0], [-1, 1, 1])
    loss = importance_correction(ObjectiveConfig("sampled", importance="none")).loss
    assert_allclose(jax.grad(lambda x: loss(x, old[0], advantage[0]))(new[0]), [-1.0])


def test_what_is_clipped_has_no_gradient():
    rng = np.random.default_rng(0)
    new, old, advantage = (jnp.asarray(rng.normal(scale=0.8, size=(400, 1))) for _ in range(3))
    flat = jax.grad(lambda x: jnp.sum(clipped_surrogate(x, old, advantage, 0.1, 0.3, 3.0)))(new) == 0
    assert 50 < flat.sum() < 350
    np.testing.assert_array_equal(is_clipped(new, old, advantage, 0.1, 0.3, 3.0), flat)


# Rewards and weights ----------------------------------------------------------------------------------------------


def test_group_advantages_of_odd_groups():
    rewards, groups = np.array([1.0, 0, 0, 1, 1, 1]), np.array([7, 3, 3, 7, 5, 3])
    centered, std = group_advantages(rewards, groups)
    assert_allclose(centered, [0, -1 / 3, -1 / 3, 0, 0, 2 / 3])
    assert_allclose(std, [0, 3**-0.5, 3**-0.5, 0, 0, 3**-0.5])


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sequence_sum", "fixed_length"])
def test_reductions_ignore_padding_and_how_a_batch_is_written(reduction):
    rng = np.random.default_rng(1)
    mask = np.arange(6) < np.array([6, 2, 4])[:, None]
    loss = rng.normal(size=mask.shape)
    weights = token_weights(mask.astype(float), reduction, 10)
    rows = [loss[b, mask[b]] for b in range(3)]
    expected = {
        "token_mean": np.concatenate(rows).mean(),
        "sequence_mean": np.mean([row.mean() for row in rows]),
        "sequence_sum": np.mean([row.sum() for row in rows]),
        "fixed_length": np.sum([row.sum() for row in rows]) / 30,
    }
    assert_allclose(np.sum(weights * loss), expected[reduction])
    padded = token_weights(np.pad(mask.astype(float), ((0, 0), (0, 3))), reduction, 10)
    assert_allclose(padded[:, :6], weights)
    assert not padded[:, 6:].any()
    assert not token_weights(np.zeros((2, 3)), reduction, 10).any()


def test_rewards_to_go_are_relative_and_masked():
    """Numbers of two TRL reports: a discount must count from the position, and padding must not count."""
    found = returns_to_go(np.ones((1, 5)), np.ones((1, 5), bool), 0.9)
    assert_allclose(found, [[4.0951, 3.439, 2.71, 1.9, 1]], rtol=1e-12)
    rewards, mask = np.array([[1.5, 1, 2, 2]] * 2), np.array([[True] * 4, [True, True, False, False]])
    assert_allclose(returns_to_go(rewards, mask), [[6.5, 5, 4, 2], [2.5, 1, 0, 0]], rtol=0)


def test_bad_settings_are_named():
    for bad, expected in (
        ({"objective": "kl"}, "objective: found 'kl', expected one of sampled"),
        ({"k": 0}, "k: found 0, expected at least 1"),
        ({"support": "both"}, "support: found 'both'"),
        ({"mass": "raw"}, "mass: found 'raw' with reverse KL"),
        ({"mass": "raw", "divergence": "jsd", "beta": 1.0}, "mass: found 'raw' with reverse KL"),
        ({"mass": "tail", "reward_scale": 2.0}, "reward_scale: found 2.0 with mass 'tail'"),
        ({"divergence": "kl"}, "divergence: found 'kl', expected one of 'reverse_kl'"),
        ({"outcome": "ppo"}, "outcome: found 'ppo', expected one of ''"),
        ({"objective": "grpo", "outcome": "grpo"}, "outcome: found 'grpo' mixed into grpo, expected a distillation"),
        ({"outcome": "grpo", "outcome_weight": -1.0}, "outcome_weight: found -1.0, expected a positive number"),
        ({"discount": 1.5}, "discount: found 1.5"),
        ({"objective": "full", "reward_scale": 2.0}, "reward_scale: found 2.0, which the objective full does not read"),
        ({"objective": "full", "importance": "none"}, "importance: found 'none', which .* not read, expected 'clip'"),
        ({"objective": "sampled", "support": "union"}, "support: found 'union', which"),
        ({"objective": "topk_thunlp", "mass": "tail"}, "mass: found 'tail', which"),
        ({"objective": "gkd", "divergence": "jsd"}, "divergence: found 'jsd', which"),
        ({"beta": 0.1}, "beta: found 0.1, which"),
        ({"weighting": "teacher"}, "weighting: found 'teacher', which"),
        ({"objective": "grpo", "discount": 0.9}, "discount: found 0.9, which"),
        ({"outcome_weight": 2.0}, "outcome_weight: found 2.0, which"),
        ({"objective": "sampled", "importance": "none", "clip_low": 0.1}, "clip_low: found 0.1, which"),
        ({"objective": "sampled", "truncation": 3.0}, "truncation: found 3.0, which"),
    ):
        with pytest.raises(InputError, match=expected):
            ObjectiveConfig(**bad)
    with pytest.raises(InputError, match="reduction: found 'sum'"):
        token_weights(np.ones((1, 2)), "sum")


def test_frozen_advantages_rebuild_the_gradient():
    """A = P f: sum_k A_k (delta_k - P) is P (f - fbar)."""
    objective = make_objective(thunlp("union"))
    positions = candidates(jnp.log(P), "union")
    advantage = jax.vmap(lambda p: frozen_advantage(objective, p))(positions)
    p = jnp.exp(positions.log_p)
    f = np.where(positions.support, advantage / p, 0.0)
    inside = jax.vmap(lambda log_p, f, fbar: logit_gradient(log_p, f, fbar))(positions.log_p, f, jnp.sum(p * f, -1))
    on_vocabulary = -gradients(thunlp("union"))
    kept = np.asarray(positions.support)
    assert_allclose(np.asarray(inside)[kept], np.take_along_axis(np.asarray(on_vocabulary), IDS, -1)[kept], atol=1e-14)


@pytest.mark.parametrize(("field", "value"), [("clip_low", -1.0), ("clip_low", 1.0), ("clip_high", -0.1)])
@pytest.mark.parametrize("importance", ["clip", "truncate"])
def test_a_clip_that_is_none_is_refused(field, value, importance):
    with pytest.raises(InputError, match=f"{field}: found {value}, expected 0 or more"):
        ObjectiveConfig(importance=importance, **{field: value})


@pytest.mark.parametrize(("field", "value"), [("truncation", 0.0), ("dual_clip", 1.0), ("dual_clip", float("nan"))])
def test_a_bound_that_binds_everything_is_refused(field, value):
    with pytest.raises(InputError, match=f"{field}: found {value}, expected more than"):
        ObjectiveConfig(**{field: value})
