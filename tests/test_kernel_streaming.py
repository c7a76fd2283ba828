"""What the scoring kernels compute from tiles of logits, in plain JAX against float64; and when a kernel is chosen."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxopd_kernels import choice, head_statistics, pair_statistics, streaming

OVER_COLUMNS = streaming.Columns(
    total=lambda x: jnp.sum(x, axis=-1), largest=lambda x: jnp.max(x, axis=-1), spread=lambda row: row[:, None]
)


@partial(jax.jit, static_argnames=("columns", "streams"))
def streamed(z_s, z_t, columns: int, streams: int) -> dict:
    """Feeds tiles of columns to several streams in turn and merges them, as a kernel does."""
    T, V = z_s.shape
    tiles = -(-V // columns)
    z_s, z_t = (jnp.pad(z, ((0, 0), (0, tiles * columns - V)), constant_values=streaming.EXCLUDED) for z in (z_s, z_t))
    parts = [streaming.PairSums(*(jnp.full(T, value, jnp.float32) for value in streaming.PAIR.start))] * streams
    for i in range(tiles):
        tile = slice(i * columns, (i + 1) * columns)
        parts[i % streams] = streaming.pair_tile(parts[i % streams], z_s[:, tile], z_t[:, tile], OVER_COLUMNS)
    return streaming.divergences(streaming.merged_pair(jax.tree.map(lambda *x: jnp.stack(x), *parts)))


def in_float64(z_s, z_t) -> dict[str, np.ndarray]:
    z_s, z_t = np.asarray(z_s, np.float64), np.asarray(z_t, np.float64)
    log_p, log_q = (z - np.logaddexp.reduce(z, axis=-1, keepdims=True) for z in (z_s, z_t))
    p, q, f = np.exp(log_p), np.exp(log_q), log_q - log_p
    centred = f - (p * f).sum(-1, keepdims=True)
    return {
        "logsumexp_student": np.logaddexp.reduce(z_s, axis=-1),
        "entropy_teacher": -(q * log_q).sum(-1),
        "reverse_kl": -(p * f).sum(-1),
        "forward_kl": (q * f).sum(-1),
        "l2": np.linalg.norm(p - q, axis=-1),
        "cosine": (p * q).sum(-1) / np.linalg.norm(p, axis=-1) / np.linalg.norm(q, axis=-1),
        "variance": (p * centred**2).sum(-1),
        "gradient_norm": np.linalg.norm(p * centred, axis=-1),
    }


@pytest.mark.parametrize("scale", [3.0, 0.3, 0.03])
@pytest.mark.parametrize("columns, streams", [(128, 1), (500, 3), (128, 20)])  # of 20 streams, 11 see no column
def test_streams_of_tiles_give_the_statistics(columns, streams, scale) -> None:
    rng = np.random.default_rng(streams)
    z_s = (4 * rng.standard_normal((24, 1031))).astype(np.float32)
    z_t = (z_s + scale * rng.standard_normal(z_s.shape)).astype(np.float32)
    z_s[:8, 77] += 60  # nearly all of P, while Q stays where it was
    z_t[4:12, 900] += 60
    z_s[12:16], z_t[12:14] = 2.5, -7.0  # constant rows
    got = streamed(z_s, z_t, columns, streams)
    for name, expected in in_float64(z_s, z_t).items():
        np.testing.assert_allclose(got[name], expected, rtol=3e-5, atol=1e-5, err_msg=name)
    assert min(got["reverse_kl"].min(), got["forward_kl"].min()) >= 0


@pytest.mark.parametrize("gap", [300, 1_000, 20_000])
def test_columns_of_next_to_no_probability_take_no_digits(gap) -> None:
    """A student whose first tiles lie far under the others: their log-ratios are far, and weigh nothing."""
    z_t = (4 * np.random.default_rng(0).standard_normal((64, 1031))).astype(np.float32)
    z_s = z_t - gap * (np.arange(1031) < 500).astype(np.float32)
    got, expected = streamed(z_s, z_t, 128, 4), in_float64(z_s, z_t)
    np.testing.assert_allclose(got["reverse_kl"], expected["reverse_kl"], atol=3e-6, rtol=0)


def test_one_pass_at_the_vocabulary_of_qwen3() -> None:
    rng = np.random.default_rng(0)
    z_s = (2.2 * rng.standard_normal((4, 151_936))).astype(np.float32)
    z_s[:, :40] += 14
    z_t = (z_s + 0.1 * rng.standard_normal(z_s.shape)).astype(np.float32)
    z_t[0] = z_s[0]
    got, expected = streamed(z_s, z_t, 8192, 4), in_float64(z_s, z_t)
    for name in ("reverse_kl", "forward_kl"):
        np.testing.assert_allclose(got[name], expected[name], atol=1e-5)
        assert got[name][0] == 0
    np.testing.assert_allclose(got["l2"], expected["l2"], rtol=1e-4, atol=1e-7)


def test_a_kernel_is_chosen_where_it_is_meant_to_win() -> None:
    def chosen(kind="NVIDIA H200", T=4096, V=151_936, widths=(1024, 4096), dtype=jnp.bfloat16, launches=1, k=0):
        return choice.choose(kind, T, V, widths, (jnp.dtype(dtype),), launches, k)

    assert chosen() == "hopper"
    assert chosen("NVIDIA H100 80GB HBM3") == "hopper"
    assert chosen("TPU v6 lite") == "tpu"
    assert chosen(launches=2) == "xla"  # the second pass costs more than moving the logits: 5,120 dimensions
    assert chosen(widths=(1024, 1024), launches=2) == "hopper"
    assert chosen(widths=(1024,), k=20) == "hopper"
    assert chosen(widths=(8192,), k=64) == "xla"  # the gathered candidates outweigh the logits
    for other in ({"T": 16}, {"V": 200}, {"dtype": jnp.float32}, {"widths": (1024, 100)}):
        assert chosen(**other) == "xla"
    for kind in ("cpu", "NVIDIA A100-SXM4-80GB", "TPU v4"):
        assert chosen(kind) == "xla"


@pytest.mark.parametrize("implementation", ["xla", "xla_materialized"])
def test_the_second_pass_can_be_left_out(implementation) -> None:
    rng = np.random.default_rng(1)
    hidden, head = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((5, 8), (33, 8)))
    op = partial(pair_statistics, hidden, head, hidden[::-1], head, jnp.zeros((5, 1), jnp.int32))
    whole, part = (op(second_pass=flag, implementation=implementation) for flag in (True, False))
    for name in ("js", "js_student", "total_variation"):
        assert np.isnan(getattr(part, name)).all()
        assert np.isfinite(getattr(whole, name)).all()
    np.testing.assert_array_equal(part.reverse_kl, whole.reverse_kl)


def test_what_a_kernel_cannot_serve_is_refused() -> None:
    hidden, head = jnp.ones((3, 96), jnp.bfloat16), jnp.ones((40, 96), jnp.bfloat16)
    for name, multiple in (("hopper", 64), ("tpu", 128)):
        with pytest.raises(ValueError, match=rf"found \(96,\), expected multiples of {multiple}"):
            head_statistics(hidden, head, implementation=name)
        with pytest.raises(ValueError, match="found float32, expected bfloat16"):
            head_statistics(jnp.ones((3, 128)), jnp.ones((40, 128)), implementation=name)
