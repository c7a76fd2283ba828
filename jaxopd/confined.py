"""A child process under limits of time and memory, for work on what others wrote.

The limits are the kernel's: a signal handler would wait for ``9^9^9^9`` to finish, and works on the main thread only.
This file is also the child's program: it imports nothing of the package, so that the child starts in a moment.
"""

import atexit
import contextlib
import json
import os
import resource
import runpy
import selectors
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

CPU_SECONDS = 3.0  # a request
MEMORY_BYTES = 2 << 30
STARTUP_SECONDS = 300
PATIENCE_SECONDS = 60  # of wall time, on a machine too busy to give the child its processor time
LONGEST_REPLY = 1 << 22  # bytes


class Confined:
    """Asks the function `answer(request)` of a script, run in a process of its own, one request at a time.

    Requests and replies are what JSON holds. The script is a file that imports nothing of this package; the process
    starts with the first request, and anew after one that killed it.
    """

    def __init__(self, script: Path) -> None:
        self._script = script
        self._lock = threading.Lock()
        self._process: Any = None  # a Popen whose pipes are always open
        atexit.register(self.close)

    def ask(self, request: Any) -> Any:
        """Return the script's reply; None where it raised, or ran out of processor time or memory.

        Raises:
            RuntimeError: the script cannot be loaded.
        """
        with self._lock:
            self._start()
            reply = b""
            try:
                self._process.stdin.write(json.dumps(request).encode() + b"\n")
                self._process.stdin.flush()
                reply = self._reply(PATIENCE_SECONDS)
            except BrokenPipeError:
                pass
            finally:
                if not reply.endswith(b"\n"):  # killed, or interrupted: a late reply must not answer the next request
                    self._stop()
            return json.loads(reply) if reply.endswith(b"\n") else None

    def close(self) -> None:
        """End the process; the next request starts another."""
        with self._lock:
            self._stop()

    def _start(self) -> None:
        if self._process is not None:
            return
        # -P keeps this folder off the import path, where types.py would hide the standard library's
        command = [sys.executable, "-P", __file__, str(self._script)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        greeting = self._reply(STARTUP_SECONDS)
        if greeting != b"ready\n":
            self._stop()
            raise RuntimeError(f"{self._script.name} did not start: {greeting.decode().strip() or 'it ended'}")

    def _reply(self, seconds: float) -> bytes:
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            return self._process.stdout.readline(LONGEST_REPLY) if selector.select(seconds) else b""

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            with contextlib.suppress(BrokenPipeError):  # of what was still buffered
                self._process.stdin.close()
            self._process.stdout.close()
            self._process = None


def _serve(script: str) -> None:
    """Answer requests until the input ends; never asked to clean up, since the kernel ends it at its limits."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no reply
    try:
        answer: Callable[[Any], Any] = runpy.run_path(script)["answer"]
    except ImportError as error:
        print(error, file=replies, flush=True)
        return
    with contextlib.suppress(ValueError, OSError):  # where a lower limit is in force already
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        try:
            reply = json.dumps(answer(json.loads(line)))
        except Exception:  # whatever a hostile request provokes, there is no answer to it
            reply = "null"
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(reply, file=replies, flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1])
