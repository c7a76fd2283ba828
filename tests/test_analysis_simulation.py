"""Intervals and tests of node records against simulation: nodes that share a question or a path are not independent.

A replicate takes the place of a teacher, so that one call measures a thousand.
"""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from jaxopd.alignment import t_interval
from jaxopd.analysis import contrast, interval_of_mean, outcomes, question_summaries

REPLICATES, QUESTIONS, PATHS, NODES = 1000, 60, 4, 3  # the exact p-values of fewer questions lie far apart
LEVEL = 0.1


def clustered(seed: int, replicates: int, gap: float = 0.0) -> pd.DataFrame:
    """Node records whose alignment is LEVEL, effects of question and path, and noise; incorrect paths are `gap` ahead.

    Effects of questions are skewed, as those of a few easy ones are.
    """
    rng = np.random.default_rng(seed)
    shape = (replicates, QUESTIONS, PATHS, NODES)
    replicate, question, path, t = (axis.ravel() for axis in np.indices(shape))
    effect = 0.15 * (rng.exponential(size=(replicates, QUESTIONS, 1, 1)) - 1)
    align = LEVEL + effect + 0.1 * rng.standard_normal((replicates, QUESTIONS, PATHS, 1))
    align = align + gap * (np.arange(PATHS) >= 2)[:, None] + 0.2 * rng.standard_normal(shape)
    return pd.DataFrame(
        {
            "question": question,
            "path": path,
            "t": t,
            "teacher": replicate,
            "path_correct": path < 2,
            "decision": True,
            "success_range": rng.uniform(0.1, 1, shape).ravel(),
            "ideal_norm": rng.uniform(0.05, 0.2, shape).ravel(),
            "align_reverse_kl": align.ravel(),
            "advantage": 0.1 * align.ravel(),
        }
    )


@pytest.fixture(scope="module")
def null() -> pd.DataFrame:
    return clustered(0, REPLICATES)


def covered(intervals) -> float:
    return float(np.mean([low <= LEVEL <= high for low, high in intervals]))


def test_intervals_over_questions_cover_and_intervals_over_nodes_do_not(null) -> None:
    per_question = question_summaries(null).groupby("teacher")["mean"]
    found = [interval_of_mean(values.to_numpy()) for _, values in per_question]
    assert 0.92 <= covered((f["low"], f["high"]) for f in found) <= 0.98
    assert 0.92 <= covered((f["boot_low"], f["boot_high"]) for f in found) <= 0.98
    of_nodes = [t_interval(values.to_numpy()) for _, values in null.groupby("teacher")["align_reverse_kl"]]
    assert covered((f["low"], f["high"]) for f in of_nodes) < 0.7


def test_p_values_of_outcomes_are_uniform_under_permutation() -> None:
    """1,000 permutations of which paths of a question are called correct, of one data set with a real difference."""
    one = clustered(1, 1, gap=0.1)
    rng = np.random.default_rng(2)
    labels = rng.permuted(np.tile(np.arange(PATHS) < 2, (REPLICATES, QUESTIONS, 1)), axis=2)
    copies = pd.concat([one.assign(teacher=replicate) for replicate in range(REPLICATES)], ignore_index=True)
    copies["path_correct"] = labels[copies["teacher"], copies["question"], copies["path"]]
    table = outcomes(copies, per_teacher=True).set_index("statistic")
    for statistic in ("mean", "sr_weighted", "global", "advantage"):
        p = table.loc[statistic, "wilcoxon_p"]
        assert len(p) == REPLICATES
        assert stats.kstest(p, "uniform").pvalue > 0.01, statistic
        assert stats.binomtest(int((p < 0.05).sum()), REPLICATES, 0.05).pvalue > 0.01, statistic
    assert outcomes(one).set_index("statistic").loc["mean", "wilcoxon_p"] < 0.01, "the difference itself is found"


def test_teachers_that_do_not_differ_give_uniform_p_values(null) -> None:
    """500 pairs of teachers with the same distribution."""
    found = [
        contrast(pair, [2 * number], [2 * number + 1])["wilcoxon_p"]
        for number, pair in null.groupby(null["teacher"] // 2)
    ]
    assert stats.kstest(found, "uniform").pvalue > 0.01
