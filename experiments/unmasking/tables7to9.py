"""Tables 7 to 9: which demonstrations are to be had, and what does each context do to the student's accuracy?

    python experiments/unmasking/tables7to9.py                               # toy scale
    python experiments/unmasking/tables7to9.py --scale paper --data DATA     # accelerators

32 rollouts a question and context at temperature 1: the bare question and six contexts. Questions that the bare student
never solves, or for which student or larger model found no correct demonstration in 60 trials, are left out.
Expected: every context raises accuracy; one correct demonstration by .13 to .27, with a wrong one beside it by .08 to
.16.
Deviations: contexts with a wrong demonstration have the questions for which one was sampled (the paper prints one
number of questions for all contexts). The toy models never saw three demonstrations at once in training.
"""

import pandas as pd
from paper import SCREENING, SETTINGS
from study import Result, Setting, Study, main

from jaxopd.analysis.screening import BINS, accuracy_by_difficulty, availability, context_accuracy
from jaxopd.report.arranged import arranged

COUNTS = {"setting": "setting", "what": "what", "questions": "questions"}
ACCURACY = {
    **{name: name for name in ("setting", "context")},
    "accuracy": ("accuracy", "low", "high"),
    "difference to baseline": ("difference", "difference_low", "difference_high"),
    "Wilcoxon p": "wilcoxon_p",
    "Holm p": "holm_p",
    "against baseline": "verdict",
    "paper": "paper",
    "questions": "n",
}
BINNED = {"setting": "setting", "context": "context"}
for _bin in (*BINS, "all"):
    BINNED |= {f"{_bin}, accuracy": f"accuracy_{_bin}", f"{_bin}, n": f"n_{_bin}"}


def make(study: Study) -> Result:
    """Screen every setting, and build the three tables."""
    counts, accuracy, binned = [], [], []
    for setting in study.settings:
        run = setting.screening
        if run is None:
            continue
        screening = run.read_table("records/screening.parquet")
        counts.append(
            availability(screening, run.read_table("records/demonstrations.parquet")).assign(setting=setting.name)
        )
        table = context_accuracy(screening).assign(setting=setting.name)
        accuracy.append(table.assign(paper=[printed(setting, context) for context in table["context"]]))
        binned.append(accuracy_by_difficulty(screening).assign(setting=setting.name))
    tables = [
        ("table7", "Table 7: questions by availability", "Counts of questions.", counts, COUNTS),
        (
            "table8",
            "Table 8: accuracy under each context",
            "Over kept questions; differences pair each question with its own baseline. Paper: accuracy.",
            accuracy,
            ACCURACY,
        ),
        ("table9", "Table 9: accuracy by difficulty of the baseline", "Over kept questions.", binned, BINNED),
    ]
    return Result(
        [
            arranged(name, title, note, pd.concat(parts, ignore_index=True), columns, labels=2)
            for name, title, note, parts, columns in tables
            if parts
        ]
    )


def printed(setting: Setting, context: str) -> str:
    """The paper's accuracy, as a share; "" where it prints none."""
    if setting.paper not in SETTINGS or context not in SCREENING:
        return ""
    return f"{SCREENING[context][SETTINGS.index(setting.paper)] / 100:.3f}"


if __name__ == "__main__":
    main(make, __doc__)
