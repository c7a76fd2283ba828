"""One wave: a few trunks on the device, their queues, and the blocks of steps that empty them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxopd.distributed import fetch, place
from jaxopd.models.config import QwenConfig
from jaxopd.rollouts.decode import Queue, Slots, Trunks, decode_block, fill, prefill
from jaxopd.rollouts.layout import Layout
from jaxopd.rollouts.sampling import Sampling
from jaxopd.rollouts.suffix import FREE, PAGE, Pages, Ring, doubled, moved, places, ring_width, stored
from jaxopd.types import bucket


@dataclass(frozen=True)
class Requests:
    """R requests: attend to trunk[:cut], feed `forced` (-1: none), sample to the end. `id` seeds the draws.

    `limit` bounds the tokens drawn per request, under the run's max_tokens; None: max_tokens for all. `spread`, numbers
    in [0, 1), choose a rollout's first tokens (`draw_spread`); None: every draw is independent.
    """

    trunk: Int[np.ndarray, " R"]
    cut: Int[np.ndarray, " R"]
    forced: Int[np.ndarray, " R"]
    id: Int[np.ndarray, " R"]
    limit: Int[np.ndarray, " R"] | None = None
    spread: Float[np.ndarray, " R"] | None = None

    def __len__(self) -> int:
        return len(self.trunk)

    @classmethod
    def continuations(cls, trunks: Sequence[Sequence[int]], n: int) -> "Requests":
        """Asks for n continuations of each whole trunk."""
        trunk = np.repeat(np.arange(len(trunks)), n)
        cut = np.array([len(t) for t in trunks], np.int64)[trunk]
        return cls(trunk, cut, np.full(len(trunk), -1), np.arange(len(trunk)))


@dataclass(frozen=True)
class Drawn:
    """Tokens drawn in one block, in no order; M of them."""

    row: Int[np.ndarray, " M"]  # the request
    step: Int[np.ndarray, " M"]
    token: Int[np.ndarray, " M"]
    raw_logp: Float[np.ndarray, " M"]
    sampling_logp: Float[np.ndarray, " M"]
    reason: Int[np.ndarray, " M"]  # STOP, LENGTH, or -1 where the rollout goes on


class Wave:
    """Serves the requests `rows[i]` on trunk i; making one dispatches the prefill (unless `computed`) and returns."""

    def __init__(
        self,
        graph: nnx.GraphDef,
        state: nnx.State,
        config: QwenConfig,
        layout: Layout,
        trunks: list[Int[np.ndarray, " L"]],
        rows: list[Int[np.ndarray, " R"]],
        requests: Requests,
        sampling: Sampling,
        computed: Trunks | None = None,
    ):
        self.graph, self.state, self.config, self.layout = graph, state, config, layout
        self.rows, self.sampling = rows, sampling
        self.waiting = True  # whether the queue still holds requests
        N, B = layout.groups, layout.slots
        tokens = np.zeros((N, trunk_bucket(max(map(len, trunks)))), np.int32)
        for group, trunk in enumerate(trunks):
            tokens[group, : len(trunk)] = trunk
        by_group, by_slot = layout.sharding(layout.groups_axis), layout.sharding(layout.slots_axes)
        if computed is None:
            where = layout.sharding(layout.trunks_axes) if layout.heads else None
            computed = prefill(graph, state, place(tokens, by_group), where)
        self.trunks = computed
        self.queue = place(_queue(config, trunks, rows, requests, sampling, N), by_group)
        idle = place(np.zeros((N, B), np.int32), by_slot)
        pointer = place(np.zeros(N, np.int32), by_group)
        unspread = None if requests.spread is None else place(np.full((N, B), -1.0, np.float32), by_slot)
        self.slots = fill(self.queue, Slots(idle - 1, idle, idle, idle, pointer, unspread, unspread))

    def blocks(self) -> Iterator[Drawn]:
        """Decodes PAGE steps at a time until every request is answered."""
        width = ring_width(self.sampling.max_tokens)
        ring, pages = Ring(*self._caches(width, self.layout.groups * self.layout.slots)), self._pages(0)
        settings, now = _settings(self.sampling), 0
        while True:
            held = self.trunks, pages, self.queue, ring, self.slots
            ring, self.slots, *out = decode_block(self.graph, self.state, *held, np.int32(now), settings, self.layout)
            log, active, self.waiting, needed = fetch(out)
            steps, groups, _ = picked = np.nonzero(log.request >= 0)
            row = np.empty(len(steps), np.int64)
            for group, members in enumerate(self.rows):
                here = groups == group
                row[here] = members[log.request[picked][here]]
            yield Drawn(row, *(x[picked] for x in (log.step, log.token, log.raw_logp, log.sampling_logp, log.reason)))
            if not active:
                return
            now += PAGE
            if self.sampling.max_tokens > width:
                pages = self._turn(pages, ring, now, int(needed))

    def _caches(self, width: int, *outer: int) -> tuple[list[Array], list[Array]]:
        """Makes zeroed keys and values [*outer, K, width, h] of every layer, the first axis over "data"."""
        shape = (*outer, self.config.num_kv_heads, width, self.config.head_dim)
        heads = self.layout.heads
        # Spelled as jit spells what it returns: another spelling of the same would be compiled anew.
        axes = P("data", *[None] * (len(outer) - 1), heads) if heads else P("data")
        dtype, where = self.trunks.keys[0].dtype, self.layout.sharding(axes)
        keys, values = ([jnp.zeros(shape, dtype, device=where) for _ in range(self.config.num_layers)] for _ in "kv")
        return keys, values

    def _pages(self, size: int) -> Pages:
        C, where = self.layout.mesh.shape["data"], self.layout.sharding(P("data"))
        owner, block = (place(np.full((C, size), value, np.int32), where) for value in (0, FREE))
        return Pages(*self._caches(PAGE, C, size), owner, block)

    def _turn(self, pages: Pages, ring: Ring, now: int, needed: int) -> Pages:
        """Saves what the next block overwrites, in a larger or smaller pool where `needed` asks for one."""
        step = self.slots.step.reshape(self.layout.mesh.shape["data"], -1)
        before, size = pages.owner.shape[1], doubled(step.shape[1], needed) if needed else 0
        if size == 0:
            return pages if before == 0 else self._pages(0)
        if before == 0:
            pages, before = self._pages(size), size
        now, width = np.int32(now), ring.keys[0].shape[2]
        owner, block, order, target = places(pages.owner, pages.block, step, now, width=width, size=size)
        for caches, news in ((pages.keys, ring.keys), (pages.values, ring.values)):
            for layer, new in enumerate(news):  # one layer at a time: only one is ever held twice
                cache = caches[layer] if size == before else moved(caches[layer], order)
                caches[layer] = stored(cache, new, target, now)
        return Pages(pages.keys, pages.values, owner, block)


def _queue(
    config: QwenConfig,
    trunks: list[np.ndarray],
    rows: list[np.ndarray],
    requests: Requests,
    sampling: Sampling,
    groups: int,
) -> Queue:
    R = doubled(256, max(map(len, rows)))  # a queue is a few numbers a request; another length would compile anew
    start, first, limit, identity = (np.zeros((groups, R), np.int32) for _ in range(4))
    count = np.zeros(groups, np.int32)
    spread = None if requests.spread is None else np.full((groups, R), -1.0, np.float32)
    for group, (trunk, members) in enumerate(zip(trunks, rows, strict=True)):
        cut, forced, n = requests.cut[members], requests.forced[members], len(members)
        # Without a forced token the trunk's last token is fed again: its logits start the rollout.
        start[group, :n] = np.where(forced >= 0, cut, cut - 1)
        first[group, :n] = np.where(forced >= 0, forced, trunk[cut - 1])
        limit[group, :n] = np.minimum(sampling.max_tokens, config.max_positions - start[group, :n] - 1)
        if requests.limit is not None:
            limit[group, :n] = np.minimum(limit[group, :n], requests.limit[members])
        identity[group, :n], count[group] = requests.id[members], n
        if spread is not None:
            spread[group, :n] = requests.spread[members]
    return Queue(start, first, limit, identity, count, spread)


def _settings(sampling: Sampling) -> tuple:
    stop = np.full(bucket(len(sampling.stop_ids), 8), -1, np.int32)
    stop[: len(sampling.stop_ids)] = sampling.stop_ids
    return (
        np.uint32(sampling.seed & 0xFFFFFFFF),
        np.float32(sampling.temperature),
        np.float32(sampling.top_p),
        np.int32(sampling.top_k),
        stop,
    )


def trunk_bucket(length: int) -> int:
    """Rounds up to 4, 5, 6 or 7 times a power of two, at least 8: at most a quarter of a trunk is padding."""
    quarter = max(8, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // quarter) * quarter
