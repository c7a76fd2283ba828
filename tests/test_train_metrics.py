"""Metrics of a scored batch, on numbers worked out by hand or published by peers' tests."""

import json
from dataclasses import fields, replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxopd.gradients import Position
from jaxopd.train.collect import Collector
from jaxopd.train.config import TrainConfig
from jaxopd.train.metrics import (
    Scored,
    by_position,
    entropy_metrics,
    overlap_metrics,
    reward_metrics,
)
from jaxopd.train.objectives import ObjectiveConfig, frozen_advantage, make_objective
from jaxopd.train.preflight import judged, misleading_windows
from jaxopd.train.supports import SUPPORTS, support_mask

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


def advantage_of(scored: Scored, support: str) -> np.ndarray:
    """What topk_thunlp on a support gives each candidate."""
    objective = make_objective(ObjectiveConfig("topk_thunlp", k=scored.k, support=support))
    mask = support_mask(scored.student_ids, scored.teacher_ids, support)
    positions = Position.create(scored.log_p, scored.log_q, support=mask)
    return np.asarray(jax.vmap(jax.vmap(lambda position: frozen_advantage(objective, position)))(positions))


@pytest.mark.parametrize(
    ("support", "expected"),
    [
        ("student", 0.060121),
        ("teacher", (0.239735 + 0.072482) / 3),  # three tokens are shared; the last one's advantage is 0
        ("overlap", 0.120055),
        ("union", (0.100354 + 0.072482) / 3),
        ("non_overlap", 0.0),
    ],
)
def test_the_pooled_advantage_is_that_of_the_objective(example, support, expected):
    found = overlap_metrics(example, advantage_of(example, support))["overlap/advantage_thunlp"]
    assert_allclose(found, expected, **ROUNDED)


def test_supports_with_the_same_tokens_have_one_pooled_advantage(example):
    same = replace(example, mask=np.array([[False, True, False]]))
    supports = [support for support in SUPPORTS if support != "non_overlap"]
    found = [overlap_metrics(same, advantage_of(same, support))["overlap/advantage_thunlp"] for support in supports]
    assert_allclose(found, 0.072482 / 2, **ROUNDED)


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


def rewarded(reward: np.ndarray) -> Scored:
    """Responses of which nothing but the reward is known."""
    B, S = reward.shape
    ids, pair, zero = np.zeros((B, S, 1), int), np.zeros((B, S, 2)), np.zeros((B, S))
    return Scored(ids, ids, pair, pair, zero, reward, zero, zero, zero, np.ones((B, S), bool))


def windows_of(reward: np.ndarray, correct: np.ndarray) -> list[str]:
    scored = rewarded(reward)
    return misleading_windows(by_position(scored, correct), scored.mask, correct)


def test_a_window_is_misleading_beyond_chance_alone():
    rng, batches = np.random.default_rng(0), 200
    correct = np.arange(48) < 24
    silent = [bool(windows_of(rng.normal(size=(48, 16)), correct)) for _ in range(batches)]
    assert np.mean(silent) < 0.1, "a share of 0.05 by construction"
    reward = rng.normal(size=(48, 16))
    reward[correct, 4:6] -= 2
    (found,) = windows_of(reward, correct)
    assert found.startswith("at tokens 4 to 5 the reward prefers wrong responses")


@pytest.mark.parametrize(
    ("low", "high", "divergence", "against", "doubted"),
    [
        (0.1, 0.3, 0.5, "", ""),
        (-0.1, 0.3, 0.5, "", "(95 % interval -0.100 to 0.300), which may be chance"),
        (-0.3, 0.0, 0.5, "(95 % interval -0.300 to 0.000): nothing to learn", ""),
        (-0.1, 0.3, 1e-6, "T is the student, but for rounding: nothing to learn", ""),
    ],
)
def test_a_teacher_is_judged_beyond_noise(low, high, divergence, against, doubted):
    figures = {"gain/T": (low + high) / 2, "gain_low/T": low, "gain_high/T": high, "reverse_kl_max/T": divergence}
    reasons, cautions = judged(figures, "T")
    for found, expected in ((reasons, against), (cautions, doubted)):
        assert len(found) == bool(expected)
        assert expected in "".join(found)


def test_a_line_of_a_corpus_that_is_cut_is_truncated(tmp_path):
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps({"question": "x", "tokens": [7] * length}) + "\n" for length in (3, 4, 5)))
    setup = SimpleNamespace(
        questions=[SimpleNamespace(id="x")], teacher_of=np.zeros(1, int), grades=lambda _, rows: np.ones(len(rows))
    )
    config = TrainConfig(objective=ObjectiveConfig("sft"), corpus=str(file), batch=3, max_tokens=4)
    batch = Collector(config, setup).draw(None, 0)
    assert sorted(zip(batch.length, batch.truncated)) == [(3, False), (4, False), (4, True)]
