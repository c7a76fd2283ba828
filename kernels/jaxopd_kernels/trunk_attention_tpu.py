"""Pallas TPU kernel: decode attention of many slots to one shared trunk.

The grid is (group, key-value head, block of rows, tile of keys), tiles innermost: the running sums of a block of rows
stay in VMEM while its tiles stream past. Rows are those of trunk_attention_rows.py. Tiles past the last key any row of
the block needs are neither fetched (their index is that of the last needed tile, already there) nor computed.

Scores are held transposed, keys down the sublanes and rows along the lanes: sums over keys are then additions of
registers, and a number per row is one lane, not a register.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from jaxopd_kernels.attention import NO_KEYS
from jaxopd_kernels.trunk_attention_rows import fold_rows, needed_tiles, unfold_rows, whole_tiles

LANES = 128
MOST_ROWS = 512  # of a block: 1 MB of scores; more rows would read the trunk less often
MOST_KEYS = 512  # of a tile
NEVER = -1e30  # a peak below every score, finite so that differences of two stay finite
CONTRACT_LAST, CONTRACT_FIRST = (((1,), (1,)), ((), ())), (((0,), (0,)), ((), ()))


def trunk_attention(
    q: Float[Array, "N B H h"], k: Float[Array, "N K L h"], v: Float[Array, "N K L h"], end: Int[Array, "N B"]
) -> tuple[Float[Array, "N B H h"], Float[Array, "N B H"]]:
    """Attends bfloat16 queries to the trunk; one whose length is no multiple of LANES is padded, that is, copied."""
    N, B, H, h = q.shape
    K, L = k.shape[1:3]
    block = min(MOST_ROWS, -(-B * H // K // LANES) * LANES)
    rows, ends, order = fold_rows(q, end, K, block)
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, -L % LANES), (0, 0))) for x in (k, v))
    tile = math.gcd(k.shape[2], MOST_KEYS)
    bounds = whole_tiles(ends, block, tile), needed_tiles(ends, block, tile)
    R, tiles = rows.shape[2], k.shape[2] // tile

    def of_rows(n, head, r, t, whole, needed):
        return n, head, r, 0

    def of_lse(n, head, r, t, whole, needed):
        return n, head, 0, r

    def of_end(n, head, r, t, whole, needed):
        return n, 0, r

    def of_tile(n, head, r, t, whole, needed):
        return n, head, jnp.clip(t, 0, jnp.maximum(needed[n, r] - 1, 0)), 0

    out, lse = pl.pallas_call(
        functools.partial(_kernel, tiles=tiles),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(bounds),
            grid=(N, K, R // block, tiles),
            in_specs=[
                pl.BlockSpec((None, None, block, h), of_rows),
                pl.BlockSpec((None, None, tile, h), of_tile),
                pl.BlockSpec((None, None, tile, h), of_tile),
                pl.BlockSpec((None, 1, block), of_end),
            ],
            out_specs=[pl.BlockSpec((None, None, block, h), of_rows), pl.BlockSpec((None, None, 1, block), of_lse)],
            scratch_shapes=[pltpu.VMEM((height, block), jnp.float32) for height in (h, 1, 1)],
        ),
        out_shape=[jax.ShapeDtypeStruct((N, K, R, h), jnp.float32), jax.ShapeDtypeStruct((N, K, 1, R), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        name="trunk_attention",
    )(*bounds, rows, k, v, ends[:, None])
    return unfold_rows(out, lse[:, :, 0], order, H)


def _kernel(whole, needed, q, k, v, end, out, lse, sums, peak, total, *, tiles):
    """Folds one tile of keys into the running (sums [h, R], peak [1, R], total [1, R]) of a block of rows."""
    group, block, tile = (pl.program_id(axis) for axis in (0, 2, 3))

    @pl.when(tile == 0)
    def _start():
        sums[...] = jnp.zeros_like(sums)
        peak[...] = jnp.full_like(peak, NEVER)
        total[...] = jnp.zeros_like(total)

    def attend(masked: bool) -> None:
        scores = lax.dot_general(k[...], q[...], CONTRACT_LAST, preferred_element_type=jnp.float32)
        scores *= 1 / math.sqrt(q.shape[1])
        if masked:
            keep = tile * k.shape[0] + lax.broadcasted_iota(jnp.int32, scores.shape, 0) < end[...]
            scores = jnp.where(keep, scores, NEVER)
        new_peak = jnp.maximum(peak[...], scores.max(0, keepdims=True))
        weight = jnp.exp(scores - new_peak)
        if masked:  # in a row without any key yet, masked scores are at the peak
            weight = jnp.where(keep, weight, 0.0)
        shrink = jnp.exp(peak[...] - new_peak)
        update = lax.dot_general(v[...], weight.astype(v.dtype), CONTRACT_FIRST, preferred_element_type=jnp.float32)
        sums[...] = sums[...] * shrink + update
        total[...] = total[...] * shrink + weight.sum(0, keepdims=True)
        peak[...] = new_peak

    unmasked = tile < whole[group, block]
    pl.when(unmasked)(functools.partial(attend, masked=False))
    pl.when(~unmasked & (tile < needed[group, block]))(functools.partial(attend, masked=True))

    @pl.when(tile == tiles - 1)
    def _finish():
        seen = total[...] > 0
        out[...] = (sums[...] / jnp.where(seen, total[...], 1.0)).T
        lse[...] = jnp.where(seen, peak[...] + jnp.log(jnp.where(seen, total[...], 1.0)), NO_KEYS)
