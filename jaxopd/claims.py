"""Several jobs on one run folder: each piece is done by one of them, without locks and without comparing clocks.

A job claims a piece by a file beside it, and writes the file again every BEAT_SECONDS while it works. Another job takes
the piece over once the file has stood still for LEASE_SECONDS of that job's own clock, or at once where the claim is of
a process of the same machine that is gone. For pieces that `RunFolder.save` commits, claims only save work: should two
jobs do one all the same, the first commit stands, so no clock, pause or lost file can harm a record.

A training run has no such commit, so its job holds it `alone` and asks `confirm` before it writes: a job that was
paused, or without storage, for longer than the lease finds its claim taken and ends. What is left to chance is a pause
between the answer and the write.
"""

import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from jaxopd import distributed
from jaxopd.errors import InputError
from jaxopd.runs import RunFolder

BEAT_SECONDS = 5.0
LEASE_SECONDS = 60.0
LOOK_SECONDS = 1.0  # between looks at a claim

State = Literal["done", "ours", "theirs"]


class Claims:
    """The pieces of a run as one job sees them; a job is a process, or several that run as one."""

    def __init__(self, run: RunFolder):
        self.run = run
        pid = os.getpid()
        self.claim = {"job": uuid.uuid4().hex, "machine": _machine(), "pid": pid, "started": _started(pid)}
        self.held: set[str] = set()  # pieces that we work on; known to process 0
        self.seen: dict[str, tuple[bytes, float]] = {}  # a claim's generation, and since when it has stood still

    def ask(self, piece: str) -> State:
        """Says whether a piece is done, ours to do from now on, or another job's at the moment."""
        return distributed.decided(lambda: self._ask(piece))

    def _ask(self, piece: str) -> State:
        if self.run.finished(piece):
            return "done"
        claim, generation = self.run.read_version(_key(piece))
        if claim is not None and not self._abandoned(_key(piece), claim, generation):
            return "theirs"
        if not self.run.write_if(_key(piece), self.claim, generation):
            return "theirs"
        if self.run.finished(piece):  # committed, and its claim given up, since we looked
            self.run.delete(_key(piece))
            return "done"
        return "ours"

    def _abandoned(self, key: str, claim: dict, generation: bytes) -> bool:
        if self._lives(claim) is False:
            return True
        known, since = self.seen.get(key, (None, 0.0))
        if known != generation:
            self.seen[key] = generation, time.monotonic()
            return False
        return time.monotonic() - since > LEASE_SECONDS

    def _lives(self, claim: dict) -> bool | None:
        """Says whether a claim is of another living process of this machine, or None where that cannot be seen."""
        if claim.get("machine") != self.claim["machine"]:
            return None
        pid = claim.get("pid", 0)
        if pid == os.getpid():  # of a job in this process that failed before
            return False
        with suppress(PermissionError):  # there, but another user's
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                return False
        started = _started(pid)  # a number is given again, to a process that began later
        return None if None in (started, claim.get("started")) else started == claim["started"]

    @contextmanager
    def alone(self, piece: str) -> Iterator[None]:
        """Works on a piece that cannot be shared, once its claim has stood still long enough.

        Raises InputError, in all processes, where another job is alive at it.
        """
        distributed.decided(lambda: self._take_alone(piece))
        with self.working(piece):
            yield

    def _take_alone(self, piece: str) -> None:
        seen = None
        while self._ask(piece) != "ours":
            claim, generation = self.run.read_version(_key(piece))
            here = claim is not None and self._lives(claim)
            if here or seen not in (None, generation):  # its process is there, or its claim moves
                found = "another job at work on this run" + (f", process {claim['pid']}" if here else "")
                raise InputError(f"{self.run.path}: found {found}, expected one job at a time")
            seen = generation
            time.sleep(LOOK_SECONDS)

    @contextmanager
    def working(self, piece: str) -> Iterator[None]:
        """Keeps the claim on a piece alive, and gives it up at the end, however that comes."""
        if not distributed.is_first():
            yield
            return
        stop = threading.Event()
        heart = threading.Thread(target=self._beat, args=(piece, stop), daemon=True)
        self.held.add(piece)
        heart.start()
        try:
            yield
        finally:
            stop.set()
            heart.join()
            self.held.discard(piece)
            self._give_up(piece)

    def confirm(self, piece: str) -> None:
        """Raises InputError, in all processes, where a piece that we work on was taken over."""
        distributed.decided(lambda: self._confirm(piece))

    def _confirm(self, piece: str) -> None:
        if piece in self.held and not self._is_ours(self.run.read_json(_key(piece))):
            found = f"a run that another job took over after {LEASE_SECONDS:.0f} s without a sign of this one"
            raise InputError(f"{self.run.path}: found {found}, expected one job at a time")

    def _is_ours(self, claim: dict | None) -> bool:
        return claim is not None and claim.get("job") == self.claim["job"]

    def _give_up(self, piece: str) -> None:
        with suppress(InputError):  # the storage is away or full: the next job sees that this one is gone
            claim, generation = self.run.read_version(_key(piece))
            if self._is_ours(claim):  # or it was taken over meanwhile
                self.run.delete(_key(piece), generation)

    def _beat(self, piece: str, stop: threading.Event) -> None:
        beats = 0
        while not stop.wait(BEAT_SECONDS):
            beats += 1
            try:
                claim, generation = self.run.read_version(_key(piece))
                if not self._is_ours(claim):
                    return
                self.run.write_if(_key(piece), self.claim | {"beats": beats}, generation)
            except ValueError:  # the storage is away: whoever sees it may take the piece over until it is back
                continue


def _key(piece: str) -> str:
    return f"pieces/{piece}/claim.json"


def _machine() -> str:
    """Names this machine since it was started, and within it the set of processes that see each other."""
    boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    named = (boot.read_text().strip(), os.readlink(space)) if boot.exists() and space.is_symlink() else ()
    return " ".join((platform.node(), *named))


def _started(pid: int) -> str | None:
    """Gives when a process began, in ticks since the machine did; None where it has ended or no system says."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # a name may hold spaces
    except OSError:
        return None
    return None if state in "ZX" else fields[18]  # field 22 of proc(5); a zombie's parent may never look after it
