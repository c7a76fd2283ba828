"""Table 6: is the gap between incorrect and correct paths there for every teacher?

    python experiments/unmasking/table6.py                               # toy scale
    python experiments/unmasking/table6.py --scale paper --data DATA     # accelerators

Mean cosine per teacher on correct and on incorrect paths of the same questions, tested as in Table 4 with Holm's
adjustment over all teachers and statistics of a setting.
Expected, with exact success: of 48 teachers and settings 1 higher on incorrect paths, 4 lower, the rest not
distinguishable.
Deviations: as Table 4; the paper prints BoolQ alone.
"""

import pandas as pd
from paper import PER_TEACHER
from study import Result, Setting, Study, main

from jaxopd.analysis import outcomes
from jaxopd.report.arranged import arranged

PRINTED = {("0.6B", "BoolQ"): 0, ("1.7B", "BoolQ"): 1}
SHOWN = {
    **{name: name for name in ("setting", "estimator", "teacher", "correct", "incorrect")},
    "difference": ("difference", "low", "high"),
    "Wilcoxon p": "wilcoxon_p",
    "Holm p": "holm_p",
    "d_z": "cohens_dz",
    "incorrect is": "verdict",
    "paper": "paper",
    "questions": "n",
}


def make(study: Study) -> Result:
    """Compare both outcomes teacher by teacher."""
    note = "Mean cosine over the questions that have paths of both outcomes; the paper's correct, incorrect."
    table = study.over(compared)
    return Result([arranged("table6", "Table 6: teacher by teacher", note, table, SHOWN, labels=3)])


def compared(setting: Setting, nodes: pd.DataFrame) -> pd.DataFrame:
    """The teachers of one setting, with the paper's values."""
    table = outcomes(nodes, per_teacher=True)
    table = table[table["statistic"] == "mean"]
    texts = [""] * len(table)
    if setting.paper in PRINTED:
        values = [PER_TEACHER.get(setting.teacher_kind(teacher)) for teacher in table["teacher"]]
        texts = ["{:.3f}, {:.3f}".format(*value[PRINTED[setting.paper]]) if value else "" for value in values]
    return table.assign(paper=texts)


if __name__ == "__main__":
    main(make, __doc__)
