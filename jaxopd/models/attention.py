"""Attention of whole sequences and of blocks over a cache, and the merge of attention over disjoint keys."""

import jax.numpy as jnp
from jax import lax
from jaxopd_kernels import NO_KEYS, Part, cache_attention
from jaxtyping import Array, Bool, Float


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
