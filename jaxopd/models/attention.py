"""Masked grouped-query attention with its log-sum-exp, and the merge of disjoint parts.

Caches are head-major, [B, K, S, h]: each head's keys lie together, so that a matrix product reads them in order. With
the sequence before the heads XLA transposes the whole cache at every decoding step (8 times slower on a CPU).
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

NO_KEYS = -1e30  # log-sum-exp of an empty set of keys, finite so that merging two of them gives no NaN
Part = tuple[Float[Array, "B T H h"], Float[Array, "B T H"]]  # attention over some keys, and its log-sum-exp


def matmul_precision(dtype: jnp.dtype) -> lax.Precision:
    """Keeps float32 weights in float32 products; accelerators would round them to TF32 or bfloat16."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def cache_attention(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B K S h"],
    v: Float[Array, "B K S h"],
    mask: Bool[Array, "B T S"],
) -> Part:
    """Attends q to the keys where `mask` is True: softmax(q k / sqrt(h)) v, and the log-sum-exp of the scores.

    H is a multiple of K (grouped queries). Scores and output are float32. A row without keys gives zeros and
    the log-sum-exp `NO_KEYS`.
    """
    B, T, H, h = q.shape
    K, S = k.shape[1:3]
    G = H // K
    precision = matmul_precision(q.dtype)
    # The queries of a group are rows of one matrix product against their head's keys.
    q_BKRh = q.reshape(B, T, K, G, h).transpose(0, 2, 1, 3, 4).reshape(B, K, T * G, h)
    scores = jnp.einsum("BKRh,BKSh->BKRS", q_BKRh, k, precision=precision, preferred_element_type=jnp.float32)
    keep = jnp.broadcast_to(mask[:, None, :, None], (B, 1, T, G, S)).reshape(B, 1, T * G, S)
    scores = jnp.where(keep, scores * h**-0.5, NO_KEYS)
    peak = scores.max(-1)
    weights = jnp.where(keep, jnp.exp(scores - peak[..., None]), 0.0)
    total = weights.sum(-1)
    out = jnp.einsum(
        "BKRS,BKSh->BKRh", weights.astype(v.dtype), v, precision=precision, preferred_element_type=jnp.float32
    )
    out = out / jnp.maximum(total, 1e-30)[..., None]
    lse = jnp.where(total > 0, peak + jnp.log(jnp.maximum(total, 1e-30)), NO_KEYS)
    out = out.reshape(B, K, T, G, h).transpose(0, 2, 1, 3, 4).reshape(B, T, H, h)
    return out, lse.reshape(B, K, T, G).transpose(0, 2, 1, 3).reshape(B, T, H)


def masked_attention(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K h"],
    mask: Bool[Array, "B T S"],
) -> Part:
    """Does what `cache_attention` does, for keys and values as a layer makes them, sequence before heads."""
    return cache_attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask)


def combine(a: Part, b: Part) -> Part:
    """Joins attention over two disjoint sets of keys: (e^{lse_a} out_a + e^{lse_b} out_b) / (e^{lse_a} + e^{lse_b})."""
    lse = jnp.logaddexp(a[1], b[1])
    return jnp.exp(a[1] - lse)[..., None] * a[0] + jnp.exp(b[1] - lse)[..., None] * b[0], lse


def merge(
    out_a: Float[Array, "B T H h"],
    lse_a: Float[Array, "B T H"],
    out_b: Float[Array, "B T H h"],
    lse_b: Float[Array, "B T H"],
) -> Float[Array, "B T H h"]:
    """Gives the output of `combine` alone."""
    return combine((out_a, lse_a), (out_b, lse_b))[0]


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
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)

    def attend(q_block: Array, rows: Array) -> Array:
        causal = rows[:, None] >= columns[None, :]
        return cache_attention(q_block, k, v, causal[None] & mask[:, None, :])[0]

    if block >= T:
        return attend(q, columns)
    blocks = -(-T // block)
    q_blocks = jnp.pad(q, ((0, 0), (0, blocks * block - T), (0, 0), (0, 0)))
    q_blocks = q_blocks.reshape(B, blocks, block, H, h).swapaxes(0, 1)
    rows = jnp.arange(blocks * block).reshape(blocks, block)
    out = lax.map(lambda pair: attend(*pair), (q_blocks, rows))
    return out.swapaxes(0, 1).reshape(B, blocks * block, H, h)[:, :T]


def prefix_attention(
    q: Float[Array, "B T H h"], k: Float[Array, "B K S h"], v: Float[Array, "B K S h"], block_index: Array
) -> Float[Array, "B T H h"]:
    """Attends the T queries at positions block_index T + (0 .. T-1) to the cached positions up to themselves.

    S is a multiple of T. Keys are taken T at a time, and none past the queries are read: scores take B H T^2 floats
    and the work follows the triangle.
    """
    B, T, H, h = q.shape
    rows = jnp.arange(T)

    def visit(j: Array, so_far: Part) -> Part:
        k_block, v_block = (lax.dynamic_slice_in_dim(x, j * T, T, 2) for x in (k, v))
        seen = (j * T + rows)[None, :] <= (block_index * T + rows)[:, None]
        return combine(so_far, cache_attention(q, k_block, v_block, jnp.broadcast_to(seen[None], (B, T, T))))

    nothing = (jnp.zeros((B, T, H, h), jnp.float32), jnp.full((B, T, H), NO_KEYS, jnp.float32))
    return lax.fori_loop(0, block_index + 1, visit, nothing)[0]
