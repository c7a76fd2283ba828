"""What verbs share: compiled programs kept on disk, notices, progress bars, small tables, the report of a run."""

import hashlib
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import pandas as pd
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from jaxopd.diagnose.session import Progress as Report
from jaxopd.distributed import decided
from jaxopd.errors import InputError
from jaxopd.rollouts.plan import MemoryPlan

NEWS = 1.5
LEAST_COMPILE_SECONDS = 0.1  # programs that compile faster are not worth a file


def keep_compiled() -> None:
    """Keeps compiled programs in the user's cache folder for later processes; JAX_COMPILATION_CACHE_DIR names another.

    Does nothing where that folder cannot be written.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = caches / "jaxopd" / "compiled" / _machine()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_COMPILE_SECONDS)


def _machine() -> str:
    """Names the processor's instruction set: a home folder may be shared, and code for one may not run on another."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
    features = sorted({line for line in lines if line.startswith(("flags", "Features"))})
    return f"{platform.machine()}-{hashlib.sha256(repr(features).encode()).hexdigest()[:12]}"


def show_notices(console: Console) -> None:
    """Prints what the package logs above the progress bars; of the engine's memory plans those that need much more."""
    log = logging.getLogger("jaxopd")
    log.handlers = [RichHandler(console=console, show_time=False, show_level=False, show_path=False)]
    log.handlers[0].addFilter(_LargerPlans())
    log.setLevel(logging.INFO)
    log.propagate = False  # a library may have set up the root logger, which would print them again


class _LargerPlans(logging.Filter):
    """Drops a memory plan that needs less than NEWS times the last one shown: verbs make one for each question."""

    shown = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        plans = [x for x in record.args or () if isinstance(x, MemoryPlan)]
        if any(plan.total <= NEWS * self.shown for plan in plans):
            return False
        self.shown = max([self.shown, *(plan.total for plan in plans)])
        return True


def made_folder(path: str | Path) -> Path:
    """Makes a folder for output, before anything is computed. Raises InputError where that cannot be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: found no folder that can be written ({error.strerror}), expected one") from None
    return Path(path)


def show_report(console: Console, out: str) -> None:
    """Writes the report of a run and prints its ranking and where it lies; one process does it for all."""
    decided(lambda: _show_report(console, out))


def _show_report(console: Console, out: str) -> None:
    from jaxopd.report import ranking_table, write_report
    from jaxopd.report.records import is_excluded, read_records
    from jaxopd.report.tables import exit_cosines

    written, records = write_report(out), read_records(out)
    reasons = records.questions.loc[is_excluded(records.questions), "excluded"].value_counts()
    left_out = "".join(f", {count} {reason}" for reason, count in reasons.items())
    console.print(f"{len(records.questions) - reasons.sum()} of {len(records.questions)} questions analysed{left_out}")
    if len(records.nodes):
        if len(records.cosines):
            table = exit_cosines(records.cosines)
            console.print(as_table(table.title, table.cells), table.note, sep="\n")
        console.print(ranking_table(records.nodes))
    console.print(f"report: {written['html']}")


def as_table(title: str, frame: pd.DataFrame) -> Table:
    """Renders a small frame for the terminal."""
    table = Table(title=title)
    for column in frame.columns:
        table.add_column(column, justify="right" if pd.api.types.is_numeric_dtype(frame[column]) else "left")
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
