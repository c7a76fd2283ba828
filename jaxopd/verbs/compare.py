"""jaxopd compare."""

import dataclasses
from pathlib import Path

import pandas as pd
import tyro
from rich.console import Console

from jaxopd.analysis import compare_runs, of_estimator, rank_changes, side_by_side
from jaxopd.analysis.teachers import ALL_STATISTICS
from jaxopd.errors import InputError
from jaxopd.report.arranged import arranged, write_tables
from jaxopd.report.records import read_records
from jaxopd.report.tables import Table
from jaxopd.verbs.console import as_table

COMPARED = (
    "Mean over questions, 95 % t interval, of all nodes that the estimator can judge; not the cosine that exits were "
    "aimed at, which a report ranks by first."
)


@dataclasses.dataclass(frozen=True)
class Compare:
    """Puts runs side by side: each teacher's alignment in every run, and which differences are more than noise."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Folders of finished runs, two or more."""
    statistic: str = "global"
    """global, mean, sr_weighted, filtered, fraction_positive or advantage."""
    form: str = "reverse_kl"
    """Gradient form."""
    estimator: str | None = None
    """Estimator of P_succ; by default the one each report shows first."""
    out: str | None = None
    """Folder for the tables as markdown and CSV; only printed where absent."""

    def run(self, console: Console) -> None:
        tables = comparison_tables(self.runs, self.statistic, self.form, self.estimator)
        for table in tables:
            console.print(as_table(table.title, table.cells))
            console.print(table.note)
        if self.out is not None:
            write_tables(tables, self.out)


def comparison_tables(folders: tuple[str, ...], statistic: str, form: str, estimator: str | None) -> list[Table]:
    """Builds the comparison's tables: teachers by run, tests of each difference, agreement of the rankings."""
    if len(folders) < 2:
        raise InputError(f"runs: found {len(folders)}, expected two or more folders of finished runs")
    if statistic not in ALL_STATISTICS:
        raise InputError(f"statistic: found {statistic!r}, expected one of {', '.join(ALL_STATISTICS)}")
    nodes = _nodes(folders, estimator)
    measured = side_by_side(nodes, statistic, form)
    pairs, ranks = compare_runs(nodes, statistic, form), rank_changes(measured)
    wide = measured.pivot(index="teacher", columns="run")
    flat = pd.DataFrame({"teacher": wide.index})
    columns: dict = {"teacher": "teacher"}
    for run in nodes:
        for part in ("mean", "low", "high", "boot_low", "boot_high", "n"):
            flat[f"{part} {run}"] = wide[(part, run)].to_numpy()
        columns[run] = (f"mean {run}", f"low {run}", f"high {run}")
    tests = {"teacher": "teacher", "second": "second", "against": "first"}
    tests |= {"difference": ("difference", "low", "high"), "test": "test", "p": "p", "Holm p": "holm_p"}
    tests |= {"second is": "verdict", "questions": "n"}
    agree = {"first": "first", "second": "second", "Kendall tau": "kendall_tau", "p": "p", "teachers": "teachers"}
    return [
        arranged("compare_runs", f"{statistic} alignment by run", COMPARED, flat, columns),
        arranged(
            "compare_tests",
            f"Differences of {statistic} alignment between runs",
            "Second minus first, over the questions in common where there are any; Holm over all rows.",
            pairs,
            tests,
            labels=3,
        ),
        arranged(
            "compare_ranks", "Agreement of the rankings", "Over the teachers of both runs.", ranks, agree, labels=2
        ),
    ]


def _nodes(folders: tuple[str, ...], estimator: str | None) -> dict[str, pd.DataFrame]:
    """Reads the node records of one estimator a run, by the run's name; by its folder where names repeat."""
    records = [read_records(folder) for folder in folders]
    repeated = len({found.name for found in records}) < len(records)
    names = [str(Path(folder)) if repeated else found.name for folder, found in zip(folders, records, strict=True)]
    if len(set(names)) < len(names):
        raise InputError(f"runs: found {names[0]} among others twice, expected different folders")
    return {
        name: of_estimator(found.nodes, estimator or found.estimator)
        for name, found in zip(names, records, strict=True)
    }
