"""Which questions were analysed, and what is missing?

    python experiments/unmasking/settings.py                               # toy scale
    python experiments/unmasking/settings.py --scale paper --data DATA     # accelerators

One row a setting: questions asked and analysed, why the others were left out, how many rollouts the analysed ones took,
and what the other tables cannot say for want of it.
Expected: 43 to 51 questions analysed a setting; left out are those without a wrong demonstration in 60 trials.
Deviations: the paper prints 45,000 to 200,000 targeted rollouts a question; toy responses are short, and the budgets
smaller.
"""

from collections.abc import Iterator

import pandas as pd
from study import Result, Setting, Study, main

from jaxopd.analysis.selective import KEYS
from jaxopd.report.arranged import arranged
from jaxopd.report.records import is_excluded

COUNTS = ("asked", "analysed", "paths", "decision nodes", "initial rollouts", "targeted rollouts")
SHOWN = {name: name for name in ("setting", "left out", "missing", *COUNTS)}


def make(study: Study) -> Result:
    """Count what every setting has."""
    note = (
        "Rollouts: mean of an analysed question. Decision nodes: of the estimator a report shows first, each once a "
        "path. Left out: questions, by reason."
    )
    table = pd.DataFrame([row(setting) for setting in study.settings], columns=list(SHOWN))
    return Result([arranged("settings", "Questions analysed, and what is missing", note, table, SHOWN, labels=3)])


def row(setting: Setting) -> dict[str, object]:
    """The counts of one setting."""
    records, excluded = setting.records, is_excluded(setting.records.questions)
    analysed, reasons = records.questions[~excluded], records.questions.loc[excluded, "excluded"].value_counts()
    nodes = records.nodes[records.nodes["estimator"] == records.estimator]
    return {
        "setting": setting.name,
        "left out": "; ".join(f"{n} {reason}" for reason, n in reasons.sort_index().items()),
        "missing": "; ".join(missing(setting, len(analysed))),
        "asked": len(records.questions),
        "analysed": len(analysed),
        "paths": len(records.paths),
        "decision nodes": len(nodes.loc[nodes["decision"].astype(bool), KEYS[:3]].drop_duplicates()),
        "initial rollouts": round(analysed["n_initial"].mean()) if len(analysed) else 0,
        "targeted rollouts": round(analysed["n_targeted"].mean()) if len(analysed) else 0,
    }


def missing(setting: Setting, analysed: int) -> Iterator[str]:
    """Says what a setting lacks, and what cannot be known for it."""
    if not analysed:
        yield "every question is left out: no alignment"
    if analysed == 1:
        yield "one question: no interval, no test"
    if len(setting.teachers) < 2:
        yield "one teacher: no ranking"
    if analysed and "truth" not in setting.records.estimators:
        yield "no oracle: no exact success"
    if setting.screening is None:
        yield "no screening: no Tables 7 to 9"


if __name__ == "__main__":
    main(make, __doc__)
