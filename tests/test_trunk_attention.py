"""Shared-trunk attention: the reference against float64, its merge with other keys, the rule, rows and splits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxopd_kernels import NO_KEYS, TRUNK_IMPLEMENTATIONS, trunk_attention, trunk_attention_hopper
from jaxopd_kernels.trunk_attention import chosen_implementation
from jaxopd_kernels.trunk_attention_rows import fold_rows, needed_tiles, unfold_rows, whole_tiles

from jaxopd.models.attention import combine

B, H, K, L, h = 5, 6, 2, 40, 8


def random_arrays(seed: int, *groups: int, dtype="float32") -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    shapes = [(*groups, B, H, h), (*groups, K, L, h), (*groups, K, L, h)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def in_float64(q, k, v, end) -> tuple[np.ndarray, np.ndarray]:
    """Attends slot by slot, head by head, to exactly the keys before the end."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out, lse = np.zeros(q.shape), np.full(q.shape[:2], NO_KEYS)
    for b, e in enumerate(end):
        for head in range(q.shape[1] if e else 0):
            keys = np.s_[head * k.shape[0] // q.shape[1], :e]
            scores = k[keys] @ q[b, head] / np.sqrt(q.shape[2])
            lse[b, head] = np.logaddexp.reduce(scores)
            out[b, head] = np.exp(scores - lse[b, head]) @ v[keys]
    return out, lse


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), end=st.lists(st.integers(0, L), min_size=B, max_size=B))
def test_reference_against_float64(seed, end) -> None:
    arrays = random_arrays(seed)
    for got, expected in zip(trunk_attention(*arrays, jnp.array(end)), in_float64(*arrays, end), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, atol=3e-6)


def test_large_scores_and_bfloat16() -> None:
    q, k, v = random_arrays(1, dtype="bfloat16")
    end = np.array([L, 3, 0, 1, 20])
    out, lse = trunk_attention(100 * q, k, v, jnp.array(end))
    true_out, true_lse = in_float64(100 * q, k, v, end)
    np.testing.assert_allclose(lse, true_lse, rtol=1e-6)
    np.testing.assert_allclose(out, true_out, atol=2e-2)  # weights are rounded to bfloat16


def test_groups_are_independent_and_an_end_past_the_trunk_is_its_end() -> None:
    q, k, v = random_arrays(2, 3)
    end = jnp.asarray(np.random.default_rng(2).integers(0, L + 9, (3, B)))
    out, lse = trunk_attention(q, k, v, end)
    for n in range(3):
        alone = trunk_attention(q[n], k[n], v[n], jnp.minimum(end[n], L))
        np.testing.assert_allclose(out[n], alone[0], atol=1e-6)
        np.testing.assert_allclose(lse[n], alone[1], atol=1e-6)


@pytest.mark.parametrize("cut", [0, 1, 17, L])
def test_merging_two_parts_is_attention_to_both(cut) -> None:
    q, k, v = random_arrays(3)
    whole, _ = trunk_attention(q, k, v, jnp.full(B, L))
    end = jnp.full(B, cut)
    first, first_lse = trunk_attention(q, k, v, end)
    second, second_lse = trunk_attention(q, jnp.roll(k, -cut, 1), jnp.roll(v, -cut, 1), L - end)
    merged = combine((first, first_lse), (second, second_lse))[0]
    np.testing.assert_allclose(merged, whole, atol=2e-6)


@pytest.mark.parametrize(
    "kind, slots, trunk, head_dim, dtype, expected",
    [
        ("NVIDIA H200", 256, 2000, 128, "bfloat16", "hopper"),
        ("NVIDIA H100 80GB HBM3", 32, 256, 64, "bfloat16", "hopper"),
        ("NVIDIA H200", 31, 2000, 128, "bfloat16", "xla"),
        ("NVIDIA H200", 256, 255, 128, "bfloat16", "xla"),
        ("NVIDIA H200", 256, 2000, 128, "float32", "xla"),
        ("NVIDIA H200", 256, 2000, 80, "bfloat16", "xla"),
        ("NVIDIA B200", 256, 2000, 128, "bfloat16", "xla"),
        ("TPU v5 lite", 256, 2000, 128, "bfloat16", "tpu"),
        ("TPU v6 lite", 256, 2000, 128, "bfloat16", "tpu"),
        ("TPU v6 lite", 256, 2000, 64, "bfloat16", "xla"),
        ("TPU v4", 256, 2000, 128, "bfloat16", "xla"),
        ("cpu", 256, 2000, 128, "bfloat16", "xla"),
    ],
)
def test_rule(kind, slots, trunk, head_dim, dtype, expected) -> None:
    got = chosen_implementation(kind, jnp.dtype(dtype), slots=slots, trunk=trunk, head_dim=head_dim)
    assert got == expected
    assert got in TRUNK_IMPLEMENTATIONS


def test_bad_arguments() -> None:
    q, k, v = random_arrays(4)
    end = jnp.zeros(B, int)
    for wrong in (
        (q, k, v[:, :-1], end),
        (q, k, v, end[:-1]),
        (q[:, :5], k, v, end),
        (q[None], k, v, end),
        (q, k, k[0], end),
    ):
        with pytest.raises(ValueError, match="found shapes"):
            trunk_attention(*wrong)
    with pytest.raises(ValueError, match="integers"):
        trunk_attention(q, k, v, end.astype(float))
    with pytest.raises(ValueError, match="expected one of xla, hopper, tpu"):
        trunk_attention(q, k, v, end, implementation="cuda")
    for name in ("hopper", "tpu"):
        with pytest.raises(ValueError, match="takes bfloat16"):
            trunk_attention(q, k, v, end, implementation=name)


def test_folding_into_rows_and_back() -> None:
    q = random_arrays(5, 2)[0]
    end = jnp.asarray(np.random.default_rng(5).integers(0, L, (2, B)))
    rows, ends, order = fold_rows(q, end, K, 16)
    G = H // K
    assert rows.shape == (2, K, 16, h)
    for n in range(2):
        for place, slot in enumerate(order[n]):
            for head in range(H):
                np.testing.assert_array_equal(rows[n, head // G, place * G + head % G], q[n, slot, head])
            assert (ends[n, place * G : (place + 1) * G] == end[n, slot]).all()
    assert (np.diff(ends, axis=1) >= 0).all()
    np.testing.assert_array_equal(ends[:, B * G :], np.repeat(end.max(1, keepdims=True), 16 - B * G, 1))
    out, lse = unfold_rows(rows, rows[..., 0], order, H)
    np.testing.assert_array_equal(out, q)
    np.testing.assert_array_equal(lse, q[..., 0])


def test_tiles_that_need_no_mask_and_tiles_needed_at_all() -> None:
    end = np.random.default_rng(6).integers(0, 100, (2, 24))
    end[0, :8], end[1, 8:16] = 0, 64
    whole, needed = (f(jnp.asarray(end), 8, 16) for f in (whole_tiles, needed_tiles))
    for n in range(2):
        for block in range(3):
            kept = np.arange(112).reshape(7, 16)[None] < end[n, block * 8 : block * 8 + 8, None, None]
            assert whole[n, block] == kept.all((0, 2)).sum()
            assert needed[n, block] == kept.any((0, 2)).sum()


def test_splits_merge_to_the_whole_whatever_is_empty() -> None:
    rng = np.random.default_rng(7)
    scores, values = rng.normal(0, 30, (3, 12)), rng.normal(size=(12, h))
    share = np.array([0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2])  # split 3 is empty; row 2 sees no key at all
    seen = np.array([True, True, False])
    peak, total, sums = np.full((4, 3), -1e30), np.zeros((4, 3)), np.zeros((4, 3, h))
    for s in range(3):
        inside = np.where(seen[:, None] & (share == s), scores, -np.inf)
        peak[s, seen] = inside[seen].max(1)
        weight = np.exp2(inside - peak[s, :, None])
        total[s], sums[s] = weight.sum(1), weight @ values
    partial = (jnp.asarray(x, jnp.float32)[:, None, None] for x in (sums, peak, total))
    out, lse = trunk_attention_hopper._merged(*partial)
    exact = np.exp2(scores - scores.max(1, keepdims=True))
    expected = np.where(seen[:, None], (exact @ values) / exact.sum(1, keepdims=True), 0)
    np.testing.assert_allclose(out[0, 0], expected, atol=1e-5)
    natural = np.where(seen, np.logaddexp.reduce(scores * np.log(2), 1), NO_KEYS)
    np.testing.assert_allclose(lse[0, 0], natural, rtol=1e-6)


@pytest.mark.parametrize("rows, trunk, splits", [(512, 2048, 4), (512, 128, 2), (128, 30208, 16), (4096, 2048, 1)])
def test_splits_fill_the_device_once(rows, trunk, splits) -> None:
    assert trunk_attention_hopper.split_count((1, 8, rows, 128), trunk) == splits
