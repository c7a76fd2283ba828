"""The memory plan of a run: what it will hold, computed before anything is allocated, and the slots that fit."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxopd.distributed import decided
from jaxopd.models.config import QwenConfig
from jaxopd.models.sharding import part_of
from jaxopd.rollouts.decode import decode_bytes, prefill_block, prefill_bytes
from jaxopd.rollouts.layout import Layout, split_heads
from jaxopd.rollouts.suffix import ring_width
from jaxopd.rollouts.wave import trunk_bucket
from jaxopd.types import bucket

HELD = 0.25  # of max_tokens, the private tokens a slot is planned for: lengths differ, and slots are refilled
USABLE = 0.9  # of the memory the device reports
MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes over all devices for waves of `groups` trunks with `slots` slots each."""

    groups: int
    slots: int
    weights: int
    trunks: int
    suffix: int
    workspace: int
    budget: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, int]:
        """The bytes of each part."""
        return {name: getattr(self, name) for name in ("weights", "trunks", "suffix", "workspace")}

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in self.parts.items())
        return f"{self.groups} x {self.slots} slots: {self.total / 1e9:.2f} of {self.budget / 1e9:.2f} GB ({parts})"


def plan_memory(
    config: QwenConfig,
    dtype: jnp.dtype,
    *,
    weights: int,
    trunks: int,
    trunk_length: int,
    most: int,
    max_tokens: int,
    slots: int,
    mesh: jax.sharding.Mesh,
    gathered: int = 0,
    attention: str | None = None,
    budget: int | None = None,
) -> MemoryPlan:
    """Plans waves for `trunks` trunks of up to `trunk_length` tokens with up to `most` requests each.

    With e bytes a number, c = 2 layers K h e bytes a cached token, L the trunk's bucket, S = N B slots, W the ring:

        trunks     N L c, twice where another wave follows (its prefill starts before this one ends)
        suffix     S W c, and in pages, where rollouts outgrow the ring, S HELD max_tokens c; all at their limit would
                   need 1 / HELD times the pages, and meet a smaller plan once the device runs out
        workspace  the larger of `decode_bytes` and `prefill_bytes`: a device runs one program at a time; and what is
                   `gathered` of matrices split over "data", by XLA once for all steps of a program, of every layer

    One trunk lies, and is computed, on every device along "data"; what "model" does not split, on every one along it.
    Slots are halved from `slots` until the total fits `budget` (default: `device_budget`), or one a row of devices is
    left.
    """
    budget = device_budget(mesh, weights) if budget is None else budget
    rows, heads = mesh.shape["data"], split_heads(config, mesh)
    spread = over_devices(config, mesh.shape["model"])
    token = cached_token(spread, jnp.dtype(dtype).itemsize)
    L = trunk_bucket(trunk_length)
    while True:
        N, B = groups_of_slots(trunks, most, slots, rows)
        S, waves, copies = N * B, 2 if trunks > N else 1, rows if N == 1 else 1
        prefill = copies * prefill_bytes(spread, N, prefill_block(config, N, L))
        by_kernel = Layout(N, B, mesh, attention, heads).implementation(dtype, L, config.head_dim) != "xla"
        workspace = gathered + max(prefill, decode_bytes(spread, S, 0 if by_kernel else L))
        width = ring_width(max_tokens)
        suffix = S * (width + (int(HELD * max_tokens) if max_tokens > width else 0)) * token
        plan = MemoryPlan(N, B, weights, copies * waves * N * L * token, suffix, workspace, budget)
        if plan.total <= budget or slots <= rows:
            return plan
        slots = max(rows, slots // 2)


def over_devices(config: QwenConfig, devices: int) -> QwenConfig:
    """Gives the heads, vocabulary and FFN that devices along "model" have together: what they do not divide, each has.

    Query heads lie in the cache's split, as `split_heads` does it.
    """
    heads = devices * part_of(config.num_kv_heads, devices) // config.num_kv_heads
    return replace(
        config,
        num_heads=heads * config.num_heads,
        num_kv_heads=heads * config.num_kv_heads,
        vocab_size=devices * part_of(config.vocab_size, devices),
        intermediate_size=devices * part_of(config.intermediate_size, devices),
    )


def cached_token(config: QwenConfig, itemsize: int) -> int:
    """Counts the bytes of a token's keys and values."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize


def groups_of_slots(trunks: int, most: int, slots: int, rows: int) -> tuple[int, int]:
    """Chooses N groups of B slots: as many slots a trunk as it has requests, then as many trunks as fit.

    rows: the devices along "data", of which each gets as many groups, or slots of the only one.
    """
    B = min(slots, bucket(most))
    N = max(1, min(bucket(trunks), slots // B))
    return (1, -(-B // rows) * rows) if N == 1 else (-(-N // rows) * rows, B)


def device_budget(mesh: jax.sharding.Mesh, counted: int = 0) -> int:
    """Gives the bytes a plan may use: USABLE of what devices report, or of the free memory of a CPU's machine.

    What devices hold already is taken off, but for the `counted` bytes that the plan itself counts.
    """
    return jax.process_count() * decided(lambda: _local_budget(mesh, counted // jax.process_count()))


def _local_budget(mesh: jax.sharding.Mesh, counted: int) -> int:
    stats = [device.memory_stats() or {} for device in mesh.local_devices]
    if all("bytes_limit" in s for s in stats):
        held = sum(s.get("bytes_in_use", 0) for s in stats)
        return int(USABLE * sum(s["bytes_limit"] for s in stats)) - max(0, held - counted)
    return int(USABLE * (free_memory() + counted))


def free_memory() -> int:
    """Gives the bytes of this machine's memory that can be had; of Linux with what only caches files."""
    if MEMINFO.exists():
        kilobytes = dict(line.split()[:2] for line in MEMINFO.read_text().splitlines())
        return 1024 * int(kilobytes["MemAvailable:"])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
