"""Jobs and processes killed, or told to stop, at random: records are those of an undisturbed run, byte for byte."""

import random
import runpy
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import Popen

import pandas as pd
import pytest

from jaxopd.cli import BAD_INPUT, STOPPED
from jaxopd.toy import MODELS

pytestmark = pytest.mark.slow  # twenty starts each

here = runpy.run_path(str(Path(__file__).with_name("processes.py")))
started, joined, finish = here["started"], here["joined"], here["finish"]

KILLS, PARTS = 20, 4  # the kills are done in parts, so that no test takes longer than a few minutes
TABLES = ("questions", "paths", "nodes", "tokens", "cosines")
MODEL_FLAGS = f"--student {MODELS / 'S'} --teacher T2={MODELS / 'T2'} --task toy --max-tokens 80 --slots 16"
DIAGNOSE = (
    f"-m jaxopd.cli diagnose {MODEL_FLAGS} --teacher Self-1C=self:1c --questions all:1:5 "
    "--rollouts 40 --exit-tokens 300 --heartbeat-seconds 10"
).split()
TRAIN = (
    f"-m jaxopd.cli train {MODEL_FLAGS} --questions all:6:7 --batch 4 --mini-batch 2 --rollouts 2 --micro-batch 8 "
    "--learning-rate 1e-3 --k 4 --steps 12 --save-every 5"
).split()


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Programs are kept between starts, as the command line does by default."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("JAX_ENABLE_COMPILATION_CACHE", "1")
        patched.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        patched.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


def pieces(out: Path) -> int:
    return len(list((out / "pieces").rglob("done.json")))


def contents(out: Path) -> dict[str, bytes]:
    return {name: (out / "records" / f"{name}.parquet").read_bytes() for name in TABLES}


def trained(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in ("metrics.jsonl", "student/model.safetensors")}


def commands(command: Sequence[str], out: Path, processes: int = 1) -> list[list[str]]:
    command = [*command, "--out", str(out)]
    return [command] if processes == 1 else joined(command, processes)


def run_to_its_end(running: list[list[str]]) -> None:
    with started(running) as processes:
        for code, _, said in finish(processes):
            assert code == 0, said


def wait_until(reached: Callable[[], bool], running: Sequence[Popen]) -> None:
    """Waits for a moment of a run, which must not end before."""
    while not reached():
        assert all(process.poll() is None for process in running), finish(running)
        time.sleep(0.01)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Callable[[int], Path]:
    """Gives the diagnosis that so many processes made without disturbance."""
    made: dict[int, Path] = {}

    def of(processes: int) -> Path:
        if processes not in made:
            made[processes] = tmp_path_factory.mktemp("whole") / "run"
            run_to_its_end(commands(DIAGNOSE, made[processes], processes))
            excluded = pd.read_parquet(made[processes] / "records" / "questions.parquet")["excluded"]
            assert list(excluded) == [""] * 3  # every question is analysed, so every stage can be cut
        return made[processes]

    return of


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("processes", [1, 2])
def test_random_kills(processes, part, undisturbed, tmp_path) -> None:
    """Of two processes that are one job, either is killed; the other ends by itself."""
    whole, out, draw = undisturbed(processes), tmp_path / "killed", random.Random(f"{processes} {part}")
    # Some kills come before a start has finished a piece of its own.
    for least in sorted(draw.choices(range(pieces(whole)), k=KILLS // PARTS)):
        with started(commands(DIAGNOSE, out, processes)) as running:
            wait_until(lambda least=least: pieces(out) >= least and (out / "config.json").exists(), running)
            time.sleep(draw.uniform(0, 0.3))
            draw.choice(running).kill()
            assert all(code != 0 for code, _, _ in finish(running))
    run_to_its_end(commands(DIAGNOSE, out, processes))
    assert contents(out) == contents(whole)


def test_two_jobs_share_a_run_and_one_is_killed(undisturbed, tmp_path) -> None:
    """Both are at work at once on pieces of their own; what the dead one held is done by the other."""
    whole, out, claimed = undisturbed(1), tmp_path / "shared", []

    def halfway() -> bool:
        claimed.append(len(list((out / "pieces").rglob("claim.json"))))
        return pieces(out) >= pieces(whole) // 2 and max(claimed) == 2

    with started(commands(DIAGNOSE, out) * 2) as (first, second):
        wait_until(halfway, [first, second])
        first.kill()
        (code, _, said), *_ = finish([second])
        assert code == 0, said
    assert contents(out) == contents(whole)
    assert not list(out.rglob("claim.json"))


def test_training_is_told_to_stop_and_a_second_job_is_refused(tmp_path) -> None:
    """SIGTERM at three random steps: exit code 75 and a checkpoint each time; metrics and student as undisturbed."""
    whole, out, draw = tmp_path / "whole", tmp_path / "stopped", random.Random(0)
    run_to_its_end(commands(TRAIN, whole))

    def steps() -> int:
        return (out / "metrics.jsonl").read_bytes().count(b"\n") if (out / "metrics.jsonl").exists() else 0

    for step in sorted(draw.sample(range(1, 10), k=3)):
        with started(commands(TRAIN, out)) as running:
            wait_until(lambda step=step: steps() >= step, running)
            time.sleep(draw.uniform(0, 0.1))
            running[0].terminate()
            (code, _, said), *_ = finish(running)
        assert code == STOPPED, said
        assert "stopped by SIGTERM" in said
        assert (out / "checkpoints" / str(steps())).exists()
        assert not list(out.rglob("claim.json"))
    with started(commands(TRAIN, out)) as (first,):
        wait_until(lambda: bool(list(out.rglob("claim.json"))), [first])
        first.send_signal(signal.SIGSTOP)  # it may not end before the second one has asked
        with started(commands(TRAIN, out)) as second:
            (code, _, said), *_ = finish(second)
        first.send_signal(signal.SIGCONT)
        assert code == BAD_INPUT
        assert f"{out}: found another job at work on this run, process {first.pid}, expected one job at a time" in said
        assert finish([first])[0][0] == 0
    assert trained(out) == trained(whole)
