"""Selective distillation: keep the teacher's signal only where it looks aligned (paper A, appendix E.3, Table 2).

The signal of a decision node is its success range times its cosine. Keeping nodes by a noisy score also keeps
those whose noise is lucky, so the kept signal looks larger than it is. Where exact success is known, the kept
nodes' exact signal stands beside the estimate, and so does what selection on noise adds.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from jaxopd.analysis.intervals import interval_of_mean
from jaxopd.analysis.teachers import FORM

EVERY_NODE = -np.inf
THRESHOLDS = (EVERY_NODE, 0.0, 0.3)
KEYS = ["question", "path", "t", "teacher"]
PATH = ["question", "path", "teacher"]


def selective(
    nodes: pd.DataFrame,
    exact: pd.DataFrame | None = None,
    thresholds: Sequence[float] = THRESHOLDS,
    form: str = FORM,
) -> pd.DataFrame:
    """Measure the mean signal of the nodes whose cosine is above each threshold; -inf keeps all (Table 2).

    `nodes`: records of one estimator. `exact`: the same nodes with exact success on the same S_u, as
    `rescore(tokens, estimator=..., success="truth")` gives them; nodes it lacks are left out of everything.

    One row per threshold: signal with its t interval across questions (low, high), kept (share of nodes),
    paths_better (share of paths and teachers whose kept signal beats their whole one), n questions. With `exact`
    also: exact_signal (low, high) of the SAME kept nodes; exact_paths_better; inflation = signal - exact_signal
    (low, high); by_selection (low, high), the part of it that is not there when every node is kept: what selecting
    on noise adds; best_signal, of the nodes whose exact cosine is above the threshold: what an oracle would keep.
    """
    column = f"align_{form}"
    table = nodes[nodes["decision"].to_numpy(bool) & nodes[column].notna().to_numpy()]
    seen = table[column].astype(float)  # records are float32: sums of differences need more
    table = table.assign(signal=table["success_range"].astype(float) * seen, seen=seen)[[*KEYS, "signal", "seen"]]
    if exact is not None:
        # A node whose exact success does not differ has no ideal gradient: its exact signal is 0.
        signal = (exact["success_range"].astype(float) * exact[column]).where(exact["decision"], 0.0).fillna(0.0)
        truth = exact.assign(exact=signal, true=exact[column].fillna(0.0))[[*KEYS, "exact", "true"]]
        table = table.merge(truth, on=KEYS, how="inner", validate="one_to_one")
    rows = []
    for threshold in thresholds:
        kept = table[table["seen"] > threshold]
        row = {"threshold": threshold} | _interval("signal", _per_question(kept, "signal"))
        row |= {"kept": len(kept) / len(table) if len(table) else np.nan}
        row["paths_better"] = _paths_better(table, kept, "signal")
        if exact is not None:
            estimate, aim = _per_question(kept, "signal"), _per_question(kept, "exact")
            best = table[table["true"] > threshold]
            inflation = estimate - aim
            row |= _interval("exact_signal", aim) | _interval("inflation", inflation)
            row |= _interval("by_selection", inflation - _per_question(table, "signal") + _per_question(table, "exact"))
            row["exact_paths_better"] = _paths_better(table, kept, "exact")
            row |= _interval("best_signal", _per_question(best, "exact"))
        rows.append(row | {"n": table["question"].nunique()})
    return pd.DataFrame(rows)


def _per_question(table: pd.DataFrame, column: str) -> pd.Series:
    return table.groupby("question")[column].mean()


def _interval(name: str, values: pd.Series) -> dict[str, float]:
    found = interval_of_mean(values.to_numpy(float))
    return {name: found["mean"], f"{name}_low": found["low"], f"{name}_high": found["high"]}


def _paths_better(table: pd.DataFrame, kept: pd.DataFrame, column: str) -> float:
    """Share of paths with a kept node whose kept nodes' mean signal is above that of all their nodes.

    A path that keeps every node is no better and no worse; it is left out.
    """
    whole, part = table.groupby(PATH)[column], kept.groupby(PATH)[column]
    chosen = part.size()[part.size() < whole.size().reindex(part.size().index)].index
    if not len(chosen):
        return np.nan
    return float((part.mean().loc[chosen] > whole.mean().loc[chosen]).mean())
