"""Objectives, rewards and importance on the numbers that peers publish in their own tests, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxopd.gradients import Position, clipped_surrogate, importance_ratio, jsd_loss, truncated_surrogate
from jaxopd.train.objectives import ObjectiveConfig, make_objective, position_loss
from jaxopd.train.rewards import extrapolated, prefix_weights, returns_to_go
from jaxopd.train.supports import with_mass

ROUNDED = {"atol": 6e-7, "rtol": 0}  # the published numbers have six digits


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def thunlp(support="student", weighting="student") -> ObjectiveConfig:
    return ObjectiveConfig("topk_thunlp", k=2, support=support, weighting=weighting)


def jsd_of(student, teacher, beta):
    return jsd_loss(jnp.log(jnp.asarray(student)), jnp.log(jnp.asarray(teacher)), beta)


def test_generalised_jsd_of_trl():
    student, teacher = [0.1, 0.9], [0.9, 0.1]
    for beta, expected in ((0.0, 0.8 * np.log(9)), (1.0, 0.8 * np.log(9)), (0.1, 0.146310513), (0.9, 0.146310513)):
        assert_allclose(jsd_of(student, teacher, beta), expected, atol=1e-9)
    assert_allclose(jsd_of(student, teacher, 0.25), 0.285781329, atol=1e-9)
    assert_allclose(jsd_of(student, teacher, 0.5), 0.368064207, atol=1e-9)
    expected = {0.0: 0.232630162, 0.25: 0.043549254, 0.5: 0.058692013, 0.75: 0.045080, 1.0: 0.250201212}
    for beta, value in expected.items():
        assert_allclose(jsd_of([0.5, 0.3, 0.2], [0.2, 0.6, 0.2], beta), value, atol=1e-9 if beta != 0.75 else 1e-6)
    assert_allclose(jsd_of([0.6, 0.3, 0.1], [0.5, 0.4, 0.1], 0.5), 0.005859545, atol=1e-9)
    for beta in (0.25, 0.7):  # swapping the models mirrors beta
        swapped = jsd_of([0.2, 0.6, 0.2], [0.5, 0.3, 0.2], 1 - beta)
        assert_allclose(jsd_of([0.5, 0.3, 0.2], [0.2, 0.6, 0.2], beta), swapped, atol=1e-15)


def test_self_distillation_of_trl():
    assert_allclose(jsd_of([0.8, 0.2], [0.5, 0.5], 0.0), 0.223143551, atol=1e-9)
    log_p, log_q = jnp.log(jnp.array([0.5, 0.3, 0.2])), jnp.log(jnp.array([0.2, 0.6, 0.2]))
    top = Position.create(log_p, log_q, support=jnp.array([True, True, False]))
    tail, renormalized = with_mass(top, "tail"), with_mass(top, "renormalized")
    assert_allclose(jsd_loss(tail.log_p, tail.log_q, 0.0), 0.232630162, atol=1e-9)
    assert_allclose(jnp.exp(renormalized.log_p), [0.625, 0.375, 0], atol=1e-15)
    assert_allclose(jsd_loss(renormalized.log_p, renormalized.log_q, 0.0), 0.290787702, atol=1e-9)


def test_sampled_loss_and_truncated_importance_of_trl():
    student, teacher, old = np.log([0.2, 0.4]), np.log([0.5, 0.5]), np.log([0.05, 0.4])
    assert_allclose(np.minimum(importance_ratio(student, old), 2.0), [2, 1])
    assert_allclose(np.minimum(importance_ratio(np.log([0.4, 0.3]), np.log([0.1, 0.2])), 2.0), [2, 1.5])
    terms = [2.949426, 0.204464]
    ratio = np.log([0.9, 0.7]) - np.log([0.6, 0.2])
    assert_allclose(ratio * np.log([0.9, 0.7]), [-0.042720013, -0.446829162], atol=1e-9)
    # The peer's loss is weight * log p: its derivative in log p is what the surrogate has, whatever its own value.
    slope = jax.grad(lambda x: jnp.sum(truncated_surrogate(x[:, None], old[:, None], (teacher - student)[:, None])))
    assert_allclose(slope(jnp.asarray(student)) * student, terms, **ROUNDED)
    assert_allclose(np.mean(terms), 1.576945, **ROUNDED)


def test_importance_weighted_opd_of_trl():
    rewards, mask = np.array([[0.2, -0.3, 0.5], [0.4, 0, 0]]), np.array([[True, True, True], [True, False, False]])
    weights = prefix_weights(rewards, mask, 0.5)
    assert_allclose(weights, [[1.5, 1.4, 1.25], [1.5, 0, 0]], atol=1e-12)
    loss = -np.log(1 / 4) * np.sum(weights * rewards) / mask.sum()
    assert_allclose(loss, 0.382963817, atol=1e-9)
    assert_allclose(loss * mask.sum() / 8, 0.191481909, atol=1e-9)


def test_rewards_to_go():
    rewards = np.array([[1.5, 1.0, 2.0, 2.0]])
    assert_allclose(returns_to_go(rewards, np.ones((1, 4), bool)), [[6.5, 5, 4, 2]])
    assert_allclose(returns_to_go(rewards, np.array([[True, True, False, False]])), [[2.5, 1, 0, 0]])
    discounted = returns_to_go(np.ones((1, 5)), np.ones((1, 5), bool), 0.9)
    assert_allclose(discounted, [[4.0951, 3.439, 2.71, 1.9, 1]])
    assert_allclose(returns_to_go(np.ones((1, 5)), np.ones((1, 5), bool), 0.9, normalized=True), np.ones((1, 5)))


def test_top_k_of_verl():
    logits = np.array([[0, 9, 8, 1, 0, 0], [8, 7, 0, 0, 9, 0], [9, 8, 7, 0, 0, 0.0]])
    ids, q = np.array([[1, 2], [4, 5], [3, 4]]), np.array([[0.7, 0.2], [0.6, 0.3], [0.5, 0.4]])
    log_p = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), ids, -1)
    objective = make_objective(ObjectiveConfig("topk_paper", k=2, mass="raw", divergence="forward_kl"))
    found = jax.vmap(lambda p: position_loss(objective, p))(Position.create(log_p, np.log(q)))
    assert_allclose(found, [-0.089160332, 2.399379788, 7.753977120], atol=1e-9)


MILES = {  # (P, Q) at the candidates, whose sum in the objective is given
    ("student", "student"): ([[0.6, 0.4], [0.7, 0.3]], [[0.3, 0.7], [0.4, 0.6]], [0.192041993, 0.183786897]),
    ("overlap", "uniform"): ([[0.4], [0.7]], [[0.5], [0.8]], [-0.223143551, -0.133531393]),
    ("non_overlap", "uniform"): ([[0.6, 0.2], [0.3, 0.1]], [[0.3, 0.5], [0.6, 0.2]], [-0.223143551, -1.386294361]),
    ("teacher", "teacher"): ([[0.4, 0.2], [0.7, 0.1]], [[0.5, 0.5], [0.8, 0.2]], None),
}


@pytest.mark.parametrize(("support", "weighting"), MILES)
def test_top_k_of_miles(support, weighting):
    p, q, expected = MILES[support, weighting]
    objective = make_objective(thunlp(support, weighting))
    found = jax.vmap(lambda x: position_loss(objective, x))(Position.create(np.log(p), np.log(q)))
    if expected is not None:
        assert_allclose(found, expected, atol=1e-9)
    else:
        direct = [np.sum(np.array(b) / np.sum(b) * (np.log(a) - np.log(b))) for a, b in zip(p, q)]
        assert_allclose(found, direct, atol=1e-12)


def test_the_teachers_own_tokens_of_miles():
    """Weights (2/3, 1/3) and (7/8, 1/8) by the student's probabilities at the teacher's tokens."""
    student, teacher = np.array([[0.4, 0.2], [0.7, 0.1]]), np.array([[0.5, 0.5], [0.8, 0.2]])
    objective = make_objective(thunlp("student", "student"))
    found = jax.vmap(lambda x: position_loss(objective, x))(Position.create(np.log(student), np.log(teacher)))
    assert_allclose(found, [-0.454192612, -0.203483366], atol=1e-9)


def test_distillation_added_to_a_task_advantage_of_slime():
    """A + coefficient (log q - log p): a mixed loss has the sum of both advantages as its slope."""
    log_p, log_q, advantage = np.array([0.0, 1.0]), np.zeros(2), np.array([2.0, 2.0])
    assert_allclose(advantage + 0.5 * (log_q - log_p), [2, 1.5])

    def loss(x, advantage, reverse_kl, coefficient):
        parts = (clipped_surrogate(x[:, None], log_p[:, None], a[:, None]) for a in (advantage, -reverse_kl))
        task, distillation = map(jnp.sum, parts)
        return task + coefficient * distillation

    assert_allclose(jax.grad(loss)(jnp.asarray(log_p), advantage, log_p - log_q, 0.5), [-2, -1.5])
    precomputed = np.array([0.4, -0.2])
    assert_allclose(jax.grad(loss)(jnp.asarray(log_p), np.zeros(2), precomputed, 0.25), [0.1, -0.05])


def test_reward_extrapolation():
    log_p, log_q, base = np.log([0.2, 0.5]), np.log([0.4, 0.3]), np.log([0.3, 0.3])
    assert_allclose(extrapolated(log_q, base, 1.0), log_q)
    reward = extrapolated(log_q, base, 2.0) - log_p
    assert_allclose(reward, 2.0 * (log_q - base) - (log_p - base))
