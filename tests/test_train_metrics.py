"""Metrics of a scored batch, on numbers worked out by hand or published by peers' tests."""

from dataclasses import fields, replace

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxopd.train.metrics import (
    Scored,
    direct_advantage,
    entropy_metrics,
    overlap_metrics,
    reward_metrics,
)

# Three positions at k = 2, whose overlap is one token, both, none.
P = np.array([[0.5, 0.3, 0.1, 0.06, 0.04], [0.25, 0.05, 0.4, 0.2, 0.1], [0.6, 0.3, 0.04, 0.03, 0.03]])
Q = np.array([[0.1, 0.4, 0.05, 0.35, 0.1], [0.25, 0.1, 0.45, 0.05, 0.15], [0.02, 0.03, 0.05, 0.5, 0.4]])
TOP_P, TOP_Q = np.array([[0, 1], [2, 0], [0, 1]]), np.array([[1, 3], [2, 0], [3, 4]])
ROUNDED = {"atol": 6e-7, "rtol": 0}  # the published numbers have six digits


def scored_of(log_p: np.ndarray, log_q: np.ndarray, top_p: np.ndarray, top_q: np.ndarray) -> Scored:
    """One response whose positions have these distributions; each drew token 0."""
    ids = np.concatenate([top_p, top_q], -1)
    at_p, at_q = (np.take_along_axis(x, ids, -1)[None] for x in (log_p, log_q))
    p, q = np.exp(log_p), np.exp(log_q)
    entropies = -(p * log_p).sum(-1)[None], -(q * log_q).sum(-1)[None]
    divergence = (p * (log_p - log_q)).sum(-1)[None]
    drawn = log_p[None, :, 0], log_q[None, :, 0]
    return Scored(top_p[None], top_q[None], at_p, at_q, *drawn, *entropies, divergence, np.ones((1, len(p)), bool))


@pytest.fixture(scope="module")
def example() -> Scored:
    return scored_of(np.log(P), np.log(Q), TOP_P, TOP_Q)


def test_overlap_of_the_example_by_every_definition(example):
    found = overlap_metrics(example)
    expected = {
        "overlap/ratio": 0.5,
        "overlap/advantage_paper": -0.000407,
        "overlap/advantage_thunlp": 0.060121,
        "overlap/advantage_verl": -0.070787,
        "overlap/mass_student_paper": 0.316667,
        "overlap/mass_teacher_paper": 0.366667,
        "overlap/mass_student_thunlp": 0.475,
        "overlap/mass_teacher_thunlp": 0.55,
    }
    for name, value in expected.items():
        assert_allclose(found[name], value, **ROUNDED, err_msg=name)


def test_the_pooled_advantage_is_that_of_the_objective(example):
    """thunlp's intersection strategy renormalises its weights over the overlap."""
    shared = np.array([[[False, True], [True, True], [False, False]]])
    log_p, log_q = (np.where(shared, x[..., :2], -1e4) for x in (example.log_p, example.log_q))
    advantage = np.where(shared, direct_advantage(log_p, np.where(shared, log_q, log_p)), 0.0)
    assert_allclose(overlap_metrics(example, advantage)["overlap/advantage_thunlp"], 0.120055, **ROUNDED)


def test_entropy_gaps_of_the_example(example):
    found = entropy_metrics(example)
    assert_allclose(found["entropy/gap_paper"], 0.064220, **ROUNDED)
    assert_allclose(found["entropy/gap_thunlp"], 0.034548, **ROUNDED)


def test_top_k_metrics_of_verl():
    logits = np.array([[0, 9, 8, 1, 0, 0], [8, 7, 0, 0, 9, 0], [9, 8, 7, 0, 0, 0.0]])
    top_p, top_q = np.array([[1, 2], [4, 0], [0, 1]]), np.array([[1, 2], [4, 5], [3, 4]])
    log_q = np.full(logits.shape, -30.0)  # the peer knows the teacher at its own tokens alone
    np.put_along_axis(log_q, top_q, np.log([[0.7, 0.2], [0.6, 0.3], [0.5, 0.4]]), -1)
    whole = scored_of(np.asarray(jax.nn.log_softmax(logits)), log_q, top_p, top_q)
    masses, advantages = [0.999484364, 0.665159229, 0.000164154], [0.044580166, 0.061784039, None]
    for position, (mass, advantage) in enumerate(zip(masses, advantages)):
        found = overlap_metrics(replace(whole, mask=np.arange(3)[None] == position))
        assert_allclose(found["overlap/top_mass_student_verl"], mass, atol=2e-7)
        assert_allclose(found["overlap/top_mass_teacher_verl"], 0.9, atol=1e-12)
        assert found.get("overlap/advantage_verl") == (advantage and pytest.approx(advantage, abs=2e-7))
    first_two = replace(whole, mask=np.array([[True, True, False]]))
    assert overlap_metrics(first_two)["overlap/ratio"] == 0.75


def test_padding_changes_no_metric():
    rng = np.random.default_rng(0)
    log_p, log_q = (np.log(rng.dirichlet(np.ones(9), 6)) for _ in range(2))
    tops = (np.argsort(-x, -1)[:, :3] for x in (log_p, log_q))
    one = scored_of(log_p, log_q, *tops)

    def padded(x: np.ndarray) -> np.ndarray:
        filling = False if x.dtype == bool else 7
        return np.pad(x, [(0, 0), (0, 4)] + [(0, 0)] * (x.ndim - 2), constant_values=filling)

    wide = Scored(**{field.name: padded(getattr(one, field.name)) for field in fields(Scored)})
    for metric in (overlap_metrics, entropy_metrics, lambda x: reward_metrics(x, np.array([True]))):
        found, expected = metric(wide), metric(one)
        assert found.keys() == expected.keys()
        assert_allclose(list(found.values()), list(expected.values()), rtol=1e-12)
