"""Masked grouped-query attention with its log-sum-exp, and the merge of two disjoint parts."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

NO_KEYS = -1e30  # log-sum-exp of an empty set of keys, finite so that merging two of them gives no NaN


def matmul_precision(dtype: jnp.dtype) -> lax.Precision:
    """Keeps float32 weights in float32 products; accelerators would round them to TF32 or bfloat16."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def masked_attention(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K h"],
    mask: Bool[Array, "B T S"],
) -> tuple[Float[Array, "B T H h"], Float[Array, "B T H"]]:
    """Attends q to the keys where `mask` is True: softmax(q k / sqrt(h)) v, and the log-sum-exp of the scores.

    H is a multiple of K (grouped queries). Scores and output are float32. A row without keys gives zeros and
    the log-sum-exp `NO_KEYS`.
    """
    B, T, H, h = q.shape
    K = k.shape[2]
    precision = matmul_precision(q.dtype)
    q_BTKGh = q.reshape(B, T, K, H // K, h)
    scores = jnp.einsum("BTKGh,BSKh->BKGTS", q_BTKGh, k, precision=precision, preferred_element_type=jnp.float32)
    keep = mask[:, None, None]
    scores = jnp.where(keep, scores * h**-0.5, NO_KEYS)
    peak = scores.max(-1)
    weights = jnp.where(keep, jnp.exp(scores - peak[..., None]), 0.0)
    total = weights.sum(-1)
    out = jnp.einsum(
        "BKGTS,BSKh->BTKGh", weights.astype(v.dtype), v, precision=precision, preferred_element_type=jnp.float32
    )
    out = out / jnp.maximum(total, 1e-30).transpose(0, 3, 1, 2)[..., None]
    lse = jnp.where(total > 0, peak + jnp.log(jnp.maximum(total, 1e-30)), NO_KEYS)
    return out.reshape(B, T, H, h), lse.transpose(0, 3, 1, 2).reshape(B, T, H)


def merge(
    out_a: Float[Array, "B T H h"],
    lse_a: Float[Array, "B T H"],
    out_b: Float[Array, "B T H h"],
    lse_b: Float[Array, "B T H"],
) -> Float[Array, "B T H h"]:
    """Joins attention over two disjoint sets of keys: (e^{lse_a} out_a + e^{lse_b} out_b) / (e^{lse_a} + e^{lse_b})."""
    lse = jnp.logaddexp(lse_a, lse_b)
    return jnp.exp(lse_a - lse)[..., None] * out_a + jnp.exp(lse_b - lse)[..., None] * out_b


def causal_attention(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B T K h"],
    v: Float[Array, "B T K h"],
    mask: Bool[Array, "B T"],
    *,
    block: int = 512,
) -> Float[Array, "B T H h"]:
    """Attends each position to the unmasked positions up to itself, `block` queries at a time.

    Scores take B H block T floats instead of B H T^2.
    """
    B, T, H, h = q.shape
    columns = jnp.arange(T)

    def attend(q_block: Array, rows: Array) -> Array:
        causal = rows[:, None] >= columns[None, :]
        return masked_attention(q_block, k, v, causal[None] & mask[:, None, :])[0]

    if block >= T:
        return attend(q, columns)
    blocks = -(-T // block)
    q_blocks = jnp.pad(q, ((0, 0), (0, blocks * block - T), (0, 0), (0, 0)))
    q_blocks = q_blocks.reshape(B, blocks, block, H, h).swapaxes(0, 1)
    rows = jnp.arange(blocks * block).reshape(blocks, block)
    out = lax.map(lambda pair: attend(*pair), (q_blocks, rows))
    return out.swapaxes(0, 1).reshape(B, blocks * block, H, h)[:, :T]
