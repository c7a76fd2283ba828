"""Log-probabilities of a few tokens a row, differentiable, without logits of all rows at once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxopd_kernels import MAX_TOP_K, head_statistics, shards
from jaxtyping import Array, Float, Int

from jaxopd.models import linear

WAVE_BYTES = 1 << 28  # of float32 logits at a time


def token_log_probs(
    hidden: Float[Array, "R D"], head: Float[Array, "V D"], ids: Int[Array, "R K"]
) -> Float[Array, "R K"]:
    """Compute log P at ids, P = softmax(hidden head^T), differentiable in hidden and head.

    Rows go through in waves; the backward pass makes each wave's logits again, and sums the head's gradient in float32.
    """
    wide = head.astype(jnp.float32)  # a cotangent has its array's dtype

    def wave(hidden: Array, ids: Array) -> Array:
        logits = linear(hidden, wide.astype(head.dtype), jnp.dtype("float32"))
        return jnp.take_along_axis(logits, ids, -1) - jax.nn.logsumexp(logits, -1, keepdims=True)

    return _in_waves(wave, head.shape[0], hidden, ids)


def top_tokens(
    hidden: Float[Array, "R D"],
    head: Float[Array, "V D"],
    k: int,
    *,
    vocab_size: int | None = None,
    axis: str | None = None,
) -> Int[Array, "R k"]:
    """Find the k most probable tokens of each row, best first, ties by lower id; any k up to V.

    vocab_size, axis: as of head_statistics, the tokens that count and what the head's rows are split over.
    """
    if k <= MAX_TOP_K:
        return head_statistics(hidden, head, k=k, vocab_size=vocab_size, axis=axis).top_ids
    ids = shards.first_id(head.shape[0], axis) + jnp.arange(head.shape[0])

    def wave(hidden: Array) -> Array:
        logits = linear(hidden, head, jnp.dtype("float32"))
        if vocab_size is not None:
            logits = jnp.where(ids[None] < vocab_size, logits, -jnp.inf)
        best, where = lax.top_k(logits, min(k, head.shape[0]))
        return shards.merged_top_k(best, ids[where], k, axis)[1]

    return _in_waves(wave, head.shape[0], hidden)


def _in_waves(function: Callable[..., Array], vocabulary: int, *rows: Any) -> Array:
    R = rows[0].shape[0]
    size = min(R, max(1, WAVE_BYTES // (4 * vocabulary)))
    waves = -(-R // size)
    padded = (jnp.pad(x, ((0, waves * size - R), (0, 0))).reshape(waves, size, -1) for x in rows)
    out = lax.map(lambda wave: jax.checkpoint(function)(*wave), tuple(padded))
    return out.reshape(waves * size, -1)[:R]
