"""The report of a run: tables, plots and one self-contained page."""

import os
import tempfile
from pathlib import Path

from jaxopd.errors import InputError
from jaxopd.report.explorer import explore
from jaxopd.report.html import render
from jaxopd.report.plots import all_plots
from jaxopd.report.records import read_records
from jaxopd.report.tables import all_tables, ranking_table

__all__ = ["ranking_table", "write_report"]


def write_report(run_dir: str | Path, out: str | Path | None = None) -> dict[str, Path]:
    """Write tables (markdown, CSV), plots (SVG) and report.html of a run, by default under RUN/report.

    Returns the paths by name: "html", "markdown", and one per CSV and SVG file, and per question whose data the page
    has no room for. Everything is rendered before the first file is written, and each file appears whole or not at
    all. Raises InputError where the run is incomplete.
    """
    records = read_records(run_dir)
    if out is None and "://" in str(run_dir):
        raise InputError(f"{run_dir}: found a remote run and no folder for the report, expected a local `out`")
    tables, plots, explored = all_tables(records), all_plots(records), explore(records)
    files = {name: (name, script) for name, script in explored.beside.items()}
    files["html"] = ("report.html", render(records, tables, plots, explored))
    files["markdown"] = ("tables.md", "\n".join([f"# {records.name}\n", *(table.markdown() for table in tables)]))
    files |= {f"{t.name}.csv": (f"{t.name}.csv", t.numbers.to_csv(index=False, lineterminator="\n")) for t in tables}
    files |= {f"{name}.svg": (f"{name}.svg", svg) for name, svg in plots.items()}
    folder = Path(run_dir) / "report" if out is None else Path(out)
    return {key: _write(folder / name, text) for key, (name, text) in files.items()}


def _write(path: Path, text: str) -> Path:
    """Write to a temporary neighbour, then rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace", newline="") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path
