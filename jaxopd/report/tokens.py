"""The data behind the token explorer: per path, columns of small numbers that the page indexes by position."""

from typing import Any

import numpy as np
import pandas as pd

from jaxopd.report.records import Records

USED = [
    *("question", "path", "t", "text", "teacher", "estimator", "decision", "visits", "p", "q"),
    *("p_succ", "p_succ_low", "p_succ_high", "value", "success_range", "align_reverse_kl"),
]
EXPLORER_TOKENS = 20_000  # path positions on the page; keeps report.html to a few megabytes
CONTROLS = {c: chr(0x2400 + c) for c in range(32) if c not in (9, 10)} | {0x7F: "\u2421"}
# Bidirectional controls and separators would reorder or break the text around them: they are shown by code point.
INVISIBLE = {
    c: f"\u27e8U+{c:04X}\u27e9"
    for c in (0x61C, 0x200E, 0x200F, 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}
VISIBLE = CONTROLS | INVISIBLE


def visible(text: Any) -> str:
    """Rewrite control and bidirectional characters as visible signs; everything else stays."""
    return str(text).translate(VISIBLE)


def explorer(records: Records) -> dict[str, Any]:
    """Collect the questions with their paths, and the compact columns that the page's script reads.

    Returns {"questions": [...], "data": {...}, "shown": int, "total": int}: `questions` is what the template renders,
    `data` becomes JSON. Questions enter in order until EXPLORER_TOKENS positions are on the page.
    """
    nodes = dict(iter(records.nodes[USED].groupby(["question", "path"], sort=False)))
    candidates = dict(iter(records.tokens.groupby(["question", "path"], sort=False)))
    paths = {key: group.sort_values("path") for key, group in records.paths.groupby("question", sort=False)}
    kept = records.questions[records.questions["question"].isin({question for question, _ in nodes})]
    questions, columns, room = [], [], EXPLORER_TOKENS
    for question in kept.to_dict("records"):
        group = paths.get(question["question"])
        group = [] if group is None else group.to_dict("records")
        room -= sum(path["length"] for path in group)
        if room < 0 and questions:
            break
        views = []
        for path in group:
            key = (path["question"], path["path"])
            if key not in nodes:
                continue
            view, column = _path(records, path, nodes[key], candidates.get(key))
            views.append(view | {"index": len(columns)})
            columns.append(column)
        questions.append(question | {"paths": views})
    data = {"teachers": records.teachers, "estimators": records.estimators, "paths": columns}
    return {"questions": questions, "data": data, "shown": len(questions), "total": len(kept)}


def _path(records: Records, path: dict, nodes: pd.DataFrame, candidates: pd.DataFrame | None) -> tuple[dict, dict]:
    """What the template renders of one path, and its columns."""
    first = nodes.drop_duplicates("t").sort_values("t")
    t, nothing = first["t"], nodes.iloc[:0].set_index("t").reindex(first["t"])
    found = nodes.drop_duplicates(["teacher", "estimator", "t"]).set_index("t").groupby(["teacher", "estimator"])
    cells = {key: group.reindex(t) for key, group in found}
    by_teacher = {teacher: cell for (teacher, _), cell in cells.items()}
    blocks = [
        _estimates([cells.get((teacher, name), nothing) for teacher in records.teachers]) for name in records.estimators
    ]
    decisions = {i for block in blocks if block for i in block["d"]}
    column = {
        "p": _round(first["p"]),
        "n": _round(first["visits"], 0),
        "q": [_round(by_teacher.get(teacher, nothing)["q"]) for teacher in records.teachers],
        "e": blocks,
        "c": {} if candidates is None else _candidates(records, candidates, t, decisions),
    }
    words = enumerate(with_gaps(list(first["text"]), path["text"]))
    tokens = [{"gap": visible(gap), "text": _shown(word), "index": i} for i, (gap, word) in words]
    return path | {"tokens": tokens, "decisions": len(decisions)}, column


def _shown(word: str) -> str:
    return visible(word).replace("\n", "\u21b5\n") or "\u2205"


def _estimates(teachers: list[pd.DataFrame]) -> dict[str, Any] | None:
    """Columns of one estimator: success at every position; alignment and stakes at decision nodes `d` only."""
    first = next((cell for cell in teachers if cell["decision"].notna().any()), None)
    if first is None:  # this estimator was not run on this question
        return None
    decision = np.flatnonzero(first["decision"].eq(True).to_numpy())
    return {
        "s": _round(first["p_succ"]),
        "lo": _round(first["p_succ_low"]),
        "hi": _round(first["p_succ_high"]),
        "v": _round(first["value"]),
        "d": decision.tolist(),
        "r": _round(first["success_range"].iloc[decision]),
        "a": [_round(cell["align_reverse_kl"].iloc[decision], 2) for cell in teachers],
    }


def _candidates(records: Records, tokens: pd.DataFrame, t: pd.Series, positions: set[int]) -> dict[str, list]:
    """Per decision node, its candidate tokens: [text, P, visits, [P_succ per estimator], [Q per teacher]]."""
    tokens = tokens.sort_values(["t", "p"], ascending=[True, False])
    blank = pd.Series(np.nan, index=tokens.index)
    columns = [
        [_round(tokens.get(f"{prefix}{name}", blank)) for name in names]
        for prefix, names in (("p_succ_", records.estimators), ("q_", records.teachers))
    ]
    index = {position: i for i, position in enumerate(t)}
    found: dict[str, list] = {}
    for row, (position, text, p, n) in enumerate(
        zip(tokens["t"], tokens["text"], _round(tokens["p"]), _round(tokens["visits"], 0), strict=True)
    ):
        i = index.get(position)
        if i in positions:
            found.setdefault(str(i), []).append([visible(text), p, n, *([c[row] for c in block] for block in columns)])
    return found


def with_gaps(tokens: list[str], text: str) -> list[tuple[str, str]]:
    """Pair each token with the white space before it in `text`, which word-level tokenizers leave out."""
    pairs, position = [], 0
    for token in map(str, tokens):
        at = text.find(token, position, position + len(token) + 8)
        gap = text[position:at] if at > position and text[position:at].isspace() else ""
        position = at + len(token) if at >= 0 else position
        pairs.append((gap, token))
    return pairs


def _round(column: pd.Series, digits: int = 3) -> list[float | int | None]:
    """Numbers short enough to embed; None where not finite, integers where exact."""
    values = np.round(np.asarray(column, dtype=float), digits)
    return [None if not np.isfinite(v) else int(v) if v == int(v) else float(v) for v in values]
