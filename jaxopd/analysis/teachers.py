"""Teachers against each other, and each on correct against incorrect paths (paper A, sections 4.1 and 4.2).

All functions take the node records of ONE estimator; `of_estimator` selects them.
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pandas as pd

from jaxopd.alignment import STATISTICS, Reading, aggregate, correct_vs_incorrect, paired_difference
from jaxopd.analysis.decisions import UNDECIDED, holm, verdict
from jaxopd.analysis.intervals import interval_of_mean
from jaxopd.errors import InputError

FORM = "reverse_kl"  # the paper's "GKD" gradient
ALL_STATISTICS = (*STATISTICS, "advantage")
ALL_TEACHERS = "all teachers"


def of_estimator(nodes: pd.DataFrame, estimator: str) -> pd.DataFrame:
    """Select the rows of one estimator of P_succ; InputError where the records hold none."""
    chosen = nodes[nodes["estimator"] == estimator]
    if chosen.empty:
        known = ", ".join(sorted(nodes["estimator"].unique())) or "no row"
        raise InputError(f"nodes: found {known}, expected rows of the estimator {estimator!r}")
    return chosen


def question_summaries(
    nodes: pd.DataFrame, form: str = FORM, by: Sequence[str] = ("teacher",), reading: Reading = "renormalized"
) -> pd.DataFrame:
    """Summarise each question: the statistics of `jaxopd.alignment.summarize` and the mean teacher advantage.

    One row per question and group of `by`; n counts decision nodes.
    """
    keys = ("question", *by)
    summaries = aggregate(nodes, form, keys, reading)
    # The advantage is one number a decision node too; its mean is the one statistic that makes sense.
    advantage = aggregate(nodes.assign(align_advantage=nodes["advantage"]), "advantage", keys)
    return summaries.assign(advantage=advantage["mean"].to_numpy(float))


def rank_teachers(nodes: pd.DataFrame, form: str = FORM, reading: Reading = "renormalized") -> pd.DataFrame:
    """Average the questions' summaries per teacher and statistic (Tables 1 and 3, Figures 4 and 8 to 10).

    One row per teacher and statistic: mean, low and high (95 % t interval across questions), boot_low and boot_high
    (95 % cluster bootstrap over questions), n questions.
    """
    summaries = question_summaries(nodes, form, reading=reading)
    rows = [
        {"teacher": teacher, "statistic": name} | interval_of_mean(group[name].to_numpy(float))
        for teacher, group in summaries.groupby("teacher", sort=True)
        for name in ALL_STATISTICS
    ]
    return pd.DataFrame(rows, columns=["teacher", "statistic", "mean", "low", "high", "boot_low", "boot_high", "n"])


def compare_teachers(
    nodes: pd.DataFrame, statistic: str = "mean", form: str = FORM, reading: Reading = "renormalized"
) -> pd.DataFrame:
    """Test every pair of teachers on the questions both have: Wilcoxon's signed-rank test, Holm over the pairs.

    One row a pair, first the teacher that is ahead: difference = first - second with its 95 % t interval, wilcoxon_p,
    holm_p, cohens_dz, n paired questions, and `verdict`: "higher", or "not distinguishable" where holm_p >= .05.
    """
    summaries = question_summaries(nodes, form, reading=reading)
    wide = summaries.pivot(index="question", columns="teacher", values=statistic)
    rows = []
    for first, second in combinations(wide.columns, 2):
        difference = (wide[first] - wide[second]).to_numpy(float)
        if np.isfinite(difference).any() and np.nanmean(difference) < 0:
            first, second, difference = second, first, -difference
        rows.append({"first": first, "second": second} | paired_difference(difference))
    columns = ["first", "second", "difference", "low", "high", "wilcoxon_p", "cohens_dz", "n"]
    return judged(pd.DataFrame(rows, columns=columns), "difference")


def contrast(
    nodes: pd.DataFrame, ahead: Sequence[str], behind: Sequence[str], statistic: str = "mean", form: str = FORM
) -> dict[str, float]:
    """Test one group of teachers against another: paired by question, each group averaged within the question.

    Gives `paired_difference` of ahead - behind; a question counts where every teacher of both groups has the statistic.
    """
    wide = question_summaries(nodes, form).pivot(index="question", columns="teacher", values=statistic)
    means = [wide.reindex(columns=list(group)).mean(axis=1, skipna=False) for group in (ahead, behind)]
    return paired_difference((means[0] - means[1]).to_numpy(float))


def judged(table: pd.DataFrame, difference: str) -> pd.DataFrame:
    """Add holm_p, adjusted over all rows, and the verdict on each row's difference."""
    adjusted = holm(table["wilcoxon_p"].to_numpy(float))
    verdicts = [verdict(d, p) for d, p in zip(table[difference], adjusted, strict=True)]
    return table.assign(holm_p=adjusted, verdict=verdicts)


def leaders(ranking: pd.DataFrame, pairs: pd.DataFrame, statistic: str = "mean") -> list[str]:
    """List the best teacher, then those not distinguishable from it; none where nothing is known."""
    means = ranking[ranking["statistic"] == statistic].dropna(subset=["mean"])
    if means.empty:
        return []
    best = means.sort_values("mean", ascending=False, kind="stable")["teacher"].iloc[0]
    ties = pairs[pairs["verdict"] == UNDECIDED]
    tied = {*ties.loc[ties["first"] == best, "second"], *ties.loc[ties["second"] == best, "first"]}
    return [best, *sorted(tied)]


def outcomes(
    nodes: pd.DataFrame, form: str = FORM, reading: Reading = "renormalized", *, per_teacher: bool = False
) -> pd.DataFrame:
    """Compare incorrect with correct paths within questions (Figure 3, Tables 4 and 6).

    One row per statistic, or per teacher and statistic: the means correct and incorrect, difference = incorrect -
    correct with its 95 % t interval, wilcoxon_p (two-sided signed-rank test over questions), holm_p over the rows,
    cohens_dz, n paired questions, verdict on the incorrect paths.
    """
    nodes = nodes if per_teacher else nodes.assign(teacher=ALL_TEACHERS)
    cosines = correct_vs_incorrect(nodes, form, ("teacher",), reading)
    advantage = correct_vs_incorrect(nodes.assign(align_advantage=nodes["advantage"]), "advantage", ("teacher",))
    advantage = advantage[advantage["statistic"] == "mean"].assign(statistic="advantage")
    table = pd.concat([part for part in (cosines, advantage) if len(part)] or [cosines], ignore_index=True)
    return judged(table, "difference")
