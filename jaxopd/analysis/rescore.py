"""Alignment again from the token records, with another N_sig, or with the exact success on an estimate's S_u."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Int

from jaxopd.alignment import node_alignment
from jaxopd.analysis.teachers import FORM
from jaxopd.errors import InputError
from jaxopd.gradients import FORMS, Position

NODE = ["question", "path", "t"]
LEAST_Q = 1e-38  # stands for probabilities that float32 rounds to 0


def rescore(
    tokens: pd.DataFrame,
    *,
    estimator: str,
    n_sig: int,
    success: str | None = None,
    forms: Sequence[str] = (FORM,),
    teachers: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Compute decision nodes and their scores (renormalised reading) from P, Q, visits and P_succ of each token.

    S_u holds the tokens with at least `n_sig` visits of `estimator` and a known P_succ; `success` names the estimator
    whose P_succ is used there, by default the same. `forms`: those that need P and Q alone. Gives rows (question,
    path, t, teacher, estimator) with decision, success_range, ideal_norm, advantage and align_FORM. Nodes without
    two tokens of S_u are left out. Raises InputError on a column that the records do not hold.
    """
    success = success or estimator
    visits = "visits_on_policy" if estimator == "on_policy" else "visits"
    if teachers is None:
        teachers = [column.removeprefix("q_") for column in tokens.columns if column.startswith("q_")]
    needed = {f"p_succ_{estimator}", f"p_succ_{success}", visits, *(f"q_{name}" for name in teachers)}
    if missing := sorted(needed - set(tokens.columns)):
        raise InputError(f"tokens: found no column {missing[0]!r}, expected {', '.join(sorted(needed))}")
    known = tokens[f"p_succ_{estimator}"].notna() & tokens[f"p_succ_{success}"].notna()
    kept = tokens[known & (tokens[visits] >= n_sig)]
    kept = kept[kept.groupby(NODE)["t"].transform("size").ge(2)]
    node, slot = (part.to_numpy() for part in (kept.groupby(NODE).ngroup(), kept.groupby(NODE).cumcount()))
    nodes = kept.groupby(NODE, as_index=False).size()[NODE].assign(estimator=estimator)
    if nodes.empty:
        return nodes.assign(teacher=pd.Series(dtype=object))
    log_p = _padded(np.log(kept["p"].to_numpy(float)), node, slot, -np.inf)
    values = {"success": _padded(kept[f"p_succ_{success}"].to_numpy(float), node, slot, 0.0)}
    values["support"] = _padded(np.ones(len(kept)), node, slot, 0.0) > 0
    parts = []
    for name in teachers:
        q = np.maximum(kept[f"q_{name}"].to_numpy(float), LEAST_Q)
        at = Position.create(log_p, _padded(np.log(q), node, slot, -np.inf), **values)
        scores = node_alignment(at, {form: FORMS[form] for form in forms}, ("renormalized",))
        parts.append(nodes.assign(teacher=name, decision=np.asarray(scores["success_range"]) > 0, **scores))
    return pd.concat(parts, ignore_index=True)


def _padded(
    values: np.ndarray, node: Int[np.ndarray, "rows"], slot: Int[np.ndarray, "rows"], fill: float
) -> np.ndarray:
    """Spreads one value a token over [N, K]; K is a multiple of 8, so that compilations stay few."""
    width = -(-(int(slot.max()) + 1) // 8) * 8
    table = np.full((int(node.max()) + 1, width), fill, np.float32)
    table[node, slot] = values
    return table
