"""What verbs show: progress bars, small tables, the report of a run."""

from collections.abc import Iterator
from contextlib import contextmanager

import pandas as pd
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from jaxopd.diagnose.session import Progress as Report


def show_report(console: Console, out: str) -> None:
    """Writes the report of a run and prints its ranking and where it lies."""
    from jaxopd.report import ranking_table, write_report

    written = write_report(out)
    console.print(ranking_table(out))
    console.print(f"report: {written['html']}")


def as_table(title: str, frame: pd.DataFrame) -> Table:
    """Renders a small frame for the terminal."""
    table = Table(title=title)
    for column in frame.columns:
        table.add_column(column, justify="left" if frame[column].dtype == object else "right")
    for row in frame.itertuples(index=False):
        table.add_row(*(f"{x:.4f}" if isinstance(x, float) else str(x) for x in row))
    return table


@contextmanager
def bars(console: Console) -> Iterator[Report]:
    """Shows one bar a stage, on a terminal."""
    columns = TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        tasks: dict[str, object] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done, total=total)  # type: ignore[arg-type]

        yield report
