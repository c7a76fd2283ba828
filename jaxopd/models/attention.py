"""Attention of whole sequences and of blocks over a cache, and the merge of attention over disjoint keys."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxopd_kernels import NO_KEYS, Part, cache_attention
from jaxtyping import Array, Bool, Float

BLOCK = 512  # queries of a sequence that `causal_attention` takes at a time


def combine(a: Part, b: Part) -> Part:
    """Joins attention over two disjoint sets of keys: (e^{lse_a} out_a + e^{lse_b} out_b) / (e^{lse_a} + e^{lse_b})."""
    lse = jnp.logaddexp(a[1], b[1])
    return jnp.exp(a[1] - lse)[..., None] * a[0] + jnp.exp(b[1] - lse)[..., None] * b[0], lse


def causal_attention(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B T K h"],
    v: Float[Array, "B T K h"],
    mask: Bool[Array, "B T"],
    *,
    block: int = BLOCK,
) -> Float[Array, "B T H h"]:
    """Attends each position to the unmasked positions up to itself, `block` queries at a time.

    Scores take B H block T floats instead of B H T^2, in the backward pass too, which computes a block's again.
    """
    T = q.shape[1]
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    if block >= T:
        return _attend(q, k, v, mask, jnp.zeros((), jnp.int32))
    whole: Array = _by_blocks(block, jnp.pad(q, ((0, 0), (0, -T % block), (0, 0), (0, 0))), k, v, mask)
    return whole[:, :T]


def _attend(q: Array, k: Array, v: Array, mask: Array, first: Array) -> Array:
    """Attends queries at positions first, first + 1, ... to the unmasked keys up to themselves."""
    causal = (first + jnp.arange(q.shape[1]))[:, None] >= jnp.arange(k.shape[2])[None]
    return cache_attention(q, k, v, causal[None] & mask[:, None])[0]


def _part(x: Array, i: Array, block: int) -> Array:
    return lax.dynamic_slice_in_dim(x, i * block, block, 1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_blocks(block: int, q: Array, k: Array, v: Array, mask: Array) -> Array:
    # Loops start from arrays at hand, whatever they hold: a compiler would make the zeros of all layers' loops at once.
    def visit(i: Array, out: Array) -> Array:
        new = _attend(_part(q, i, block), k, v, mask, i * block)
        return lax.dynamic_update_slice_in_dim(out, new, i * block, 1)

    return lax.fori_loop(0, q.shape[1] // block, visit, q.astype(jnp.float32))


def _by_blocks_forward(block: int, *given: Array) -> tuple[Array, tuple[Array, ...]]:
    return _by_blocks(block, *given), given


def _by_blocks_backward(block: int, given: tuple[Array, ...], cotangent: Array) -> tuple[Array | None, ...]:
    q, k, v, mask = given

    def visit(i: Array, so_far: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        pullback = jax.vjp(lambda *qkv: _attend(*qkv, mask, i * block), _part(q, i, block), k, v)[1]
        dq, *dkv = pullback(_part(cotangent, i, block))
        sums = (jnp.where(i > 0, old, 0.0) + new.astype(jnp.float32) for old, new in zip(so_far[1:], dkv, strict=True))
        return lax.dynamic_update_slice_in_dim(so_far[0], dq, i * block, 1), *sums

    start = cotangent.astype(q.dtype), k.astype(jnp.float32), v.astype(jnp.float32)
    dq, dk, dv = lax.fori_loop(0, q.shape[1] // block, visit, start)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None


_by_blocks.defvjp(_by_blocks_forward, _by_blocks_backward)


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
