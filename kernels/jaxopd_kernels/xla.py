"""The XLA implementations: one in row chunks that never holds [T, V], one that does and follows the textbook."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxopd_kernels import shards
from jaxopd_kernels.products import product
from jaxopd_kernels.rows import at_ids, head_rows, pair_rows
from jaxopd_kernels.statistics import HeadStatistics, PairStatistics

# Float32 logits of one chunk of rows: at V = 151,936, 128 rows of two models. Fewer would make the heads' bytes the
# bound. Compiled for a CPU, a call holds some five times as much, and half of it keeps it under 1 GB.
CHUNK_BYTES = 256 << 20
CHUNK_BYTES_CPU = CHUNK_BYTES // 2

Statistics = TypeVar("Statistics", PairStatistics, HeadStatistics)


def logits(hidden: Float[Array, "T D"], head: Float[Array, "V D"], vocab_size: int) -> Float[Array, "T V"]:
    """Multiplies hidden states by the head's first vocab_size rows, accumulating and returning float32."""
    return product("td,vd->tv", hidden, head)[:, :vocab_size]


def shard_logits(
    hidden: Float[Array, "T D"], head: Float[Array, "rows D"], vocab_size: int, axis: str | None
) -> Float[Array, "T rows"]:
    """Multiplies hidden states by a shard's rows of the head; columns past the vocabulary are cut, or -inf."""
    if axis is None:
        return logits(hidden, head, vocab_size)
    z, rows = product("td,vd->tv", hidden, head), head.shape[0]
    if rows * shards.count(axis) == vocab_size:
        return z
    return jnp.where(jnp.arange(rows)[None] < vocab_size - shards.first_id(rows, axis), z, -jnp.inf)


def all_logits(
    hidden: Float[Array, "T D"], head: Float[Array, "rows D"], vocab_size: int, axis: str | None
) -> Float[Array, "T V"]:
    """Multiplies hidden states by the whole head and gathers what each shard has of the logits."""
    z = logits(hidden, head, vocab_size)
    return z if axis is None else jax.lax.all_gather(z, axis, axis=1, tiled=True)[:, :vocab_size]


def rows_per_chunk(row_bytes: int, chunk_bytes: int | None) -> int:
    """Gives the largest power of two of rows whose logits fit in the budget, at least 1."""
    if chunk_bytes is None:
        chunk_bytes = CHUNK_BYTES_CPU if jax.default_backend() == "cpu" else CHUNK_BYTES
    return 1 << max(0, (chunk_bytes // row_bytes).bit_length() - 1)


def in_chunks(function: Callable[..., Statistics], arrays: tuple[Array, ...], rows: int) -> Statistics:
    """Applies a function of rows to `rows` of them at a time, padding the last chunk with zeros."""
    T = arrays[0].shape[0]
    if rows >= T:
        return function(*arrays)
    chunks = -(-T // rows)

    def split(x: Array) -> Array:
        return jnp.pad(x, ((0, chunks * rows - T), (0, 0))).reshape(chunks, rows, -1)

    # As bits: XLA would convert all bfloat16 hidden states to float32 ahead of the loop, for CPUs.
    parts = [jax.lax.bitcast_convert_type(split(x), jnp.dtype(f"uint{8 * x.dtype.itemsize}")) for x in arrays]

    def one(parts: list[Array]) -> Statistics:
        return function(*(jax.lax.bitcast_convert_type(part, x.dtype) for part, x in zip(parts, arrays)))

    mapped = jax.lax.map(one, parts)
    return jax.tree.map(lambda x: x.reshape(chunks * rows, *x.shape[2:])[:T], mapped)


def pair_statistics(
    hidden_s: Float[Array, "T Ds"],
    head_s: Float[Array, "Vs Ds"],
    hidden_t: Float[Array, "T Dt"],
    head_t: Float[Array, "Vt Dt"],
    ids: Int[Array, "T K"],
    vocab_size: int,
    second_pass: bool = True,
    axis: str | None = None,
    chunk_bytes: int | None = None,
) -> PairStatistics:
    """Computes the statistics of two models a chunk of rows at a time."""

    def chunk(hidden_s: Array, hidden_t: Array, ids: Array) -> PairStatistics:
        z_s = shard_logits(hidden_s, head_s, vocab_size, axis)
        z_t = shard_logits(hidden_t, head_t, vocab_size, axis)
        return pair_rows(z_s, z_t, ids, second_pass, axis)

    rows = rows_per_chunk(4 * (head_s.shape[0] + head_t.shape[0]), chunk_bytes)
    return in_chunks(chunk, (hidden_s, hidden_t, ids), rows)


def head_statistics(
    hidden: Float[Array, "T D"],
    head: Float[Array, "V D"],
    ids: Int[Array, "T K"],
    k: int,
    vocab_size: int,
    axis: str | None = None,
    chunk_bytes: int | None = None,
) -> HeadStatistics:
    """Computes the statistics of one model a chunk of rows at a time."""

    def chunk(hidden: Array, ids: Array) -> HeadStatistics:
        return head_rows(shard_logits(hidden, head, vocab_size, axis), ids, k, axis)

    return in_chunks(chunk, (hidden, ids), rows_per_chunk(4 * head.shape[0], chunk_bytes))


def pair_statistics_materialized(
    hidden_s: Float[Array, "T Ds"],
    head_s: Float[Array, "Vs Ds"],
    hidden_t: Float[Array, "T Dt"],
    head_t: Float[Array, "Vt Dt"],
    ids: Int[Array, "T K"],
    vocab_size: int,
    second_pass: bool = True,
    axis: str | None = None,
) -> PairStatistics:
    """Computes the same from all [T, V] logits by the definitions; its small divergences are only good to 1e-5."""
    z_s, z_t = all_logits(hidden_s, head_s, vocab_size, axis), all_logits(hidden_t, head_t, vocab_size, axis)
    log_p, log_q = jax.nn.log_softmax(z_s), jax.nn.log_softmax(z_t)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    log_m = jnp.logaddexp(log_p, log_q) - jnp.log(2.0)
    f = log_q - log_p
    fbar = jnp.sum(p * f, axis=-1, keepdims=True)
    total = partial(jnp.sum, axis=-1)
    once = 1.0 if second_pass else jnp.nan
    return PairStatistics(
        logsumexp_student=jax.nn.logsumexp(z_s, axis=-1),
        logsumexp_teacher=jax.nn.logsumexp(z_t, axis=-1),
        entropy_student=-total(p * log_p),
        entropy_teacher=-total(q * log_q),
        reverse_kl=total(p * (log_p - log_q)),
        forward_kl=total(q * (log_q - log_p)),
        js=total(p * (log_p - log_m) + q * (log_q - log_m)) / 2 * once,
        js_student=total(p * (log_p - log_m)) * once,
        total_variation=total(jnp.abs(p - q)) / 2 * once,
        l2=jnp.linalg.norm(p - q, axis=-1),
        cosine=total(p * q) / (jnp.linalg.norm(p, axis=-1) * jnp.linalg.norm(q, axis=-1)),
        variance=total(p * (f - fbar) ** 2),
        gradient_norm=jnp.linalg.norm(p * (f - fbar), axis=-1),
        log_p=at_ids(log_p, ids),
        log_q=at_ids(log_q, ids),
    )


def head_statistics_materialized(
    hidden: Float[Array, "T D"],
    head: Float[Array, "V D"],
    ids: Int[Array, "T K"],
    k: int,
    vocab_size: int,
    axis: str | None = None,
) -> HeadStatistics:
    """Computes the same from all [T, V] logits by the definitions."""
    z = all_logits(hidden, head, vocab_size, axis)
    log_p = jax.nn.log_softmax(z)
    top_log_p, top_ids = jax.lax.top_k(log_p, k)
    return HeadStatistics(
        logsumexp=jax.nn.logsumexp(z, axis=-1),
        entropy=-jnp.sum(jnp.exp(log_p) * log_p, axis=-1),
        top_ids=top_ids,
        top_log_p=top_log_p,
        log_p=at_ids(log_p, ids),
    )
