"""Saying what a comparison showed, when many are made at once."""

import numpy as np
from jaxtyping import Float

ALPHA = 0.05
UNDECIDED = "not distinguishable"


def holm(p: Float[np.ndarray, "m"]) -> Float[np.ndarray, "m"]:
    """Adjust p-values so that the chance of any false rejection among the m stays under alpha (Holm 1979).

    p_(i) -> max_{j <= i} min(1, (m - j + 1) p_(j)), in increasing order of p. NaN stays NaN and does not count in m.
    """
    p = np.asarray(p, float)
    adjusted = np.full(p.shape, np.nan)
    order = np.argsort(p)[: np.isfinite(p).sum()]  # NaN sorts last
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def verdict(difference: float, p: float) -> str:
    """Say "higher", "lower" or "not distinguishable" of a difference with an (adjusted) p-value."""
    if not p < ALPHA:
        return UNDECIDED
    return "higher" if difference > 0 else "lower"


def agreement(low: float, high: float, claimed: int) -> str:
    """Say whether an interval confirms a claimed sign: "same", "opposite" or "not distinguishable" from 0."""
    if not (low > 0 or high < 0):
        return UNDECIDED
    return "same" if (low > 0) == (claimed > 0) else "opposite"
