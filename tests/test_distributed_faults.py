"""A process that dies, or is told to stop, ends the others soon and with a sentence."""

import os
import runpy
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jaxopd import cli
from jaxopd.runs import RunFolder

here = runpy.run_path(str(Path(__file__).with_name("processes.py")))
started, joined, finish = here["started"], here["joined"], here["finish"]
tiny = runpy.run_path(str(Path(__file__).with_name("test_full_disk.py")))
diagnose, inputs = tiny["diagnose"], tiny["inputs"]

HEARTBEAT = 5
MEETING = f"""
import sys, time
from jaxopd import cli, distributed

def meet():
    flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    distributed.Hosts(
        coordinator=flags["--coordinator"], processes=int(flags["--processes"]), process=int(flags["--process"]),
        join_seconds=int(flags["--join-seconds"]), heartbeat_seconds={HEARTBEAT},
    ).join()
    for step in range(10_000):
        distributed.stop_if_preempted()
        {{work}}
        print("step", step, flush=True)

sys.exit(cli.guarded(meet))
"""
TALK, COMPUTE = "distributed.decided(lambda: time.sleep(0.05))", "time.sleep(0.05)"  # with the others, and alone


@contextmanager
def meeting(work: str) -> Iterator[list]:
    """Two processes at work."""
    with started(joined(["-c", MEETING.format(work=work)], 2)) as running:
        for process in running:
            while "step" not in (line := process.stdout.readline()):
                assert line, process.communicate()
        yield running


@pytest.mark.slow
@pytest.mark.parametrize("work", [TALK, COMPUTE], ids=["the other waits for it", "the other is busy"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others(victim, work) -> None:
    with meeting(work) as running:
        running[victim].kill()
        killed = time.monotonic()
        (code, _, said), *_ = finish([running[1 - victim]])
        assert time.monotonic() - killed < 60
    assert code not in (0, cli.STOPPED)
    sentences = [line for line in said.splitlines() if line.startswith("jaxopd: ")]
    assert len(sentences) == 1, said
    assert "what was finished is saved, and the same command goes on from there" in sentences[0]


def test_sigterm_to_one_process_stops_all_at_the_same_step() -> None:
    with meeting(TALK) as running:
        running[1].terminate()
        ended = finish(running)
    assert [code for code, _, _ in ended] == [cli.STOPPED] * 2, ended
    assert ended[0][1].splitlines()[-1] == ended[1][1].splitlines()[-1]
    assert "jaxopd: stopped by SIGTERM" in ended[0][2]
    assert "jaxopd:" not in ended[1][2]


@pytest.mark.parametrize(("number", "name", "code"), [(signal.SIGTERM, "SIGTERM", 75), (signal.SIGINT, "Ctrl-C", 130)])
def test_a_signal_during_a_diagnosis(inputs, tmp_path, capsys, monkeypatch, number, name, code) -> None:
    """The piece in hand is finished, nothing else is begun, and the same command goes on."""
    save, saved = RunFolder.save, []

    def stopped(self, piece, *rest):
        save(self, piece, *rest)
        saved.append(piece)
        if len(saved) == 2:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "save", stopped)
        assert diagnose(inputs, tmp_path / "run") == code
    assert f"jaxopd: stopped by {name}: what was finished is saved" in capsys.readouterr().err
    assert signal.getsignal(number) is before
    assert len(saved) == 2
    assert len(list((tmp_path / "run" / "pieces").rglob("done.json"))) == 2
    assert not list((tmp_path / "run").rglob("claim.json"))
    assert diagnose(inputs, tmp_path / "run") == 0
