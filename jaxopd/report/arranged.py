"""Small frames as tables for reading: means with their intervals, counts, verdicts; and tables as files."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from jaxopd.report.tables import Table, number

Cell = str | tuple[str, str, str]  # a column, or (mean, low, high)


def arranged(
    name: str, title: str, note: str, numbers: pd.DataFrame, columns: Mapping[str, Cell], *, labels: int = 1
) -> Table:
    """Make a table whose cells are columns of `numbers`, or a mean with the half width of its interval.

    `columns`: heading -> column, or (mean, low, high). p-values (columns that end in "_p" or are "p") keep two
    digits; other floats three decimals; NaN is a dash. Mind that half the width stands for both sides.
    """
    cells = {heading: [_cell(row, cell) for _, row in numbers.iterrows()] for heading, cell in columns.items()}
    return Table(name, title, note, numbers, pd.DataFrame(cells, columns=list(columns)), labels)


def write_tables(tables: Iterable[Table], folder: str | Path) -> list[Path]:
    """Write each table as NAME.md for reading and NAME.csv for machines; gives the paths."""
    folder, written = Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    for table in tables:
        for path, text in (
            (folder / f"{table.name}.md", table.markdown()),
            (folder / f"{table.name}.csv", table.numbers.to_csv(index=False, lineterminator="\n")),
        ):
            path.write_text(text, encoding="utf-8")
            written.append(path)
    return written


def p_value(p: float) -> str:
    """Write a p-value: two digits, an exponent under .001, a dash where there is none."""
    if not np.isfinite(p):
        return "\u2013"
    return f"{p:.0e}".replace("e-0", "e-").replace("-", "\u2212") if p < 0.001 else f"{p:.3f}"


def _cell(row: pd.Series, cell: Cell) -> str:
    if isinstance(cell, tuple):
        mean, low, high = (row[column] for column in cell)
        half = (high - low) / 2
        return f"{number(mean)} \u00b1 {number(half)}" if np.isfinite(half) else number(mean)
    value = row[cell]
    if isinstance(value, (float, np.floating)):
        return p_value(value) if cell == "p" or cell.endswith("_p") else number(value)
    return str(value)
