"""A question's records as the tree that they describe: nodes once, although paths share them, and edges to tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from jaxopd.report.records import Records
from jaxopd.tree import EXIT, LEAF, build_tree

SCORES = [
    *("decision", "support", "visits", "value", "success_range", "advantage"),
    *("reverse_kl", "js", "entropy_student", "entropy_teacher"),
]


@dataclass(frozen=True)
class QuestionTree:
    """The M paths of a question merged into N nodes, with one edge a candidate token.

    spine   one row a path position: path, t, text, node, edge (of the path's own token)
    edges   the rows of tokens.parquet, one an edge, sorted by node and P; and their node, and child (node, EXIT, LEAF)
    scores  columns of nodes.parquet over estimators, teachers and nodes; NaN where an estimator was not run
    depth   t of each node
    """

    spine: pd.DataFrame
    edges: pd.DataFrame
    scores: dict[str, Float[np.ndarray, "estimators teachers N"]]
    depth: Int[np.ndarray, " N"]


def question_tree(records: Records, nodes: pd.DataFrame, tokens: pd.DataFrame) -> QuestionTree:
    """Merge one question's rows of nodes.parquet and tokens.parquet."""
    spine = nodes.drop_duplicates(["path", "t"]).sort_values(["path", "t"])
    spine = spine[["path", "path_correct", "t", "token", "text"]].reset_index(drop=True)
    paths = [path for _, path in spine.groupby("path")]
    merged = build_tree([path["token"].to_numpy() for path in paths], [path["path_correct"].iloc[0] for path in paths])
    spine["node"] = merged.node_of[merged.node_of >= 0]
    spine["child"] = spine.groupby("path")["node"].shift(-1, fill_value=LEAF)
    home = spine.drop_duplicates("node")[["path", "t", "node"]]  # a shared node's rows repeat: read them once

    steps = spine[["node", "token", "child"]].drop_duplicates(["node", "token"])
    edges = tokens.merge(home, on=["path", "t"]).merge(steps, on=["node", "token"], how="left")
    edges = edges.sort_values(["node", "p"], ascending=[True, False], kind="stable", ignore_index=True)
    edges["child"] = edges["child"].fillna(EXIT).astype(int)
    numbered = edges[["node", "token"]].assign(edge=np.arange(len(edges)))
    spine = spine.merge(numbered, on=["node", "token"])

    columns = [*SCORES, *(f"align_{form}" for form in records.forms)]
    scores = _cube(nodes.merge(home, on=["path", "t"]), columns, records.estimators, records.teachers, len(home))
    return QuestionTree(spine, edges, scores, home["t"].to_numpy())


def _cube(
    rows: pd.DataFrame, columns: list[str], estimators: Sequence[str], teachers: Sequence[str], n: int
) -> dict[str, Float[np.ndarray, "estimators teachers N"]]:
    """Spread rows (estimator, teacher, node) over a full grid."""
    place = ["estimator", "teacher", "node"]
    grid = pd.MultiIndex.from_product([estimators, teachers, range(n)], names=place)
    found = rows.drop_duplicates(place).set_index(place)[columns].reindex(grid)
    shape = len(estimators), len(teachers), n
    return {name: found[name].to_numpy(dtype=float, na_value=np.nan).reshape(shape) for name in columns}
