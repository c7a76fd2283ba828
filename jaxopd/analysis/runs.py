"""Runs side by side: the same teachers under another student, task, budget or seed."""

from collections.abc import Mapping
from itertools import combinations

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

from jaxopd.alignment import paired_difference
from jaxopd.analysis.intervals import interval_of_mean
from jaxopd.analysis.teachers import FORM, judged, question_summaries

PAIRED, UNPAIRED = "Wilcoxon signed-rank, paired by question", "Welch's t, no question in common"


def side_by_side(runs: Mapping[str, pd.DataFrame], statistic: str = "mean", form: str = FORM) -> pd.DataFrame:
    """Average a statistic over questions per run and teacher, from the node records of one estimator each.

    One row per teacher and run: mean, t interval (low, high), bootstrap interval, n questions, in the runs' order.
    """
    rows = []
    for run, nodes in runs.items():
        for teacher, group in question_summaries(nodes, form).groupby("teacher", sort=True):
            rows.append({"teacher": teacher, "run": run} | interval_of_mean(group[statistic].to_numpy(float)))
    columns = ["teacher", "run", "mean", "low", "high", "boot_low", "boot_high", "n"]
    return pd.DataFrame(rows, columns=columns).sort_values("teacher", kind="stable", ignore_index=True)


def compare_runs(runs: Mapping[str, pd.DataFrame], statistic: str = "mean", form: str = FORM) -> pd.DataFrame:
    """Test, for each teacher that two runs share, whether its statistic differs between them.

    Over the questions in common where there are at least two (Wilcoxon's signed-rank test), else between separate
    questions (Welch's t test). One row per teacher and pair of runs: difference = second - first, t interval (low,
    high), n questions used, test, wilcoxon_p or welch_p as `p`, holm_p over all rows, verdict on the second run.
    """
    found = {run: question_summaries(nodes, form) for run, nodes in runs.items()}
    rows = []
    for first, second in combinations(found, 2):
        for teacher in sorted(set(found[first]["teacher"]) & set(found[second]["teacher"])):
            left, right = (
                found[run].loc[found[run]["teacher"] == teacher].set_index("question")[statistic].dropna()
                for run in (first, second)
            )
            common = left.index.intersection(right.index)
            if len(common) > 1:
                test = paired_difference((right[common] - left[common]).to_numpy(float))
                row = {key: test[key] for key in ("difference", "low", "high", "n")}
                row |= {"test": PAIRED, "p": test["wilcoxon_p"]}
            else:
                row = _welch(left.to_numpy(float), right.to_numpy(float))
            rows.append({"teacher": teacher, "first": first, "second": second} | row)
    columns = ["teacher", "first", "second", "difference", "low", "high", "n", "test", "p"]
    table = pd.DataFrame(rows, columns=columns).rename(columns={"p": "wilcoxon_p"})
    return judged(table, "difference").rename(columns={"wilcoxon_p": "p"})


def rank_changes(table: pd.DataFrame) -> pd.DataFrame:
    """Compare the rankings of teachers between runs: Kendall's tau_b over the teachers of both, per pair of runs."""
    wide = table.pivot(index="teacher", columns="run", values="mean")[list(dict.fromkeys(table["run"]))]
    rows = []
    for first, second in combinations(wide.columns, 2):
        both = wide[[first, second]].dropna()
        tau = stats.kendalltau(both[first], both[second]) if len(both) > 1 else None
        row = {"first": first, "second": second, "teachers": len(both)}
        row |= {"kendall_tau": float(tau.statistic) if tau else np.nan, "p": float(tau.pvalue) if tau else np.nan}
        rows.append(row)
    return pd.DataFrame(rows, columns=["first", "second", "teachers", "kendall_tau", "p"])


def _welch(first: Float[np.ndarray, "n"], second: Float[np.ndarray, "m"]) -> dict[str, object]:
    """Welch's t test of second - first; NaN where either has fewer than two values."""
    row = {"difference": np.nan, "low": np.nan, "high": np.nan, "n": len(first) + len(second), "test": UNPAIRED}
    if min(len(first), len(second)) < 2:
        return row | {"p": np.nan}
    test = stats.ttest_ind(second, first, equal_var=False)
    low, high = test.confidence_interval(0.95)
    return row | {
        "difference": float(second.mean() - first.mean()),
        "low": float(low),
        "high": float(high),
        "p": float(test.pvalue),
    }
