"""Runs a command as several JAX processes on the loopback, two fake devices each, and leaves none behind."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

DEVICES = 2  # of each process
PATIENCE = 600  # seconds


@contextmanager
def started(commands: Sequence[Sequence[str]], **options) -> Iterator[list[subprocess.Popen]]:
    """Starts Python commands side by side, and kills at the end what still runs."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("XLA_")}
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    running = [subprocess.Popen([sys.executable, *command], env=environment, **pipes) for command in commands]
    try:
        yield running
    finally:
        for process in running:
            process.kill()
        for process in running:
            process.communicate()


def joined(command: Sequence[str], processes: int) -> list[list[str]]:
    """Gives the command of each process of one run, which meet at a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    meet = ["--coordinator", address, "--processes", str(processes), "--join-seconds", "120"]
    return [[*command, *meet, "--process", str(process)] for process in range(processes)]


def finish(running: Sequence[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Waits for processes; gives the exit code and what was printed, of each."""
    ended = []
    for process in running:
        out, err = process.communicate(timeout=PATIENCE)
        ended.append((process.returncode, out, err))
    return ended
