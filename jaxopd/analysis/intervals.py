"""Uncertainty of means over questions: Student's t, and the cluster bootstrap that resamples whole questions.

Nodes of one question share its tree, so they are no independent draws; questions are. Both intervals therefore take
one number a question. They differ where few questions or heavy tails make the t interval's symmetry doubtful.
"""

import numpy as np
from jaxtyping import Float
from scipy import stats

from jaxopd.alignment import t_interval

DRAWS = 2000


def cluster_bootstrap(
    values: Float[np.ndarray, "Q"],
    weights: Float[np.ndarray, "Q"] | None = None,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> tuple[float, float]:
    """Bound sum w v / sum w by the 95 % expanded percentile interval over resampled questions.

    With one value and weight 1 a question this is the mean over questions; with node counts as weights, the mean
    over nodes. NaN values take no part; fewer than two questions have no interval. The percentiles are those that
    make the interval of a normal mean as wide as Student's (Hesterberg 2015, "What Teachers Should Know About the
    Bootstrap", section 3.4): the plain percentile interval is too narrow below 50 questions.
    """
    values = np.asarray(values, float)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, float)
    known = np.isfinite(values) & (weights > 0)
    values, weights = values[known], weights[known]
    n = len(values)
    if n < 2:
        return np.nan, np.nan
    times = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)
    means = times @ (weights * values) / (times @ weights)
    tail = stats.norm.cdf(stats.t.ppf(0.025, n - 1) * np.sqrt(n / (n - 1)))
    low, high = np.quantile(means, (tail, 1 - tail))
    return float(low), float(high)


def interval_of_mean(values: Float[np.ndarray, "Q"]) -> dict[str, float]:
    """Give the mean over questions with both 95 % intervals: low, high (t); boot_low, boot_high (bootstrap); n."""
    values = np.asarray(values, float)
    boot_low, boot_high = cluster_bootstrap(values)
    found = t_interval(values)
    return {
        **{name: found[name] for name in ("mean", "low", "high")},
        "boot_low": boot_low,
        "boot_high": boot_high,
        "n": found["n"],
    }
