"""The rollout engine: one trunk, many branches.

A trunk is a token sequence whose keys and values are computed once. A request is (trunk, cut, forced token or none,
id): attend to trunk[:cut], feed the forced token, sample to the end. No request has a prefill of its own.

Slots live on the device in groups; a group serves one trunk at a time. Its queue of requests is on the device too: a
slot that finishes takes the next request inside the decoding loop, and the host is asked only every `CHUNK` steps.
Attention of a slot is its trunk's part (one copy of the keys for the group, masked at the slot's cut) merged with its
private suffix. Draw t of request r depends on (seed, r, t) alone: not on slots, groups, devices or resumption.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxopd.errors import InputError
from jaxopd.models.attention import causal_attention, masked_attention, merge
from jaxopd.models.qwen import Qwen, linear
from jaxopd.models.sharding import data_mesh
from jaxopd.rollouts.sampling import Sampling, draw, request_keys, warp

CHUNK = 32  # decoding steps between two looks from the host
STOP, LENGTH = 0, 1  # finish reasons: a stop token was drawn; the token budget or the context ended


@dataclass(frozen=True)
class Requests:
    """R requests: attend to trunk[:cut], feed `forced` (-1: none), sample to the end. `id` seeds the draws.

    `limit` bounds the tokens drawn per request, under the run's max_tokens; None: max_tokens for all.
    """

    trunk: Int[np.ndarray, " R"]
    cut: Int[np.ndarray, " R"]
    forced: Int[np.ndarray, " R"]
    id: Int[np.ndarray, " R"]
    limit: Int[np.ndarray, " R"] | None = None

    def __len__(self) -> int:
        return len(self.trunk)

    @classmethod
    def continuations(cls, trunks: Sequence[Sequence[int]], n: int) -> "Requests":
        """Asks for n continuations of each whole trunk."""
        trunk = np.repeat(np.arange(len(trunks)), n)
        cut = np.array([len(t) for t in trunks], np.int64)[trunk]
        return cls(trunk, cut, np.full(len(trunk), -1), np.arange(len(trunk)))


@dataclass(frozen=True)
class Rollouts:
    """Sampled continuations in request order; the forced token is not part of them. Padding is -1 and 0."""

    tokens: Int[np.ndarray, "R S"]
    length: Int[np.ndarray, " R"]
    raw_logp: Float[np.ndarray, "R S"]  # under the untempered, untruncated student
    sampling_logp: Float[np.ndarray, "R S"]  # under the distribution the token was drawn from
    finish: Int[np.ndarray, " R"]  # STOP or LENGTH


@struct.dataclass
class Slots:
    """What the decoding loop carries; N groups of B slots, R queued requests a group."""

    keys: list[Array]  # per layer [N B, S, K, h]
    values: list[Array]
    request: Array  # [N, B] index into the group's queue, -1 idle
    token: Array  # [N, B] next token to feed
    start: Array  # [N, B] trunk tokens attended to
    step: Array  # [N, B] tokens drawn so far, also the private tokens fed
    pointer: Array  # [N] next request of the queue


@struct.dataclass
class Queue:
    start: Array  # [N, R] trunk tokens attended to
    first: Array  # [N, R] first token to feed: the forced one, or the trunk's token before the cut
    limit: Array  # [N, R] tokens to draw at most
    id: Array  # [N, R]
    count: Array  # [N]


class Engine:
    """Runs requests on `model` with up to `slots` sequences in flight, sharded over all local devices."""

    def __init__(self, model: Qwen, *, slots: int = 256, mesh: jax.sharding.Mesh | None = None):
        self.config = model.config
        self.mesh = data_mesh() if mesh is None else mesh
        self.slots = slots
        # Split once: walking the module at each call would cost more than a step of a small model.
        self.graph, state = nnx.split(model)
        self.state = jax.device_put(state, NamedSharding(self.mesh, PartitionSpec()))

    def run(self, trunks: Sequence[Sequence[int] | np.ndarray], requests: Requests, sampling: Sampling) -> Rollouts:
        """Answers every request. Raises InputError on a trunk, cut or token outside the model's range."""
        trunks = [np.asarray(trunk, np.int32) for trunk in trunks]
        self._check(trunks, requests)
        R = len(requests)
        tokens = np.full((R, sampling.max_tokens), -1, np.int32)
        raw, sampled = np.zeros((R, sampling.max_tokens), np.float32), np.zeros((R, sampling.max_tokens), np.float32)
        finish, length = np.zeros(R, np.int8), np.zeros(R, np.int32)
        for row, step, token, raw_logp, sampling_logp, reason in self._decode(trunks, requests, sampling):
            tokens[row, step], raw[row, step], sampled[row, step] = token, raw_logp, sampling_logp
            ended = reason >= 0
            finish[row[ended]], length[row[ended]] = reason[ended], step[ended] + 1
        longest = int(length.max(initial=0))
        return Rollouts(tokens[:, :longest], length, raw[:, :longest], sampled[:, :longest], finish)

    def _check(self, trunks: list[np.ndarray], requests: Requests) -> None:
        vocabulary, context = self.config.vocab_size, self.config.max_positions
        for index, trunk in enumerate(trunks):
            if len(trunk) == 0 or len(trunk) > context:
                raise InputError(f"trunk {index}: found {len(trunk)} tokens, expected 1 to {context} (the context)")
            if trunk.min() < 0 or trunk.max() >= vocabulary:
                raise InputError(f"trunk {index}: found a token outside the vocabulary, expected 0 to {vocabulary - 1}")
        if len(requests) == 0:
            return
        if requests.trunk.min() < 0 or requests.trunk.max() >= len(trunks):
            raise InputError(f"requests: found a trunk outside 0 to {len(trunks) - 1}")
        lengths = np.array([len(t) for t in trunks])[requests.trunk]
        # A request needs room for one token after what it attends to.
        full = requests.cut + (requests.forced >= 0) >= context
        wrong = (requests.cut < 1) | (requests.cut > lengths) | full
        if wrong.any():
            cut, most = requests.cut[wrong][0], min(lengths[wrong][0], context - 1)
            raise InputError(f"requests: found cut {cut}, expected 1 to {most} (trunk and context {context})")
        if requests.limit is not None and requests.limit.min() < 1:
            raise InputError(f"requests: found limit {requests.limit.min()}, expected at least 1 token to draw")
        if requests.forced.max() >= vocabulary:
            raise InputError(f"requests: found forced token {requests.forced.max()}, expected under {vocabulary}")

    def _decode(self, trunks: list[np.ndarray], requests: Requests, sampling: Sampling) -> Iterator[tuple]:
        """Yields flat (request row, step, token, raw log-prob, sampling log-prob, finish reason or -1) per chunk."""
        order, bounds = _by_trunk(requests)
        sizes = np.diff(bounds)
        served = np.flatnonzero(sizes)
        served = served[np.argsort(-sizes[served], kind="stable")]  # equal queues side by side finish together
        N, B = self._layout(len(served), int(sizes.max(initial=0)))
        for wave in range(0, len(served), N):
            members = served[wave : wave + N]
            rows = [order[bounds[m] : bounds[m + 1]] for m in members]
            yield from self._wave([trunks[m] for m in members], rows, requests, sampling, N, B)

    def _layout(self, trunks: int, most: int) -> tuple[int, int]:
        """Chooses N groups of B slots: as many slots a trunk as it has requests, then as many trunks as fit."""
        devices = self.mesh.size
        B = min(self.slots, _bucket(most, 1))
        N = max(1, min(_bucket(trunks, 1), self.slots // B))
        return (1, -(-B // devices) * devices) if N == 1 else (-(-N // devices) * devices, B)

    def _wave(
        self, trunks: list[np.ndarray], rows: list[np.ndarray], requests: Requests, sampling: Sampling, N: int, B: int
    ) -> Iterator[tuple]:
        grouped = NamedSharding(self.mesh, PartitionSpec("data") if N > 1 else PartitionSpec())
        slotted = NamedSharding(self.mesh, PartitionSpec("data") if N > 1 else PartitionSpec(None, "data"))
        flat = NamedSharding(self.mesh, PartitionSpec("data"))
        L = _bucket(max(map(len, trunks)), 32)
        tokens = np.zeros((N, L), np.int32)
        for group, trunk in enumerate(trunks):
            tokens[group, : len(trunk)] = trunk
        trunk_keys, trunk_values = _prefill(self.graph, self.state, jax.device_put(tokens, grouped))
        queue = jax.device_put(self._queue(trunks, rows, requests, sampling, N), grouped)
        settings = _settings(sampling)

        def zeros(size: int) -> list[Array]:
            shape = (N * B, size, self.config.num_kv_heads, self.config.head_dim)
            dtype = trunk_keys[0].dtype
            return [jax.device_put(jnp.zeros(shape, dtype), flat) for _ in range(self.config.num_layers)]

        room, longest = min(2 * CHUNK, _bucket(sampling.max_tokens, CHUNK)), 0
        idle = jax.device_put(np.zeros((N, B), np.int32), slotted)
        pointer = jax.device_put(np.zeros(N, np.int32), grouped)
        slots = Slots(zeros(room), zeros(room), idle - 1, idle, idle, idle, pointer)
        slots = _fill(queue, slots)
        while True:
            if longest + CHUNK > room and room < _bucket(sampling.max_tokens, CHUNK):
                # The suffix grows with the longest rollout met, not with the longest allowed.
                slots = slots.replace(keys=_widened(slots.keys, flat), values=_widened(slots.values, flat))
                room *= 2
            slots, out = _chunk(self.graph, self.state, trunk_keys, trunk_values, queue, slots, settings)
            request, step, token, raw, sampled, reason, active, longest = jax.device_get(out)
            steps, groups, places = np.nonzero(request >= 0)
            picked = (steps, groups, places)
            row = np.empty(len(steps), np.int64)
            for group, members in enumerate(rows):
                here = groups == group
                row[here] = members[request[picked][here]]
            yield row, step[picked], token[picked], raw[picked], sampled[picked], reason[picked]
            if not active:
                return

    def _queue(
        self, trunks: list[np.ndarray], rows: list[np.ndarray], requests: Requests, sampling: Sampling, N: int
    ) -> Queue:
        R = _bucket(max(map(len, rows)), 16)
        start, first, limit, identity = (np.zeros((N, R), np.int32) for _ in range(4))
        count = np.zeros(N, np.int32)
        for group, (trunk, members) in enumerate(zip(trunks, rows, strict=True)):
            cut, forced, n = requests.cut[members], requests.forced[members], len(members)
            # Without a forced token the trunk's last token is fed again: its logits start the rollout.
            start[group, :n] = np.where(forced >= 0, cut, cut - 1)
            first[group, :n] = np.where(forced >= 0, forced, trunk[cut - 1])
            limit[group, :n] = np.minimum(sampling.max_tokens, self.config.max_positions - start[group, :n] - 1)
            if requests.limit is not None:
                limit[group, :n] = np.minimum(limit[group, :n], requests.limit[members])
            identity[group, :n], count[group] = requests.id[members], n
        return Queue(start, first, limit, identity, count)


def rollout(
    model: Qwen, prompts: Sequence[Sequence[int]], n: int = 1, *, max_tokens: int = 128, slots: int = 256, **sampling
) -> Rollouts:
    """Samples n continuations of each prompt (token ids), in prompt order; row i belongs to prompt i // n.

    `sampling`: stop_ids, temperature, top_p, top_k, seed as in `Sampling`; stop_ids default to the checkpoint's.
    """
    settings = Sampling(max_tokens, **{"stop_ids": model.config.eos_token_ids, **sampling})
    trunks = [np.asarray(prompt, np.int32) for prompt in prompts]
    return Engine(model, slots=slots).run(trunks, Requests.continuations(prompts, n), settings)


def _bucket(n: int, least: int) -> int:
    """Rounds n up to a power of two (to multiples of 4096 beyond that), so that few shapes are compiled."""
    n = max(n, least)
    return 1 << (n - 1).bit_length() if n <= 4096 else -(-n // 4096) * 4096


def _widened(caches: list[Array], sharding: NamedSharding) -> list[Array]:
    """Doubles the suffix length of every layer's cache."""
    return [jax.device_put(jnp.pad(x, [(0, 0), (0, x.shape[1]), (0, 0), (0, 0)]), sharding) for x in caches]


def _by_trunk(requests: Requests) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(requests.trunk, kind="stable")
    most = int(requests.trunk.max(initial=-1)) + 1
    return order, np.searchsorted(requests.trunk[order], np.arange(most + 1))


def _settings(sampling: Sampling) -> tuple:
    stop = np.full(_bucket(len(sampling.stop_ids), 8), -1, np.int32)
    stop[: len(sampling.stop_ids)] = sampling.stop_ids
    return (
        np.uint32(sampling.seed & 0xFFFFFFFF),
        np.float32(sampling.temperature),
        np.float32(sampling.top_p),
        np.int32(sampling.top_k),
        stop,
    )


@functools.partial(jax.jit, static_argnums=0)
def _prefill(graph: nnx.GraphDef, state: nnx.State, tokens: Int[Array, "N L"]) -> tuple[list[Array], list[Array]]:
    """Computes the keys and values [N, L, K, h] of each layer. Padding follows the tokens, so it is never attended."""
    model = nnx.merge(graph, state)
    keys, values = [], []
    everything = jnp.ones(tokens.shape, bool)

    def attend(_: int, q: Array, k: Array, v: Array) -> Array:
        keys.append(k)
        values.append(v)
        return causal_attention(q, k, v, everything)

    model(tokens, jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape), attend)
    return keys, values


@jax.jit
def _fill(queue: Queue, slots: Slots) -> Slots:
    """Gives every idle slot the next request of its group's queue, while there is one."""
    idle = slots.request < 0
    candidate = slots.pointer[:, None] + jnp.cumsum(idle, 1) - 1
    taken = idle & (candidate < queue.count[:, None])
    index = jnp.where(taken, candidate, 0)
    start, first = (jnp.take_along_axis(x, index, 1) for x in (queue.start, queue.first))
    return slots.replace(
        request=jnp.where(taken, candidate, slots.request),
        token=jnp.where(taken, first, slots.token),
        start=jnp.where(taken, start, slots.start),
        step=jnp.where(taken, 0, slots.step),
        pointer=slots.pointer + taken.sum(1, dtype=jnp.int32),
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=5)
def _chunk(
    graph: nnx.GraphDef,
    state: nnx.State,
    trunk_keys: list[Array],
    trunk_values: list[Array],
    queue: Queue,
    slots: Slots,
    settings: tuple,
) -> tuple[Slots, tuple]:
    """Decodes up to CHUNK steps; stops early when every request is done."""
    model = nnx.merge(graph, state)
    head = model.head()
    seed, temperature, top_p, top_k, stop_ids = settings
    shape = (CHUNK, *slots.request.shape)
    log = (
        jnp.full(shape, -1, jnp.int32),  # request
        jnp.zeros(shape, jnp.int32),  # step
        jnp.zeros(shape, jnp.int32),  # token
        jnp.zeros(shape, jnp.float32),  # raw log-prob
        jnp.zeros(shape, jnp.float32),  # sampling log-prob
        jnp.full(shape, -1, jnp.int32),  # finish reason
    )

    def running(carry: tuple) -> Array:
        return (carry[0] < CHUNK) & (carry[1].request >= 0).any()

    def advance(carry: tuple) -> tuple:
        now, slots, log = carry
        hidden, keys, values = _feed(model, trunk_keys, trunk_values, slots)
        logits = linear(hidden, head, jnp.dtype("float32"))
        warped = warp(logits, temperature, top_p, top_k)
        identity = jnp.take_along_axis(queue.id, jnp.maximum(slots.request, 0), 1)
        token = draw(request_keys(seed, identity.reshape(-1), slots.step.reshape(-1)), warped)
        raw, sampled = (
            jnp.take_along_axis(jax.nn.log_softmax(x, -1), token[:, None], 1).reshape(slots.token.shape)
            for x in (logits, warped)
        )
        token = token.reshape(slots.token.shape).astype(jnp.int32)
        limit = jnp.take_along_axis(queue.limit, jnp.maximum(slots.request, 0), 1)
        stopped = (token[..., None] == stop_ids[None, None]).any(-1)
        reason = jnp.where(stopped, STOP, jnp.where(slots.step + 1 >= limit, LENGTH, -1))
        reason = jnp.where(slots.request >= 0, reason, -1)
        entry = (slots.request, slots.step, token, raw, sampled, reason)
        log = jax.tree.map(lambda whole, new: lax.dynamic_update_index_in_dim(whole, new, now, 0), log, entry)
        slots = slots.replace(keys=keys, values=values, token=token, step=slots.step + 1)
        slots = slots.replace(request=jnp.where(reason >= 0, -1, slots.request))
        return now + 1, _fill(queue, slots), log

    _, slots, log = lax.while_loop(running, advance, (jnp.int32(0), slots, log))
    live = slots.request >= 0
    return slots, (*log, live.any(), jnp.where(live, slots.step, 0).max())


def _feed(
    model: Qwen, trunk_keys: list[Array], trunk_values: list[Array], slots: Slots
) -> tuple[Float[Array, "NB D"], list[Array], list[Array]]:
    """Feeds each slot its next token; returns the hidden state and the caches with that token's key and value."""
    N, B = slots.token.shape
    keys, values = list(slots.keys), list(slots.values)
    step = slots.step.reshape(-1)
    place = jnp.minimum(step, keys[0].shape[1] - 1)  # an idle slot keeps stepping; it may not write elsewhere
    row = jnp.arange(N * B)
    in_trunk = jnp.arange(trunk_keys[0].shape[1])[None, None] < slots.start[..., None]
    in_suffix = (jnp.arange(keys[0].shape[1])[None] <= step[:, None])[:, None]

    def attend(layer: int, q: Array, k: Array, v: Array) -> Array:
        keys[layer] = keys[layer].at[row, place].set(k[:, 0])
        values[layer] = values[layer].at[row, place].set(v[:, 0])
        by_group = q.reshape(N, B, *q.shape[2:])
        out, lse = masked_attention(by_group, trunk_keys[layer], trunk_values[layer], in_trunk)
        suffix = masked_attention(q, keys[layer], values[layer], in_suffix)
        return merge(out.reshape(suffix[0].shape), lse.reshape(suffix[1].shape), *suffix)

    hidden = model(slots.token.reshape(-1, 1), (slots.start.reshape(-1) + step)[:, None], attend)
    return hidden[:, 0], keys, values
