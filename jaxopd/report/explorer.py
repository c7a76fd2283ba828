"""The data behind the token explorer: names and scales once, and a block of numbers for each question.

Numbers are whole thousandths, null where unknown, so that a page stays small; a triple is a number with the low and
the high end of its 95 % interval. Arrays run over the nodes or the edges of the question's tree (report/trees.py),
over decision nodes, or over S_u, as `_block` says.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from jaxopd.errors import InputError
from jaxopd.report.noise import KnownTokens, Noise, form_gradients, known_tokens
from jaxopd.report.records import Records
from jaxopd.report.text import script_json, shown_token, visible, with_gaps
from jaxopd.report.trees import QuestionTree, question_tree
from jaxopd.tree.success import Z95

PAGE_BYTES = 8_000_000  # of blocks in the page, which stays under 10 MB; further blocks lie beside it
FOLDER = "explorer"
NODES_AT_ONCE = 4096  # whose intervals are made together


@dataclass(frozen=True)
class Measure:
    """Something that tokens can be coloured by; a scale from below 0 has two colours."""

    key: str
    name: str
    unit: str
    low: float
    high: float
    words: tuple[str, str]  # at the two ends of the scale


@dataclass(frozen=True)
class Explorer:
    """What the page embeds (`head`, and `inside`: JSON by question number) and the files beside it."""

    head: dict[str, Any]
    inside: dict[int, str]
    beside: dict[str, str]


def explore(records: Records) -> Explorer:
    """Collect every question with paths; blocks beyond PAGE_BYTES become scripts beside the page.

    Raises InputError where the tokens lack a teacher or an estimator that the nodes have.
    """
    needed = [f"{prefix}_{name}" for prefix in ("p_succ", "se") for name in records.estimators]
    for column in (*needed, *(f"q_{name}" for name in records.teachers)):
        if column not in records.tokens:
            raise InputError(
                f"{records.name}/records/tokens.parquet: found no column {column!r}, expected it as in nodes"
            )
    nodes, tokens, paths = (
        dict(iter(frame.groupby("question", sort=False))) for frame in (records.nodes, records.tokens, records.paths)
    )
    kept = records.questions[records.questions["question"].isin(nodes)].to_dict("records")
    inside, beside, listed, room = {}, {}, [], PAGE_BYTES
    for number, question in enumerate(kept):
        name = question["question"]
        tree = question_tree(records, nodes[name], tokens[name])
        text = script_json(_block(records, question, paths[name], tree))
        file, size = None, len(text.encode())
        if size <= room:
            inside[number], room = text, room - size
        else:
            file = f"{FOLDER}/{number:05d}.js"
            beside[file] = f"receive({number},{text});\n"
        listed.append({"id": name, "label": _label(question), "file": file})
    head = {
        "teachers": [visible(name) for name in records.teachers],
        "forms": records.forms,
        "estimators": [visible(name) for name in records.estimators],
        "estimator": records.estimators.index(records.estimator) if records.estimators else 0,
        "measures": [asdict(measure) for measure in measures(records.nodes)],
        "questions": listed,
    }
    return Explorer(head, inside, beside)


def measures(nodes: pd.DataFrame) -> list[Measure]:
    """List what tokens can be coloured by; open scales end where 98 % of the run's nodes lie inside."""
    stakes, gain, kl, js = (_round_scale(nodes[name]) for name in ("success_range", "advantage", "reverse_kl", "js"))
    gap = _round_scale(nodes["entropy_teacher"] - nodes["entropy_student"])
    probability = "probability of success"
    return [
        Measure("alignment", "alignment", "cosine with the ideal gradient", -1, 1, ("harmful", "helpful")),
        Measure("advantage", "teacher advantage", probability, -gain, gain, ("loses", "gains")),
        Measure("success_range", "success range", probability, 0, stakes, ("nothing at stake", "much")),
        Measure("p_succ", "P_succ after the token", probability, 0, 1, ("fails", "succeeds")),
        Measure("reverse_kl", "reverse KL, student to teacher", "nats", 0, kl, ("agree", "differ")),
        Measure("js", "JS divergence", "nats", 0, js, ("agree", "differ")),
        Measure("entropy_gap", "entropy gap, teacher minus student", "nats", -gap, gap, ("surer", "less sure")),
    ]


def _round_scale(values: pd.Series) -> float:
    """End a scale at a round number that few values pass."""
    values = np.abs(values.to_numpy(float))
    values = values[np.isfinite(values) & (values > 0)]
    reach = float(np.quantile(values, 0.98)) if len(values) else 1.0
    step = 10.0 ** np.floor(np.log10(reach))
    return float(np.round(np.ceil(reach / step) * step, 9))


def _label(question: dict) -> str:
    return f"{visible(question['question'])}: {question['difficulty']}, pass rate {question['pass_rate']:.2f}"


def _block(records: Records, question: dict, paths: pd.DataFrame, tree: QuestionTree) -> dict[str, Any]:
    """Everything the page knows of one question.

    paths       the node and the edge of each token, and the white space before it
    nodes       t, visits, entropy of the student, and `first`: where a node's edges begin
    edges       the candidate tokens: text, P, visits, launches, child (node, EXIT, LEAF), and Q of each teacher
    teachers    divergences over nodes;  estimators  see `_estimates`
    """
    edges, scores = tree.edges, tree.scores
    gap = scores["entropy_teacher"] - scores["entropy_student"]
    exact = {"reverse_kl": _any(scores["reverse_kl"]), "js": _any(scores["js"]), "entropy_gap": _any(gap)}
    spine = dict(iter(tree.spine.groupby("path")))
    return {
        "prompt": visible(question["prompt"]),
        "gold": visible(question["gold"]),
        "pass_rate": _thousandths(_pass_rate(question)),
        "rollouts": [int(question["n_initial"]), int(question["n_targeted"])],
        "paths": [_path(row, spine[row["path"]]) for row in paths.to_dict("records")],
        "nodes": {
            "t": tree.depth.tolist(),
            "visits": _whole(np.nanmax(scores["visits"], (0, 1))),
            "entropy": _thousandths(_any(scores["entropy_student"])[0]),
            "first": np.searchsorted(edges["node"], np.arange(len(tree.depth) + 1)).tolist(),
        },
        "edges": {
            "text": [shown_token(text) for text in edges["text"]],
            "p": _thousandths(edges["p"]),
            "visits": _whole(edges["visits"]),
            "launches": _whole(edges["launches"]) if "launches" in edges else None,
            "child": edges["child"].tolist(),
            "q": [_thousandths(edges[f"q_{name}"]) for name in records.teachers],
        },
        "teachers": [
            {key: _thousandths(values[m]) for key, values in exact.items()} for m in range(len(records.teachers))
        ],
        "estimators": [_estimates(records, tree, index) for index in range(len(records.estimators))],
    }


def _path(path: dict, spine: pd.DataFrame) -> dict[str, Any]:
    gaps = [visible(gap) for gap, _ in with_gaps(list(spine["text"]), path["text"])]
    fixed = {"path": int(path["path"]), "correct": bool(path["correct"]), "cut": path["finish"] == "length"}
    return fixed | {"gaps": gaps, "nodes": spine["node"].tolist(), "edges": spine["edge"].tolist()}


def _estimates(records: Records, tree: QuestionTree, index: int) -> dict[str, Any] | None:
    """One estimator's numbers, or None where it was not run on this question.

    success      triples over edges
    decisions    the D decision nodes; value, success_range: triples over them; advantage, alignment: the same for
                 each teacher, and for each form and teacher
    known        the edges of S_u; ideal: triples over them; signs: a string a token, of the sign of each form's
                 gradient (+, - or 0; ? where its inputs were not recorded), teacher by teacher
    """
    name, edges, teachers = records.estimators[index], tree.edges, records.teachers
    if np.isnan(tree.scores["decision"][index]).all():
        return None
    known = known_tokens(tree, name, index)
    here = {column: values[index][:, known.nodes] for column, values in tree.scores.items()}
    slopes = [form_gradients(tree, known, name, teacher, records.forms) for teacher in teachers]
    bounds = _bounds(records, tree, name, known, here, slopes)
    return {
        "success": _thousandths(_success(edges, name)),
        "decisions": known.nodes.tolist(),
        "value": _thousandths(bounds["value"]),
        "success_range": _thousandths(bounds["success_range"]),
        "advantage": [_thousandths(of_teacher) for of_teacher in bounds["advantage"]],
        "alignment": [[_thousandths(of_teacher) for of_teacher in of_form] for of_form in bounds["alignment"]],
        "known": known.edges[known.mask].tolist(),
        "ideal": _thousandths(bounds["ideal"]),
        "signs": _signs(known, slopes, records.forms),
    }


def _bounds(
    records: Records,
    tree: QuestionTree,
    name: str,
    known: KnownTokens,
    here: dict[str, np.ndarray],
    slopes: list[dict[str, np.ndarray]],
) -> dict[str, np.ndarray]:
    """Numbers with their intervals, [..., D or tokens, 3], made for a few nodes at a time: draws are large."""
    parts = []
    for low in range(0, max(1, len(known.nodes)), NODES_AT_ONCE):
        rows = slice(low, low + NODES_AT_ONCE)
        part = known[rows]
        noise, at = Noise(tree, part, name, seed=low), {column: values[:, rows] for column, values in here.items()}
        advantages = [
            noise.advantage(at["advantage"][m], tree.edges[f"q_{teacher}"])
            for m, teacher in enumerate(records.teachers)
        ]
        alignments = [
            [_alignment(noise, at[f"align_{form}"][m], slope.get(form), rows) for m, slope in enumerate(slopes)]
            for form in records.forms
        ]
        found = {"value": noise.value(at["value"][0]), "success_range": noise.success_range(at["success_range"][0])}
        found["advantage"] = np.reshape(advantages, (len(slopes), len(part.nodes), 3))
        found["alignment"] = np.reshape(alignments, (len(records.forms), len(slopes), len(part.nodes), 3))
        parts.append(found | {"ideal": noise.ideal()[part.mask]})
    return {key: np.concatenate([part[key] for part in parts], -2) for key in parts[0]}


def _success(edges: pd.DataFrame, estimator: str) -> np.ndarray:
    """P_succ of each edge with its interval: the recorded one, else 1.96 standard errors either way."""
    value, se = edges[f"p_succ_{estimator}"], edges[f"se_{estimator}"]
    low = edges.get(f"low_{estimator}", (value - Z95 * se).clip(0, 1))
    high = edges.get(f"high_{estimator}", (value + Z95 * se).clip(0, 1))
    return np.stack([value, low, high], -1)


def _alignment(noise: Noise, estimate: np.ndarray, slope: np.ndarray | None, rows: slice) -> np.ndarray:
    if slope is None:  # without the form's gradient there is no interval
        return np.stack([estimate, *np.full((2, len(estimate)), np.nan)], -1)
    return noise.alignment(estimate, slope[rows])


def _signs(known: KnownTokens, slopes: list[dict[str, np.ndarray]], forms: list[str]) -> list[str]:
    columns = [slope.get(form) for slope in slopes for form in forms]
    letters = [
        np.full(known.mask.sum(), "?") if x is None else np.select([x > 0, x < 0], ["+", "-"], "0")[known.mask]
        for x in columns
    ]
    return ["".join(row) for row in zip(*letters, strict=True)]


def _any(scores: np.ndarray) -> np.ndarray:
    """A score that does not depend on the estimator: [teachers, N], from any that was run."""
    run = np.flatnonzero(~np.isnan(scores).all((1, 2)))
    return scores[run[0] if len(run) else 0]


def _pass_rate(question: dict) -> list[float]:
    """The pass rate with Wilson's interval over the initial rollouts."""
    n, rate = int(question["n_initial"]), float(question["pass_rate"])
    interval = binomtest(round(rate * n), n).proportion_ci(method="wilson")
    return [rate, interval.low, interval.high]


def _thousandths(values: Any) -> list[int | None]:
    """Flatten to whole thousandths; None where not finite."""
    scaled = np.rint(np.asarray(values, float).ravel() * 1000)
    return [int(v) if np.isfinite(v) else None for v in scaled.tolist()]


def _whole(values: Any) -> list[int | None]:
    return [int(v) if np.isfinite(v) else None for v in np.asarray(values, float).tolist()]
