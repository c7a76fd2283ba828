"""When training goes wrong: it stops on what is not finite, and warns of collapse."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from jaxopd.distributed import SharedError, decided
from jaxopd.train.batch import Batch

NGRAM = 4
REPEATED = 0.5  # share of repeated 4-grams from which a response counts as degenerate
# A metric, the factor against its mean over the first steps beyond which it is suspicious, and what that means.
RISES = {
    "rollout/repetitive": (0.2, "responses repeat themselves"),
    "rollout/truncated": (0.5, "responses run into the length limit"),
}
ENTROPY_LEFT = 0.2  # of the first steps' entropy
LENGTH_FACTOR = 3.0
FIRST_STEPS = 5


class TrainingStopped(SharedError):
    """Training cannot go on; the message names the step, the kept batch and the last checkpoint."""


def check_finite(values: dict[str, float], step: int, batch: Batch, folder: Path, checkpoint: int | None) -> None:
    """Raises TrainingStopped where a loss or norm is not finite, after keeping the batch for replay."""
    wrong = [name for name, value in values.items() if not np.isfinite(value)]
    if not wrong:
        return
    kept = folder / "replay" / f"step-{step:06d}.npz"
    arrays = {name: getattr(batch, name) for name in batch.__dataclass_fields__}
    decided(lambda: _keep(kept, {name: array for name, array in arrays.items() if array is not None}))
    last = "none yet" if checkpoint is None else str(folder / "checkpoints" / str(checkpoint))
    raise TrainingStopped(
        f"step {step}: found {wrong[0]} {values[wrong[0]]}, expected a finite number; the batch is kept in {kept}, the "
        f"last checkpoint is {last}"
    )


def _keep(file: Path, arrays: dict[str, np.ndarray]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, **arrays)


def repetition(tokens: Int[np.ndarray, "S"]) -> float:
    """Gives the share of a response's 4-grams that occurred before in it."""
    tokens = tokens[tokens >= 0]
    if len(tokens) <= NGRAM:
        return 0.0
    grams = np.lib.stride_tricks.sliding_window_view(tokens, NGRAM)
    return 1.0 - len(np.unique(grams, axis=0)) / len(grams)


def rollout_metrics(batch: Batch) -> dict[str, float]:
    """Describes a batch's responses: correctness, length, truncation, repetition."""
    return {
        "rollout/accuracy": float(np.mean(batch.correct == 1)),
        "rollout/unanswered": float(np.mean(batch.correct == -1)),
        "rollout/length": float(batch.length.mean()),
        "rollout/truncated": float(batch.truncated.mean()),
        "rollout/repetitive": float(np.mean([repetition(row) > REPEATED for row in batch.responses])),
    }


class Monitor:
    """Remembers the first steps and compares later ones with them."""

    def __init__(self, first: Sequence[dict[str, float]] = ()):
        self.first = [dict(metrics) for metrics in first]

    def warnings(self, metrics: dict[str, float]) -> list[str]:
        """Gives one sentence a suspicion; the first steps only teach what is normal."""
        watched = {name: metrics[name] for name in ("entropy/student", "rollout/length", *RISES) if name in metrics}
        if len(self.first) < FIRST_STEPS:
            self.first.append(watched)
            return []
        normal = {name: float(np.mean([m[name] for m in self.first if name in m])) for name in watched}
        found = []
        entropy = "entropy/student"
        if entropy in watched and watched[entropy] < ENTROPY_LEFT * normal[entropy]:
            found.append(f"entropy fell to {watched[entropy]:.4f} from {normal[entropy]:.4f}: collapse")
        length, usual = watched["rollout/length"], normal["rollout/length"]
        if not usual / LENGTH_FACTOR <= length <= usual * LENGTH_FACTOR:
            found.append(f"responses are {length:.0f} tokens long, {usual:.0f} at first")
        for name, (rise, meaning) in RISES.items():
            if watched[name] > normal[name] + rise:
                found.append(f"{meaning}: {watched[name]:.0%}, {normal[name]:.0%} at first")
        return found
