"""Table 5: which features of a single rollout go with alignment along a path?

    python experiments/unmasking/table5.py                               # toy scale
    python experiments/unmasking/table5.py --scale paper --data DATA     # accelerators

Spearman's rho of depth, KL(student||teacher), JS, L2 and cosine of the distributions with the alignment score, within
each path; averaged over a question's paths (and teachers), then over questions. All teachers, then the best one.
Expected, with exact success: rho of .06 to .18 for KL, .10 to .21 for depth, -.17 to -.05 for similarity.
Deviations: "best" is the highest mean cosine of the setting and estimator, not the paper's choice of teacher.
"""

import pandas as pd
from paper import CORRELATIONS
from study import Result, Setting, Study, main

from jaxopd.analysis import rank_teachers, within_path
from jaxopd.report.arranged import arranged

SHOWN = {
    **{name: name for name in ("setting", "estimator", "teacher", "feature")},
    "rho": ("mean", "low", "high"),
    "Wilcoxon p": "wilcoxon_p",
    "Holm p": "holm_p",
    "rho is": "verdict",
    "paper (all teachers)": "paper",
    "questions": "n",
}


def make(study: Study) -> Result:
    """Correlate within paths for all teachers and for the best."""
    note = "Means over questions with 95 % t intervals; tests against 0; Holm over the five features."
    table = study.over(correlated)
    return Result([arranged("table5", "Table 5: within-path Spearman correlations", note, table, SHOWN, labels=4)])


def correlated(setting: Setting, nodes: pd.DataFrame) -> pd.DataFrame:
    """Five features for all teachers, with the paper's values, and for the best."""
    ranking = rank_teachers(nodes)
    means = ranking[ranking["statistic"] == "mean"].set_index("teacher")["mean"]
    parts = [within_path(nodes)]
    parts[0]["paper"] = [
        f"{CORRELATIONS[setting.paper][feature]:+.3f}" if setting.paper in CORRELATIONS else ""
        for feature in parts[0]["feature"]
    ]
    if means.notna().any():
        best = within_path(nodes, teacher=means.idxmax())
        parts.append(best.assign(teacher=f"best: {means.idxmax()}", paper=""))
    return pd.concat(parts, ignore_index=True)


if __name__ == "__main__":
    main(make, __doc__)
