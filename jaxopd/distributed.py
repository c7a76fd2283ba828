"""Several processes as one run, on JAX's own multi-controller runtime (`jax.distributed`).

Every process runs the same host program in the same order, and one mesh spans the devices of all. What the rest of the
package needs for that is here: two doors between host and devices (`place`, `fetch`), and `decided` for whatever might
come out differently elsewhere: a time limit, a clock, a file that exists. Process 0 alone writes the run folder, which
every process must be able to read, and prints. In a single process all of this is the identity.
"""

import atexit
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxopd.errors import InputError, first_line
from jaxopd.types import bucket

T = TypeVar("T")

_stop_signals: list[int] = []
_safe_points = itertools.count()
_dismissals: list[Callable[[], object]] = []


class Preempted(Exception):
    """SIGTERM or Ctrl-C arrived, and this is a moment at which nothing finished is lost."""


class SharedError(InputError):
    """What process 0 found wrong, in every process: all of them end."""


@dataclasses.dataclass(frozen=True)
class Hosts:
    """How this process finds the others of its run."""

    distributed: bool = False
    """Be one of several processes of one run; SLURM, TPU, GKE and Open MPI tell which."""
    coordinator: str | None = None
    """Where nothing tells: HOST:PORT of process 0, as in JAX_COORDINATOR_ADDRESS."""
    processes: int | None = None
    """Where nothing tells: their number, as in JAX_NUM_PROCESSES."""
    process: int | None = None
    """Where nothing tells: the number of this one, from 0, as in JAX_PROCESS_ID."""
    join_seconds: int = 300
    """How long to wait for the others at the start."""
    heartbeat_seconds: int = 60
    """Silence after which a process counts as dead and the others end."""

    def join(self) -> None:
        """Joins the other processes, before JAX computes anything.

        Raises InputError where nothing says who they are; JAX ends the process if they are not there in `join_seconds`.
        """
        coordinator = self.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
        processes = _number("--processes", self.processes, "JAX_NUM_PROCESSES")
        process = _number("--process", self.process, "JAX_PROCESS_ID")
        if not self.distributed and (self.coordinator, self.processes, self.process) == (None, None, None):
            return
        given = (coordinator, processes, process)
        if None not in given:
            self._check(*given)
        self._leave_witness(process)
        try:
            jax.distributed.initialize(
                *given,
                cluster_detection_method=None if None in given else "deactivate",
                initialization_timeout=self.join_seconds,
                heartbeat_timeout_seconds=self.heartbeat_seconds,
                shutdown_timeout_seconds=self.join_seconds,
            )
        except ValueError as error:
            raise InputError(
                f"--distributed: found nothing that names the other processes ({error}), expected SLURM, TPU, GKE or "
                "Open MPI to do so, or --coordinator, --processes and --process"
            ) from None
        except jax.errors.JaxRuntimeError as error:
            reason = first_line(error)
            raise InputError(
                f"--coordinator {coordinator}: found no way to the other processes ({reason}), expected the same free "
                "port of process 0 everywhere, and a number of its own for each process"
            ) from None

    def _leave_witness(self, process: int | None) -> None:
        """Has a small process say what happened if JAX ends this one, which it does without returning to Python."""
        name = "a process" if process is None else f"process {process}"
        sentence = (
            f"jaxopd: {name} was ended: it, or another one, died or gave no answer for {self.heartbeat_seconds} s "
            f"({self.join_seconds} s at the start); what was finished is saved, and the same command goes on from there"
        )
        waiting = "import sys; sys.stdin.read() or print(sys.argv[1], file=sys.stderr)"
        command = [sys.executable, "-I", "-c", waiting, sentence]
        # In a session of its own it outlives a signal to this process's group.
        witness = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        _dismissals.append(partial(witness.communicate, b"a regular end"))
        atexit.register(_dismissals[-1])

    @staticmethod
    def _check(coordinator: str, processes: int, process: int) -> None:
        host, colon, port = coordinator.rpartition(":")
        if not (host and colon and port.isdecimal()):
            raise InputError(f"--coordinator: found {coordinator!r}, expected HOST:PORT")
        if not 0 <= process < processes:
            raise InputError(f"--process: found {process}, expected 0 to {processes - 1}")


def _number(flag: str, given: int | None, variable: str) -> int | None:
    """Gives a flag's value, or that of the environment variable beside it."""
    text = os.environ.get(variable)
    if given is not None or not text:
        return given
    if not text.isdecimal():
        raise InputError(f"{variable}: found {text!r}, expected a number, as for {flag}")
    return int(text)


def several() -> bool:
    """Says whether this run has more than one process."""
    return jax.distributed.is_initialized() and jax.process_count() > 1  # the count alone would start the devices


def is_first() -> bool:
    """Says whether this is process 0, which writes and prints."""
    return not several() or jax.process_index() == 0


def place(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """Puts arrays that every process holds alike onto devices, of which each process fills its own."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def put(x: Any) -> jax.Array:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.device_put(x, sharding)
        whole = np.asarray(x)
        # device_put would first gather the array from all processes, to see that it is the same.
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(put, tree)


def fetch(tree: Any) -> Any:
    """Gives every process the whole of arrays that are spread over devices, as numpy."""

    def whole(x: Any) -> Any:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return multihost_utils.process_allgather(x, tiled=True)
        return x

    return jax.device_get(jax.tree.map(whole, tree) if several() else tree)


def decided(decide: Callable[[], T]) -> T:
    """Runs `decide` in process 0 and gives its result, a JSON value, to every process; so also an InputError."""
    if not several():
        return decide()
    outcome = {}
    if is_first():
        try:
            outcome = {"result": decide()}
        except InputError as error:
            outcome = {"error": str(error)}
    outcome = json.loads(_broadcast(json.dumps(outcome).encode()))
    if "error" in outcome:
        raise SharedError(outcome["error"])
    return outcome["result"]


def _broadcast(message: bytes) -> bytes:
    """Gives every process the message of process 0, padded so that few shapes are compiled."""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(message))))
    padded = np.zeros(bucket(size), np.uint8)
    if is_first():
        padded[:size] = np.frombuffer(message, np.uint8)
    return multihost_utils.broadcast_one_to_all(padded)[:size].tobytes()


@contextmanager
def preemptible() -> Iterator[None]:
    """Has SIGTERM, and the first Ctrl-C, wait for the next `stop_if_preempted`.

    With several processes JAX's preemption service does it, for SIGTERM alone.
    """
    if several():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def stop(number: int, _: Any) -> None:
        _stop_signals.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, before[signal.SIGINT])
            print("jaxopd: stopping where nothing finished is lost; Ctrl-C again stops at once", file=sys.stderr)

    try:
        for number in before:
            signal.signal(number, stop)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _stop_signals.clear()


def stop_if_preempted() -> None:
    """Raises Preempted after SIGTERM: in all processes at the same call of this, whichever of them had the signal."""
    if _stop_signals:
        raise Preempted("Ctrl-C" if _stop_signals[0] == signal.SIGINT else "SIGTERM")
    if several() and multihost_utils.reached_preemption_sync_point(next(_safe_points)):
        raise Preempted("SIGTERM")


def leave(code: int) -> None:
    """Ends a process that failed at once, where a regular end would wait for the others."""
    if several():
        for dismiss in _dismissals:
            dismiss()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
