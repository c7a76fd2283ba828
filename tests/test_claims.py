"""Who may do a piece: claims that are held, given up, taken over from the dead, and lost."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxopd import claims
from jaxopd.claims import LEASE_SECONDS, Claims
from jaxopd.errors import InputError
from jaxopd.runs import RunFolder

PIECE, KEY = "stage/00000", "pieces/stage/00000/claim.json"
ELSEWHERE = {"job": "another", "machine": "another", "pid": 1}


@pytest.fixture
def run(tmp_path) -> RunFolder:
    return RunFolder.create(str(tmp_path / "run"), {})


def claim_of_another(run: RunFolder, **claim) -> None:
    run.write_json(KEY, ELSEWHERE | claim)


def the_first_process(ours: Claims) -> dict:
    """What a claim of this machine's process 1 says of it."""
    return {"machine": ours.claim["machine"], "pid": 1, "started": Path("/proc/1/stat").read_text().split()[21]}


def take(job: Claims) -> None:
    with job.alone(PIECE):
        assert job.run.read_json(KEY)["job"] == job.claim["job"]
    assert job.run.read_json(KEY) is None


def test_a_piece_is_ours_until_it_is_done(run) -> None:
    ours = Claims(run)
    assert ours.ask(PIECE) == "ours"
    with ours.working(PIECE):
        run.save(PIECE, {"x": np.zeros(1)})
    assert run.read_json(KEY) is None
    assert ours.ask(PIECE) == Claims(run).ask(PIECE) == "done"


def test_a_piece_is_given_up_when_its_job_fails(run) -> None:
    ours = Claims(run)
    assert ours.ask(PIECE) == "ours"
    with pytest.raises(KeyboardInterrupt), ours.working(PIECE):
        raise KeyboardInterrupt
    assert run.read_json(KEY) is None


def test_a_process_of_this_machine_that_is_gone_is_followed_at_once(run) -> None:
    dies = (
        "import sys, os; from jaxopd.claims import Claims; from jaxopd.runs import RunFolder\n"
        f"assert Claims(RunFolder.existing(sys.argv[1])).ask({PIECE!r}) == 'ours'; os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", dies, run.path], check=True)
    assert run.read_json(KEY) is not None
    assert Claims(run).ask(PIECE) == "ours"


def test_a_claim_from_elsewhere_holds_as_long_as_it_changes(run, monkeypatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(claims.time, "monotonic", lambda: now[0])
    ours = Claims(run)
    for beats in range(3):
        claim_of_another(run, beats=beats)
        for _ in range(2):
            assert ours.ask(PIECE) == "theirs"
            now[0] += LEASE_SECONDS / 2
    assert ours.ask(PIECE) == "theirs"
    now[0] += LEASE_SECONDS / 2 + 1
    assert ours.ask(PIECE) == "ours"


def test_a_job_that_works_alone_is_refused_while_another_lives(run, monkeypatch) -> None:
    """A process of this machine by its number, one elsewhere by its claim, which moves or stands still."""
    now, beats = [1000.0], iter(range(3))
    monkeypatch.setattr(claims.time, "monotonic", lambda: now[0])
    ours = Claims(run)
    claim_of_another(run, **the_first_process(ours))
    with pytest.raises(InputError, match="found another job at work on this run, process 1, expected one job"):
        take(ours)
    claim_of_another(run)
    monkeypatch.setattr(claims.time, "sleep", lambda _: claim_of_another(run, beats=next(beats)))
    with pytest.raises(InputError, match="found another job at work on this run, expected one job"):
        take(ours)
    monkeypatch.setattr(claims.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    take(ours)
    assert now[0] > 1000 + LEASE_SECONDS
    take(ours)  # again


def test_a_number_that_another_process_has_now_is_no_sign_of_life(run, monkeypatch) -> None:
    """A claim tells when its process began; where the system does not say, the claim holds while it changes."""
    ours = Claims(run)
    living = the_first_process(ours)
    claim_of_another(run, **living | {"started": str(int(living["started"]) + 1)})
    assert ours.ask(PIECE) == "ours"
    claim_of_another(run, **living)
    assert ours.ask(PIECE) == "theirs"
    monkeypatch.setattr(claims, "_started", lambda pid: None)
    now = [1000.0]
    monkeypatch.setattr(claims.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(claims.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    take(ours)
    assert now[0] > 1000 + LEASE_SECONDS


def test_of_two_that_take_over_one_wins(run, monkeypatch) -> None:
    monkeypatch.setattr(Claims, "_abandoned", lambda *_: True)
    first, second = Claims(run), Claims(run)
    claim_of_another(run)
    read = run.read_version

    def read_then_lose(key):
        found = read(key)
        if key == KEY:
            monkeypatch.setattr(run, "read_version", read)
            assert second.ask(PIECE) == "ours"
        return found

    monkeypatch.setattr(run, "read_version", read_then_lose)
    assert first.ask(PIECE) == "theirs"
    assert run.read_json(KEY)["job"] == second.claim["job"]


def test_a_heart_beats_and_stops_when_the_piece_is_taken(run, monkeypatch) -> None:
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.001)
    ours = Claims(run)
    assert ours.ask(PIECE) == "ours"
    with ours.working(PIECE):
        while run.read_json(KEY).get("beats", 0) < 3:
            pass
        claim_of_another(run)
    assert run.read_json(KEY) == ELSEWHERE


def test_a_heart_beats_on_after_the_storage_was_away(run, monkeypatch) -> None:
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.001)
    ours, write, away = Claims(run), run.write_if, iter(range(3))
    assert ours.ask(PIECE) == "ours"

    def fails_at_first(*given) -> bool:
        if next(away, None) is not None:
            raise InputError("found storage that failed")
        return write(*given)

    monkeypatch.setattr(run, "write_if", fails_at_first)
    with ours.working(PIECE):
        until = time.monotonic() + 10
        while run.read_json(KEY).get("beats", 0) <= 3:
            assert time.monotonic() < until, "no beat since"


def test_who_lost_a_piece_is_told(run) -> None:
    ours = Claims(run)
    ours.confirm(PIECE)  # not held, so nothing to lose
    for taken in (lambda: claim_of_another(run), lambda: run.delete(KEY)):  # the other job may have ended since
        with ours.alone(PIECE):
            ours.confirm(PIECE)
            taken()
            with pytest.raises(InputError, match="found a run that another job took over after 60 s"):
                ours.confirm(PIECE)
        run.delete(KEY)
