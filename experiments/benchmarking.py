"""What the benchmarks share: contestants timed in turns, the machine's own limits, one table and one JSON a script.

    floor = machine_floor()
    timed = interleaved({"ours": lambda: f(x), "peer": lambda: g(x)}, case="T 4,096", repeats=5, reference="peer")
    rows = [with_floor(row, floor.at_least(flops=2 * T * V * D, read=2 * V * D)) for row in timed]
    write(Result("bench_scoring", floor, rows, settings), folder)

Times are wall-clock seconds until the result is in memory. Machines are noisy and shared: compare ratios, which pair
runs of the same round, and read them with their range.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "transformers", "liger-kernel", "triton")
STARTED = time.perf_counter()
NOT_STARTED = "not started: the minutes were over"


@dataclass(frozen=True)
class Floor:
    """The time no program can beat here, and the formula that says why."""

    seconds: float
    formula: str


@dataclass(frozen=True)
class Measurement:
    """One contestant in one case.

    case, name         what was run (the shape, as a reader would write it) and by whom
    seconds            median over the rounds
    spread             (largest - smallest) / median over the rounds
    ratio              median over the rounds of seconds / the reference's seconds in that round; ratio_range its ends
    work, unit         what one run gets done ("tokens", "rows"), so that work / seconds is a rate
    floor, formula     see Floor; None where nobody knows one
    extra              further figures (bytes of temporaries, errors), by name with their unit
    note               why there are no figures, or what is special about them
    """

    case: str
    name: str
    seconds: float | None = None
    spread: float | None = None
    ratio: float | None = None
    ratio_range: tuple[float, float] | None = None
    work: float | None = None
    unit: str = ""
    floor: float | None = None
    formula: str = ""
    extra: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class MachineFloor:
    """What this device was measured to do: matrix products in FLOP/s by dtype, reading in bytes/s."""

    flops: Mapping[str, float]
    bandwidth: float

    def at_least(self, *, flops: float = 0.0, dtype: str = "bfloat16", read: float = 0.0) -> Floor:
        """Bounds the time of that many floating-point operations and bytes read: the larger, as they can overlap."""
        arithmetic, memory = flops / self.flops[dtype], read / self.bandwidth
        formula = (
            f"max({flops:.3g} FLOP / {self.flops[dtype] / 1e12:.3g} TFLOP/s, {read / 1e9:.3g} GB / "
            f"{self.bandwidth / 1e9:.3g} GB/s)"
        )
        return Floor(max(arithmetic, memory), formula)

    def or_faster(self, other: "MachineFloor") -> "MachineFloor":
        """Keeps the better of two measurements: on a shared machine, take one before and one after the contestants."""
        flops = {dtype: max(rate, other.flops[dtype]) for dtype, rate in self.flops.items()}
        return MachineFloor(flops, max(self.bandwidth, other.bandwidth))


@dataclass(frozen=True)
class Result:
    """All that a script found, with what is needed to find it again."""

    name: str
    floor: MachineFloor
    rows: Sequence[Measurement]
    settings: Mapping[str, Any]


def arguments(description: str) -> argparse.ArgumentParser:
    """Makes the parser every benchmark starts from: --smoke and --folder."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, seconds: shows that everything runs")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the JSON goes")
    return parser


def progress(message: str) -> None:
    """Prints a line with the time since the start to stderr."""
    print(f"[{time.perf_counter() - STARTED:6.1f} s] {message}", file=sys.stderr, flush=True)


def over(seconds: float) -> bool:
    """Says whether the script has run for longer than that."""
    return time.perf_counter() - STARTED > seconds


def seconds_of(run: Callable[[], Any]) -> float:
    """Times one run, to the moment its arrays are computed."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def interleaved(
    contestants: Mapping[str, Callable[[], Any]],
    *,
    case: str,
    repeats: int = 5,
    reference: str | None = None,
    work: float | None = None,
    unit: str = "",
    limit: float = float("inf"),
) -> list[Measurement]:
    """Times contestants in turns, after one untimed run of each, the first of a round changing from round to round.

    A contestant that leaves its result on a device of another library must wait for it itself. One that raises, in any
    round, is reported by its error and leaves the others alone; none starts once the script has run for `limit`
    seconds. reference: whose time is ratio 1, default the first.
    """
    failed: dict[str, str] = {}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(1 + repeats):  # the first is the untimed one
        names = [name for name in contestants if name not in failed]
        first = turn % max(len(names), 1)
        for name in names[first:] + names[:first]:
            if turn == 0:
                progress(f"{case}: {name}")
                if over(limit):
                    failed[name] = NOT_STARTED
                    continue
            try:
                times[name].append(seconds_of(contestants[name]))
            except Exception as error:  # what does not fit or is not supported is a finding, not the end of the run
                failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]
    reference = next(iter(contestants)) if reference is None else reference

    def measurement(name: str) -> Measurement:
        if name in failed:
            return Measurement(case, name, note=failed[name])
        taken = np.asarray(times[name][1:])
        row = Measurement(case, name, float(np.median(taken)), float(np.ptp(taken) / np.median(taken)))
        if reference in contestants.keys() - failed.keys():
            ratios = taken / np.asarray(times[reference][1:])
            row = replace(row, ratio=float(np.median(ratios)), ratio_range=(float(ratios.min()), float(ratios.max())))
        return replace(row, work=work, unit=unit)

    return [measurement(name) for name in contestants]


def with_floor(row: Measurement, floor: Floor, **extra: float) -> Measurement:
    """Puts a floor and further figures beside a measurement."""
    return replace(row, floor=floor.seconds, formula=floor.formula, extra={**row.extra, **extra})


def machine_floor(*, smoke: bool = False) -> MachineFloor:
    """Measures this device: the fastest square matrix product in each dtype, the fastest pass over a large array.

    The fastest of several runs, not the median: a floor is what the machine can do when nothing disturbs it.
    """
    on_cpu = jax.default_backend() == "cpu"
    side = 512 if smoke else 2048 if on_cpu else 8192
    size = (1 << 24) if smoke else (1 << 28) if on_cpu else (1 << 31)  # bytes; past every cache unless smoke
    progress("the machine's own limits")
    return MachineFloor({dtype: _matmul_rate(side, dtype) for dtype in ("bfloat16", "float32")}, _read_rate(size))


def _matmul_rate(side: int, dtype: str) -> float:
    """FLOP/s of x @ x accumulated in float32; random, because zeros draw less power and run faster."""
    x = jax.random.normal(jax.random.key(0), (side, side), dtype)
    precision = "highest" if dtype == "float32" else None
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=precision, preferred_element_type=jnp.float32))
    return 2 * side**3 / _fastest(lambda: product(x, x))


def _read_rate(size: int) -> float:
    """Bytes/s of the faster of a sum and a matrix-vector product over `size` bytes."""
    x = jnp.ones((size // 8192, 4096), jnp.bfloat16)
    vector = jnp.ones((4096,), jnp.bfloat16)
    total = jax.jit(lambda x: jnp.sum(x, axis=-1, dtype=jnp.float32))
    product = jax.jit(lambda x, v: jnp.matmul(x, v, preferred_element_type=jnp.float32))
    return x.nbytes / min(_fastest(lambda: total(x)), _fastest(lambda: product(x, vector)))


def _fastest(run: Callable[[], Any], repeats: int = 8) -> float:
    seconds_of(run)
    return min(seconds_of(run) for _ in range(repeats))


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Fits cost = c size^a by least squares of the logarithms and returns a."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def write(result: Result, folder: Path, *, table: bool = True) -> Path:
    """Writes the rows, versions, device and command to folder/NAME_DEVICE.json, prints the table, returns the path.

    Without the table for what is found so far, so that a script that is killed leaves it.
    """
    if table:
        _print_table(result)
    environment = {
        "command": " ".join(["python", f"experiments/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": _device(),
        "python": platform.python_version(),
        **{name: version for name in PACKAGES if (version := _version(name))},
    }
    smoke = "_smoke" if result.settings.get("smoke") else ""
    path = folder / f"{result.name}_{jax.devices()[0].device_kind.replace(' ', '-').lower()}{smoke}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment, **asdict(result)}, indent=1, default=str) + "\n")
    progress(f"wrote {path}")
    return path


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    kind = jax.devices()[0].device_kind
    cpuinfo = Path("/proc/cpuinfo")
    if kind == "cpu" and cpuinfo.exists():
        models = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        kind = models[0] if models else kind
    return f"{jax.device_count()} x {kind}, {cores} cores"


def _cells(row: Measurement) -> list[str]:
    if row.seconds is None:
        return [row.case, row.name, row.note, "", "", "", "", ""]
    ratio = f"{row.ratio:.2f} ({row.ratio_range[0]:.2f}-{row.ratio_range[1]:.2f})" if row.ratio_range else ""
    rate = f"{row.work / row.seconds:,.0f} {row.unit}/s" if row.work else ""
    floors = [f"{1e3 * row.floor:,.2f} ms", f"{row.floor / row.seconds:.0%}"] if row.floor else ["", ""]
    more = ", ".join([*(f"{name} {value:.3g}" for name, value in row.extra.items()), *([row.note] if row.note else [])])
    return [row.case, row.name, f"{1e3 * row.seconds:,.2f} ms ±{row.spread / 2:.0%}", ratio, rate, *floors, more]


def _print_table(result: Result) -> None:
    """Prints the rows, through rich where it is installed, else as plain columns, and the formula of each floor."""
    header = ["case", "who", "time", "ratio (range)", "rate", "floor", "of floor", "further"]
    cells = [_cells(row) for row in result.rows]
    limits = ", ".join(f"{rate / 1e12:.3g} TFLOP/s {dtype}" for dtype, rate in result.floor.flops.items())
    print(f"{result.name} on {_device()}; measured limits: {limits}, {result.floor.bandwidth / 1e9:.3g} GB/s read")
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(line[i]) for line in [header, *cells]) for i in range(len(header))]
        for line in [header, *cells]:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
    else:
        table = Table(*header)
        for line in cells:
            table.add_row(*line)
        Console(width=None if sys.stdout.isatty() else 180).print(table)
    for case, formula in dict.fromkeys((row.case, row.formula) for row in result.rows if row.formula):
        print(f"floor of {case}: {formula}")
