"""The rollout engine: one trunk, many branches.

A trunk is a token sequence whose keys and values are computed once. A request is (trunk, cut, forced token or none,
id): attend to trunk[:cut], feed the forced token, sample to the end. No request has a prefill of its own.

Slots live on the device in groups; a group serves one trunk at a time. Its queue of requests is on the device too: a
slot that finishes takes the next request inside the decoding loop, and the host is asked only every PAGE steps.
Attention of a slot is its trunk's part (one copy of the keys for the group, masked at the slot's cut) merged with its
private suffix. Draw t of request r depends on (seed, r, t) alone: not on slots, groups, devices or resumption.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from jaxopd.distributed import place, several, stop_if_preempted
from jaxopd.errors import InputError
from jaxopd.models.qwen import Qwen
from jaxopd.models.sharding import device_mesh, gathered_bytes, held_bytes, split_mesh
from jaxopd.rollouts.layout import Layout, split_heads
from jaxopd.rollouts.plan import MemoryPlan, plan_memory
from jaxopd.rollouts.sampling import Sampling
from jaxopd.rollouts.wave import Drawn, Requests, Wave
from jaxopd.types import bucket

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rollouts:
    """Sampled continuations in request order; the forced token is not part of them. Padding is -1 and 0."""

    tokens: Int[np.ndarray, "R S"]
    length: Int[np.ndarray, " R"]
    raw_logp: Float[np.ndarray, "R S"]  # under the untempered, untruncated student
    sampling_logp: Float[np.ndarray, "R S"]  # under the distribution the token was drawn from
    finish: Int[np.ndarray, " R"]  # STOP or LENGTH


class Engine:
    """Runs requests on `model` with up to `slots` sequences in flight, spread over the devices of `mesh`.

    Each device gets a copy of the model. Where no mesh is given, those are all devices; but a model that is split over
    an axis "model" of its own mesh decodes there, with slots over "data", and stays as it lies. Matrices that are split
    over "data" too are gathered by XLA once for all steps of a program, of every layer, which the memory plan counts.

    A memory plan made before each run says how many of the slots are used; it is logged. Where the device runs out of
    memory all the same, the requests not yet answered start again with half the slots, and draw the same numbers.
    budget: bytes the run may use, default what the devices report. attention: how slots attend to their trunk, a name
    of jaxopd_kernels.TRUNK_IMPLEMENTATIONS, default a kernel where its rule expects one to win.
    """

    def __init__(
        self,
        model: Qwen,
        *,
        slots: int = 256,
        mesh: jax.sharding.Mesh | None = None,
        budget: int | None = None,
        attention: str | None = None,
    ):
        if slots < 1:
            raise InputError(f"slots: found {slots}, expected at least 1")
        self.config, self.dtype = model.config, model.dtype
        self.slots, self.budget, self.attention = slots, budget, attention
        # Split once: walking the module at each call would cost more than a step of a small model.
        self.graph, state = nnx.split(model)
        split = split_mesh(state) if mesh is None else None
        self.mesh = split or device_mesh(None if mesh is None else mesh.devices.flatten())
        self.state = state if split else place(state, NamedSharding(self.mesh, PartitionSpec()))
        self.weights, self.gathered = held_bytes(self.state), gathered_bytes(self.state)

    def run(self, trunks: Sequence[Sequence[int] | np.ndarray], requests: Requests, sampling: Sampling) -> Rollouts:
        """Answers every request. Raises InputError on a trunk, cut or token outside the model's range."""
        trunks = [np.asarray(trunk, np.int32) for trunk in trunks]
        self._check(trunks, requests)
        R, slots = len(requests), self.slots
        finish, length = np.full(R, -1, np.int8), np.zeros(R, np.int32)
        tokens, raw, sampled = np.zeros((R, 0), np.int32), np.zeros((R, 0), np.float32), np.zeros((R, 0), np.float32)
        while (finish < 0).any():
            unanswered = np.flatnonzero(finish < 0)
            plan = self._plan(trunks, requests, unanswered, sampling, slots)
            try:
                for new in self._decode(trunks, requests, unanswered, sampling, plan):
                    # Few rollouts are as long as they may be: columns are added as they are needed.
                    if (needed := int(new.step.max(initial=-1)) + 1) > tokens.shape[1]:
                        width = min(sampling.max_tokens, bucket(needed))
                        tokens, raw, sampled = (widened(array, width) for array in (tokens, raw, sampled))
                    at = new.row, new.step
                    tokens[at], raw[at], sampled[at] = new.token, new.raw_logp, new.sampling_logp
                    ended = new.reason >= 0
                    finish[new.row[ended]], length[new.row[ended]] = new.reason[ended], new.step[ended] + 1
            except jax.errors.JaxRuntimeError as error:
                # Other processes may not have run out, and would go on with as many slots as before.
                tried, least = plan.groups * plan.slots, self.mesh.shape["data"]
                if "RESOURCE_EXHAUSTED" not in str(error) or tried <= least or several():
                    raise
                slots = max(least, tried // 2)
                log.warning("out of device memory: the unanswered requests start again with %d slots", slots)
                again = finish < 0
                tokens[again], raw[again], sampled[again] = -1, 0.0, 0.0
        longest = int(length.max(initial=0))
        return Rollouts(tokens[:, :longest], length, raw[:, :longest], sampled[:, :longest], finish)

    def plan(self, trunks: Sequence[Sequence[int]], requests: Requests, sampling: Sampling) -> MemoryPlan:
        """Computes what `run` will hold, before anything is allocated."""
        return self._plan(trunks, requests, np.arange(len(requests)), sampling, self.slots)

    def _plan(
        self, trunks: Sequence, requests: Requests, unanswered: np.ndarray, sampling: Sampling, slots: int
    ) -> MemoryPlan:
        served, sizes = np.unique(requests.trunk[unanswered], return_counts=True)
        return plan_memory(
            self.config,
            self.dtype,
            weights=self.weights,
            gathered=self.gathered,
            trunks=len(served),
            trunk_length=max(len(trunks[t]) for t in served),
            most=int(sizes.max()),
            max_tokens=sampling.max_tokens,
            slots=slots,
            mesh=self.mesh,
            attention=self.attention,
            budget=self.budget,
        )

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
        if requests.spread is not None and not ((requests.spread >= 0) & (requests.spread < 1)).all():
            raise InputError("requests: found a spread number outside [0, 1), expected one in it for every request")
        if requests.forced.max() >= vocabulary:
            raise InputError(f"requests: found forced token {requests.forced.max()}, expected under {vocabulary}")

    def _decode(
        self, trunks: list[np.ndarray], requests: Requests, unanswered: np.ndarray, sampling: Sampling, plan: MemoryPlan
    ) -> Iterator[Drawn]:
        """Serves trunks in waves, the largest queues first, so that queues side by side finish together.

        A wave's prefill is dispatched once the queue before it is empty, while its last rollouts still run.
        """
        log.info("memory plan: %s", plan)
        # Early cuts first: their rollouts have the most to write, and cuts in flight together stay close.
        order = unanswered[np.lexsort((requests.cut[unanswered], requests.trunk[unanswered]))]
        served, first, sizes = np.unique(requests.trunk[order], return_index=True, return_counts=True)
        largest = np.argsort(-sizes, kind="stable")
        layout = Layout(plan.groups, plan.slots, self.mesh, self.attention, split_heads(self.config, self.mesh))

        def wave(low: int) -> Wave:
            chosen = largest[low : low + plan.groups]
            rows = [order[first[i] : first[i] + sizes[i]] for i in chosen]
            members = [trunks[served[i]] for i in chosen]
            return Wave(self.graph, self.state, self.config, layout, members, rows, requests, sampling)

        upcoming = wave(0)
        for low in range(0, len(served), plan.groups):
            current, upcoming = upcoming if upcoming is not None else wave(low), None
            for drawn in current.blocks():
                stop_if_preempted()
                yield drawn
                if upcoming is None and not current.waiting and low + plan.groups < len(served):
                    upcoming = wave(low + plan.groups)


def widened(array: np.ndarray, width: int) -> np.ndarray:
    """Pads the token axis of what belongs to rollouts: tokens with -1, numbers with 0."""
    fill = -1 if np.issubdtype(array.dtype, np.integer) else 0
    return np.pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=fill)


def rollout(
    model: Qwen, prompts: Sequence[Sequence[int]], n: int = 1, *, max_tokens: int = 128, slots: int = 256, **sampling
) -> Rollouts:
    """Samples n continuations of each prompt (token ids), in prompt order; row i belongs to prompt i // n.

    `sampling`: stop_ids, temperature, top_p, top_k, seed as in `Sampling`; stop_ids default to the checkpoint's.
    """
    settings = Sampling(max_tokens, **{"stop_ids": model.config.eos_token_ids, **sampling})
    trunks = [np.asarray(prompt, np.int32) for prompt in prompts]
    return Engine(model, slots=slots).run(trunks, Requests.continuations(prompts, n), settings)
