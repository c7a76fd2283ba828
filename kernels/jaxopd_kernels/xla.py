"""The XLA implementations: one row at a time by definition, chunks of rows in practice."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxopd_kernels.results import HeadStatistics, PairStatistics

Stats = TypeVar("Stats", HeadStatistics, PairStatistics)
CHUNK_BYTES = 1 << 26  # of float32 logits held at once per model, 64 MiB


def head_statistics(hidden: Array, head: Array, ids: Array, k: int, vocab_size: int) -> HeadStatistics:
    """The reference, in chunks of rows."""
    row = partial(_head_row, k=k)
    return _chunked(lambda h, i: jax.vmap(row)(_logits(h, head[:vocab_size]), i), vocab_size, hidden, ids)


def head_statistics_materialized(
    hidden: Array, head: Array, ids: Array, k: int, vocab_size: int
) -> HeadStatistics:
    """The reference with all logits [T, V] at once."""
    return jax.vmap(partial(_head_row, k=k))(_logits(hidden, head[:vocab_size]), ids)


def pair_statistics(
    hidden_s: Array, head_s: Array, hidden_t: Array, head_t: Array, ids: Array, forms: tuple, vocab_size: int
) -> PairStatistics:
    """The reference, in chunks of rows."""

    def chunk(h_s: Array, h_t: Array, i: Array) -> PairStatistics:
        return pair_statistics_materialized(h_s, head_s, h_t, head_t, i, forms, vocab_size)

    return _chunked(chunk, vocab_size, hidden_s, hidden_t, ids)


def pair_statistics_materialized(
    hidden_s: Array, head_s: Array, hidden_t: Array, head_t: Array, ids: Array, forms: tuple, vocab_size: int
) -> PairStatistics:
    """The reference with all logits [T, V] of both models at once."""
    z_s, z_t = _logits(hidden_s, head_s[:vocab_size]), _logits(hidden_t, head_t[:vocab_size])
    return jax.vmap(partial(_pair_row, forms=forms))(z_s, z_t, ids)


def _logits(hidden: Float[Array, "T D"], head: Float[Array, "V D"]) -> Float[Array, "T V"]:
    precision = lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else lax.Precision.DEFAULT
    return jnp.einsum("TD,VD->TV", hidden, head, precision=precision, preferred_element_type=jnp.float32)


def _chunked(work: Callable[..., Stats], vocab_size: int, *rows: Array) -> Stats:
    """Applies `work` to blocks of rows, one block after the other."""
    T = rows[0].shape[0]
    size = max(1, min(T, CHUNK_BYTES // (4 * vocab_size)))
    blocks = -(-T // size)
    if blocks == 1:
        return work(*rows)

    def blocked(x: Array) -> Array:
        padded = jnp.pad(x, [(0, blocks * size - T)] + [(0, 0)] * (x.ndim - 1))
        return padded.reshape(blocks, size, *x.shape[1:])

    out = lax.map(lambda block: work(*block), tuple(blocked(x) for x in rows))
    return jax.tree.map(lambda x: x.reshape(blocks * size, *x.shape[2:])[:T], out)


def _log_softmax(z: Float[Array, " V"]) -> tuple[Array, Array]:
    lse = jax.nn.logsumexp(z)
    return z - lse, lse


def _at(values: Float[Array, " V"], ids: Int[Array, " K"], missing: float) -> Float[Array, " K"]:
    return jnp.where(ids >= 0, values[jnp.maximum(ids, 0)], missing)


def _mean(p: Float[Array, " V"], x: Float[Array, " V"]) -> Float[Array, ""]:
    """sum_k p_k x_k with 0 * inf = 0, for tokens of probability zero."""
    return jnp.sum(jnp.where(p > 0, p * x, 0.0))


def _head_row(z: Float[Array, " V"], ids: Int[Array, " K"], *, k: int) -> HeadStatistics:
    log_p, lse = _log_softmax(z)
    top_log_p, top_ids = lax.top_k(log_p, k)
    return HeadStatistics(lse, -_mean(jnp.exp(log_p), log_p), top_ids, top_log_p, _at(log_p, ids, -jnp.inf))


def _pair_row(z_s: Float[Array, " V"], z_t: Float[Array, " V"], ids: Int[Array, " K"], *, forms: tuple) -> PairStatistics:
    (log_p, lse_s), (log_q, lse_t) = _log_softmax(z_s), _log_softmax(z_t)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    # One difference per token before any sum: two separate sums would cancel badly where P is close to Q.
    ratio = jnp.where(p > 0, log_q - log_p, 0.0)
    reverse_kl = -_mean(p, ratio)
    forward_kl = _mean(q, log_q - log_p)
    log_mixture = jnp.logaddexp(log_p, log_q) - jnp.log(2.0)
    js = 0.5 * (_mean(p, log_p - log_mixture) + _mean(q, log_q - log_mixture))
    centred = ratio + reverse_kl
    fs = [form(log_p, log_q) for form in forms]
    return PairStatistics(
        lse_s=lse_s,
        lse_t=lse_t,
        entropy_s=-_mean(p, log_p),
        entropy_t=-_mean(q, log_q),
        reverse_kl=reverse_kl,
        forward_kl=forward_kl,
        js=js,
        total_variation=0.5 * jnp.sum(jnp.abs(p - q)),
        l2=jnp.sqrt(jnp.sum((p - q) ** 2)),
        cosine=jnp.sum(p * q) / (jnp.sqrt(jnp.sum(p * p)) * jnp.sqrt(jnp.sum(q * q))),
        log_ratio_variance=_mean(p, centred**2),
        gradient_norm=jnp.sqrt(jnp.sum(jnp.where(p > 0, p * centred, 0.0) ** 2)),
        log_p=_at(log_p, ids, -jnp.inf),
        log_q=_at(log_q, ids, -jnp.inf),
        form_f=tuple(_at(f, ids, 0.0) for f in fs),
        form_fbar=tuple(_mean(p, f) for f in fs),
    )
