"""The command line: jaxopd demo, diagnose, report, truth, toy train, toy check."""

import dataclasses
import errno
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import pandas as pd
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from jaxopd import toy
from jaxopd.diagnose import DiagnoseConfig, collect, diagnose
from jaxopd.diagnose.session import Progress as Report
from jaxopd.diagnose.session import Session
from jaxopd.errors import InputError

PIPED_WIDTH = 140  # columns of a table that goes into a file

TOY_TEACHERS = (
    "Self-1C=self:1c",
    "Self-1C-X=self:1c@large",
    "Self-Sum-1C=self:sum1c",
    "Self-Sum-1C1W=self:sum1c1w",
    "Self-1C1W=self:1c1w",
    *(f"{name}={toy.MODELS / name}" for name in ("T1", "T2", "T3")),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diagnose(DiagnoseConfig):
    """Measures, per token and per teacher, whether distillation would point toward success; resumes a killed run."""

    teacher: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    out: str = "runs/diagnose"
    """Folder of the run; the same command with the same folder resumes it."""

    def __post_init__(self) -> None:
        pass  # `run` checks: an error raised while parsing would be tyro's to show

    def run(self, console: Console) -> None:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(DiagnoseConfig)}
        with bars(console) as report:
            diagnose(DiagnoseConfig(**fields), self.out, report)
        show_report(console, self.out)


@dataclasses.dataclass(frozen=True)
class MakeReport:
    """Writes tables, plots and one self-contained report.html from a finished run."""

    run_folder: tyro.conf.Positional[str]
    """Folder of the run."""

    def run(self, console: Console) -> None:
        show_report(console, self.run_folder)


@dataclasses.dataclass(frozen=True)
class Demo:
    """Runs the whole instrument on the toy suite and prints the teacher ranking beside the truth."""

    out: str = "runs/demo"
    """Folder of the run; the same command resumes it."""
    student: str = "S"
    """Toy student: S or M."""
    questions: int = 3
    """Questions of each of the three flavours."""
    truth_rollouts: int = 300
    """Rollouts a node for the near-exact truth."""
    seed: int = 0
    """Seed of every draw."""

    def run(self, console: Console) -> None:
        config = toy_config(self.student, self.questions, self.seed, truth_rollouts=self.truth_rollouts)
        with bars(console) as report:
            diagnose(config, self.out, report)
        show_report(console, self.out)


@dataclasses.dataclass(frozen=True)
class Truth:
    """Replays the whole procedure on exact decision processes and prints how wrong each estimator is."""

    out: str = "runs/truth"
    """Folder of the run whose questions become decision processes; made when absent."""
    student: str = "S"
    """Toy student: S or M."""
    questions: int = 10
    """Questions of each of the three flavours."""
    per_window: int = 20
    """Targets a depth window and teacher, by each of the two criteria."""
    replicates: int = 60
    """Replicates of the procedure, a question."""
    seed: int = 0
    """Seed of every draw."""

    def run(self, console: Console) -> None:
        from jaxopd.truth import truth

        config = toy_config(self.student, self.questions, self.seed, truth_rollouts=100)
        config = dataclasses.replace(config, by_gradient=self.per_window, by_difference=self.per_window)
        with bars(console) as report:
            session = Session(config, self.out, report)
            collect(session)
            tables = truth(session, report, self.replicates, self.seed)
        console.print(
            f"{tables.questions} questions, {tables.replicates} replicates, "
            f"{tables.rollouts:,.0f} targeted rollouts a question and replicate"
        )
        console.print(as_table("Success probability of the tokens of S_u against the exact one", tables.success))
        console.print(as_table("Alignment of reverse KL against the exact one on the same S_u", tables.aggregates))
        session.run.write_table("truth/success.parquet", tables.success)
        session.run.write_table("truth/aggregates.parquet", tables.aggregates)


@dataclasses.dataclass(frozen=True)
class ToyTrain:
    """Trains the six toy models that ship with jaxopd."""

    out: str = "runs/toy"
    """Folder that gets one Hugging Face folder a model."""
    seed: int = 0
    """Seed of initial weights and corpora."""

    def run(self, console: Console) -> None:
        from jaxopd.toy.train import train_all

        train_all(Path(self.out), seed=self.seed)


@dataclasses.dataclass(frozen=True)
class ToyCheck:
    """Measures the toy models and asserts their order: teachers above students, contexts in order."""

    models: str = str(toy.MODELS)
    """Folder that holds one Hugging Face folder a model."""

    def run(self, console: Console) -> None:
        from jaxopd.toy.check import check

        _, good = check(Path(self.models), report=console.print)
        if not good:
            raise SystemExit(1)


ToyVerb = Annotated[ToyTrain, tyro.conf.subcommand("train")] | Annotated[ToyCheck, tyro.conf.subcommand("check")]


@dataclasses.dataclass(frozen=True)
class Toy:
    """Trains or checks the toy suite."""

    verb: tyro.conf.OmitSubcommandPrefixes[ToyVerb]

    def run(self, console: Console) -> None:
        self.verb.run(console)


Verb = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Diagnose, tyro.conf.subcommand("diagnose")]
    | Annotated[MakeReport, tyro.conf.subcommand("report")]
    | Annotated[Truth, tyro.conf.subcommand("truth")]
    | Annotated[Toy, tyro.conf.subcommand("toy")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb; 0 when it worked, 2 with one sentence on bad input or a full disk."""
    verb = tyro.cli(Verb, args=arguments, prog="jaxopd", description=__doc__)
    try:
        console = Console()
        verb.run(console if console.is_terminal else Console(width=PIPED_WIDTH))
    except InputError as error:
        print(f"jaxopd: {error}", file=sys.stderr)
        return 2
    except Exception as error:  # libraries say it in exceptions of their own kinds
        if not any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT)):
            raise
        where = getattr(error, "filename", None) or "output"
        print(f"jaxopd: {where}: found no free disk space, expected room for it", file=sys.stderr)
        return 2
    return 0


def toy_config(student: str, questions: int, seed: int, *, truth_rollouts: int) -> DiagnoseConfig:
    """Gives the diagnosis of a toy student with all eight teacher configurations."""
    return DiagnoseConfig(
        student=str(toy.MODELS / student),
        teacher=TOY_TEACHERS,
        task="toy",
        questions=f"all:{questions}:{seed + 1}",
        large=str(toy.MODELS / "X"),
        max_tokens=80,
        truth_rollouts=truth_rollouts,
        seed=seed,
    )


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


if __name__ == "__main__":
    sys.exit(main())
