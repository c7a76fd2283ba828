"""How the trunk-attention kernels see their arguments: rows of one matrix per key-value head, and the tiles they need.

All slots of a group read the same keys, so the queries of all slots and of all query heads that share a key-value head
are rows of one matrix product. Slots are sorted by `end`, so that neighbouring rows need the same tiles of keys: row
b G + g is query head g of the slot whose end is the b-th smallest.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def fold_rows(
    q: Float[Array, "N B H h"], end: Int[Array, "N B"], kv_heads: int, multiple: int
) -> tuple[Float[Array, "N K R h"], Int[Array, "N R"], Int[Array, "N B"]]:
    """Folds slots and grouped query heads into R rows per key-value head, padded to a multiple of `multiple`.

    Gives the rows, their ends and the order of the slots. Padded rows end where the last row ends, so that they ask for
    no tile of their own.
    """
    N, B, H, h = q.shape
    G = H // kv_heads
    order = jnp.argsort(end, axis=1)
    q, end = jnp.take_along_axis(q, order[..., None, None], 1), jnp.take_along_axis(end, order, 1)
    rows = q.reshape(N, B, kv_heads, G, h).transpose(0, 2, 1, 3, 4).reshape(N, kv_heads, B * G, h)
    missing = -B * G % multiple
    ends = jnp.pad(jnp.repeat(end.astype(jnp.int32), G, 1), ((0, 0), (0, missing)), mode="edge")
    return jnp.pad(rows, ((0, 0), (0, 0), (0, missing), (0, 0))), ends, order


def unfold_rows(
    out: Float[Array, "N K R h"], lse: Float[Array, "N K R"], order: Int[Array, "N B"], heads: int
) -> tuple[Float[Array, "N B H h"], Float[Array, "N B H"]]:
    """Undoes `fold_rows` for the output and its log-sum-exp."""
    N, K, _, h = out.shape
    B, G = order.shape[1], heads // K
    out, lse = out[:, :, : B * G].reshape(N, K, B, G, h), lse[:, :, : B * G].reshape(N, K, B, G)
    out, lse = out.transpose(0, 2, 1, 3, 4).reshape(N, B, heads, h), lse.transpose(0, 2, 1, 3).reshape(N, B, heads)
    place = jnp.argsort(order, axis=1)
    return jnp.take_along_axis(out, place[..., None, None], 1), jnp.take_along_axis(lse, place[..., None], 1)


def whole_tiles(end: Int[Array, "N R"], rows: int, tile: int) -> Int[Array, "N R/rows"]:
    """Counts, per block of rows, the leading tiles of keys that every row attends to in full: no mask is needed."""
    return end.reshape(len(end), -1, rows).min(-1) // tile


def needed_tiles(end: Int[Array, "N R"], rows: int, tile: int) -> Int[Array, "N R/rows"]:
    """Counts, per block of rows, the leading tiles of keys that some row attends to."""
    return -(-end.reshape(len(end), -1, rows).max(-1) // tile)
