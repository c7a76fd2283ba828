"""Metrics of a run: metrics.jsonl, which a resumed run continues exactly, and other places when installed."""

import importlib.util
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxopd.distributed import is_first
from jaxopd.errors import InputError

NEEDED = {"tensorboard": "tensorboardX", "wandb": "wandb"}


class MetricsLog:
    """Appends one line a step. Lines hold no times and no paths: two runs of one configuration write the same bytes."""

    def __init__(self, folder: str | Path, others: Sequence[str] = (), config: dict[str, Any] | None = None):
        self.folder = Path(folder)
        self.path = self.folder / "metrics.jsonl"
        self.writers = [_writer(name, self.folder, config or {}) for name in others if is_first()]

    def resume(self, step: int) -> None:
        """Drops the lines of `step` and later: they are written again."""
        if is_first() and self.path.exists():
            kept = [
                line
                for line in self.path.read_text().splitlines()
                if _complete(line) and json.loads(line)["step"] < step
            ]
            self.path.write_text("".join(f"{line}\n" for line in kept))

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Writes a step's metrics, sorted by name; what is not finite becomes null."""
        if not is_first():
            return
        metrics = {name: None if _undefined(value) else value for name, value in metrics.items()}
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step} | dict(sorted(metrics.items()))) + "\n")
        numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
        for write in self.writers:
            write(step, numbers)

    def time(self, step: int, seconds: dict[str, float]) -> None:
        """Writes how long the parts of a step took, in a file of its own."""
        if not is_first():
            return
        with (self.folder / "timings.jsonl").open("a") as file:
            file.write(json.dumps({"step": step} | {name: round(s, 4) for name, s in seconds.items()}) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """Reads all lines."""
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []


def _undefined(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _complete(line: str) -> bool:
    """A line that a killed run did not finish is no JSON."""
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def check_writers(names: Sequence[str]) -> None:
    """Raises InputError on a writer that is unknown, or whose package is not installed."""
    for name in names:
        if name not in NEEDED or importlib.util.find_spec(NEEDED[name]) is None:
            known = ", ".join(f"{name} (package {package})" for name, package in NEEDED.items())
            raise InputError(f"log_to: found {name!r}, expected one whose package is installed, of {known}")


def _writer(name: str, folder: Path, config: dict[str, Any]):
    if name == "wandb":
        import wandb  # pyright: ignore[reportMissingImports]

        run = wandb.init(project="jaxopd", dir=folder, config=config)
        return lambda step, numbers: run.log(numbers, step=step)
    from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]

    board = SummaryWriter(str(folder / "tensorboard"))

    def write(step: int, numbers: dict[str, float]) -> None:
        for key, value in numbers.items():
            board.add_scalar(key, value, step)

    return write
