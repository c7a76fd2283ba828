"""jaxopd_kernels against float64 numpy: two models, one model, top k, and what is never in memory."""

from dataclasses import fields
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxopd_kernels import IMPLEMENTATIONS, MAX_TOP_K, PairStatistics, head_statistics, pair_statistics, xla
from jaxopd_kernels.rows import GROUP, head_rows, pair_rows, top_k

ROWS = ("xla", "xla_materialized")
SCALARS = [field.name for field in fields(PairStatistics) if field.name not in ("log_p", "log_q")]


# compiled once per shape: run eagerly, each of some fifty operations would be compiled alone
pair = jax.jit(pair_statistics, static_argnames=("vocab_size", "implementation"))
one_model = jax.jit(head_statistics, static_argnames=("vocab_size", "implementation", "k"))


def log_softmax64(z):
    z = np.asarray(z, np.float64)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def expected_pair(z_s, z_t, ids):
    """The definitions of PairStatistics in float64; z may hold -inf in both models."""
    z_s, z_t = np.asarray(z_s, np.float64), np.asarray(z_t, np.float64)
    kept = np.isfinite(z_s)
    log_p, log_q = (np.where(kept, log_softmax64(z), -1e5) for z in (z_s, z_t))
    p, q = np.exp(log_p), np.exp(log_q)
    with np.errstate(divide="ignore"):
        log_m = np.where(p + q > 0, np.log((p + q) / 2), 0.0)
    f = log_q - log_p
    fbar = (p * f).sum(-1, keepdims=True)
    inside = (ids >= 0) & (ids < z_s.shape[-1])

    def gather(values):
        return np.where(inside, np.take_along_axis(values, np.where(inside, ids, 0), -1), -np.inf)

    return {
        "logsumexp_student": np.log(np.exp(z_s - z_s.max(-1, keepdims=True)).sum(-1)) + z_s.max(-1),
        "logsumexp_teacher": np.log(np.exp(z_t - z_t.max(-1, keepdims=True)).sum(-1)) + z_t.max(-1),
        "entropy_student": -(p * log_p).sum(-1),
        "entropy_teacher": -(q * log_q).sum(-1),
        "reverse_kl": (p * (log_p - log_q)).sum(-1),
        "forward_kl": (q * (log_q - log_p)).sum(-1),
        "js": (p * (log_p - log_m) + q * (log_q - log_m)).sum(-1) / 2,
        "js_student": (p * (log_p - log_m)).sum(-1),
        "total_variation": np.abs(p - q).sum(-1) / 2,
        "l2": np.linalg.norm(p - q, axis=-1),
        "cosine": (p * q).sum(-1) / np.linalg.norm(p, axis=-1) / np.linalg.norm(q, axis=-1),
        "variance": (p * (f - fbar) ** 2).sum(-1),
        "gradient_norm": np.linalg.norm(p * (f - fbar), axis=-1),
        "log_p": gather(log_p),
        "log_q": gather(log_q),
    }


def check_pair(statistics, expected, *, atol=1e-5, rtol=2e-6, names=None):
    for name in names or expected:
        np.testing.assert_allclose(np.asarray(getattr(statistics, name)), expected[name], rtol, atol, err_msg=name)
    assert min(statistics.reverse_kl.min(), statistics.forward_kl.min(), statistics.js.min()) >= -1e-5
    for value in jax.tree.leaves(statistics):
        assert value.dtype == jnp.float32


def some_ids(rng, T, V, K=5):
    ids = rng.integers(0, V, (T, K))
    ids[:, 0], ids[::2, 1], ids[:, 2] = V - 1, -1, 0
    return ids.astype(np.int32)


def random_model(rng, T, V, D, dtype=np.float32):
    hidden = jnp.asarray(rng.standard_normal((T, D)), dtype)
    head = jnp.asarray(rng.standard_normal((V, D)) * 3 / np.sqrt(D), dtype)
    return hidden, head, np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T


def exact_model(z):
    """Hidden states and a head whose float32 product is z exactly, whatever its size."""
    return np.eye(len(z), dtype=np.float32), np.ascontiguousarray(z.T)


@pytest.mark.parametrize("implementation", ROWS)
@pytest.mark.parametrize("T, V", [(1, 127), (63, 512), (128, 1031), (129, 127), (129, 1031)])
def test_pair_on_random_models_of_different_width(T, V, implementation):
    rng = np.random.default_rng(T + V)
    hidden_s, head_s, z_s = random_model(rng, T, V, 24)
    hidden_t, head_t, z_t = random_model(rng, T, V, 40)
    ids = some_ids(rng, T, V)
    op = partial(pair, implementation=implementation)
    check_pair(op(hidden_s, head_s, hidden_t, head_t, ids), expected_pair(z_s, z_t, ids))


@pytest.mark.parametrize("implementation", ROWS)
def test_pair_in_bfloat16_accumulates_in_float32(implementation):
    rng = np.random.default_rng(3)
    hidden_s, head_s, z_s = random_model(rng, 63, 512, 64, jnp.bfloat16)
    hidden_t, head_t, z_t = random_model(rng, 63, 512, 96, jnp.bfloat16)
    ids = some_ids(rng, 63, 512)
    statistics = pair(hidden_s, head_s, hidden_t, head_t, ids, implementation=implementation)
    check_pair(statistics, expected_pair(z_s, z_t, ids))  # logits rounded to bfloat16 would miss by 1e-2


def peaked(rng, T, V):
    z = rng.standard_normal((T, V)).astype(np.float32)
    z[np.arange(T), rng.integers(0, V, T)] += 80
    return z


@pytest.mark.parametrize("implementation", ROWS)
@pytest.mark.parametrize("V", [127, 1031])
def test_pair_on_hard_rows(V, implementation):
    rng = np.random.default_rng(V)
    flat, sharp, noise = np.full((8, V), 3.5, np.float32), peaked(rng, 8, V), rng.standard_normal((8, V))
    z_s = np.concatenate([flat, flat, sharp, sharp, sharp, noise]).astype(np.float32)
    z_t = np.concatenate([flat - 40, sharp, flat, sharp, peaked(rng, 8, V), noise]).astype(np.float32)
    ids = some_ids(rng, len(z_s), V)
    args = (*exact_model(z_s), *exact_model(z_t), ids)
    statistics = pair(*args, implementation=implementation)
    check_pair(statistics, expected_pair(z_s, z_t, ids), names=(*SCALARS, "log_p", "log_q"))


@pytest.mark.parametrize("implementation", ROWS)
def test_a_student_that_is_its_teacher(implementation):
    rng = np.random.default_rng(4)
    hidden, head, _ = random_model(rng, 63, 1031, 32)
    same = pair(hidden, head, hidden, head, some_ids(rng, 63, 1031), implementation=implementation)
    for name in ("reverse_kl", "forward_kl", "js", "total_variation", "l2", "variance", "gradient_norm"):
        assert np.abs(getattr(same, name)).max() <= 1e-6, name
    np.testing.assert_allclose(same.cosine, 1.0, rtol=1e-6)
    np.testing.assert_allclose(same.log_p, same.log_q, atol=2e-6)


@pytest.mark.parametrize("scale", [1e-1, 1e-2, 1e-3, 1e-4])
def test_small_divergences_keep_their_digits(scale):
    rng = np.random.default_rng(5)
    z_s = (4 * rng.standard_normal((16, 1031))).astype(np.float32)
    z_t = (z_s + scale * rng.standard_normal(z_s.shape)).astype(np.float32)
    ids = some_ids(rng, 16, 1031)
    statistics = pair(*exact_model(z_s), *exact_model(z_t), ids)
    names = ("reverse_kl", "forward_kl", "js", "variance", "gradient_norm")
    check_pair(statistics, expected_pair(z_s, z_t, ids), atol=1e-14, rtol=1e-3, names=names)


@pytest.mark.parametrize("implementation", ROWS)
@pytest.mark.parametrize("Vs, Vt, vocab_size", [(512, 512, 500), (512, 640, None), (640, 512, 505)])
def test_rows_past_the_common_vocabulary_do_not_count(Vs, Vt, vocab_size, implementation):
    rng = np.random.default_rng(6)
    hidden_s, head_s, z_s = random_model(rng, 63, Vs, 16)
    hidden_t, head_t, z_t = random_model(rng, 63, Vt, 24)
    common = vocab_size or min(Vs, Vt)
    head_s, head_t = head_s.at[common:].mul(50), head_t.at[common:].mul(50)  # would dominate if they counted
    ids = some_ids(rng, 63, max(Vs, Vt))
    op = partial(pair, vocab_size=vocab_size, implementation=implementation)
    expected = expected_pair(z_s[:, :common], z_t[:, :common], ids)
    assert np.isneginf(expected["log_p"][:, 0]).all()
    check_pair(op(hidden_s, head_s, hidden_t, head_t, ids), expected)


def test_tokens_that_both_models_exclude():
    rng = np.random.default_rng(7)
    z_s, z_t = rng.standard_normal((2, 9, 127)).astype(np.float32) * 5
    z_s[:, 1::3] = z_t[:, 1::3] = -np.inf
    z_s[0, 1:] = z_t[0, 1:] = -np.inf
    ids = np.tile(np.array([[0, 3, 126]], np.int32), (9, 1))
    names = (*SCALARS, "log_p", "log_q")
    expected = expected_pair(z_s, z_t, ids) | {"log_p": log_softmax64(z_s)[:, [0, 3, 126]]}
    expected["log_q"] = log_softmax64(z_t)[:, [0, 3, 126]]
    check_pair(pair_rows(jnp.asarray(z_s), jnp.asarray(z_t), jnp.asarray(ids)), expected, names=names)
    head = head_rows(jnp.asarray(z_s), jnp.asarray(ids), 5)
    np.testing.assert_allclose(head.entropy, expected["entropy_student"], atol=1e-5)
    np.testing.assert_array_equal(head.top_ids[0], [0, 1, 2, 3, 4])


def test_the_vocabulary_of_qwen3():
    V, rng = 151_936, np.random.default_rng(8)
    z_s = (2.2 * rng.standard_normal((3, V))).astype(np.float32)
    z_s[:, :40] += 14
    z_t = (z_s + 0.1 * rng.standard_normal((3, V))).astype(np.float32)
    ids = some_ids(rng, 3, V)
    check_pair(pair(*exact_model(z_s), *exact_model(z_t), ids), expected_pair(z_s, z_t, ids))
    check_head(one_model(*exact_model(z_s), ids=ids, k=MAX_TOP_K), z_s, ids, MAX_TOP_K)


@pytest.mark.parametrize("T", [1, 63, 128, 129])
def test_chunks_do_not_change_a_row(T):
    rng = np.random.default_rng(9)
    hidden_s, head_s, z_s = random_model(rng, T, 512, 16)
    hidden_t, head_t, z_t = random_model(rng, T, 512, 16)
    ids = some_ids(rng, T, 512)
    chunked = xla.pair_statistics(hidden_s, head_s, hidden_t, head_t, ids, vocab_size=512, chunk_bytes=8 * 4 * 1024)
    check_pair(chunked, expected_pair(z_s, z_t, ids))
    check_head(xla.head_statistics(hidden_s, head_s, ids, 20, 512, chunk_bytes=8 * 4 * 512), z_s, ids, 20)


def test_rows_per_chunk():
    assert [xla.rows_per_chunk(10, budget) for budget in (1, 10, 19, 20, 1000)] == [1, 1, 1, 2, 64]


def check_head(statistics, z, ids, k):
    z = np.asarray(z, np.float64)
    log_p = log_softmax64(z)
    np.testing.assert_allclose(statistics.logsumexp, (z - log_p)[:, 0], atol=1e-5)
    np.testing.assert_allclose(statistics.entropy, -(np.exp(log_p) * log_p).sum(-1), atol=1e-5)
    inside = (ids >= 0) & (ids < z.shape[1])
    expected = np.where(inside, np.take_along_axis(log_p, np.where(inside, ids, 0), -1), -np.inf)
    np.testing.assert_allclose(statistics.log_p, expected, atol=1e-5)
    best = np.argsort(-z, axis=-1, kind="stable")[:, :k]
    np.testing.assert_allclose(statistics.top_log_p, np.take_along_axis(log_p, best, -1), atol=1e-5)
    np.testing.assert_array_equal(statistics.top_ids, best)


@pytest.mark.parametrize("implementation", ROWS)
@pytest.mark.parametrize("T, V, k", [(1, 127, 0), (63, 512, 64), (128, 1031, 1), (129, 1031, 20)])
def test_head_statistics(T, V, k, implementation):
    rng = np.random.default_rng(T)
    hidden, head, z = random_model(rng, T, V, 32)
    ids = some_ids(rng, T, V)
    statistics = one_model(hidden, head, ids=ids, k=k, implementation=implementation)
    check_head(statistics, z, ids, k)
    padded = jnp.concatenate([head, 9 * head[:50]])
    check_head(one_model(hidden, padded, ids=ids, k=k, vocab_size=V, implementation=implementation), z, ids, k)


def test_bfloat16_head_statistics():
    rng = np.random.default_rng(10)
    hidden, head, z = random_model(rng, 63, 1031, 64, jnp.bfloat16)
    check_head(one_model(hidden, head, k=8), z, np.zeros((63, 0), np.int32), 8)


@pytest.mark.parametrize("V, k", [(5, 5), (127, 64), (5000, 64), (GROUP * 200, 20), (151_936, 64)])
@pytest.mark.parametrize("kinds", [2, 30, 10**6])
def test_top_k_gives_ties_to_the_lower_id(V, k, kinds):
    rng = np.random.default_rng(V + kinds)
    z = -rng.integers(0, kinds, (4, V)).astype(np.float32)
    z[1] = 0.0
    z[2, rng.integers(0, V, V // 2)] = -np.inf
    z[3, : V - k // 2] = -np.inf  # fewer finite entries than k
    values, ids = jax.jit(top_k, static_argnums=1)(z, k)
    expected = np.argsort(-z, axis=-1, kind="stable")[:, :k]
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(z, expected, -1))


@pytest.mark.parametrize("implementation, holds_them", [("xla", False), ("xla_materialized", True)])
def test_the_logits_are_in_memory_only_in_the_materialized_row(implementation, holds_them):
    T, V, D = 4096, 5003, 8
    hidden, head = jax.ShapeDtypeStruct((T, D), jnp.float32), jax.ShapeDtypeStruct((V, D), jnp.float32)
    ids = jax.ShapeDtypeStruct((T, 4), jnp.int32)
    op = IMPLEMENTATIONS[implementation].pair_statistics
    budget = {"chunk_bytes": 64 * 8 * V} if implementation == "xla" else {}
    op = jax.jit(partial(op, vocab_size=V, **budget))
    compiled = op.lower(hidden, head, hidden, head, ids).compile()
    assert (f"f32[{T},{V}]" in compiled.as_text()) == holds_them
    assert (compiled.memory_analysis().temp_size_in_bytes > 4 * T * V) == holds_them


@pytest.mark.parametrize("widths", [(1024, 2048), (1024, 4096)])
def test_a_long_batch_over_a_real_vocabulary_takes_under_a_gigabyte(widths):
    T, V = 32_768, 151_936
    shapes = [shape for D in widths for shape in ((T, D), (V, D))]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    ids = jax.ShapeDtypeStruct((T, 32), jnp.int32)
    op = jax.jit(partial(pair_statistics, implementation="xla"))
    assert op.lower(*arguments, ids).compile().memory_analysis().temp_size_in_bytes < 1e9


def test_bad_arguments_are_named():
    hidden, head, ids = jnp.ones((3, 4)), jnp.ones((7, 4)), jnp.zeros((3, 1), jnp.int32)
    pair = partial(pair_statistics, hidden, head, hidden, head)
    for call, message in [
        (lambda: pair_statistics(hidden, head, hidden[:2], head, ids), r"hidden_t, head_t: found shapes \(2, 4\)"),
        (lambda: pair_statistics(hidden, head[:, :3], hidden, head, ids), r"head_s: found shapes .* \(7, 3\)"),
        (lambda: pair_statistics(hidden, head, hidden.astype(int), head, ids), "int32 and float32, expected floats"),
        (lambda: pair(ids[:2]), r"ids: found shape \(2, 1\)"),
        (lambda: pair(ids.astype(float)), "ids: found .* of float32, expected integers"),
        (lambda: pair(ids, vocab_size=8), "vocab_size: found 8, expected 1 to 7"),
        (lambda: pair(ids, implementation="cuda"), "found 'cuda', expected one of xla, xla_materialized"),
        (lambda: head_statistics(hidden, head, k=8), "k: found 8, expected 0 to 7"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
