"""Mosaic GPU kernels for Hopper: the statistics of one or two LM heads in one pass, no logits in device memory.

A thread block has three warpgroups. One copies tiles of hidden states and of the heads into a ring in shared memory
(TMA); two multiply them (wgmma), 64 rows each, into float32 registers, and fold each finished tile of logits into the
rows' running sums (streaming.py) before the next. Both models go through the same ring, one after the other, so their
widths may differ. Blocks form clusters of row_blocks x column_blocks: a tile of a head is read once for all row blocks
of the cluster, a tile of hidden states once for all its column blocks, and multicast.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from jaxopd_kernels.one_pass import GROUP, Streamed
from jaxopd_kernels.streaming import EXCLUDED, Columns, Pass

DEPTH = 64  # hidden dimensions per step: 128 bytes of bfloat16, one swizzled line of shared memory
TILE_ROWS = 8  # of a swizzled tile in shared memory
WARPGROUP_ROWS = 64
CONSUMERS = 2
BLOCK_ROWS = WARPGROUP_ROWS * CONSUMERS
BLOCKS = 128  # thread blocks in flight; 132 multiprocessors take 32 clusters of four
LANES = 8  # clusters side by side on rows: keeps their hidden states, 8 x 256 rows, in the L2 cache
# By number of models: columns of a tile, stages of the ring, (row blocks, column blocks) of a cluster. The accumulators
# take 128 registers of a thread either way; two narrow tiles need more of each operand, so that both are multicast.
SHAPES = {1: (256, 4, (2, 1)), 2: (128, 5, (2, 2))}
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 40, 232

ROW_LAYOUT = plgpu.Layout.WGMMA.reduce(1)


class Plan(NamedTuple):
    """Sizes of one launch.

    columns: of a tile; stages: of the ring; cluster: (row blocks, column blocks); lanes, splits: the grid of clusters,
    over rows and over the vocabulary; tiles: column tiles that a block visits at most for each of its row blocks;
    row_clusters, column_steps: rows and vocabulary in units of what a cluster takes at a time; head_rows: that exist.
    """

    columns: int
    stages: int
    cluster: tuple[int, int]
    lanes: int
    splits: int
    tiles: int
    row_clusters: int
    column_steps: int
    vocab_size: int
    head_rows: int

    @property
    def rows(self) -> int:
        """Rows after padding."""
        return self.row_clusters * self.cluster[0] * BLOCK_ROWS

    @property
    def streams(self) -> int:
        """Partial results per row."""
        return self.splits * self.cluster[1]

    def column_start(self, tile: Any) -> Any:
        """The first column of a tile. The last tiles end with the head; what they share with others does not count."""
        return jnp.minimum(tile * self.columns, self.head_rows - self.columns)

    def counts(self, ids: Array, tile: Any) -> Array:
        """Whether a tile's columns are its own and in the vocabulary."""
        return (ids >= tile * self.columns) & (ids < self.vocab_size)


def plan(T: int, vocab_size: int, head_rows: int, models: int) -> Plan:
    """Spreads rows and a vocabulary over the clusters: few row lanes, as even as can be, the rest vocabulary splits."""
    columns, stages, cluster = SHAPES[models]
    cluster = (1, 1) if T <= BLOCK_ROWS else cluster
    row_clusters = -(-T // (cluster[0] * BLOCK_ROWS))
    groups = -(-row_clusters // LANES)
    lanes = -(-row_clusters // groups)
    column_steps = -(-vocab_size // (columns * cluster[1]))
    splits = min(max(1, BLOCKS // (cluster[0] * cluster[1] * lanes)), column_steps)
    tiles = -(-column_steps // splits)
    return Plan(columns, stages, cluster, lanes, splits, tiles, groups * lanes, column_steps, vocab_size, head_rows)


def launch(
    work: Pass,
    hidden: tuple[Float[Array, "T _"], ...],
    heads: tuple[Float[Array, "V _"], ...],
    vocab_size: int,
    given: tuple[Float[Array, "T"], ...] = (),
    maxima: bool = False,
) -> Streamed:
    """Streams the vocabulary past every row; see one_pass.Launch. Widths are multiples of 64, inputs bfloat16."""
    T, models = hidden[0].shape[0], work.models
    # copies begin at multiples of a swizzled tile's rows, and are whole
    heads = tuple(_padded_rows(w, max(-(-w.shape[0] // TILE_ROWS) * TILE_ROWS, SHAPES[models][0])) for w in heads)
    sizes = plan(T, vocab_size, min(w.shape[0] for w in heads), models)
    hidden = tuple(_padded_rows(x, sizes.rows) for x in hidden)
    given = tuple(_padded_rows(row[:, None], sizes.rows)[:, 0] for row in given)
    out = [jax.ShapeDtypeStruct((sizes.streams, len(work.start), sizes.rows), jnp.float32)]
    if maxima:
        groups = sizes.column_steps * sizes.cluster[1] * sizes.columns // GROUP
        out.append(jax.ShapeDtypeStruct((groups, sizes.rows), jnp.float32))
    sums, *rest = _kernel(work, sizes, out, hidden[0].dtype)(*hidden, *heads, *given)
    merged = work.merged(type(work.start)(*jnp.moveaxis(sums[:, :, :T], 1, 0)))
    return Streamed(merged, rest[0][:, :T], _group_columns(sizes)) if maxima else Streamed(merged)


def _group_columns(sizes: Plan) -> Int[Array, "G g"]:
    tile = jnp.arange(sizes.column_steps * sizes.cluster[1])[:, None]
    ids = sizes.column_start(tile) + jnp.arange(sizes.columns)[None]
    return jnp.where(sizes.counts(ids, tile), ids, -1).reshape(-1, GROUP)


def _padded_rows(x: Array, rows: int) -> Array:
    return x if x.shape[0] == rows else jnp.pad(x, ((0, rows - x.shape[0]), (0, 0)))


class _Refs(NamedTuple):
    """What the warpgroups of a block share: global memory, then shared memory, then barriers."""

    hidden: tuple[Any, ...]
    heads: tuple[Any, ...]
    given: tuple[Any, ...]
    out: Any
    maxima: Any
    hidden_ring: Any
    head_ring: Any
    sums: Any
    group_maxima: Any
    filled: Any
    freed: Any


def _kernel(work: Pass, sizes: Plan, out: list[jax.ShapeDtypeStruct], dtype: Any) -> Callable[..., list[Array]]:
    shared = sizes.cluster != (1, 1)
    swizzled = (plgpu.TilingTransform((TILE_ROWS, DEPTH)), plgpu.SwizzleTransform(128))
    freed = {"num_arrivals": CONSUMERS, "num_barriers": sizes.stages}
    scratch = {
        "hidden_ring": plgpu.SMEM((sizes.stages, BLOCK_ROWS, DEPTH), dtype, transforms=swizzled),
        "head_ring": plgpu.SMEM((sizes.stages, sizes.columns, DEPTH), dtype, transforms=swizzled),
        "sums": plgpu.SMEM((CONSUMERS, out[0].shape[1], WARPGROUP_ROWS), jnp.float32),
        "filled": plgpu.Barrier(num_arrivals=2, num_barriers=sizes.stages),
        # a block's copies land in its neighbours too, so their consumers have a say in when a slot is free
        "freed": plgpu.ClusterBarrier(collective_axes=("row", "column"), **freed) if shared else plgpu.Barrier(**freed),
    }
    if len(out) == 2:
        groups = sizes.columns // GROUP
        scratch["group_maxima"] = plgpu.SMEM((CONSUMERS, groups, WARPGROUP_ROWS), jnp.float32)

    def body(*refs: Any, group_maxima: Any = None, **scratch: Any) -> None:
        inputs, outputs = refs[: -len(out)], refs[-len(out) :]
        refs = _Refs(
            inputs[: work.models],
            inputs[work.models : 2 * work.models],
            inputs[2 * work.models :],
            outputs[0],
            outputs[1] if len(out) == 2 else None,
            group_maxima=group_maxima,
            **scratch,
        )
        schedule = _Schedule(sizes, refs)
        warpgroup = lax.axis_index("warpgroup")
        pl.when(warpgroup == CONSUMERS)(lambda: _produce(schedule))
        pl.when(warpgroup < CONSUMERS)(lambda: _consume(schedule, work, warpgroup))

    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=scratch,
        grid=(sizes.row_clusters * sizes.splits,),
        grid_names=("block",),
        cluster=sizes.cluster,
        cluster_names=("row", "column"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )


class _Schedule:
    """Which rows and columns this block visits in which order; the producer and the consumers walk it alike."""

    def __init__(self, sizes: Plan, refs: _Refs):
        self.sizes, self.refs = sizes, refs
        # Lanes first, then splits: what runs at a time fits the L2 cache, and passes the vocabulary in step.
        block, lane = _div_rem(lax.axis_index("block"), sizes.lanes)
        group, self.split = _div_rem(block, sizes.splits)
        self.row_cluster = group * sizes.lanes + lane
        self.row, self.column = lax.axis_index("row"), lax.axis_index("column")
        self.depths = [x.shape[1] // DEPTH for x in refs.hidden]
        self.steps = sum(self.depths)  # per tile
        self.tiles = jnp.minimum(sizes.tiles, sizes.column_steps - self.split * sizes.tiles)
        self.first_row = (self.row_cluster * sizes.cluster[0] + self.row) * BLOCK_ROWS

    def tile(self, i: Array) -> Array:
        """The i-th tile: neighbouring blocks of a cluster take neighbouring tiles."""
        return (self.split * self.sizes.tiles + i) * self.sizes.cluster[1] + self.column


def _div_rem(x: Array, y: int) -> tuple[Array, Array]:
    return lax.div(x, y), lax.rem(x, y)


def _produce(schedule: _Schedule) -> None:
    """Fills the ring's slots in turn, each once both consumers of every block it is copied to have freed it."""
    plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
    refs, sizes = schedule.refs, schedule.sizes
    to_columns = ("column",) if sizes.cluster[1] > 1 else None
    to_rows = ("row",) if sizes.cluster[0] > 1 else None

    def wait_for_slot(step: Array) -> Array:
        slot = lax.rem(step, sizes.stages)
        pl.when(step >= sizes.stages)(lambda: plgpu.barrier_wait(refs.freed.at[slot]))
        return slot

    rows = pl.ds(schedule.first_row, BLOCK_ROWS)

    @pl.loop(0, schedule.tiles)
    def _(i: Array) -> None:
        start = pl.multiple_of(sizes.column_start(schedule.tile(i)), TILE_ROWS)
        columns = pl.ds(start, sizes.columns)
        step = i * schedule.steps
        for hidden, head, depth in zip(refs.hidden, refs.heads, schedule.depths):

            @pl.loop(0, depth)
            def _(k: Array, hidden=hidden, head=head, step=step) -> None:
                slot = wait_for_slot(step + k)
                dims = pl.ds(k * DEPTH, DEPTH)
                filled = refs.filled.at[slot]
                plgpu.copy_gmem_to_smem(
                    hidden.at[rows, dims], refs.hidden_ring.at[slot], filled, collective_axes=to_columns
                )
                plgpu.copy_gmem_to_smem(
                    head.at[columns, dims], refs.head_ring.at[slot], filled, collective_axes=to_rows
                )

            step += depth

    # A block must not leave while its neighbours still copy into it or signal it.
    @pl.loop(0, sizes.stages)
    def _(i: Array) -> None:
        wait_for_slot(schedule.tiles * schedule.steps + i)


def _consume(schedule: _Schedule, work: Pass, warpgroup: Array) -> None:
    """Multiplies tiles and folds their logits into the sums of this warpgroup's rows."""
    plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
    refs, sizes = schedule.refs, schedule.sizes
    shape = (WARPGROUP_ROWS, sizes.columns)
    sums_ref = refs.sums.at[warpgroup]
    over_columns = Columns(
        total=lambda x: jnp.sum(x, axis=1),
        largest=lambda x: jnp.max(x, axis=1),
        spread=lambda row: lax.broadcast_in_dim(row, shape, [0]),
    )

    rows = pl.ds(schedule.first_row + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
    given = [plgpu.load(ref.at[rows], layout=ROW_LAYOUT, optimized=False) for ref in refs.given]
    for n, value in enumerate(work.start):
        sums_ref[n] = plgpu.layout_cast(jnp.full((WARPGROUP_ROWS,), value, jnp.float32), ROW_LAYOUT)

    @pl.loop(0, schedule.tiles)
    def _(i: Array) -> None:
        step = i * schedule.steps
        logits = []
        for depth in schedule.depths:
            logits.append(_product(refs, shape, warpgroup, step, depth))
            step += depth
        logits = _masked(logits, schedule, i)
        if refs.maxima is not None:
            _write_maxima(refs, logits[0], schedule.tile(i), warpgroup, rows)
        old = _Stored(sums_ref, work.start._fields)
        for n, value in enumerate(work.update(old, *logits, *given, over_columns)):
            sums_ref[n] = value

    plgpu.commit_smem()
    stream = schedule.split * sizes.cluster[1] + schedule.column
    plgpu.copy_smem_to_gmem(sums_ref, refs.out.at[stream, :, rows])
    plgpu.wait_smem_to_gmem(0)


class _Stored:
    """Sums in shared memory, each read where it is used: registers are for the tile."""

    def __init__(self, ref: Any, names: tuple[str, ...]):
        self._ref, self._names = ref, names

    def __getattr__(self, name: str) -> Array:
        return plgpu.load(self._ref.at[self._names.index(name)], layout=ROW_LAYOUT)


def _product(refs: _Refs, shape: tuple[int, int], warpgroup: Array, first_step: Array, depth: int) -> Array:
    """Multiplies the ring's next `depth` slots; each is freed once the product after it is under way."""
    stages = refs.filled.shape[0]
    rows = pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)

    def multiply(acc: Any) -> Array:
        @pl.loop(0, depth)
        def _(k: Array) -> None:
            slot = lax.rem(first_step + k, stages)
            plgpu.barrier_wait(refs.filled.at[slot])
            head = refs.head_ring.at[slot].transpose((1, 0))
            plgpu.wgmma(acc, refs.hidden_ring.at[slot, rows], head)
            plgpu.wgmma_wait(1)
            before = lax.rem(first_step + k + stages - 1, stages)
            pl.when(k > 0)(lambda: plgpu.barrier_arrive(refs.freed.at[before]))

        logits = acc[...]
        plgpu.barrier_arrive(refs.freed.at[lax.rem(first_step + depth - 1, stages)])
        return logits

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def _masked(logits: list[Array], schedule: _Schedule, i: Array) -> list[Array]:
    """Replaces columns past the vocabulary, or of the tile before, in the last tiles; the others are left alone."""
    sizes, tile = schedule.sizes, schedule.tile(i)
    if sizes.vocab_size % (sizes.columns * sizes.cluster[1]) == 0:
        return logits

    def mask() -> list[Array]:
        ids = plgpu.broadcasted_iota(jnp.int32, logits[0].shape, 1, layout=plgpu.Layout.WGMMA)
        counts = sizes.counts(ids + sizes.column_start(tile), tile)
        return [jnp.where(counts, z, EXCLUDED) for z in logits]

    return lax.cond((tile + 1) * sizes.columns > sizes.vocab_size, mask, lambda: logits)


def _write_maxima(refs: _Refs, z: Array, tile: Array, warpgroup: Array, rows: Any) -> None:
    staged = refs.group_maxima.at[warpgroup]
    groups = staged.shape[0]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for group in range(groups):
        staged[group] = jnp.max(z[:, group * GROUP : (group + 1) * GROUP], axis=1)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staged, refs.maxima.at[pl.ds(tile * groups, groups), rows])
