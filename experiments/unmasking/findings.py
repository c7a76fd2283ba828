"""The paper's findings beside ours: same, opposite, or not distinguishable?

    python experiments/unmasking/findings.py                               # toy scale
    python experiments/unmasking/findings.py --scale paper --data DATA     # accelerators

Each finding is a claimed sign of a paired difference over questions (claims.py): Wilcoxon's signed-rank test, Holm over
the settings in which the paper claims it. Measured with the paper's instrument (pooled, mean cosine), with the default
estimator (mean and global cosine) and, where an oracle ran, with exact success; screening by accuracy.
Expected: README.md has the table. Of 60 claims and settings the paper's instrument finds 40 same and 4 opposite,
exact success 41 and 4; the rest cannot be told.
Deviations: the paper draws most of these from overlapping intervals; "not distinguishable" here is no evidence
against.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd
from claims import CLAIMS, screened
from study import Result, Study, main

from jaxopd.analysis import ALPHA, UNDECIDED, compare_teachers, holm, leaders, rank_teachers
from jaxopd.report.arranged import arranged
from jaxopd.report.tables import Table, number

INSTRUMENTS = (("pooled", "mean"), ("bellman", "mean"), ("bellman", "global"), ("truth", "mean"), ("truth", "global"))
SHOWN = {
    **{name: name for name in ("finding", "instrument", "setting", "paper")},
    "ours": ("difference", "low", "high"),
    "Wilcoxon p": "wilcoxon_p",
    "Holm p": "holm_p",
    "d_z": "cohens_dz",
    "paper's claim is": "verdict",
    "questions": "n",
}
PAIRED = ("difference", "low", "high", "wilcoxon_p", "cohens_dz", "n")


def make(study: Study) -> Result:
    """Measure every claim with every instrument, and say what agrees."""
    rows = pd.DataFrame(measured(study), columns=["finding", "instrument", "setting", "paper", *PAIRED])
    parts = [judge(group) for _, group in rows.groupby(["finding", "instrument"], sort=False)]
    table = pd.concat([rows.iloc[:0].assign(holm_p=[], verdict=[]), *parts], ignore_index=True)
    note = (
        "Paper, ours: positive where the paper's claim holds. Same or opposite: Holm-adjusted p under .05 over the "
        "settings of a claim; anything else is not distinguishable. The paper's numbers are mean cosines, whatever "
        "the instrument."
    )
    tables = [overview(table), arranged("findings_numbers", "Findings: the numbers", note, table, SHOWN, labels=3)]
    return Result([*tables, universal(study)])


def measured(study: Study) -> Iterator[dict[str, object]]:
    """Yields one row per claim, instrument and setting where the paper makes the claim."""
    for setting in study.settings:
        for estimator, statistic in INSTRUMENTS:
            if estimator not in setting.estimators:
                continue
            nodes = setting.nodes(estimator)
            for claim in CLAIMS:
                if claim.applies(setting) and statistic in claim.statistics:
                    found = claim.measure(setting, nodes, statistic)
                    row = {"finding": claim.text, "instrument": f"{estimator}, {statistic}", "setting": setting.name}
                    yield row | {"paper": claim.paper(setting)} | {name: found[name] for name in PAIRED}
        for row in screened(setting):
            yield row | {"setting": setting.name}


def judge(group: pd.DataFrame) -> pd.DataFrame:
    """Adjust a claim's p-values over its settings, and say same, opposite or not distinguishable."""
    adjusted = holm(group["wilcoxon_p"].to_numpy(float))
    signs = np.where(group["difference"] > 0, "same", "opposite")
    return group.assign(holm_p=adjusted, verdict=np.where(adjusted < ALPHA, signs, UNDECIDED))


def overview(table: pd.DataFrame) -> Table:
    """One row a finding: the paper's numbers, then ours with the verdicts, by instrument."""
    rows = []
    for finding, group in table.groupby("finding", sort=False):
        row = {"paper's finding": finding, "paper": spread(group["paper"])}
        rows.append(row | {name: counted(part) for name, part in group.groupby("instrument", sort=False)})
    instruments = list(dict.fromkeys(table["instrument"]))
    counts = pd.DataFrame(rows, columns=["paper's finding", "paper", *instruments]).fillna("")
    note = (
        "Numbers: the least and the largest mean difference over the settings in which the paper makes the claim (or, "
        "for other runs, could make it), positive where it holds; of the paper they are mean cosines or accuracies. "
        "Then the count of settings by verdict; n.d. = not distinguishable."
    )
    shown = {name: name for name in counts.columns}
    return arranged("findings", "The paper's findings beside ours", note, counts, shown, labels=len(shown))


def counted(group: pd.DataFrame) -> str:
    """Write the range of a finding's differences and how often each verdict was given."""
    counts = group["verdict"].replace(UNDECIDED, "n.d.").value_counts()
    return f"{spread(group['difference'])}: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.items())


def spread(values: pd.Series) -> str:
    """Write the least and the largest of some numbers, once where they are the same; "" where there is none."""
    known = values.dropna()
    return " to ".join(dict.fromkeys([number(known.min()), number(known.max())])) if len(known) else ""


def universal(study: Study) -> Table:
    """The last finding: no teacher is best everywhere. The best and those tied with it, per setting."""
    rows = []
    for estimator, statistic in INSTRUMENTS:
        tied = []
        for setting in study.settings:
            if estimator in setting.estimators:
                nodes = setting.nodes(estimator)
                found = leaders(rank_teachers(nodes), compare_teachers(nodes, statistic), statistic)
                row = {"instrument": f"{estimator}, {statistic}", "setting": setting.name}
                rows.append(row | {"best": found[0] if found else "", "tied": ", ".join(found[1:])})
                tied += [set(found)] if found else []
        everywhere = sorted(set.intersection(*tied)) if tied else []
        row = {"instrument": f"{estimator}, {statistic}", "setting": "all"}
        verdict = (
            f"best or tied everywhere: {', '.join(everywhere)}" if everywhere else "same: no teacher is best everywhere"
        )
        rows.append(row | {"best": verdict if tied else "", "tied": UNDECIDED if everywhere else ""})
    note = "Tied: not distinguishable from the best (Wilcoxon, Holm over all pairs). The paper: no universal recipe."
    columns = {name: name for name in ("instrument", "setting", "best", "tied")}
    return arranged("findings_best", "Is one teacher best everywhere?", note, pd.DataFrame(rows), columns, labels=4)


if __name__ == "__main__":
    main(make, __doc__)
