"""A vocabulary split over an axis of the mesh, inside jax.shard_map: what the shards know is merged exactly here.

Each device holds as many rows of a head, in the order of the ids: device i has ids i rows to (i + 1) rows - 1. The last
of them may lie past the vocabulary. `axis` is None where one device holds all; every function is then the identity.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

Tree = TypeVar("Tree")


def count(axis: str | None) -> int:
    """Gives the number of shards."""
    return 1 if axis is None else lax.axis_size(axis)


def first_id(rows: int, axis: str | None) -> int | Int[Array, ""]:
    """Gives the id of this shard's first row."""
    return 0 if axis is None else lax.axis_index(axis) * rows


def local_ids(ids: Int[Array, "T K"], rows: int, axis: str | None) -> Int[Array, "T K"]:
    """Turns ids into rows of this shard, -1 where an id is none of them."""
    local = ids - first_id(rows, axis)
    return jnp.where((local >= 0) & (local < rows), local, -1)


def largest(x: Array, axis: str | None) -> Array:
    """Takes the elementwise maximum over the shards."""
    return x if axis is None else lax.pmax(x, axis)


def total(tree: Tree, axis: str | None) -> Tree:
    """Adds the arrays of a tree over the shards."""
    return tree if axis is None else lax.psum(tree, axis)


def merged_top_k(
    values: Float[Array, "T n"], ids: Int[Array, "T n"], k: int, axis: str | None
) -> tuple[Float[Array, "T k"], Int[Array, "T k"]]:
    """Merges what each shard has sorted by value, then id: its best n = k columns, or all of them if they are fewer."""
    if axis is None or k == 0:
        return values, ids
    # In the order of the shards, hence of their ids: lax.top_k then gives ties to the lower one.
    values, ids = (lax.all_gather(x, axis, axis=1, tiled=True) for x in (values, ids))
    values, where = lax.top_k(values, k)
    return values, jnp.take_along_axis(ids, where, axis=1)


def merged_sums(sums: Any, merged: Callable[[Any], Any], axis: str | None) -> Any:
    """Merges each shard's running sums, a NamedTuple of [T], by a function of streams [shards, T]."""
    if axis is None:
        return sums
    gathered = lax.all_gather(jnp.stack(sums), axis, axis=1)
    return merged(type(sums)(*gathered))


def by_columns(function: Callable[[int], Tree], rows: int, vocab_size: int, axis: str | None) -> Tree:
    """Calls a function with the number of this shard's rows that are in the vocabulary, static in each call.

    Shards may differ in it: each device then runs its own branch of a switch, in which nothing may cross devices.
    """
    counts = [min(max(vocab_size - shard * rows, 0), rows) for shard in range(count(axis))]
    branches = sorted(set(counts))
    if len(branches) == 1:
        return function(counts[0])
    mine = jnp.array([branches.index(columns) for columns in counts])[lax.axis_index(axis)]
    return lax.switch(mine, [lambda columns=columns: function(columns) for columns in branches])
