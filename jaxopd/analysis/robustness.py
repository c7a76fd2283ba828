"""Does the ranking of teachers hold when a choice of the instrument changes? One factor at a time.

Factors: the estimator of P_succ, N_sig, the reading of S_u, the |g_ideal| filter, the gradient form, the statistic.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from jaxopd.alignment import READINGS, STATISTICS, summarize
from jaxopd.analysis.intervals import interval_of_mean
from jaxopd.analysis.rescore import rescore
from jaxopd.analysis.teachers import FORM, of_estimator, question_summaries
from jaxopd.errors import InputError

N_SIGS = (10, 20, 40, 80)
FILTERS = (0.0, 0.01, 0.03, 0.1)
COLUMNS = ["factor", "setting", "teacher", "mean", "low", "high", "n", "nodes"]
TEACHERLESS = ("dr_grpo", "dr_grpo_std")  # forms that no teacher enters, so they rank none


@dataclass(frozen=True)
class Baseline:
    """The setting from which one factor at a time is moved."""

    estimator: str = "bellman"
    statistic: str = "mean"
    form: str = FORM
    n_sig: int = 20

    @property
    def label(self) -> str:
        """Name the baseline's setting in words."""
        return f"{self.estimator}, N_sig {self.n_sig}, renormalized, {self.form}, {self.statistic}"


def robustness(
    nodes: pd.DataFrame,
    tokens: pd.DataFrame,
    baseline: Baseline = Baseline(),
    n_sigs: Sequence[int] = N_SIGS,
    filters: Sequence[float] = FILTERS,
) -> pd.DataFrame:
    """Measure each teacher's mean over questions under every setting, the baseline's own first.

    One row per factor, setting and teacher: mean with its 95 % t interval across questions, n questions, nodes that
    entered. A setting under which no node is left has no row.
    """
    parts = [
        _per_teacher(summaries, column).assign(factor=factor, setting=str(setting))
        for factor, setting, summaries, column in _settings(nodes, tokens, baseline, n_sigs, filters)
    ]
    return pd.concat(parts, ignore_index=True)[COLUMNS]


def rank_agreement(table: pd.DataFrame) -> pd.DataFrame:
    """Compare each setting's ranking of the teachers with the baseline's.

    One row per factor and setting: Kendall's tau_b of the means and its p-value, the best teacher, and whether it is
    the baseline's best. NaN tau where fewer than two teachers have a mean in both.
    """
    wide = table.pivot(index=["factor", "setting"], columns="teacher", values="mean")
    wide = wide.loc[list(dict.fromkeys(zip(table["factor"], table["setting"], strict=True)))]  # keep the order
    base = wide.iloc[0]
    rows = []
    for (factor, setting), means in wide.iterrows():
        both = base.notna() & means.notna()
        found = stats.kendalltau(base[both], means[both]) if both.sum() > 1 else None
        row = {"factor": factor, "setting": setting, "kendall_tau": float(found.statistic) if found else np.nan}
        row |= {"kendall_p": float(found.pvalue) if found else np.nan, "best": _best(means)}
        rows.append(row | {"same_best": row["best"] != "" and row["best"] == _best(base)})
    return pd.DataFrame(rows)


def _best(means: pd.Series) -> str:
    return str(means.idxmax()) if means.notna().any() else ""


def _settings(
    nodes: pd.DataFrame, tokens: pd.DataFrame, base: Baseline, n_sigs: Sequence[int], filters: Sequence[float]
) -> Iterator[tuple[str, object, pd.DataFrame, str]]:
    """Yields (factor, setting, question summaries, statistic's column)."""
    own = of_estimator(nodes, base.estimator)
    plain = question_summaries(own, base.form)
    yield "baseline", base.label, plain, base.statistic
    for name in dict.fromkeys(nodes["estimator"]):
        yield "estimator", name, question_summaries(of_estimator(nodes, name), base.form), base.statistic
    for n_sig in n_sigs:
        again = rescore(tokens, estimator=base.estimator, n_sig=n_sig, forms=(base.form,))
        if len(again):
            yield "N_sig", n_sig, question_summaries(again, base.form), base.statistic
    for reading in READINGS:
        yield "reading of S_u", reading, question_summaries(own, base.form, reading=reading), base.statistic
    for floor in filters:
        yield "|g_ideal| above", floor, _filtered(own, base.form, floor), "filtered"
    for form in _forms(own):
        yield "gradient form", form, question_summaries(own, form), base.statistic
    for statistic in (*STATISTICS, "advantage"):
        yield "statistic", statistic, plain, statistic


def _forms(nodes: pd.DataFrame) -> list[str]:
    named = [column.removeprefix("align_") for column in nodes.columns if column.startswith("align_")]
    return [name for name in named if not name.endswith("_restricted") and name not in TEACHERLESS]


def _filtered(nodes: pd.DataFrame, form: str, floor: float) -> pd.DataFrame:
    columns = [f"align_{form}", "ideal_norm", "success_range", "decision"]
    if missing := [column for column in columns if column not in nodes.columns]:
        raise InputError(f"nodes: found no column {missing[0]!r}, expected {', '.join(columns)}")
    rows = []
    for (question, teacher), group in nodes.groupby(["question", "teacher"]):
        cosine, norm, spread, decision = (group[column].to_numpy() for column in columns)
        kept = decision.astype(bool) & (norm > floor)
        summary = summarize(cosine, norm, spread, kept, floor)
        row = {"question": question, "teacher": teacher}
        rows.append(row | {"filtered": summary["filtered"].item(), "n": summary["n"].item()})
    return pd.DataFrame(rows)


def _per_teacher(summaries: pd.DataFrame, column: str) -> pd.DataFrame:
    rows = []
    for teacher, group in summaries.groupby("teacher", sort=True):
        found = interval_of_mean(group[column].to_numpy(float))
        row = {name: found[name] for name in ("mean", "low", "high", "n")}
        rows.append({"teacher": teacher} | row | {"nodes": int(group["n"].sum())})
    return pd.DataFrame(rows)
