"""The paper's findings beside ours: same, opposite, or not distinguishable?

    python experiments/unmasking/findings.py                               # toy scale
    python experiments/unmasking/findings.py --scale paper --data DATA     # accelerators

Each finding is a claimed sign of a paired difference over questions: Wilcoxon's signed-rank test, Holm over the
settings in which the paper claims it. Measured with the paper's instrument (pooled, mean cosine), with the default
estimator (mean and global cosine) and, where an oracle ran, with exact success; screening by accuracy.
Deviations: the paper draws most of these from overlapping intervals; "not distinguishable" here is no evidence against.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from study import Result, Setting, Study, main

from jaxopd.alignment import paired_difference
from jaxopd.analysis import (
    ALPHA,
    UNDECIDED,
    compare_teachers,
    contrast,
    holm,
    leaders,
    outcomes,
    path_correlations,
    question_summaries,
    rank_teachers,
)
from jaxopd.analysis.screening import BASELINE
from jaxopd.analysis.teachers import ALL_TEACHERS
from jaxopd.report.arranged import arranged

INSTRUMENTS = (("pooled", "mean"), ("bellman", "mean"), ("bellman", "global"), ("truth", "mean"))
EXTERNAL = tuple(("external", place) for place in range(3))
CORRECT_ONLY = (("1C", "student"), ("1C", "large"), ("Sum1C", "student"))
Measure = Callable[[Setting, pd.DataFrame, str], dict[str, float]]
SHOWN = {
    **{name: name for name in ("finding", "instrument", "setting")},
    "difference": ("difference", "low", "high"),
    "Wilcoxon p": "wilcoxon_p",
    "Holm p": "holm_p",
    "d_z": "cohens_dz",
    "paper's claim is": "verdict",
    "questions": "n",
}


@dataclass(frozen=True)
class Claim:
    """A finding of the paper: `measure` gives a paired difference that it says is positive where `applies`."""

    text: str
    measure: Measure
    applies: Callable[[Setting], bool] = lambda setting: True


def incorrect_gap(setting: Setting, nodes: pd.DataFrame, statistic: str) -> dict[str, float]:
    """Incorrect minus correct paths."""
    return outcomes(nodes).set_index("statistic").loc[statistic].to_dict() if len(nodes) else nothing()


def overall(setting: Setting, nodes: pd.DataFrame, statistic: str) -> dict[str, float]:
    """Alignment over all teachers, against 0."""
    return paired_difference(question_summaries(nodes.assign(teacher=ALL_TEACHERS))[statistic].to_numpy(float))


def between(ahead: tuple, behind: tuple) -> Measure:
    """One group of teachers minus another."""

    def measure(setting: Setting, nodes: pd.DataFrame, statistic: str) -> dict[str, float]:
        groups = [[setting.teachers[kind] for kind in group if kind in setting.teachers] for group in (ahead, behind)]
        return contrast(nodes, *groups, statistic) if all(groups) else nothing()

    return measure


def correlation(feature: str, sign: int) -> Measure:
    """Within-path rank correlation of a feature with alignment, all teachers, times the claimed sign."""

    def measure(setting: Setting, nodes: pd.DataFrame, statistic: str) -> dict[str, float]:
        rho = path_correlations(nodes, features=(feature,)).groupby("question")["rho"].mean()
        return paired_difference(sign * rho.to_numpy(float))

    return measure


def nothing() -> dict[str, float]:
    """A comparison that could not be made."""
    return paired_difference(np.array([]))


def size(*sizes: str) -> Callable[[Setting], bool]:
    """Settings of a student that plays one of these."""
    return lambda setting: setting.paper is not None and setting.paper[0] in sizes


def at(*settings: tuple[str, str]) -> Callable[[Setting], bool]:
    """Settings that play one of these."""
    return lambda setting: setting.paper in settings


def tabulated(setting: Setting) -> bool:
    """Settings that play a BoolQ or MMLU of the paper, or runs of one's own."""
    return setting.paper is not None or setting.config is None


def hard(setting: Setting) -> bool:
    """Settings that play AIME."""
    return setting.paper is None and setting.config is not None


CLAIMS = (
    Claim("the teacher is better aligned on incorrect paths than on correct ones", incorrect_gap),
    Claim("alignment is positive on average", overall),
    Claim(
        "contexts of correct demonstrations beat external teachers",
        between(CORRECT_ONLY, EXTERNAL),
        at(("0.6B", "BoolQ"), ("0.6B", "MMLU"), ("1.7B", "MMLU")),
    ),
    Claim(
        "external teachers beat contexts of correct demonstrations",
        between(EXTERNAL, CORRECT_ONLY),
        at(("1.7B", "BoolQ")),
    ),
    Claim(
        "a wrong demonstration beside the correct one hurts",
        between(CORRECT_ONLY[:1], (("1C1W", "student"),)),
        tabulated,
    ),
    Claim("a wrong demonstration helps on hard problems", between((("1C1W", "student"),), CORRECT_ONLY[:1]), hard),
    Claim(
        "a wrong summary beside the correct one hurts", between(CORRECT_ONLY[2:], (("Sum1C1W", "student"),)), tabulated
    ),
    Claim("summaries help the larger student", between(CORRECT_ONLY[2:], CORRECT_ONLY[:1]), size("1.7B")),
    Claim("KL(student||teacher) goes with alignment", correlation("reverse_kl", 1)),
    Claim("JS divergence goes with alignment", correlation("js", 1)),
    Claim("similarity of the distributions goes against alignment", correlation("cosine", -1)),
    Claim("depth goes with alignment for the smaller student", correlation("depth", 1), size("0.6B")),
)
SCREENED = (
    ("one correct demonstration raises accuracy", "Self-1C", BASELINE),
    ("a wrong demonstration beside it lowers accuracy", "Self-1C", "Self-1C1W"),
    ("a wrong summary beside the correct one lowers accuracy", "Self-Sum-1C", "Self-Sum-1C1W"),
)


def make(study: Study) -> Result:
    """Measure every claim with every instrument, and say what agrees."""
    rows = pd.DataFrame(measured(study), columns=["finding", "instrument", "setting", *PAIRED])
    parts = [judge(group) for _, group in rows.groupby(["finding", "instrument"], sort=False)]
    table = pd.concat([rows.iloc[:0].assign(holm_p=[], verdict=[]), *parts], ignore_index=True)
    note = (
        "Difference: positive where the paper's claim holds. Same or opposite: Holm-adjusted p under .05 over the "
        "settings of a claim; anything else is not distinguishable."
    )
    tables = [overview(table), arranged("findings_numbers", "Findings: the numbers", note, table, SHOWN, labels=3)]
    return Result([*tables, universal(study)])


PAIRED = ("difference", "low", "high", "wilcoxon_p", "cohens_dz", "n")


def measured(study: Study) -> Iterator[dict[str, object]]:
    """Yields one row per claim, instrument and setting where the paper makes the claim."""
    for setting in study.settings:
        for estimator, statistic in INSTRUMENTS:
            if estimator not in setting.estimators:
                continue
            nodes = setting.nodes(estimator)
            for claim in CLAIMS:
                if claim.applies(setting):
                    found = claim.measure(setting, nodes, statistic)
                    row = {"finding": claim.text, "instrument": f"{estimator}, {statistic}", "setting": setting.name}
                    yield row | {name: found[name] for name in PAIRED}
        yield from screened(setting)


def screened(setting: Setting) -> Iterator[dict[str, object]]:
    """Yields the claims about accuracy under contexts, measured on the kept questions of a screening."""
    if setting.screening is None:
        return
    table = setting.screening.read_table("records/screening.parquet")
    wide = table[table["kept"]].pivot(index="question", columns="context", values="pass_rate")
    for text, higher, lower in SCREENED:
        found = paired_difference((wide[higher] - wide[lower]).to_numpy(float)) if len(wide) else nothing()
        yield {"finding": text, "instrument": "accuracy", "setting": setting.name} | found


def judge(group: pd.DataFrame) -> pd.DataFrame:
    """Adjust a claim's p-values over its settings, and say same, opposite or not distinguishable."""
    adjusted = holm(group["wilcoxon_p"].to_numpy(float))
    signs = np.where(group["difference"] > 0, "same", "opposite")
    return group.assign(holm_p=adjusted, verdict=np.where(adjusted < ALPHA, signs, UNDECIDED))


def overview(table: pd.DataFrame):
    """One row a finding and instrument: in how many settings it is the same, opposite, not distinguishable."""
    counts = table.groupby(["finding", "instrument"], sort=False)["verdict"].value_counts().unstack(fill_value=0)
    counts = counts.reindex(columns=["same", UNDECIDED, "opposite"], fill_value=0).reset_index()
    texts = [*(claim.text for claim in CLAIMS), *(text for text, _, _ in SCREENED)]
    order = {text: place for place, text in enumerate(texts)}
    counts = counts.sort_values("finding", key=lambda column: column.map(order), kind="stable", ignore_index=True)
    note = "Counts of settings in which the paper makes the claim (or, for other runs, could make it)."
    columns = {"paper's finding": "finding", "instrument": "instrument"}
    columns |= {name: name for name in ("same", UNDECIDED, "opposite")}
    return arranged("findings", "The paper's findings beside ours", note, counts, columns, labels=2)


def universal(study: Study):
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
