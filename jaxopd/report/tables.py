"""The report's tables: what `jaxopd.alignment` computes, arranged for reading (cells) and for machines (numbers)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.markup import escape as rich_escape
from rich.table import Table as RichTable

from jaxopd.alignment import MIN_IDEAL_NORM, across_questions, aggregate, correct_vs_incorrect, t_interval
from jaxopd.gradients import READINGS
from jaxopd.report.records import Records, default_estimator, estimators_of, is_excluded, read_records

ALL = "all teachers"
FORM = "reverse_kl"  # the form of the paper's rankings
NAMES = {
    "global": "global cosine",
    "mean": "mean cosine",
    "sr_weighted": "SR-weighted",
    "filtered": "filtered",
    "fraction_positive": "fraction positive",
    "advantage": "advantage",
}
METRICS_NOTE = (
    "Global cosine weights nodes by the size of the ideal gradient and is nearly unbiased; mean cosine counts every "
    "decision node alike and is attenuated by noise; SR-weighted weights nodes by their success range; filtered keeps "
    f"nodes with an ideal gradient above {MIN_IDEAL_NORM}; advantage is the expected success under the teacher minus "
    "that under the student (Eq. 2.1). A dash: no node has a defined value, as where the teacher equals the student."
)
REASONS = {
    "none correct": "no initial rollout was correct, so no token has a success rate above 0",
    "none incorrect": "every initial rollout was correct, so no token has a success rate below 1",
    "no demonstration": "a teacher's context needs a demonstration and none was found",
    "prompt too long": "the prompt leaves no room for a response",
}


@dataclass(frozen=True)
class Table:
    """One table twice: `numbers` goes to CSV, `cells` (text) to markdown, HTML and the terminal."""

    name: str
    title: str
    note: str
    numbers: pd.DataFrame
    cells: pd.DataFrame
    labels: int = 1  # leading columns of words

    def header(self) -> list[tuple[str, list[str]]]:
        """Group the columns "group, name" under their group; a column of its own has the group ""."""
        groups: list[tuple[str, list[str]]] = []
        for column in self.cells.columns:
            group, comma, name = column.partition(", ")
            if comma and groups and groups[-1][0] == group:
                groups[-1][1].append(name)
            else:
                groups.append((group, [name]) if comma else ("", [column]))
        return groups

    def markdown(self) -> str:
        """Write the table as GitHub markdown; cell text cannot break out of its cell."""
        lines = [list(self.cells.columns), ["---"] * self.labels + ["---:"] * (self.cells.shape[1] - self.labels)]
        lines += [[_markdown_cell(cell) for cell in row] for row in self.cells.itertuples(index=False, name=None)]
        rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"## {self.title}\n\n{rows}\n\n{self.note}\n"


def all_tables(records: Records) -> list[Table]:
    """Build every table of the report."""
    nodes = records.nodes
    measured = statistics(nodes)
    counts = aggregate(nodes, FORM, ("teacher", "estimator"))
    return [
        *([exit_cosines(records.cosines)] if len(records.cosines) else []),
        *(ranking(measured, counts, estimator) for estimator in _front_first(records)),
        side_by_side(nodes),
        correct_incorrect(records),
        forms(records),
        exclusions(records),
    ]


def statistics(nodes: pd.DataFrame, by: Sequence[str] = ("teacher", "estimator")) -> pd.DataFrame:
    """Average over questions the alignment statistics and the teacher advantage: long form, as `across_questions`."""
    cosines = across_questions(nodes, FORM, by)
    # The advantage is a score per decision node too: its plain mean is the one statistic that makes sense.
    advantage = across_questions(nodes.assign(align_advantage=nodes["advantage"]), "advantage", by)
    advantage = advantage[advantage["statistic"] == "mean"].assign(statistic="advantage")
    return pd.concat([table for table in (cosines, advantage) if len(table)] or [cosines], ignore_index=True)


def ranking(measured: pd.DataFrame, counts: pd.DataFrame, estimator: str) -> Table:
    """Rank the teachers of one estimator by global cosine."""
    measured = measured[measured["estimator"] == estimator]
    nodes = counts[counts["estimator"] == estimator].set_index("teacher")["n"]
    teachers = by_global_cosine(measured)
    rows, cells = [], []
    for teacher in teachers:
        found = measured[measured["teacher"] == teacher].set_index("statistic")
        row = {"teacher": teacher}
        for statistic in NAMES:
            mean, low, high = found.loc[statistic, ["mean", "low", "high"]]
            row |= {statistic: mean, f"{statistic}_low": low, f"{statistic}_high": high}
        questions = int(found.loc["mean", "n"])
        rows.append(row | {"n_questions": questions, "n_nodes": int(nodes[teacher])})
        text = [with_interval(found.loc[statistic]) for statistic in NAMES]
        cells.append([teacher, *text, str(questions), f"{nodes[teacher]:,}"])
    columns = [f"{s}{end}" for s in NAMES for end in ("", "_low", "_high")]
    return Table(
        f"ranking_{re.sub(r'[^A-Za-z0-9]+', '_', estimator)}",
        f"Ranking under {estimator}",
        METRICS_NOTE,
        pd.DataFrame(rows, columns=["teacher", *columns, "n_questions", "n_nodes"]),
        pd.DataFrame(cells, columns=["teacher", *NAMES.values(), "questions", "nodes"]),
    )


def exit_cosines(cosines: pd.DataFrame) -> Table:
    """Rank the teachers by the global cosine that the exits allocation was aimed at."""
    rows = []
    for teacher, group in cosines.groupby("teacher", sort=False):
        found = t_interval(group["global_cosine"].to_numpy(float))
        rows.append({"teacher": teacher} | found | {"se": float(group["se"].median())})
    numbers = pd.DataFrame(rows).sort_values("mean", ascending=False)
    cells = [[row.teacher, with_interval(row), number(row.se), str(int(row.n))] for _, row in numbers.iterrows()]
    note = (
        "Mean over questions with its 95 % t interval, of all tokens above tau; the noise of the rollouts is taken out "
        "of the gradient's norm. Error of a question: the median standard error its rollouts leave (`--target-se`)."
    )
    frame = pd.DataFrame(cells, columns=["teacher", "global cosine", "error of a question", "questions"])
    return Table("cosines", "Ranking by the cosine that exits were aimed at", note, numbers, frame)


def side_by_side(nodes: pd.DataFrame, shown: Sequence[str] = ("global", "mean")) -> Table:
    """Set the estimators beside each other, over the nodes that all of them can judge."""
    estimators = estimators_of(nodes)
    place = ["question", "path", "t", "teacher"]
    decided = nodes["decision"].astype(bool)
    everywhere = decided.groupby([nodes[name] for name in place]).transform("sum") == len(estimators)
    same = nodes[everywhere]
    measured = statistics(same)
    measured = measured[measured["statistic"].isin(shown)].reset_index(drop=True)
    found = measured.set_index(["teacher", "estimator", "statistic"])
    front = measured[measured["estimator"] == default_estimator(nodes)]
    cells = [
        [teacher, *(with_interval(found.loc[teacher, name, s]) for s in shown for name in estimators)]
        for teacher in by_global_cosine(front)
    ]
    headings = [f"{NAMES[s].replace(' cosine', '')}, {name}" for s in shown for name in estimators]
    some, every = (len(each[place[:3]].drop_duplicates()) for each in (same, nodes[decided]))
    note = f"Over the {some} nodes, of {every}, that are decision nodes under every estimator."
    if "truth" in estimators:
        note += " The oracle has rollouts of its own: the distance to truth is an estimator's error and the oracle's."
    return Table(
        "estimators", "Estimators side by side", note, measured, pd.DataFrame(cells, columns=["teacher", *headings])
    )


def correct_incorrect(records: Records, shown: Sequence[str] = ("global", "mean")) -> Table:
    """Compare incorrect with correct paths, teacher by teacher and over all teachers, in pairs of one question."""
    nodes = records.nodes
    each = correct_vs_incorrect(nodes, FORM)
    pooled = correct_vs_incorrect(nodes, FORM, ("estimator",)).assign(teacher=ALL)
    numbers = pd.concat([pooled, each] if len(each) else [each])[list(each.columns)].reset_index(drop=True)
    found = numbers[numbers["estimator"] == records.estimator].set_index(["teacher", "statistic"])
    order = by_global_cosine(statistics(nodes[nodes["estimator"] == records.estimator]))
    cells = []
    for teacher in [ALL, *order] if order else []:
        rows = [found.loc[teacher, statistic] for statistic in shown]
        cells.append([teacher, *(text for row in rows for text in _paired_cells(row)), str(int(rows[0]["n"]))])
    headings = [f"{s}, {part}" for s in shown for part in ("correct", "incorrect", "difference", "p")]
    note = (
        f"Estimator {records.estimator}. Difference = incorrect minus correct, paired by question, with its 95 % t "
        "interval; p is Wilcoxon's signed-rank test. Positive: the teacher points better where the student goes wrong."
    )
    frame = pd.DataFrame(cells, columns=["teacher", *headings, "questions"])
    return Table("correct_incorrect", "Correct against incorrect paths", note, numbers, frame)


def forms(records: Records, shown: Sequence[str] = ("global", "mean")) -> Table:
    """Compare the gradient forms, over all teachers (cells) and teacher by teacher (numbers)."""
    nodes = records.nodes[records.nodes["estimator"] == records.estimator]
    parts = []
    for form in records.forms:
        for reading in READINGS:
            if reading == "restricted" and f"align_{form}_restricted" not in nodes.columns:
                continue
            for by in (("estimator",), ("teacher", "estimator")):
                table = across_questions(nodes, form, by, reading)
                parts.append(
                    table.assign(form=form, reading=reading, **({} if "teacher" in table else {"teacher": ALL}))
                )
    columns = ["form", "reading", "teacher", "estimator", "statistic", "mean", "low", "high", "n"]
    numbers = pd.concat([p for p in parts if len(p)] or [pd.DataFrame(columns=columns)], ignore_index=True)[columns]
    found = numbers[numbers["teacher"] == ALL].set_index(["form", "reading", "statistic"])
    keys = [(statistic, reading) for statistic in shown for reading in READINGS]

    def cell(form: str, statistic: str, reading: str) -> str:
        key = (form, reading, statistic)
        return with_interval(found.loc[key]) if key in found.index else "\u2013"

    cells = [[form, *(cell(form, *key) for key in keys)] for form in dict.fromkeys(numbers["form"])]
    headings = [f"{NAMES[statistic]}, {reading}" for statistic, reading in keys]
    note = (
        f"Estimator {records.estimator}, all teachers. Renormalized: student and teacher are renormalised on the "
        "tokens of known success. Restricted: the gradient is computed over the full vocabulary, then restricted to "
        "those tokens. The CSV file holds each teacher's rows."
    )
    return Table("forms", "Gradient forms", note, numbers, pd.DataFrame(cells, columns=["form", *headings]))


def exclusions(records: Records) -> Table:
    """List the questions that enter no number, and why."""
    out = records.questions[is_excluded(records.questions)]
    numbers = out[["question", "task", "excluded", "pass_rate", "difficulty", "n_initial"]].reset_index(drop=True)
    reasons = [f"{reason}: {REASONS[reason]}" if reason in REASONS else str(reason) for reason in numbers["excluded"]]
    cells = [
        [str(row.question), reason, str(row.task), number(row.pass_rate), str(row.n_initial)]
        for row, reason in zip(numbers.itertuples(), reasons, strict=True)
    ]
    note = f"{len(out)} of {len(records.questions)} questions; they enter no other number of this report."
    frame = pd.DataFrame(cells, columns=["question", "reason", "task", "pass rate", "initial rollouts"])
    return Table("exclusions", "Excluded questions", note, numbers, frame, labels=3)


def ranking_table(run: str | Path | pd.DataFrame) -> RichTable:
    """Build the terminal's table of a run (its folder, or its nodes): global cosine per teacher and estimator."""
    nodes = run if isinstance(run, pd.DataFrame) else read_records(run).nodes
    table = side_by_side(nodes, shown=("global",))
    rich = RichTable(
        title="Global cosine of the teachers (95 % interval)",
        title_justify="left",
        caption=table.note,
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for index, column in enumerate(table.cells.columns):
        rich.add_column(column.removeprefix("global, "), justify="right" if index else "left", no_wrap=index > 0)
    for row in table.cells.itertuples(index=False, name=None):
        rich.add_row(*map(rich_escape, row))
    return rich


def by_global_cosine(measured: pd.DataFrame) -> list[str]:
    """Order the teachers of one estimator, best first, unknown last."""
    rows = measured[measured["statistic"] == "global"]
    return list(rows.sort_values("mean", ascending=False, na_position="last", kind="stable")["teacher"])


def number(value: float, digits: int = 3) -> str:
    """Write a number for reading; a dash where there is none."""
    text = f"{value:z.{digits}f}"  # z: no negative zero
    return text.replace("-", "\u2212") if np.isfinite(value) else "\u2013"


def with_interval(row: pd.Series, mean: str = "mean") -> str:
    """Write a mean with the half width of its interval, or alone where it has none."""
    half = (row["high"] - row["low"]) / 2
    return f"{number(row[mean])} \u00b1 {number(half)}" if np.isfinite(half) else number(row[mean])


def _paired_cells(row: pd.Series) -> list[str]:
    p = row["wilcoxon_p"]
    small = f"{p:.0e}".replace("e-0", "e-").replace("-", "\u2212") if p < 0.001 else number(p)
    return [number(row["correct"]), number(row["incorrect"]), with_interval(row, "difference"), small]


def _front_first(records: Records) -> list[str]:
    return sorted(records.estimators, key=lambda name: name != records.estimator)


def _markdown_cell(text: str) -> str:
    for sign in "\\|<>`*_[]":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())
