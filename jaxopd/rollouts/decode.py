"""The compiled half of the engine: prefill of trunks, and PAGE decoding steps with refills from the queue."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax import lax
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from jaxopd.models.attention import combine, prefix_attention
from jaxopd.models.config import QwenConfig
from jaxopd.models.qwen import Qwen, linear
from jaxopd.rollouts.layout import Layout
from jaxopd.rollouts.sampling import SPREAD_BITS, draw_scored, draw_spread, log_prob, request_keys, warp
from jaxopd.rollouts.suffix import PAGE, Pages, Ring, page_attention, pages_needed, ring_attention, written

STOP, LENGTH = 0, 1  # finish reasons: a stop token was drawn; the token budget or the context ended
PREFILL_BYTES = 1 << 28  # of one layer's intermediate results


@struct.dataclass
class Trunks:
    """Keys and values of N trunks, per layer [N, K, L, h]."""

    keys: list[Array]
    values: list[Array]


@struct.dataclass
class Slots:
    """Who runs where; N groups of B slots."""

    request: Int[Array, "N B"]  # index into the group's queue, -1 idle
    token: Int[Array, "N B"]  # next token to feed
    start: Int[Array, "N B"]  # trunk tokens attended to
    step: Int[Array, "N B"]  # tokens drawn so far, also the private tokens fed; 0 when idle
    pointer: Int[Array, " N"]  # next request of the queue
    spread: Float[Array, "N B"] | None = None  # what is left of a spread number, -1 where it is used up
    bits: Float[Array, "N B"] | None = None  # of it that have been used


@struct.dataclass
class Queue:
    """R queued requests a group."""

    start: Int[Array, "N R"]  # trunk tokens attended to
    first: Int[Array, "N R"]  # first token to feed: the forced one, or the trunk's token before the cut
    limit: Int[Array, "N R"]  # tokens to draw at most
    id: Int[Array, "N R"]
    count: Int[Array, " N"]
    spread: Float[Array, "N R"] | None = None  # spread numbers; None: every draw is independent


@struct.dataclass
class Log:
    """What a block of steps drew; rows past the last step have request -1."""

    request: Int[Array, "PAGE N B"]
    step: Int[Array, "PAGE N B"]
    token: Int[Array, "PAGE N B"]
    raw_logp: Float[Array, "PAGE N B"]
    sampling_logp: Float[Array, "PAGE N B"]
    reason: Int[Array, "PAGE N B"]  # finish reason, -1 while running


def prefill_block(config: QwenConfig, groups: int, length: int) -> int:
    """Gives the tokens a trunk is computed at once: all, halved while the intermediate results pass PREFILL_BYTES."""
    block = length
    while block % 2 == 0 and prefill_bytes(config, groups, block) > PREFILL_BYTES:
        block //= 2
    return block


def prefill_bytes(config: QwenConfig, groups: int, block: int) -> int:
    """Counts three float32 copies of a block's inner MLP state, and two of its scores against a block of keys."""
    return 4 * groups * block * (3 * config.intermediate_size + 2 * config.num_heads * block)


def decode_bytes(config: QwenConfig, slots: int, scored: int) -> int:
    """Counts six float32 copies of a step's logits or, larger over a long trunk, two of a layer's scores and its keys.

    Compiled programs hold these on a CPU; the logits are that many for the sake of top-k and top-p. scored: the length
    of the trunk, 0 where a kernel attends to it.
    """
    keys = config.num_kv_heads * config.head_dim * scored
    return 4 * max(6 * slots * config.vocab_size, 2 * slots * config.num_heads * scored + keys)


@functools.partial(jax.jit, static_argnums=(0, 3))
def prefill(
    graph: nnx.GraphDef, state: nnx.State, tokens: Int[Array, "N L"], where: NamedSharding | None = None
) -> Trunks:
    """Computes keys and values, block by block. Padding follows the tokens, so it is never attended."""
    model = nnx.merge(graph, state)
    config = model.config
    N, L = tokens.shape
    block = prefill_block(config, N, L)
    shape = (N, config.num_kv_heads, L, config.head_dim)
    empty = [jnp.zeros(shape, model.dtype) for _ in range(config.num_layers)]

    def compute(i: Array, trunks: Trunks) -> Trunks:
        keys, values = list(trunks.keys), list(trunks.values)

        def attend(layer: int, q: Array, k: Array, v: Array) -> Array:
            for cache, new in ((keys, k), (values, v)):
                cache[layer] = lax.dynamic_update_slice_in_dim(cache[layer], new.swapaxes(1, 2), i * block, 2)
            return prefix_attention(q, keys[layer], values[layer], i)

        positions = jnp.broadcast_to((i * block + jnp.arange(block))[None], (N, block))
        model(lax.dynamic_slice_in_dim(tokens, i * block, block, 1), positions, attend)
        return Trunks(keys, values)

    trunks = lax.fori_loop(0, L // block, compute, Trunks(empty, list(empty)))
    return trunks if where is None else lax.with_sharding_constraint(trunks, where)


@jax.jit
def fill(queue: Queue, slots: Slots) -> Slots:
    """Gives every idle slot the next request of its group's queue, while there is one."""
    idle = slots.request < 0
    candidate = slots.pointer[:, None] + jnp.cumsum(idle, 1) - 1
    taken = idle & (candidate < queue.count[:, None])
    index = jnp.where(taken, candidate, 0)
    start, first = (jnp.take_along_axis(x, index, 1) for x in (queue.start, queue.first))
    spread = bits = None
    if queue.spread is not None:
        spread = jnp.where(taken, jnp.take_along_axis(queue.spread, index, 1), slots.spread)
        bits = jnp.where(taken, 0.0, slots.bits)
    return Slots(
        request=jnp.where(taken, candidate, slots.request),
        token=jnp.where(taken, first, slots.token),
        start=jnp.where(taken, start, slots.start),
        step=jnp.where(idle, 0, slots.step),
        pointer=slots.pointer + taken.sum(1, dtype=jnp.int32),
        spread=spread,
        bits=bits,
    )


@functools.partial(jax.jit, static_argnums=(0, 9), donate_argnums=(5, 6))
def decode_block(
    graph: nnx.GraphDef,
    state: nnx.State,
    trunks: Trunks,
    pages: Pages,
    queue: Queue,
    ring: Ring,
    slots: Slots,
    began: Int[Array, ""],
    settings: tuple,
    layout: Layout,
) -> tuple[Ring, Slots, Log, Array, Array, Array]:
    """Decodes up to PAGE steps from step `began` of the wave; stops early when every request is done.

    Returns besides the log whether anything still runs, whether a request still waits, and the pages the busiest device
    needs for the next block.
    """
    model = nnx.merge(graph, state)
    head = model.head()
    seed, temperature, top_p, top_k, stop_ids = settings
    as_it_is = (temperature == 1) & (top_p >= 1) & (top_k <= 0)  # draws from the student itself: one log-prob is both
    shape = (PAGE, *slots.request.shape)
    whole, real = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)
    log = Log(whole - 1, whole, whole, real, real, whole - 1)

    def running(carry: tuple) -> Array:
        return (carry[0] < PAGE) & (carry[2].request >= 0).any()

    def advance(carry: tuple) -> tuple:
        now, ring, slots, log = carry
        hidden, ring = _feed(model, layout, trunks, pages, ring, slots, began + now)
        logits = linear(hidden, head, jnp.dtype("float32"))
        warped = warp(logits, temperature, top_p, top_k)
        request = jnp.maximum(slots.request, 0)
        identity, limit = (jnp.take_along_axis(x, request, 1) for x in (queue.id, queue.limit))
        keys = request_keys(seed, identity.reshape(-1), slots.step.reshape(-1))
        token, sampled = draw_scored(keys, warped)
        if slots.spread is not None:
            slots, token, sampled = _drawn_evenly(slots, keys, warped, token, sampled)
        raw = lax.cond(as_it_is, lambda: sampled, lambda: log_prob(logits, token))
        token, raw, sampled = (x.reshape(slots.token.shape) for x in (token, raw, sampled))
        stopped = (token[..., None] == stop_ids[None, None]).any(-1)
        reason = jnp.where(stopped, STOP, jnp.where(slots.step + 1 >= limit, LENGTH, -1))
        reason = jnp.where(slots.request >= 0, reason, -1)
        entry = Log(slots.request, slots.step, token, raw, sampled, reason)
        log = jax.tree.map(lambda all_steps, new: all_steps.at[now].set(new), log, entry)
        request = jnp.where(reason >= 0, -1, slots.request)
        slots = fill(queue, slots.replace(token=token, step=slots.step + 1, request=request))
        return now + 1, ring, slots, log

    _, ring, slots, log = lax.while_loop(running, advance, (jnp.int32(0), ring, slots, log))
    needed = pages_needed(pages, slots.step.reshape(-1), ring.keys[0].shape[2], began + PAGE)
    return ring, slots, log, (slots.request >= 0).any(), (slots.pointer < queue.count).any(), needed


def _drawn_evenly(
    slots: Slots, keys: Array, logits: Float[Array, "NB V"], token: Int[Array, " NB"], logp: Float[Array, " NB"]
) -> tuple[Slots, Int[Array, " NB"], Float[Array, " NB"]]:
    """Replaces the draws of slots whose spread number is not used up by those it makes."""
    left, bits = slots.spread.reshape(-1), slots.bits.reshape(-1)
    active = left >= 0
    chosen, its_logp, left = draw_spread(jnp.maximum(left, 0.0), bits, keys, logits)
    bits = bits - its_logp / jnp.log(2.0)
    left = jnp.where(active & (bits < SPREAD_BITS), left, -1.0)
    place = slots.spread.shape
    slots = slots.replace(spread=left.reshape(place), bits=bits.reshape(place))
    return slots, jnp.where(active, chosen, token), jnp.where(active, its_logp, logp)


def _feed(
    model: Qwen, layout: Layout, trunks: Trunks, pages: Pages, ring: Ring, slots: Slots, now: Array
) -> tuple[Float[Array, "NB D"], Ring]:
    """Feeds each slot its next token; returns the hidden states and the ring with that token's keys and values."""
    N, B = slots.token.shape
    keys, values = list(ring.keys), list(ring.values)
    width = keys[0].shape[2]
    step = slots.step.reshape(-1)

    def attend(layer: int, q: Array, k: Array, v: Array) -> Array:
        keys[layer], values[layer] = written(keys[layer], k, now), written(values[layer], v, now)
        by_group = q.reshape(N, B, *q.shape[2:])
        out, lse = layout.attend_trunks(by_group, trunks.keys[layer], trunks.values[layer], slots.start)
        part = out.reshape(q.shape), lse.reshape(q.shape[:3])
        part = combine(part, ring_attention(q, keys[layer], values[layer], now, step))
        if pages.owner.shape[1]:
            part = combine(part, page_attention(q, pages.keys[layer], pages.values[layer], pages, width, now, step))
        return part[0]

    hidden = model(slots.token.reshape(-1, 1), (slots.start.reshape(-1) + step)[:, None], attend)
    return hidden[:, 0], Ring(keys, values)
