"""Mosaic GPU kernel for Hopper: decode attention of many slots to one shared trunk.

A thread block takes 128 rows (trunk_attention_rows.py) of one key-value head and a share of the trunk's tiles. One
warpgroup copies tiles of keys and values into a ring in shared memory (TMA); two hold 64 rows each: scores (wgmma),
an online softmax in float32 registers, then weights times values (wgmma). The weights go through shared memory: ptxas
before 13.3 may overwrite the registers of a wgmma's left operand while it still reads them.

Few slots would leave most of the device idle, so the tiles a block of rows needs are split among `splits` thread
blocks. Each writes unnormalised sums; `_merged` joins them in a fixed order, so results do not vary between runs.
"""

import functools
import math

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from jaxopd_kernels.attention import NO_KEYS
from jaxopd_kernels.trunk_attention_rows import fold_rows, needed_tiles, unfold_rows, whole_tiles

TILE = 64  # keys per step
STAGES = 3  # tiles of keys and values in flight
WARPGROUP_ROWS = 64
CONSUMERS = 2
BLOCK_ROWS = WARPGROUP_ROWS * CONSUMERS
MULTIPROCESSORS = 132
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 40, 232
LOG2E = math.log2(math.e)
NEVER = -1e30  # a peak below every score, finite so that differences of two stay finite
ROW, MATRIX = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA


def trunk_attention(
    q: Float[Array, "N B H h"], k: Float[Array, "N K L h"], v: Float[Array, "N K L h"], end: Int[Array, "N B"]
) -> tuple[Float[Array, "N B H h"], Float[Array, "N B H"]]:
    """Attends bfloat16 queries to the trunk; a trunk whose length is no multiple of TILE is padded, that is, copied."""
    K, L = k.shape[1:3]
    missing = ((0, 0), (0, 0), (0, -L % TILE), (0, 0))
    rows, ends, order = fold_rows(q, end, K, BLOCK_ROWS)
    splits = split_count(rows.shape, L)
    whole = whole_tiles(ends, WARPGROUP_ROWS, TILE)
    needed = needed_tiles(ends, BLOCK_ROWS, TILE)
    partial = _partial_sums(rows, jnp.pad(k, missing), jnp.pad(v, missing), ends, whole, needed, splits)
    return unfold_rows(*_merged(*partial), order, q.shape[2])


def split_count(rows_shape: tuple[int, ...], trunk_length: int) -> int:
    """Chooses into how many thread blocks the trunk is split: as many as fill the device once, a tile each at least."""
    N, K, R, _ = rows_shape
    return max(1, min(MULTIPROCESSORS // (N * K * (R // BLOCK_ROWS)), -(-trunk_length // TILE)))


def _merged(
    sums: Float[Array, "S N K R h"], peak: Float[Array, "S N K R"], total: Float[Array, "S N K R"]
) -> tuple[Float[Array, "N K R h"], Float[Array, "N K R"]]:
    """Joins the splits: out = sum_s 2^(peak_s - m) sums_s / sum_s 2^(peak_s - m) total_s, with m the largest peak."""
    highest = peak.max(0)
    factor = jnp.exp2(peak - highest[None])
    whole = (factor * total).sum(0)
    out = (factor[..., None] * sums).sum(0) / jnp.where(whole > 0, whole, 1.0)[..., None]
    return out, jnp.where(whole > 0, highest / LOG2E + jnp.log(jnp.where(whole > 0, whole, 1.0)), NO_KEYS)


def _scratch(h: int, dtype: jnp.dtype) -> dict:
    swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    swizzled_f32 = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
    return {
        "q_tile": plgpu.SMEM((BLOCK_ROWS, h), dtype, transforms=swizzled),
        "k_ring": plgpu.SMEM((STAGES, TILE, h), dtype, transforms=swizzled),
        "v_ring": plgpu.SMEM((STAGES, TILE, h), dtype, transforms=swizzled),
        "weights": plgpu.SMEM((CONSUMERS, WARPGROUP_ROWS, TILE), dtype, transforms=swizzled),
        "sums_tile": plgpu.SMEM((CONSUMERS, WARPGROUP_ROWS, h), jnp.float32, transforms=swizzled_f32),
        "row_tile": plgpu.SMEM((2, CONSUMERS, WARPGROUP_ROWS), jnp.float32),
        "q_loaded": plgpu.Barrier(),
        # Keys and values arrive apart: the scores need not wait for the values.
        "k_loaded": plgpu.Barrier(num_barriers=STAGES),
        "v_loaded": plgpu.Barrier(num_barriers=STAGES),
        "consumed": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=STAGES),
    }


def _partial_sums(
    q: Float[Array, "N K R h"],
    k: Float[Array, "N K L h"],
    v: Float[Array, "N K L h"],
    end: Int[Array, "N R"],
    whole: Int[Array, "N R/64"],
    needed: Int[Array, "N R/128"],
    splits: int,
) -> tuple[Float[Array, "S N K R h"], Float[Array, "S N K R"], Float[Array, "S N K R"]]:
    """Gives per split and row sum_j w_j v_j, the peak of the scores s (log2 units), sum_j w_j; w_j = 2^(s_j - peak)."""
    N, K, R, h = q.shape
    row_shape = jax.ShapeDtypeStruct((splits, N, K, R), jnp.float32)

    @functools.partial(
        plgpu.kernel,
        out_type=[jax.ShapeDtypeStruct((*row_shape.shape, h), jnp.float32), row_shape, row_shape],
        grid=(N, K, R // BLOCK_ROWS, splits),
        grid_names=("group", "head", "rows", "split"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        scratch_types=_scratch(h, q.dtype),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    def trunk_attention_kernel(q, k, v, end, whole, needed, sums, peak, total, **scratch):
        group, block, split = (lax.axis_index(name) for name in ("group", "rows", "split"))
        # Tiles are shared out among the splits by what these rows need, not by the length of the trunk.
        tiles = needed[group, block]
        share = lax.div(tiles + (splits - 1), jnp.int32(splits))
        first = jnp.minimum(split * share, tiles)
        stop = jnp.minimum(first + share, tiles)
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == CONSUMERS)
        def _produce():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
            _produce_tiles(q, k, v, first, stop, **scratch)

        @pl.when(warpgroup < CONSUMERS)
        def _consume():
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
            unmasked_stop = jnp.clip(whole[group, block * CONSUMERS + warpgroup], first, stop)
            _consume_tiles(end, sums, peak, total, first, unmasked_stop, stop, **scratch)

    return trunk_attention_kernel(q, k, v, end, whole, needed)


def _produce_tiles(q, k, v, first, stop, *, q_tile, k_ring, v_ring, q_loaded, k_loaded, v_loaded, consumed, **_):
    """Copies this block's rows once, then its tiles of keys and values through the ring."""
    group, head, block = (lax.axis_index(name) for name in ("group", "head", "rows"))
    plgpu.copy_gmem_to_smem(q.at[group, head, pl.ds(block * BLOCK_ROWS, BLOCK_ROWS)], q_tile, q_loaded)
    steps = stop - first

    @pl.loop(0, steps)
    def _copy(step):
        stage = lax.rem(step, jnp.int32(STAGES))

        @pl.when(step >= STAGES)
        def _wait_for_room():
            plgpu.barrier_wait(consumed.at[stage])

        keys = pl.ds((first + step) * TILE, TILE)
        plgpu.copy_gmem_to_smem(k.at[group, head, keys], k_ring.at[stage], k_loaded.at[stage])
        plgpu.copy_gmem_to_smem(v.at[group, head, keys], v_ring.at[stage], v_loaded.at[stage])

    # Every arrival is awaited: a barrier must not be left in the middle of a phase.
    @pl.loop(jnp.maximum(steps - STAGES, 0), steps)
    def _drain(step):
        plgpu.barrier_wait(consumed.at[lax.rem(step, jnp.int32(STAGES))])


def _consume_tiles(
    end, sums, peak, total, first, unmasked_stop, stop, *,
    q_tile, k_ring, v_ring, weights, sums_tile, row_tile, q_loaded, k_loaded, v_loaded, consumed,
):  # fmt: skip
    """Runs the online softmax of 64 rows over the tiles first..stop; only those from unmasked_stop on need a mask."""
    group, head, block, split = (lax.axis_index(name) for name in ("group", "head", "rows", "split"))
    warpgroup = lax.axis_index("warpgroup")
    own = pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
    rows = pl.ds(block * BLOCK_ROWS + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
    end_of_row = plgpu.load(end.at[group, rows], layout=ROW, optimized=False)
    h = q_tile.shape[1]
    scale = LOG2E / math.sqrt(h)

    def attend(tile, carry, *, masked):
        acc, peak, total = carry
        stage = lax.rem(tile - first, jnp.int32(STAGES))

        def score(acc_ref):
            plgpu.wgmma(acc_ref, q_tile.at[own], k_ring.at[stage].transpose((1, 0)))
            return acc_ref[...]

        def weigh(acc_ref):
            plgpu.wgmma(acc_ref, weights.at[warpgroup], v_ring.at[stage])
            return acc_ref[...]

        plgpu.barrier_wait(k_loaded.at[stage])
        scores = pl.run_scoped(score, plgpu.ACC((WARPGROUP_ROWS, TILE), jnp.float32)) * scale
        if masked:
            column = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=MATRIX)
            keep = tile * TILE + column < _over_columns(end_of_row, TILE)
            scores = jnp.where(keep, scores, NEVER)
        new_peak = jnp.maximum(peak, scores.max(axis=1))
        weight = jnp.exp2(scores - _over_columns(new_peak, TILE))
        if masked:  # in a row without any key yet, masked scores are at the peak
            weight = jnp.where(keep, weight, 0.0)
        shrink = jnp.exp2(peak - new_peak)
        weights[warpgroup] = weight.astype(q_tile.dtype)
        plgpu.commit_smem()
        total = total * shrink + weight.sum(axis=1)
        acc = acc * _over_columns(shrink, h)
        plgpu.barrier_wait(v_loaded.at[stage])
        acc += pl.run_scoped(weigh, plgpu.ACC((WARPGROUP_ROWS, h), jnp.float32))
        plgpu.barrier_arrive(consumed.at[stage])
        return acc, new_peak, total

    start = (
        plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, h), jnp.float32), MATRIX),
        plgpu.layout_cast(jnp.full((WARPGROUP_ROWS,), NEVER, jnp.float32), ROW),
        plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS,), jnp.float32), ROW),
    )
    plgpu.barrier_wait(q_loaded)
    carry = lax.fori_loop(first, unmasked_stop, functools.partial(attend, masked=False), start)
    carry = lax.fori_loop(unmasked_stop, stop, functools.partial(attend, masked=True), carry)
    sums_tile[warpgroup], row_tile[0, warpgroup], row_tile[1, warpgroup] = carry
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(sums_tile.at[warpgroup], sums.at[split, group, head, rows])
    plgpu.copy_smem_to_gmem(row_tile.at[0, warpgroup], peak.at[split, group, head, rows])
    plgpu.copy_smem_to_gmem(row_tile.at[1, warpgroup], total.at[split, group, head, rows])
    plgpu.wait_smem_to_gmem(0)


def _over_columns(row_values: Float[Array, " R"], columns: int) -> Float[Array, "R C"]:
    return lax.broadcast_in_dim(row_values, (row_values.shape[0], columns), [0])
