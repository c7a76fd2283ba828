"""The private part of the cache: what each slot has fed since its trunk, in a ring and in pages.

The wave's clock counts decoding steps. All slots step together, so a step's keys go to one column of the `Ring`, which
holds the last W steps of every slot: one slice update, whatever the slots' lengths. Before a block of PAGE columns is
overwritten, each slot that still needs its part of it gets a page of a common pool; pages of finished requests are free
again. Rollouts of up to W tokens never meet a page, and for longer ones memory follows the tokens held.

A column and a page know the age of their tokens in steps; a token is a slot's own when it is no older than the slot's
request. To attend, a page gathers its owner's query instead of a slot its pages: keys are read once, where they lie.
Pages are split evenly over the devices and never leave their slot's device.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxopd_kernels import NO_KEYS, Part, cache_attention, product
from jaxtyping import Array, Float, Int

PAGE = 32  # tokens a page; also the decoding steps between two looks from the host
RING = 128  # columns of the ring at most
FREE = -(1 << 20)  # the block of a free page: too long ago for anybody


@struct.dataclass
class Ring:
    """The last W steps of S slots; step t is in column t mod W."""

    keys: list[Array]  # per layer [S, K, W, h]
    values: list[Array]


@struct.dataclass
class Pages:
    """Blocks of steps that left the ring; C devices with P pages each, b = S / C slots each."""

    keys: list[Array]  # per layer [C, P, K, PAGE, h]
    values: list[Array]
    owner: Int[Array, "C P"]  # slot, counted on its device
    block: Int[Array, "C P"]  # the block of the wave it holds, or FREE


def ring_width(max_tokens: int) -> int:
    """Gives W: the tokens of the longest rollout in whole pages' worth, doubled up to RING."""
    return doubled(PAGE, min(max_tokens, RING))


def doubled(least: int, size: int) -> int:
    """Doubles `least` until it reaches `size`: what grows by doubling meets few shapes, and each is compiled once."""
    while least < size:
        least *= 2
    return least


def written(cache: Float[Array, "S K W h"], new: Float[Array, "S 1 K h"], now: Array) -> Array:
    """Puts the keys or values of step `now` into their column."""
    return lax.dynamic_update_slice_in_dim(cache, new.swapaxes(1, 2), now % cache.shape[2], 2)


def ring_attention(q: Float[Array, "S 1 H h"], k: Array, v: Array, now: Array, step: Int[Array, " S"]) -> Part:
    """Attends each slot to its last min(step + 1, W) tokens, itself included."""
    width = k.shape[2]
    age = (now - jnp.arange(width)) % width
    return cache_attention(q, k, v, (age[None] <= step[:, None])[:, None])


def page_attention(
    q: Float[Array, "S 1 H h"], k: Array, v: Array, pages: Pages, width: int, now: Array, step: Int[Array, " S"]
) -> Part:
    """Attends each slot to its own tokens that have left the ring of `width` columns, at step `now`."""
    C, P = pages.owner.shape
    S, _, H, h = q.shape
    age = now - (pages.block[..., None] * PAGE + jnp.arange(PAGE)[None, None])
    mask = (age >= width) & (age <= _of_owner(step.reshape(C, -1), pages.owner)[..., None])
    q_pages = _of_owner(q.reshape(C, S // C, H * h), pages.owner).reshape(C * P, 1, H, h)
    flat = (C * P, *k.shape[2:])
    out, lse = cache_attention(q_pages, k.reshape(flat), v.reshape(flat), mask.reshape(C * P, 1, PAGE))
    return _joined(out.reshape(C, P, H, h), lse.reshape(C, P, H), pages.owner, S // C)


def _of_owner(x: Array, owner: Int[Array, "C P"]) -> Array:
    """Gives each page its owner's row of x [C, b, ...]."""
    return jax.vmap(lambda rows, index: rows[index])(x, owner)


def _joined(out: Float[Array, "C P H h"], lse: Float[Array, "C P H"], owner: Int[Array, "C P"], slots: int) -> Part:
    """Merges the pages' attention by owner, as a product with the 0/1 matrix of owners: scattered sums are slow."""
    peak = jax.vmap(lambda x, index: jnp.full((slots, x.shape[1]), NO_KEYS).at[index].max(x))(lse, owner)
    weight = jnp.exp(lse - _of_owner(peak, owner))
    owns = (jnp.arange(slots)[None, :, None] == owner[:, None]).astype(jnp.float32)
    total = product("CbP,CPH->CbH", owns, weight)
    mixed = product("CbP,CPHh->CbHh", owns, weight[..., None] * out)
    mixed = mixed / jnp.maximum(total, 1e-30)[..., None]
    joined = jnp.where(total > 0, peak + jnp.log(jnp.maximum(total, 1e-30)), NO_KEYS)
    C, _, H, h = mixed.shape
    return mixed.reshape(C * slots, 1, H, h), joined.reshape(C * slots, 1, H)


def living(owner: Int[Array, "C P"], block: Int[Array, "C P"], step: Int[Array, "C b"], now: Array) -> Array:
    """Says which pages hold a token of their owner's running request, before step `now` is fed."""
    youngest = now - (block * PAGE + PAGE - 1)
    return youngest <= _of_owner(step, owner)


def leaving(step: Array, width: int) -> Array:
    """Says which slots own a token of the block that the next PAGE steps overwrite."""
    return step > width - PAGE


def pages_needed(pages: Pages, step: Int[Array, " S"], width: int, now: Array) -> Int[Array, ""]:
    """Counts the pages the busiest device needs before step `now`."""
    step = step.reshape(pages.owner.shape[0], -1)
    alive = living(pages.owner, pages.block, step, now)
    return (alive.sum(1, dtype=jnp.int32) + leaving(step, width).sum(1, dtype=jnp.int32)).max()


@functools.partial(jax.jit, static_argnames=("width", "size"))
def places(
    owner: Int[Array, "C P"], block: Int[Array, "C P"], step: Int[Array, "C b"], now: Array, *, width: int, size: int
) -> tuple[Array, Array, Array, Array]:
    """Plans the end of a block, `now` being the next step: which pages stay, and which take what leaves the ring.

    Returns the owner and block of the new pool of `size` pages a device, the old page behind each new one (of use only
    where the size changes) and the page [C, b] that takes each slot's block (`size`, nowhere, where it owns none).
    """
    C, b = step.shape
    alive = living(owner, block, step, now)
    order = jnp.argsort(~alive, axis=1, stable=True)  # living pages first
    free = order
    block = jnp.where(alive, block, FREE)
    if size != owner.shape[1]:
        order = jnp.pad(order, ((0, 0), (0, max(0, size - order.shape[1]))))[:, :size]
        stays = jnp.arange(size)[None] < alive.sum(1)[:, None]
        owner = jnp.take_along_axis(owner, order, 1)
        block = jnp.where(stays, jnp.take_along_axis(block, order, 1), FREE)
        free = jnp.broadcast_to(jnp.arange(size)[None], (C, size))
    wanted = leaving(step, width)
    rank = alive.sum(1)[:, None] + jnp.cumsum(wanted, 1) - 1
    target = jnp.where(wanted, jnp.take_along_axis(free, jnp.clip(rank, 0, size - 1), 1), size)

    def recorded(values: Array, new: Array) -> Array:
        return jax.vmap(lambda x, index, y: x.at[index].set(y, mode="drop"))(values, target, new)

    slot = jnp.broadcast_to(jnp.arange(b)[None], (C, b))
    left = jnp.broadcast_to((now - width) // PAGE, (C, b))
    return recorded(owner, slot), recorded(block, left), order, target


@functools.partial(jax.jit, donate_argnums=0)
def stored(
    pool: Float[Array, "C P K PAGE h"], ring: Float[Array, "S K W h"], target: Int[Array, "C b"], now: Array
) -> Array:
    """Copies each slot's part of the block about to be overwritten to its page; target P drops it."""
    blocks = lax.dynamic_slice_in_dim(ring, now % ring.shape[2], PAGE, 2)
    blocks = blocks.reshape(*target.shape, *blocks.shape[1:])
    return jax.vmap(lambda x, index, y: x.at[index].set(y, mode="drop"))(pool, target, blocks)


@jax.jit
def moved(pool: Float[Array, "C P K PAGE h"], order: Int[Array, "C P2"]) -> Float[Array, "C P2 K PAGE h"]:
    """Copies pages to a pool of another size."""
    return jax.vmap(lambda x, index: x[index])(pool, order)
