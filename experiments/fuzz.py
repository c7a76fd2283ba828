"""Do loaders and graders survive hostile input? Counts cases, crashes, hangs and allocations.

    python experiments/fuzz.py --cases 100000 --seed 1 [--only config,index] [--keep FOLDER]

Each target's cases run one after another in a child process that may allocate ROOM more than it holds once the valid
inputs have run. A case may raise InputError and nothing else, and take HANG seconds of processor time, its own children
included; a slower one is run again alone and counts where it is slow again. A child that dies, or that is killed after
PATIENCE seconds, is started again behind the case. Case i of a target depends on the seed and i alone; --keep writes
the inputs that failed.
"""

import argparse
import importlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

HANG = 5.0  # seconds
PATIENCE = 60.0  # the machine may be busy
ROOM = 2 << 30  # bytes
STARTUP = 300.0  # seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="targets, separated by commas; all by default")
    parser.add_argument("--keep", type=Path, help="folder that gets the inputs that failed")
    parser.add_argument("--targets", default="fuzz_targets", help="module with the targets")
    parser.add_argument("--child", nargs=4, metavar=("TARGET", "FIRST", "END", "PLACE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    targets = importlib.import_module(given.targets).TARGETS
    if given.child:
        name, first, end, place = given.child
        return run_cases(name, targets[name], given.seed, range(int(first), int(end)), Path(place))
    chosen = {name: targets[name] for name in (given.only.split(",") if given.only else targets)}
    shares, total, began = sum(target.share for target in chosen.values()), Counter(), time.monotonic()
    for name, target in chosen.items():
        cases, counts = -(-given.cases * target.share // shares), Counter()
        for fault in supervised(given, name, cases):
            counts[fault["kind"]] += 1
            print(json.dumps(fault), flush=True)
            if given.keep:
                given.keep.mkdir(parents=True, exist_ok=True)
                (given.keep / f"{name}-{fault['case']}").write_bytes(case_of(name, target, given.seed, fault["case"]))
        total += counts | Counter(cases=cases)
        print(f"{name}: {cases} cases, {dict(counts) or 'no fault'}", flush=True)
    print(f"all: {dict(total)} in {time.monotonic() - began:.0f} s")
    sys.exit(1 if set(total) - {"cases"} else 0)


def supervised(given: argparse.Namespace, name: str, cases: int) -> Iterator[dict]:
    """Runs a target's cases in children; yields the faults, slow ones once they were slow twice."""
    first = 0
    while first < cases:
        faults, first = one_child(given, name, first, cases)
        for fault in faults:
            if fault["kind"] == "slow":
                again, _ = one_child(given, name, fault["case"], fault["case"] + 1)
                fault["kind"] = "hang" if again else "busy"
            if fault["kind"] != "busy":
                yield fault


def one_child(given: argparse.Namespace, name: str, first: int, end: int) -> tuple[list[dict], int]:
    """Runs cases in one child until they are done or it dies; gives the faults and the next case."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as told:
        place = Path(folder) / "place"
        shared = ["--targets", given.targets, "--seed", str(given.seed), "--child", name]
        command = [sys.executable, __file__, *shared, str(first), str(end), str(place)]
        child = subprocess.Popen(command, stdout=told)
        try:
            while child.poll() is None:
                time.sleep(0.1)
                patience = PATIENCE if place.exists() else STARTUP
                if time.time() - (place if place.exists() else Path(folder)).stat().st_mtime > patience:
                    child.kill()
        finally:
            child.kill()
            child.wait()
        told.seek(0)
        faults = [json.loads(line) for line in told.read().splitlines() if line.startswith(b"{")]
        if child.returncode == 0:
            return faults, end
        if not place.exists():
            raise RuntimeError(f"{name}: the child did not start, exit code {child.returncode}")
        at, late = int(place.read_text()), time.time() - place.stat().st_mtime > PATIENCE
        fault = {"kind": "slow" if late else "death", "error": f"exit code {child.returncode}"}
        return [*faults, {"target": name, "case": at} | fault], at + 1


def run_cases(name: str, target, seed: int, cases: range, place: Path) -> None:
    """Runs cases in this process; writes which one is running to `place`, the faults to stdout."""
    folder = place.parent / "case"
    folder.mkdir()
    for valid in target.seeds:  # imports and compiles what is needed
        fault_of(target, valid, folder)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + ROOM, held + ROOM))
    with open(place, "wb", buffering=0) as current:
        for index in cases:
            os.pwrite(current.fileno(), f"{index:<20}".encode(), 0)
            fault = fault_of(target, case_of(name, target, seed, index), folder)
            if fault is not None:
                print(json.dumps({"target": name, "case": index} | fault), flush=True)


def case_of(name: str, target, seed: int, index: int) -> bytes:
    """Makes case `index` of a target."""
    return target.case(random.Random(f"{seed} {name} {index}"))


def fault_of(target, data: bytes, folder: Path) -> dict | None:
    """Runs a case; gives what it did that it must not do."""
    from jaxopd.errors import InputError

    began, raised = processor_seconds(), None
    try:
        target.run(data, folder)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        raised = error
    seconds, cause = processor_seconds() - began, raised
    while cause is not None and not isinstance(cause, MemoryError):
        cause = cause.__cause__ or cause.__context__  # a loader may have taken it for broken input
    if cause is not None:
        return {"kind": "memory", "error": repr(raised)[:200]}
    if raised is not None and not isinstance(raised, InputError):
        where = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(raised.__traceback__)]
        return {"kind": "crash", "error": f"{type(raised).__name__}: {raised}"[:200], "where": where[-4:]}
    return {"kind": "slow", "error": f"{seconds:.1f} s"} if seconds > HANG else None


def processor_seconds() -> float:
    """Counts what this process and its children have used, the living ones too."""
    times, used = os.times(), 0
    for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():  # the main thread's
        fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        used += int(fields[11]) + int(fields[12])
    ended = times.user + times.system + times.children_user + times.children_system
    return ended + used / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
