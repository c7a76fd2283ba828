"""Table 1: which teacher's gradient points best toward success?

    python experiments/unmasking/table1.py                               # toy scale
    python experiments/unmasking/table1.py --scale paper --data DATA     # accelerators

Mean cosine of reverse KL (the paper's "GKD") and the ideal gradient: mean over decision nodes of a question, then over
questions, with 95 % t and cluster-bootstrap intervals. The paper's own instrument is the estimator "pooled".
Expected: mean cosines of .04 to .33 (pooled) and .08 to .30 (truth), where the paper has .00 to .05; 24 and 26 of 168
pairs can be told apart.
Deviations: the paper does not name its interval; Holm-adjusted tests of all pairs of teachers stand beside the
ranking.
"""

from dataclasses import replace

import pandas as pd
from paper import RANKING
from study import Result, Setting, Study, main

from jaxopd.analysis import UNDECIDED, compare_teachers, leaders, rank_teachers
from jaxopd.report.arranged import arranged
from jaxopd.report.tables import Table, number

SHOWN = {
    "setting": "setting",
    "estimator": "estimator",
    "teacher": "teacher",
    "mean cosine (t)": ("mean", "low", "high"),
    "bootstrap": "bootstrap",
    "global cosine (t)": ("global", "global_low", "global_high"),
    "paper": "paper",
    "leads or ties": "leads",
    "questions": "n",
}
PAIRS = {
    **{name: name for name in ("setting", "estimator", "first", "verdict", "second")},
    "difference": ("difference", "low", "high"),
    "Wilcoxon p": "wilcoxon_p",
    "Holm p": "holm_p",
    "questions": "n",
}


def make(study: Study) -> Result:
    """Rank the teachers of every setting, and test every pair."""
    note = (
        "Leads or ties: the best teacher by mean cosine, and those whose paired difference to it is not "
        "distinguishable (Wilcoxon's signed-rank test, Holm over all pairs of teachers)."
    )
    ranks = arranged("table1", "Table 1: teachers by mean alignment", note, study.over(ranked), SHOWN, labels=3)
    return Result([ranks, decided(study.over(lambda setting, nodes: compare_teachers(nodes)))])


def decided(pairs: pd.DataFrame) -> Table:
    """Show the pairs that can be told apart; the CSV file holds all."""
    apart = pairs[pairs["verdict"] != UNDECIDED] if len(pairs) else pairs
    note = f"First minus second; {len(apart)} of {len(pairs)} pairs are distinguishable, the CSV file holds all."
    table = arranged("table1_pairs", "Table 1: pairs of teachers", note, apart, PAIRS, labels=5)
    return replace(table, numbers=pairs)


def ranked(setting: Setting, nodes: pd.DataFrame) -> pd.DataFrame:
    """Teachers of one setting, best first, with the paper's value."""
    ranking = rank_teachers(nodes)
    best = leaders(ranking, compare_teachers(nodes))
    means = ranking[ranking["statistic"] == "mean"].sort_values("mean", ascending=False, ignore_index=True)
    weighted = ranking[ranking["statistic"] == "global"].set_index("teacher").loc[means["teacher"]]
    printed = [RANKING.get(setting.paper, {}).get(setting.teacher_kind(name)) for name in means["teacher"]]
    return means.assign(
        bootstrap=[f"{number(low)} to {number(high)}" for low, high in zip(means["boot_low"], means["boot_high"])],
        **{"global": weighted["mean"].to_numpy(), "global_low": weighted["low"].to_numpy()},
        global_high=weighted["high"].to_numpy(),
        paper=["{:.3f} \u00b1 {:.3f}".format(*value) if value else "" for value in printed],
        leads=["yes" if name in best else "" for name in means["teacher"]],
    )


if __name__ == "__main__":
    main(make, __doc__)
