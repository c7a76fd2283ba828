"""How the engine's costs grow: a decoding step with its trunk's length, memory with rollouts in flight and in all.

    PYTHONPATH=.:kernels python experiments/bench_scaling.py            # 4 minutes on 2 cores; experiments/results/
    PYTHONPATH=.:kernels python experiments/bench_scaling.py --smoke    # seconds

Small models of Qwen3's architecture on the CPU. Time: the decode phase of 32 sequences on one trunk of 200 to 8,000
tokens. Memory: the peak of a process of its own while a run goes on, above what it held before and without compiling,
beside the plan that the engine printed; R rollouts of 128 tokens with a slot each, and R of 1 to 128 on 64 slots.
Expected: a step grows with the trunk to a power below 1, memory with the slots to a power near 1, with the rollouts
that wait for one not at all.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import peak_memory
from bench_rollouts import Case, decode_phase, floor_of
from benchmarking import (
    MachineFloor,
    Measurement,
    Result,
    arguments,
    exponent,
    interleaved,
    machine_floor,
    progress,
    with_floor,
    write,
)

from jaxopd.models import QwenConfig, init_model
from jaxopd.models.sharding import device_mesh
from jaxopd.rollouts import Engine, Requests, Sampling

FAST = QwenConfig(1031, 256, 768, 4, 4, 2, 64, max_positions=40960, tie_embeddings=True)
WIDE_CACHE = QwenConfig(1031, 64, 128, 2, 4, 4, 64, max_positions=40960, initializer_range=0.05)  # 4 kB a token
LENGTHS = (200, 500, 1_000, 2_000, 4_000, 8_000)
IN_FLIGHT, SLOTS, IN_ALL = (64, 128, 256, 512), 64, (64, 512, 2_048)


@dataclass(frozen=True)
class Run:
    """R rollouts of one trunk of 512 tokens; `tokens` each, or drawn from 1 to `tokens` where they differ."""

    rollouts: int
    slots: int
    tokens: int
    differ: bool = False

    @property
    def name(self) -> str:
        return f"rollouts on {self.slots} slots" if self.differ else "rollouts, a slot each"


def step_times(lengths: Sequence[int], machine: MachineFloor, smoke: bool) -> list[Measurement]:
    """Times the decode phase on trunks of several lengths."""
    model = init_model(FAST, dtype="bfloat16")
    rows = []
    for length in lengths:
        case = Case("small", length, 4 if smoke else 32, 32)
        run, work = decode_phase(model, case, shared=True), case.sequences * case.new
        [row] = interleaved({"decode phase": run}, case=case.name, repeats=2 if smoke else 5, work=work, unit="tok")
        rows.append(with_floor(row, floor_of(case, FAST, machine, shared=True), tokens=length))
    return rows


def peak_of(run: Run) -> dict[str, float]:
    """Gives, in bytes, what a run holds at its peak and what its plan says, and its seconds; for a fresh process."""
    engine = Engine(init_model(WIDE_CACHE), slots=run.slots, mesh=device_mesh(1))
    trunks, sampling = [np.arange(512) % WIDE_CACHE.vocab_size], Sampling(run.tokens, seed=0)
    requests = Requests.continuations(trunks, run.rollouts)
    if run.differ:
        limit = np.random.default_rng(0).integers(1, run.tokens + 1, run.rollouts)
        requests = replace(requests, limit=limit)
    engine.run(trunks, requests, sampling)  # compiles
    before = peak_memory.held()
    peak_memory.forget_peak()
    start = time.perf_counter()
    drawn = engine.run(trunks, requests, sampling).length.sum()
    seconds, plan = time.perf_counter() - start, engine.plan(trunks, requests, sampling)
    held = peak_memory.peak() - before + plan.weights
    return {"held": held, "planned": plan.total, "seconds": seconds, "drawn": int(drawn)}


def measured(run: Run) -> Measurement:
    """Runs `peak_of` in a process that gives memory back at once, so that what it holds is what it uses."""
    progress(f"{run.rollouts:,} {run.name}")
    asked = [run.rollouts, run.slots, run.tokens, int(run.differ)]
    command = [sys.executable, __file__, "--peak", *map(str, asked)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    told = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(told.stdout.splitlines()[-1])
    memory = {"rollouts": run.rollouts, "MB held": found["held"] / 1e6, "MB planned": found["planned"] / 1e6}
    case = f"{run.rollouts:,} {run.name}"
    return Measurement(case, run.name, found["seconds"], 0.0, work=found["drawn"], unit="tok", extra=memory)


def fitted(rows: list[Measurement], size: str, cost: Callable[[Measurement], float]) -> dict[str, float]:
    """Fits cost = c size^a to the rows of each contestant."""
    found = {}
    for name in dict.fromkeys(row.name for row in rows):
        line = [row for row in rows if row.name == name]
        found[name] = round(exponent([row.extra[size] for row in line], [cost(row) for row in line]), 2)
    return found


def plot(
    rows: list[Measurement], size: str, ylabel: str, curves: dict[str, Callable[[Measurement], float]], path: Path
) -> None:
    """Draws each contestant's curves over its sizes, the second one dotted, where matplotlib is installed."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        progress("matplotlib is not installed: no plot")
        return
    figure, ax = plt.subplots(figsize=(6, 4.2))
    for colour, name in enumerate(dict.fromkeys(row.name for row in rows)):
        line = [row for row in rows if row.name == name]
        for style, (label, curve) in zip(("o-", ":"), curves.items()):
            values = [curve(row) for row in line]
            ax.loglog([row.extra[size] for row in line], values, style, color=f"C{colour}", label=f"{name}: {label}")
    sizes = sorted({row.extra[size] for row in rows})
    ax.set_xticks(sizes, [f"{value:,}" for value in sizes])
    ax.set(xlabel=size, ylabel=ylabel)
    ax.minorticks_off()
    ax.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    progress(f"wrote {path}")


def against_trunk(machine: MachineFloor, smoke: bool, folder: Path) -> None:
    """Writes tokens/s against the trunk's length."""
    rows = step_times((200, 400) if smoke else LENGTHS, machine, smoke)
    powers = fitted(rows, "tokens", lambda row: row.seconds)
    written = write(Result("bench_scaling_trunk", machine, rows, {"smoke": smoke, "exponents": powers}), folder)
    [power] = powers.values()
    curves = {
        f"a step takes tokens^{power}": lambda row: row.work / row.seconds,
        "floor": lambda row: row.work / row.floor,
    }
    plot(rows, "tokens", "tokens/s, 32 sequences on one trunk", curves, written.with_suffix(".png"))


def against_rollouts(machine: MachineFloor, smoke: bool, folder: Path) -> None:
    """Writes peak memory against rollouts, those in flight and those that wait for a slot."""
    in_flight, in_all, tokens = ((8, 16), (64, 96), 40) if smoke else (IN_FLIGHT, IN_ALL, 128)
    runs = [Run(R, R, tokens) for R in in_flight] + [Run(R, SLOTS, tokens, differ=True) for R in in_all]
    rows = [measured(run) for run in runs]
    powers = fitted(rows, "rollouts", lambda row: row.extra["MB held"])
    rows = [replace(row, name=f"{row.name}, rollouts^{powers[row.name]}") for row in rows]
    written = write(Result("bench_scaling_memory", machine, rows, {"smoke": smoke, "exponents": powers}), folder)
    curves = {"held": lambda row: row.extra["MB held"], "planned": lambda row: row.extra["MB planned"]}
    plot(rows, "rollouts", "peak memory, MB", curves, written.with_suffix(".png"))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", choices=("trunk", "memory"), help="one of the two plots")
    parser.add_argument("--peak", type=int, nargs=4, help="rollouts, slots, tokens, whether they differ: one run alone")
    options = parser.parse_args()
    if options.peak:
        print(json.dumps(peak_of(Run(*options.peak[:3], bool(options.peak[3])))))
        return
    machine = machine_floor(smoke=options.smoke)
    if options.only != "memory":
        against_trunk(machine, options.smoke, options.folder)
    if options.only != "trunk" and peak_memory.CLEAR_REFS.exists():
        against_rollouts(machine, options.smoke, options.folder)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # small models, and memory as the operating system counts it
    main()
