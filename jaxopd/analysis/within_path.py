"""What happens along one path: which features go with alignment, and how often it changes sign.

Paper A, section 4.3, Table 5 and appendix E.2.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from jaxopd.alignment import Reading, paired_difference
from jaxopd.analysis.intervals import interval_of_mean
from jaxopd.analysis.teachers import ALL_TEACHERS, FORM, judged

FEATURES = ("depth", "reverse_kl", "js", "l2", "cosine")
PATH = ["question", "path", "teacher"]
LEAST = 3  # decision nodes on a path from which ranks can correlate


def scored(nodes: pd.DataFrame, form: str = FORM, reading: Reading = "renormalized") -> pd.DataFrame:
    """Keep the decision nodes with a defined alignment, and name that column `align`."""
    column = f"align_{form}" + ("" if reading == "renormalized" else f"_{reading}")
    kept = nodes["decision"].to_numpy(bool) & np.isfinite(nodes[column].to_numpy(float))
    return nodes[kept].rename(columns={column: "align"})


def path_correlations(
    nodes: pd.DataFrame, form: str = FORM, features: Sequence[str] = FEATURES, reading: Reading = "renormalized"
) -> pd.DataFrame:
    """Correlate each feature's ranks with the alignment's along every path: Spearman's rho, ties averaged.

    One row per question, path, teacher and feature, NaN where either is constant; paths with fewer than 3 decision
    nodes are left out.
    """
    kept = scored(nodes, form, reading)
    kept = kept[kept.groupby(PATH)["align"].transform("size").ge(LEAST)]
    names = ["align", *features]
    ranks = kept.groupby(PATH)[names].rank()
    keys = [kept[key] for key in PATH]
    centred = ranks - ranks.groupby(keys).transform("mean")
    squares: pd.DataFrame = (centred**2).groupby(keys).sum()
    products: pd.DataFrame = centred[list(features)].mul(centred["align"], axis=0).groupby(keys).sum()
    size = np.sqrt(squares[list(features)].to_numpy(float) * squares[["align"]].to_numpy(float))
    rho = products / np.where(size > 0, size, np.nan)
    return rho.rename_axis(columns="feature").stack(future_stack=True).rename("rho").reset_index()


def within_path(
    nodes: pd.DataFrame,
    form: str = FORM,
    teacher: str | None = None,
    features: Sequence[str] = FEATURES,
    reading: Reading = "renormalized",
) -> pd.DataFrame:
    """Average the within-path correlations of all teachers, or of one, over questions (Table 5).

    One row a feature: mean rho with t and bootstrap intervals across questions (each question's paths and teachers
    are averaged first), wilcoxon_p of the questions' rho against 0, holm_p over the features, verdict, n questions.
    """
    chosen = nodes if teacher is None else nodes[nodes["teacher"] == teacher]
    rho = path_correlations(chosen, form, features, reading)
    rows = []
    for feature in features:
        per_question = rho[rho["feature"] == feature].groupby("question")["rho"].mean().to_numpy(float)
        tested = paired_difference(per_question)["wilcoxon_p"]
        who = {"teacher": teacher or ALL_TEACHERS, "feature": feature}
        rows.append(who | interval_of_mean(per_question) | {"wilcoxon_p": tested})
    return judged(pd.DataFrame(rows), "mean")


def oscillation(nodes: pd.DataFrame, form: str = FORM, reading: Reading = "renormalized") -> pd.DataFrame:
    """Count sign changes of the alignment between consecutive decision nodes of a path (appendix E.2).

    One row per question, path and teacher: n signed nodes, positive among them, changes = the share of neighbours
    whose signs differ, by_chance = that share in a random order of the same signs, 2 n+ n- / (n (n - 1)).
    """
    kept = scored(nodes, form, reading)
    kept = kept[kept["align"] != 0].sort_values([*PATH, "t"])
    positive = kept["align"] > 0
    groups = positive.groupby([kept[key] for key in PATH])
    table = pd.DataFrame({"n": groups.size(), "positive": groups.sum()})
    changed = groups.shift().notna() & (groups.shift() != positive)
    table["changes"] = changed.groupby([kept[key] for key in PATH]).sum() / (table["n"] - 1)
    table["by_chance"] = 2 * table["positive"] * (table["n"] - table["positive"]) / (table["n"] * (table["n"] - 1))
    return table[table["n"] > 1].reset_index()
