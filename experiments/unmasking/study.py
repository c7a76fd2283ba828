"""What the scripts of this folder share: the runs they read, made on demand, and the files they write.

A setting is one student on one benchmark: a run of `jaxopd diagnose`, and one of `jaxopd screen` for Tables 7 to 9.
Every script takes the same flags:

    (none)            toy scale: S and M on boolean, choice and chain, 48 to 66 questions each, eight teachers
    --smoke           two settings of one question, minutes: does it run, not what does it say
    --scale paper     Qwen3-0.6B and 1.7B; --data the folder that holds boolq/, mmlu/ and aime25/
    --runs A B ...    finished runs of your own, any student and task
    --allocation      where targeted rollouts go: paper (default, the paper's windows) or exits
    --out             folder of runs and results; runs/unmasking by default

Runs are resumable and shared: the first script makes them, the others find them.
"""

import argparse
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from paper import SETTINGS

from jaxopd.analysis import of_estimator
from jaxopd.diagnose import DiagnoseConfig, diagnose
from jaxopd.diagnose.config import ALONE
from jaxopd.diagnose.screen import CONTEXTS, ROLLOUTS, screen
from jaxopd.report.arranged import write_tables
from jaxopd.report.plots import STYLE
from jaxopd.report.records import read_records
from jaxopd.report.tables import Table
from jaxopd.runs import RunFolder
from jaxopd.tasks.contexts import NO_CONTEXT, parse_teacher
from jaxopd.tasks.toy import FLAVOURS
from jaxopd.toy import MODELS
from jaxopd.verbs.console import keep_compiled
from jaxopd.verbs.demo import TOY_TEACHERS

QUESTIONS = {"boolean": 56, "choice": 66, "chain": 48}  # asked of each student, so that at least 40 can be analysed
SELF_TEACHERS = (
    "Self-1C=self:1c",
    "Self-1C-large=self:1c@large",
    "Self-Sum-1C=self:sum1c",
    "Self-Sum-1C1W=self:sum1c1w",
    "Self-1C1W=self:1c1w",
)
TOY_BENCHMARKS = {"boolean": "BoolQ", "choice": "MMLU"}  # whose part a flavour plays; chain plays AIME's, untabulated
TOY_STUDENTS = {"S": "0.6B", "M": "1.7B"}
DATA_FOLDERS = {"BoolQ": "boolq", "MMLU": "mmlu", "AIME": "aime25"}
TOY_BUDGETS = {"max_tokens": 80, "by_gradient": 5, "by_difference": 5, "truth_rollouts": 40}
SMOKE_BUDGETS = {"rollouts": 60, "by_gradient": 1, "by_difference": 1, "n_min": 20, "n_sig": 5, "truth_rollouts": 10}
SMOKE_FLAVOURS = {"S": "boolean", "M": "chain"}
PAPER_QUESTIONS = 40
AIME = {"limit": 4, "max_tokens": 30_000, "n_sig": 40}


@dataclass(frozen=True)
class Setting:
    """One student on one benchmark.

    Attributes:
        name: how tables call it.
        folder: its diagnosis.
        config: how to make the diagnosis; None where it must exist.
        paper: the paper's setting whose part it plays, a key of `paper.RANKING`, or None.
    """

    name: str
    folder: Path
    config: DiagnoseConfig | None = None
    paper: tuple[str, str] | None = None

    @cached_property
    def records(self):
        """The tables of the diagnosis."""
        return read_records(self.folder)

    def nodes(self, estimator: str) -> pd.DataFrame:
        """Node records of one estimator; empty where every question was excluded."""
        nodes = self.records.nodes
        return of_estimator(nodes, estimator) if len(nodes) else nodes

    @property
    def estimators(self) -> list[str]:
        """The paper's estimator, the default one and, where an oracle ran, the truth."""
        return [name for name in ("pooled", "bellman", "truth") if name in self.records.estimators]

    @property
    def n_sig(self) -> int:
        """Visits from which a token counts; 0 where exits were launched, which judge every token compared."""
        config = self.records.config
        return 0 if config.get("allocation") == "exits" else int(config["n_sig"])

    @cached_property
    def teachers(self) -> dict[tuple, str]:
        """What each teacher is, as `paper.py` writes it, and its name."""
        specs = [parse_teacher(argument) for argument in self.records.config["teacher"]]
        external = [spec.name for spec in specs if spec.kind == NO_CONTEXT]
        own = {(spec.kind, spec.source): spec.name for spec in specs if spec.kind != NO_CONTEXT}
        return own | {("external", place): name for place, name in enumerate(external)}

    def teacher_kind(self, name: str) -> tuple | None:
        """What a teacher is, by its name."""
        return next((kind for kind, known in self.teachers.items() if known == name), None)

    @property
    def screening_folder(self) -> Path:
        """Where the screening lies, beside the diagnosis."""
        return self.folder.with_name(f"{self.folder.name}-screening")

    @cached_property
    def screening(self) -> RunFolder | None:
        """The screening run; None for runs of one's own without one."""
        return RunFolder.existing(str(self.screening_folder)) if self.screening_folder.exists() else None

    @property
    def finished(self) -> bool:
        """Whether there is nothing to make."""
        made = (self.folder / "records/nodes.parquet", self.screening_folder / "records/screening.parquet")
        return self.config is None or all(path.exists() for path in made)

    def make(self) -> None:
        """Runs, or resumes, the screening and the diagnosis."""
        if self.config is not None:
            keep_compiled()  # settings compile the same programs, in processes of their own
            contexts = {"teacher": CONTEXTS, "rollouts": min(ROLLOUTS, self.config.rollouts), "truth_rollouts": 0}
            screen(replace(self.config, **contexts), str(self.screening_folder))
            diagnose(self.config, str(self.folder))


@dataclass(frozen=True)
class Result:
    """What a script found."""

    tables: Sequence[Table] = ()
    figures: dict[str, Figure] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """The settings at hand, and where results go."""

    settings: tuple[Setting, ...]
    out: Path

    def prepare(self, jobs: int) -> None:
        """Makes the runs that are missing, `jobs` at a time, each on its share of the cores."""
        missing = [setting for setting in self.settings if not setting.finished]
        if jobs < 2 or len(missing) < 2:
            for setting in missing:
                setting.make()
            return
        # Fresh processes, as JAX must not be forked; cores of their own, so that their thread pools do not compete.
        spawn = get_context("spawn")
        turns = spawn.Value("i", 0)
        with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_begin, initargs=(turns, jobs)) as pool:
            # The last settings take longest, and neighbours differ in the student: they compile different programs.
            for done in [pool.submit(setting.make) for setting in reversed(missing)]:
                done.result()

    def over(self, measure: Callable[[Setting, pd.DataFrame], pd.DataFrame], but: Sequence[str] = ()) -> pd.DataFrame:
        """Joins measure(setting, nodes) of every setting and estimator `but` some; those two become first columns."""
        parts = []
        for setting in self.settings:
            for estimator in setting.estimators:
                if estimator in but:
                    continue
                found = measure(setting, setting.nodes(estimator))
                found = found.drop(columns=["setting", "estimator"], errors="ignore")
                found.insert(0, "setting", setting.name)
                found.insert(1, "estimator", estimator)
                parts.append(found)
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()

    def write(self, result: Result) -> list[Path]:
        """Writes tables as markdown and CSV, figures as SVG."""
        written = write_tables(result.tables, self.out / "results")
        for name, figure in result.figures.items():
            written.append(self.out / "results" / f"{name}.svg")
            written[-1].parent.mkdir(parents=True, exist_ok=True)
            with matplotlib.rc_context(STYLE):
                figure.savefig(written[-1], metadata={"Date": None})
        return written


def toy_settings(out: Path, questions: int | None, allocation: str, *, smoke: bool) -> tuple[Setting, ...]:
    """S and M on the three flavours."""
    settings = []
    for flavour in FLAVOURS:
        for student, size in TOY_STUDENTS.items():
            if smoke and flavour != SMOKE_FLAVOURS[student]:
                continue
            config = DiagnoseConfig(
                student=str(MODELS / student),
                teacher=TOY_TEACHERS,
                task="toy",
                questions=f"{flavour}:{1 if smoke else questions or QUESTIONS[flavour]}:1",
                large=str(MODELS / "X"),
                **_budgets(allocation, TOY_BUDGETS | (SMOKE_BUDGETS if smoke else {})),
            )
            paper = (size, TOY_BENCHMARKS[flavour]) if flavour in TOY_BENCHMARKS else None
            settings.append(Setting(f"{student} {flavour}", out / f"{student}-{flavour}", config, paper))
    return tuple(settings)


def paper_settings(out: Path, questions: int | None, allocation: str, data: Path, models: str) -> tuple[Setting, ...]:
    """The paper's students, teachers and budgets; `models` is a hub organisation or a local folder."""
    teachers = (*SELF_TEACHERS, *(f"Qwen3-{size}={models}/Qwen3-{size}" for size in ("4B", "8B", "14B")))
    shared = {"teacher": teachers, "large": f"{models}/Qwen3-32B", "dtype": "bfloat16", "thinking": True}
    settings = []
    for size in ("0.6B", "1.7B"):
        for name, task, benchmark in (("BoolQ", "boolq", {}), ("MMLU", "mmlu", {}), ("AIME", "math", AIME)):
            config = DiagnoseConfig(
                student=f"{models}/Qwen3-{size}",
                task=task,
                questions=str(question_file(data / DATA_FOLDERS[name])),
                **_budgets(allocation, {"limit": questions or PAPER_QUESTIONS, "max_tokens": 4096} | benchmark),
                **shared,
            )
            played = (size, name) if (size, name) in SETTINGS else None
            settings.append(Setting(f"{size} {name}", out / f"{size}-{name}", config, played))
    return tuple(settings)


def _budgets(allocation: str, wanted: dict[str, Any]) -> dict[str, Any]:
    """The allocation with its budgets; those of the paper's alone are left out of the others'."""
    idle = () if allocation == "paper" else ALONE["paper"]
    return {"allocation": allocation} | {name: value for name, value in wanted.items() if name not in idle}


def question_file(folder: Path) -> Path:
    """The first JSONL file of a folder; the folder itself where its task reads folders."""
    return next(iter(sorted(folder.glob("*.jsonl"))), folder)


def study(arguments: Sequence[str] | None = None, description: str | None = None) -> Study:
    """Reads the flags and makes the runs that are missing."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter)
    parser.add_argument("--smoke", action="store_true", help="two settings of one question, tiny budgets")
    parser.add_argument("--scale", choices=("toy", "paper"), default="toy")
    parser.add_argument("--allocation", choices=("paper", "exits"), default="paper")
    parser.add_argument("--questions", type=int, help="questions asked a setting")
    parser.add_argument("--runs", nargs="+", type=Path, help="finished runs to read instead")
    parser.add_argument(
        "--data", type=Path, default=Path("data"), help="folder with boolq/, mmlu/, aime25/ (paper scale)"
    )
    parser.add_argument("--models", default="Qwen", help="hub organisation or folder of the models (paper scale)")
    parser.add_argument("--jobs", type=int, default=2, help="diagnoses at a time (toy scale)")
    parser.add_argument("--out", type=Path, help="folder of runs and results; runs/unmasking by default")
    chosen = parser.parse_args(arguments)
    out = chosen.out or Path("runs/unmasking-smoke" if chosen.smoke else "runs/unmasking")
    jobs = chosen.jobs
    if chosen.runs:
        settings = tuple(Setting(run.name, run) for run in chosen.runs)
    elif chosen.scale == "paper":
        settings, jobs = paper_settings(out, chosen.questions, chosen.allocation, chosen.data, chosen.models), 1
    else:
        settings = toy_settings(out, chosen.questions, chosen.allocation, smoke=chosen.smoke)
    made = Study(settings, out)
    made.prepare(jobs)
    return made


def main(make: Callable[[Study], Result], description: str | None) -> None:
    """Runs one script: flags, runs, results; prints its tables and where they lie."""
    chosen = study(description=description)
    result = make(chosen)
    for table in result.tables:
        print(table.markdown())
    for path in chosen.write(result):
        print(path)


def _begin(turns, jobs: int) -> None:
    """Gives this process every `jobs`-th core, and ends it with its parent: a resumed study would meet its files."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if not hasattr(os, "sched_setaffinity"):
        return
    with turns.get_lock():
        turn, turns.value = turns.value, turns.value + 1
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[turn::jobs] or cores)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
