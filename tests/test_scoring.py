"""jaxopd.scoring: numpy in, numpy out, the same numbers whatever the block, and few compilations."""

from dataclasses import dataclass, fields
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from jaxopd import gradients, scoring
from jaxopd.alignment import node_alignment
from jaxopd.diagnose.nodes import ANALYTIC
from jaxopd.errors import InputError
from jaxopd.models import QwenConfig, hidden_states, init_model, logits
from jaxopd.scoring import AnalyticForm, score_pair, score_tokens, topk


@dataclass(frozen=True)
class Head:
    """The least that scoring asks of a model."""

    weight: np.ndarray

    def head(self):
        return jnp.asarray(self.weight)


def ratio(log_p, log_q):
    return jnp.exp(log_q - log_p)


def gap(log_p, log_q):
    return log_q - log_p


FORMS = {
    "gap": AnalyticForm(gap, lambda known: -known.reverse_kl),
    "ratio": AnalyticForm(ratio, lambda known: np.ones_like(known.reverse_kl)),
}


def make_case(T, *, V=97, Ds=8, Dt=12, K=3, dtype=np.float32):
    rng = np.random.default_rng(T)
    hidden_s, hidden_t = rng.standard_normal((T, Ds)).astype(dtype), rng.standard_normal((T, Dt)).astype(dtype)
    student, teacher = (Head(rng.standard_normal((V, D)).astype(dtype) / 2) for D in (Ds, Dt))
    ids = rng.integers(-1, V, (T, K))
    return student, teacher, hidden_s, hidden_t, ids


def log_softmax64(hidden, model, V=None):
    z = (hidden.astype(np.float64) @ np.asarray(model.weight, np.float64).T)[:, :V]
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def at(values, ids, outside):
    return np.where(ids >= 0, np.take_along_axis(values, np.maximum(ids, 0), -1), outside)


@pytest.mark.parametrize("T", [0, 1, 15, 16, 17, 100])
def test_score_pair_against_float64(T, monkeypatch):
    monkeypatch.setattr(scoring, "BLOCK", 32)  # 100 rows: three full blocks and one of 4, padded to 16
    student, teacher, hidden_s, hidden_t, ids = make_case(T)
    scores = score_pair(student, teacher, hidden_s, hidden_t, ids, FORMS)
    log_p, log_q = log_softmax64(hidden_s, student), log_softmax64(hidden_t, teacher)
    p, q = np.exp(log_p), np.exp(log_q)
    for field in fields(scores.statistics):
        value = getattr(scores.statistics, field.name)
        assert isinstance(value, np.ndarray), field.name
        assert len(value) == T, field.name
    close = partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5)
    close(scores.statistics.reverse_kl, (p * (log_p - log_q)).sum(-1))
    close(scores.statistics.entropy_teacher, -(q * log_q).sum(-1))
    close(scores.statistics.log_p, at(log_p, ids, -np.inf))
    close(scores.statistics.log_q, at(log_q, ids, -np.inf))
    assert list(scores.known) == ["gap", "ratio"]
    for name, f in (("gap", log_q - log_p), ("ratio", q / p)):
        close(scores.known[name][0], at(f, ids, 0.0), rtol=1e-4)
        close(scores.known[name][1], (p * f).sum(-1), rtol=1e-4)


@pytest.mark.parametrize("name", ANALYTIC)
def test_the_means_of_the_diagnosis_are_those_of_whole_rows(name):
    student, teacher, hidden_s, hidden_t, ids = make_case(30)
    scores = score_pair(student, teacher, hidden_s, hidden_t, ids, ANALYTIC)
    log_p, log_q = (log_softmax64(*model) for model in ((hidden_s, student), (hidden_t, teacher)))
    f = np.asarray(gradients.FORMS[name](gradients.Position.create(log_p, log_q)), np.float64)
    np.testing.assert_allclose(scores.known[name][0], at(f, ids, 0.0), rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(scores.known[name][1], (np.exp(log_p) * f).sum(-1), rtol=1e-5, atol=2e-6)


def test_without_the_second_pass_the_rest_is_the_same():
    student, teacher, hidden_s, hidden_t, ids = make_case(20)
    whole, part = (
        score_pair(student, teacher, hidden_s, hidden_t, ids, second_pass=flag).statistics for flag in (True, False)
    )
    for field in fields(whole):
        value, expected = getattr(part, field.name), getattr(whole, field.name)
        if field.name in ("js", "js_student", "total_variation"):
            assert np.isnan(value).all()
        else:
            np.testing.assert_array_equal(value, expected)


def test_score_tokens_and_topk_against_float64():
    student, _, hidden, _, ids = make_case(37)
    log_p = log_softmax64(hidden, student)
    scores = score_tokens(student, hidden, ids, k=7)
    np.testing.assert_allclose(scores.entropy, -(np.exp(log_p) * log_p).sum(-1), atol=1e-5)
    np.testing.assert_allclose(scores.log_p, at(log_p, ids, -np.inf), atol=1e-5)
    best = np.argsort(-log_p, -1)[:, :7]
    top_ids, top_log_p = topk(student, hidden, 7)
    np.testing.assert_array_equal(top_ids, best)
    np.testing.assert_allclose(top_log_p, np.take_along_axis(log_p, best, -1), atol=1e-5)
    assert scores.log_p.shape == (37, 3)
    assert score_tokens(student, hidden).log_p.shape == (37, 0)


def test_a_longer_teacher_vocabulary_is_cut_and_renormalised():
    student, _, hidden_s, hidden_t, ids = make_case(20)
    teacher = Head(np.random.default_rng(0).standard_normal((130, 12)).astype(np.float32))
    scores = score_pair(student, teacher, hidden_s, hidden_t, ids)
    log_q = log_softmax64(hidden_t, teacher, 97)
    np.testing.assert_allclose(scores.statistics.log_q, at(log_q, ids, -np.inf), atol=1e-5)


def test_hidden_states_may_come_from_a_memory_map(tmp_path):
    student, teacher, hidden_s, hidden_t, ids = make_case(40)
    np.save(tmp_path / "hidden.npy", hidden_t)
    direct = score_pair(student, teacher, hidden_s, hidden_t, ids)
    mapped = score_pair(student, teacher, hidden_s, np.load(tmp_path / "hidden.npy", mmap_mode="r"), ids)
    np.testing.assert_array_equal(direct.statistics.forward_kl, mapped.statistics.forward_kl)


def test_few_shapes_are_compiled():
    student, teacher, hidden_s, hidden_t, _ = make_case(128, V=53)
    before = scoring._pair._cache_size()
    for T in range(1, 129, 7):
        for K in (3, 4):
            score_pair(student, teacher, hidden_s[:T], hidden_t[:T], np.zeros((T, K), int), FORMS)
    assert scoring._pair._cache_size() - before == 4  # 16, 32, 64, 128 rows; 3 and 4 ids share a bucket


def test_real_models_give_their_own_logits():
    sizes = {"intermediate_size": 32, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "vocab_size": 61}
    student = init_model(QwenConfig(hidden_size=16, num_layers=1, **sizes), seed=1)
    teacher = init_model(QwenConfig(hidden_size=24, num_layers=2, **sizes), seed=2)
    tokens = np.random.default_rng(0).integers(0, 61, (2, 9))
    hidden_s, hidden_t = (np.asarray(hidden_states(m, tokens)).reshape(18, -1) for m in (student, teacher))
    ids = np.tile(np.arange(61), (18, 1))
    scores = score_pair(student, teacher, hidden_s, hidden_t, ids).statistics
    for model, log_p in ((student, scores.log_p), (teacher, scores.log_q)):
        z = np.asarray(logits(model, tokens), np.float64).reshape(18, -1)
        np.testing.assert_allclose(log_p, z - np.log(np.exp(z).sum(-1, keepdims=True)), atol=1e-5)


def test_known_forms_serve_the_restricted_reading():
    student, teacher, hidden_s, hidden_t, _ = make_case(30)
    ids = np.tile(np.array([[5, 9, 20, 96]]), (30, 1))
    scores = score_pair(student, teacher, hidden_s, hidden_t, ids, {"forward_kl": ANALYTIC["forward_kl"]})
    success = np.random.default_rng(1).random((30, 4))
    positions = gradients.Position.create(scores.statistics.log_p, scores.statistics.log_q, success=success)
    aligned = node_alignment(positions, {"forward_kl": gradients.forward_kl}, known=scores.known)

    p, q = (np.exp(log_softmax64(*model))[:, ids[0]] for model in ((hidden_s, student), (hidden_t, teacher)))
    ideal = p * (success - (p * success).sum(-1, keepdims=True))
    signal = q - p  # the forward-KL gradient, fbar over the whole vocabulary
    cosine = (ideal * signal).sum(-1) / np.linalg.norm(ideal, axis=-1) / np.linalg.norm(signal, axis=-1)
    np.testing.assert_allclose(aligned["align_forward_kl_restricted"], cosine, atol=1e-5)


def test_bad_input_is_named():
    student, teacher, hidden_s, hidden_t, ids = make_case(5)
    pair = partial(score_pair, student, teacher)
    for call, message in [
        (lambda: pair(hidden_s, hidden_t[:4], ids), r"hidden_t: found shape \(4, 12\), expected \[5, 12\]"),
        (lambda: pair(hidden_t, hidden_t, ids), r"hidden_s: found shape \(5, 12\), expected \[5, 8\]"),
        (lambda: pair(hidden_s, hidden_t, ids + 97), "ids: found .*, expected 0 to 96, or -1"),
        (lambda: pair(hidden_s, hidden_t, ids[:3]), r"ids: found shape \(3, 3\)"),
        (lambda: pair(hidden_s, hidden_t, ids, vocab_size=98), "vocab_size: found 98, expected 1 to 97"),
        (lambda: topk(student, hidden_s, 65), "k: found 65, expected 0 to 64"),
    ]:
        with pytest.raises(InputError, match=message):
            call()
