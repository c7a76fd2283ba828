"""Jobs and processes killed at random during `diagnose`: the records are those of an undisturbed run, byte for byte."""

import random
import runpy
import time
from pathlib import Path

import pytest

from jaxopd.toy import MODELS

pytestmark = pytest.mark.slow  # twenty starts each

here = runpy.run_path(str(Path(__file__).with_name("processes.py")))
started, joined, finish = here["started"], here["joined"], here["finish"]

KILLS = 20
TABLES = ("questions", "paths", "nodes", "tokens", "cosines")
COMMAND = (
    f"-m jaxopd.cli diagnose --student {MODELS / 'S'} --teacher Self-1C=self:1c --teacher T2={MODELS / 'T2'} "
    "--task toy --questions chain:2:3 --rollouts 40 --max-tokens 80 --slots 16 --exit-tokens 300 --heartbeat-seconds 10"
).split()


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Programs are kept between starts, as the command line does by default."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("JAX_ENABLE_COMPILATION_CACHE", "1")
        patched.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        yield


def pieces(out: Path) -> int:
    return len(list((out / "pieces").rglob("done.json")))


def contents(out: Path) -> dict[str, bytes]:
    return {name: (out / "records" / f"{name}.parquet").read_bytes() for name in TABLES}


def run_to_its_end(commands: list[list[str]]) -> None:
    with started(commands) as running:
        assert all(code == 0 for code, _, _ in finish(running))


def undisturbed(out: Path, processes: int) -> Path:
    command = [*COMMAND, "--out", str(out)]
    run_to_its_end([command] if processes == 1 else joined(command, processes))
    return out


@pytest.mark.parametrize("processes", [1, 2])
def test_twenty_random_kills(processes, tmp_path) -> None:
    """Of two processes that are one job, either is killed; the other ends by itself."""
    whole, out, draw = undisturbed(tmp_path / "whole", processes), tmp_path / "killed", random.Random(processes)
    command = [*COMMAND, "--out", str(out)]
    # Some kills come before a start has finished a piece of its own.
    for least in sorted(draw.choices(range(pieces(whole)), k=KILLS)):
        with started([command] if processes == 1 else joined(command, processes)) as running:
            while pieces(out) < least or not (out / "config.json").exists():
                assert all(process.poll() is None for process in running), finish(running)
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 0.3))
            draw.choice(running).kill()
            assert all(code != 0 for code, _, _ in finish(running))
    run_to_its_end([command] if processes == 1 else joined(command, processes))
    assert contents(out) == contents(whole)


def test_two_jobs_share_a_run_and_one_is_killed(tmp_path) -> None:
    """Both are at work at once on pieces of their own; what the dead one held is done by the other."""
    whole, out = undisturbed(tmp_path / "whole", 1), tmp_path / "shared"
    with started([[*COMMAND, "--out", str(out)]] * 2) as (first, second):
        most = 0
        while pieces(out) < pieces(whole) // 2 or not most:
            most = max(most, len(list((out / "pieces").rglob("claim.json"))) - 1)
            time.sleep(0.005)
        first.kill()
        (code, _, said), *_ = finish([second])
        assert code == 0, said
    assert contents(out) == contents(whole)
    assert not list(out.rglob("claim.json"))
