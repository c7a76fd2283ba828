"""Several jobs on one run folder: each piece is done by one of them, without locks and without comparing clocks.

A job claims a piece by a file beside it, and writes the file again every BEAT_SECONDS while it works. Another job takes
the piece over once the file has stood still for LEASE_SECONDS of that job's own clock, or at once where the claim is of
a process of the same machine that is gone. Claims only save work: should two jobs do a piece all the same, the first
commit stands (`RunFolder.save`), so no clock, pause or lost file can harm a record.
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
        self.claim = {"job": uuid.uuid4().hex, "machine": _machine(), "pid": os.getpid()}
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
        if claim.get("machine") == self.claim["machine"] and not _others(claim.get("pid", 0)):
            return True
        known, since = self.seen.get(key, (None, 0.0))
        if known != generation:
            self.seen[key] = generation, time.monotonic()
            return False
        return time.monotonic() - since > LEASE_SECONDS

    def take_alone(self, piece: str) -> None:
        """Makes a piece ours that cannot be shared, after its claim stood still long enough.

        Raises InputError, in all processes, where another job is alive at it.
        """
        distributed.decided(lambda: self._take_alone(piece))

    def _take_alone(self, piece: str) -> None:
        seen = None
        while self._ask(piece) != "ours":
            claim, generation = self.run.read_version(_key(piece))
            here = claim is not None and claim.get("machine") == self.claim["machine"]
            if here or seen not in (None, generation):  # its process is there, or its claim moves
                found = "another job at work on this run" + f", process {claim['pid']}" * here
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
        heart.start()
        try:
            yield
        finally:
            stop.set()
            heart.join()
            self._give_up(piece)

    def _give_up(self, piece: str) -> None:
        with suppress(InputError):  # the storage is away or full: the next job sees that this one is gone
            claim, generation = self.run.read_version(_key(piece))
            if claim is not None and claim.get("job") == self.claim["job"]:  # or it was taken over meanwhile
                self.run.delete(_key(piece), generation)

    def _beat(self, piece: str, stop: threading.Event) -> None:
        beats = 0
        while not stop.wait(BEAT_SECONDS):
            beats += 1
            try:
                claim, generation = self.run.read_version(_key(piece))
                if claim is None or claim.get("job") != self.claim["job"]:
                    return
                self.run.write_if(_key(piece), self.claim | {"beats": beats}, generation)
            except InputError:  # the storage is away: the piece may be taken over, and the first commit stands
                return


def _key(piece: str) -> str:
    return f"pieces/{piece}/claim.json"


def _machine() -> str:
    """Names this machine since it was started, and within it the set of processes that see each other."""
    boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    named = (boot.read_text().strip(), os.readlink(space)) if boot.exists() and space.is_symlink() else ()
    return " ".join((platform.node(), *named))


def _others(pid: int) -> bool:
    """Says whether another living process has this number; a claim of our own is of a job that failed before."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # there, but another user's
        return True
    return True
