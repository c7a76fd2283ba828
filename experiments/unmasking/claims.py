"""The paper's findings as claims that can be measured: each a sign of a paired difference over questions.

A claim knows where the paper makes it, how it is measured on node records, and the paper's own number there.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from paper import CORRELATIONS, OUTCOMES, RANKING, SCREENING, SETTINGS
from study import Setting

from jaxopd.alignment import paired_difference
from jaxopd.analysis import contrast, outcomes, path_correlations, question_summaries
from jaxopd.analysis.screening import BASELINE
from jaxopd.analysis.teachers import ALL_TEACHERS

EXTERNAL = tuple(("external", place) for place in range(3))
CORRECT_ONLY = (("1C", "student"), ("1C", "large"), ("Sum1C", "student"))
Measure = Callable[[Setting, pd.DataFrame, str], dict[str, float]]
Printed = Callable[[tuple[str, str]], float]


@dataclass(frozen=True)
class Claim:
    """A finding of the paper: a paired difference that it says is positive where `applies`.

    Attributes:
        text: the finding.
        measure: gives the difference with its test, from a setting, its nodes of one estimator and a statistic.
        printed: the paper's own mean difference in one of its settings.
        applies: where the paper makes the claim.
        statistics: those of `measure` that differ.
    """

    text: str
    measure: Measure
    printed: Printed
    applies: Callable[[Setting], bool] = lambda setting: True
    statistics: tuple[str, ...] = ("mean", "global")

    def paper(self, setting: Setting) -> float:
        """The paper's number for the setting whose part this one plays; NaN where it prints none."""
        return self.printed(setting.paper) if setting.paper in SETTINGS else np.nan


def incorrect_gap(text: str, metric: str | None = None) -> Claim:
    """Claims that a metric of Table 4, or the instrument's own, is higher on incorrect paths than on correct ones."""

    def measure(setting: Setting, nodes: pd.DataFrame, statistic: str) -> dict[str, float]:
        return outcomes(nodes).set_index("statistic").loc[metric or statistic].to_dict() if len(nodes) else nothing()

    def printed(played: tuple[str, str]) -> float:
        correct, incorrect = OUTCOMES[played][metric or "mean"]
        return incorrect - correct

    return Claim(text, measure, printed, statistics=("mean",) if metric else ("mean", "global"))


def overall(setting: Setting, nodes: pd.DataFrame, statistic: str) -> dict[str, float]:
    """Alignment over all teachers, against 0."""
    return paired_difference(question_summaries(nodes.assign(teacher=ALL_TEACHERS))[statistic].to_numpy(float))


def printed_overall(played: tuple[str, str]) -> float:
    """Mean over the teachers of Table 1."""
    return float(np.mean([mean for mean, _ in RANKING[played].values()]))


def between(text: str, ahead: tuple, behind: tuple, applies: Callable[[Setting], bool]) -> Claim:
    """Claims that one group of teachers is ahead of another."""

    def measure(setting: Setting, nodes: pd.DataFrame, statistic: str) -> dict[str, float]:
        groups = [[setting.teachers[kind] for kind in group if kind in setting.teachers] for group in (ahead, behind)]
        return contrast(nodes, *groups, statistic) if all(groups) else nothing()

    def printed(played: tuple[str, str]) -> float:
        first, second = (np.mean([RANKING[played][kind][0] for kind in group]) for group in (ahead, behind))
        return float(first - second)

    return Claim(text, measure, printed, applies)


def correlation(text: str, feature: str, sign: int, applies: Callable[[Setting], bool] = lambda setting: True) -> Claim:
    """Claims the sign of a feature's rank correlation with alignment within paths, all teachers."""

    def measure(setting: Setting, nodes: pd.DataFrame, statistic: str) -> dict[str, float]:
        rho = path_correlations(nodes, features=(feature,)).groupby("question")["rho"].mean()
        return paired_difference(sign * rho.to_numpy(float))

    return Claim(text, measure, lambda played: sign * CORRELATIONS[played][feature], applies, ("mean",))


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
    incorrect_gap("the teacher is better aligned on incorrect paths than on correct ones"),
    incorrect_gap("so it is where decision nodes are weighted by their success range", "sr_weighted"),
    incorrect_gap("the teacher's advantage is larger on incorrect paths", "advantage"),
    Claim("alignment is positive on average", overall, printed_overall),
    between(
        "contexts of correct demonstrations beat external teachers",
        CORRECT_ONLY,
        EXTERNAL,
        at(("0.6B", "BoolQ"), ("0.6B", "MMLU"), ("1.7B", "MMLU")),
    ),
    between("external teachers beat contexts of correct demonstrations", EXTERNAL, CORRECT_ONLY, at(("1.7B", "BoolQ"))),
    between("a wrong demonstration beside the correct one hurts", CORRECT_ONLY[:1], (("1C1W", "student"),), tabulated),
    between("a wrong demonstration helps on hard problems", (("1C1W", "student"),), CORRECT_ONLY[:1], hard),
    between("a wrong summary beside the correct one hurts", CORRECT_ONLY[2:], (("Sum1C1W", "student"),), tabulated),
    between("summaries help the larger student", CORRECT_ONLY[2:], CORRECT_ONLY[:1], size("1.7B")),
    correlation("KL(student||teacher) goes with alignment", "reverse_kl", 1),
    correlation("JS divergence goes with alignment", "js", 1),
    correlation("similarity of the distributions goes against alignment", "cosine", -1),
    correlation("depth goes with alignment for the smaller student", "depth", 1, size("0.6B")),
)
SCREENED = (
    ("one correct demonstration raises accuracy", "Self-1C", BASELINE),
    ("a wrong demonstration beside it lowers accuracy", "Self-1C", "Self-1C1W"),
    ("a wrong summary beside the correct one lowers accuracy", "Self-Sum-1C", "Self-Sum-1C1W"),
)


def screened(setting: Setting) -> list[dict[str, object]]:
    """Measures the claims about accuracy under contexts on the kept questions of a screening, if there is one."""
    if setting.screening is None:
        return []
    table = setting.screening.read_table("records/screening.parquet")
    wide = table[table["kept"]].pivot(index="question", columns="context", values="pass_rate")
    rows = []
    for text, higher, lower in SCREENED:
        found = paired_difference((wide[higher] - wide[lower]).to_numpy(float)) if len(wide) else nothing()
        rows.append(
            found | {"finding": text, "instrument": "accuracy", "paper": _printed_accuracy(setting, higher, lower)}
        )
    return rows


def _printed_accuracy(setting: Setting, higher: str, lower: str) -> float:
    """The paper's difference of accuracies, as a share; NaN where it prints none."""
    if setting.paper not in SETTINGS:
        return np.nan
    column = SETTINGS.index(setting.paper)
    return (SCREENING[higher][column] - SCREENING[lower][column]) / 100
