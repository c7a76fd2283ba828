"""What this process holds, and held at most, as Linux tells it; for scripts that run in a process of their own."""

from pathlib import Path

CLEAR_REFS = Path("/proc/self/clear_refs")


def held() -> int:
    """Gives the bytes held now."""
    return _bytes("VmRSS")


def peak() -> int:
    """Gives the bytes held at most, since the start or `forget_peak`; getrusage's survive exec."""
    return _bytes("VmHWM")


def forget_peak() -> None:
    """Makes the peak what is held now."""
    CLEAR_REFS.write_text("5")


def _bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))
