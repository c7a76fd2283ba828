"""Pallas kernel for TPUs: the statistics of one or two LM heads in one pass, no logits in device memory.

The grid is (row blocks, column tiles, steps of the contraction). A block of hidden states stays in VMEM while the whole
vocabulary passes by. Logits are held transposed, vocabulary down the sublanes and rows along the lanes: sums over the
vocabulary are then additions of registers, and a number per row is one lane, not a register.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from jaxopd_kernels.one_pass import GROUP, Streamed
from jaxopd_kernels.streaming import EXCLUDED, Columns, Pass

LANES = 128
SUBLANES = 8
VMEM_BYTES = 48 << 20  # of 64 MiB on a TPU7x, 128 MiB on a v5e, v5p or v6e
HIDDEN_BYTES = 24 << 20  # of hidden states in VMEM, two buffers each

OVER_COLUMNS = Columns(
    total=lambda x: jnp.sum(x, axis=0, keepdims=True),
    largest=lambda x: jnp.max(x, axis=0, keepdims=True),
    spread=lambda row: row,
)


class Plan(NamedTuple):
    """Tile sizes: rows and columns of a tile of logits, hidden dimensions per step."""

    rows: int = 1024
    columns: int = 512
    depth: int = 512


def plan(T: int, widths: tuple[int, ...]) -> Plan:
    """Chooses tiles: as many rows as VMEM takes, since each row block reads both heads once, and as T has."""
    rows = Plan().rows
    while rows > LANES and (2 * 2 * rows * sum(widths) > HIDDEN_BYTES or rows >= 2 * T):
        rows //= 2
    return Plan(rows=rows)


def launch(
    work: Pass,
    hidden: tuple[Float[Array, "T _"], ...],
    heads: tuple[Float[Array, "V _"], ...],
    vocab_size: int,
    given: tuple[Float[Array, "T"], ...] = (),
    maxima: bool = False,
) -> Streamed:
    """Streams the vocabulary past every row; see one_pass.Launch. Widths are multiples of 128."""
    T, widths = hidden[0].shape[0], tuple(x.shape[1] for x in hidden)
    sizes = plan(T, widths)
    row_blocks, tiles = -(-T // sizes.rows), -(-vocab_size // sizes.columns)
    depths = [_largest_step(width, sizes.depth) for width in widths]
    steps = [width // depth for width, depth in zip(widths, depths)]
    in_specs = [pl.BlockSpec((sizes.rows, width), lambda i, j, k: (i, 0)) for width in widths]
    for depth, n in zip(depths, steps):  # the shorter model's last step is not fetched again
        in_specs.append(pl.BlockSpec((sizes.columns, depth), lambda i, j, k, n=n: (j, jnp.minimum(k, n - 1))))
    in_specs += [pl.BlockSpec((1, sizes.rows), lambda i, j, k: (0, i)) for _ in given]
    fields = -(-len(work.start) // SUBLANES) * SUBLANES
    out = [jax.ShapeDtypeStruct((fields, T), jnp.float32)]
    out_specs = [pl.BlockSpec((fields, sizes.rows), lambda i, j, k: (0, i))]
    groups = sizes.columns // GROUP
    if maxima:
        out.append(jax.ShapeDtypeStruct((tiles * groups, T), jnp.float32))
        out_specs.append(pl.BlockSpec((groups, sizes.rows), lambda i, j, k: (j, i)))
    sums, *rest = pl.pallas_call(
        partial(_body, work, sizes, vocab_size, steps, maxima),
        out_shape=out,
        grid=(row_blocks, tiles, max(steps)),
        in_specs=in_specs,
        out_specs=out_specs,
        scratch_shapes=[pltpu.VMEM((sizes.columns, sizes.rows), jnp.float32) for _ in hidden],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
    )(*hidden, *heads, *(row[None] for row in given))
    streamed = Streamed(type(work.start)(*sums[: len(work.start)]))
    if not maxima:
        return streamed
    ids = jnp.arange(tiles * sizes.columns)
    return streamed._replace(maxima=rest[0], columns=jnp.where(ids < vocab_size, ids, -1).reshape(-1, GROUP))


def _largest_step(width: int, most: int) -> int:
    """The largest multiple of LANES that divides a width and is at most `most`."""
    return max(step for step in range(LANES, most + 1, LANES) if width % step == 0)


def _body(work: Pass, sizes: Plan, vocab_size: int, steps: list[int], maxima: bool, *refs: Any) -> None:
    models = work.models
    hidden, heads, refs = refs[:models], refs[models : 2 * models], refs[2 * models :]
    logits, refs = refs[-models:], refs[:-models]
    maxima_ref = refs[-1] if maxima else None
    sums = refs[-2] if maxima else refs[-1]
    given = refs[: -2 if maxima else -1]
    j, k = pl.program_id(1), pl.program_id(2)

    @pl.when((j == 0) & (k == 0))
    def _() -> None:
        for n, value in enumerate(work.start):
            sums[n : n + 1] = jnp.full((1, sizes.rows), value, jnp.float32)

    for x, w, z, n in zip(hidden, heads, logits, steps):
        pl.when(k < n)(partial(_multiply, x, w, z, k))

    @pl.when(k == max(steps) - 1)
    def _() -> None:
        ids = j * sizes.columns + lax.broadcasted_iota(jnp.int32, logits[0].shape, 0)
        tiles = [jnp.where(ids < vocab_size, z[...], EXCLUDED) for z in logits]
        old = type(work.start)(*(sums[n : n + 1] for n in range(len(work.start))))
        new = work.update(old, *tiles, *(row[...] for row in given), OVER_COLUMNS)
        for n, value in enumerate(new):
            sums[n : n + 1] = value
        if maxima_ref is not None:
            maxima_ref[...] = jnp.max(tiles[0].reshape(-1, GROUP, sizes.rows), axis=1)


def _multiply(hidden: Any, head: Any, logits: Any, k: Array) -> None:
    """Adds one step of the contraction to a tile of logits [columns, rows]."""
    depth = head.shape[1]
    x = hidden[:, pl.ds(k * depth, depth)]
    product = lax.dot_general(head[...], x, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    logits[...] = jnp.where(k == 0, product, logits[...] + product)
