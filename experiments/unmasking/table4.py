"""Table 4: does the teacher point better on paths that end wrong, under every metric?

    python experiments/unmasking/table4.py                               # toy scale
    python experiments/unmasking/table4.py --scale paper --data DATA     # accelerators

All teachers together. A question's incorrect paths are compared with its correct ones: difference = incorrect - correct
(the paper prints correct - incorrect), Wilcoxon's signed-rank test over questions, Cohen's d_z.
Expected, with exact success: mean cosine higher in 0, lower in 0 of 6 settings; global cosine higher in 0, lower in 5
of 6 settings; advantage higher in 6, lower in 0 of 6 settings (incorrect against correct).
Deviations: the paper does not name its test. Its small p-values suggest that paths or nodes were the unit; here it is
the question, since nodes of one question share rollouts.
"""

import pandas as pd
from paper import OUTCOMES
from study import Result, Setting, Study, main

from jaxopd.analysis import outcomes
from jaxopd.report.arranged import arranged

SHOWN = {
    **{name: name for name in ("setting", "estimator", "statistic", "correct", "incorrect")},
    "difference": ("difference", "low", "high"),
    "Wilcoxon p": "wilcoxon_p",
    "Holm p": "holm_p",
    "d_z": "cohens_dz",
    "incorrect is": "verdict",
    "paper": "paper",
    "questions": "n",
}


def make(study: Study) -> Result:
    """Compare both outcomes under every statistic."""
    note = "Means over the questions that have paths of both outcomes. Holm over a setting's six statistics."
    table = study.over(compared)
    return Result([arranged("table4", "Table 4: incorrect against correct paths", note, table, SHOWN, labels=3)])


def compared(setting: Setting, nodes: pd.DataFrame) -> pd.DataFrame:
    """All statistics of one setting, with the paper's values: correct, then incorrect."""
    table = outcomes(nodes)
    printed = [OUTCOMES.get(setting.paper, {}).get(statistic) for statistic in table["statistic"]]
    return table.assign(paper=["{:.3f}, {:.3f}".format(*value) if value else "" for value in printed])


if __name__ == "__main__":
    main(make, __doc__)
