"""Table 3: do other metrics rank the teachers alike?

    python experiments/unmasking/table3.py                               # toy scale
    python experiments/unmasking/table3.py --scale paper --data DATA     # accelerators

Share of positively aligned nodes and the cosine weighted by success range, as in the paper; beside them the filtered
and global cosines and the teacher advantage, with Kendall's tau of each ranking against the mean cosine's.
Expected: tau of .57 to .93 for the share of positive nodes, .21 to .93 for the global cosine, -.29 to .93 for the
advantage: choices of a metric are choices of a winner.
Deviations: the paper prints BoolQ alone and no interval.
"""

import pandas as pd
from paper import ALTERNATIVES, SETTINGS
from scipy import stats
from study import Result, Setting, Study, main

from jaxopd.analysis import rank_teachers
from jaxopd.report.arranged import arranged

STATISTICS = ("mean", "fraction_positive", "sr_weighted", "filtered", "global", "advantage")
PRINTED = {"0.6B": 0, "1.7B": 1}
SHOWN = {name: name for name in ("setting", "estimator", "teacher")}
SHOWN |= {name.replace("_", " "): (name, f"{name}_low", f"{name}_high") for name in STATISTICS}
SHOWN |= {"paper: positive": "paper_positive", "paper: SR-weighted": "paper_weighted"}
AGREEMENT = {"setting": "setting", "estimator": "estimator"} | {name: name for name in STATISTICS[1:]}


def make(study: Study) -> Result:
    """Measure every metric per teacher, and how far the rankings agree."""
    note = "Means over questions with 95 % t intervals, teachers in the order of their mean cosine."
    table = study.over(metrics)
    tables = [arranged("table3", "Table 3: alternative metrics", note, table, SHOWN, labels=3)]
    if len(table):
        groups = table.groupby(["setting", "estimator"], sort=False)
        taus = pd.DataFrame([dict(zip(("setting", "estimator"), key)) | agreement(group) for key, group in groups])
        note = "Kendall's tau_b of each metric's ranking of the teachers against the mean cosine's."
        tables.append(
            arranged("table3_agreement", "Table 3: agreement of the rankings", note, taus, AGREEMENT, labels=2)
        )
    return Result(tables)


def metrics(setting: Setting, nodes: pd.DataFrame) -> pd.DataFrame:
    """One row a teacher: every statistic with its interval, and the paper's two values where it prints them."""
    wide = rank_teachers(nodes).pivot(index="teacher", columns="statistic", values=["mean", "low", "high"])
    table = pd.DataFrame({"teacher": wide.index})
    for name in STATISTICS:
        for part, ending in (("mean", ""), ("low", "_low"), ("high", "_high")):
            table[f"{name}{ending}"] = wide[(part, name)].to_numpy(float) if len(wide) else []
    printed = [ALTERNATIVES.get(setting.teacher_kind(name)) for name in table["teacher"]]
    if setting.paper in SETTINGS and setting.paper[1] == "BoolQ":
        values = [value[PRINTED[setting.paper[0]]] if value else ("", "") for value in printed]
    else:
        values = [("", "")] * len(table)
    table["paper_positive"], table["paper_weighted"] = ([str(v[column]) for v in values] for column in (0, 1))
    return table.sort_values("mean", ascending=False)


def agreement(group: pd.DataFrame) -> dict[str, float]:
    """Kendall's tau_b of each metric with the mean cosine."""
    known = group.dropna(subset=["mean"])
    enough = len(known) > 1
    return {
        name: float(stats.kendalltau(known["mean"], known[name]).statistic) if enough else float("nan")
        for name in STATISTICS[1:]
    }


if __name__ == "__main__":
    main(make, __doc__)
