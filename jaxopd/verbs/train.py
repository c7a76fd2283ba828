"""jaxopd train, evaluate, preflight and corpus."""

import dataclasses
import json
from pathlib import Path

import pandas as pd
import tyro
from rich.console import Console

from jaxopd.distributed import Hosts
from jaxopd.errors import InputError
from jaxopd.models import load_model, load_tokenizer
from jaxopd.train.config import GateConfig, TrainConfig
from jaxopd.train.corpus import CorpusConfig, write_corpus
from jaxopd.train.evaluate import EvalConfig, evaluate, gap_recovery, summary
from jaxopd.train.objectives import ObjectiveConfig
from jaxopd.verbs.console import as_table, made_folder

NO_GO = 4  # exit code


@dataclasses.dataclass(frozen=True)
class ObjectiveFlags(ObjectiveConfig):
    def __post_init__(self) -> None:
        pass  # `run` checks: an error raised while parsing would be tyro's to show


@dataclasses.dataclass(frozen=True)
class GateFlags(GateConfig):
    def __post_init__(self) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class TrainFlags(TrainConfig):
    """The flags that train and preflight share."""

    teacher: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    route: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    objective: tyro.conf.OmitArgPrefixes[ObjectiveFlags] = ObjectiveFlags()
    gate: tyro.conf.OmitArgPrefixes[GateFlags] = GateFlags()

    def __post_init__(self) -> None:
        pass

    def checked(self) -> TrainConfig:
        """Gives the configuration, or InputError on a value out of range."""
        fields = _fields(self, TrainConfig)
        _check_given(self, "student", "questions")
        objective = ObjectiveConfig(**_fields(self.objective, ObjectiveConfig))
        return TrainConfig(**fields | {"objective": objective, "gate": GateConfig(**_fields(self.gate, GateConfig))})


@dataclasses.dataclass(frozen=True)
class Train(TrainFlags):
    """Trains a student by on-policy distillation, outcome reward or fine-tuning; resumes a killed run."""

    out: str = "runs/train"
    """Folder of the run; the same command with the same folder resumes it."""
    hosts: tyro.conf.OmitArgPrefixes[Hosts] = dataclasses.field(default_factory=Hosts)

    def run(self, console: Console) -> None:
        from jaxopd.train.loop import train

        train(self.checked(), self.out, lambda line: console.print(line, markup=False))
        console.print(f"student: {Path(self.out) / 'student'}", markup=False)


@dataclasses.dataclass(frozen=True)
class Preflight(TrainFlags):
    """Measures on one batch whether a student and a teacher are worth training: go, or no-go (exit code 4)."""

    out: str = ""
    """File that gets the figures as JSON; none by default."""

    def run(self, console: Console) -> None:
        from jaxopd.train.preflight import preflight

        config = self.checked()
        if self.out:
            _made_place(self.out)
        found = preflight(config)
        numbers = {name: value for name, value in found.figures.items() if isinstance(value, float)}
        console.print(as_table("Student-visited states", pd.DataFrame(sorted(numbers.items()), columns=["", "value"])))
        windows = {k.partition("/")[2]: v for k, v in found.figures.items() if k.startswith("position/")}
        console.print(as_table("By response position", pd.DataFrame(windows).astype(float)))
        for caution in found.cautions:
            console.print(f"caution: {caution}", markup=False)
        for reason in found.reasons:
            console.print(f"against: {reason}", markup=False)
        console.print("go" if found.go else "no-go")
        if self.out:
            verdict = {"go": found.go, "reasons": found.reasons, "cautions": found.cautions}
            Path(self.out).write_text(json.dumps(verdict | {"figures": found.figures}, indent=1) + "\n")
        if not found.go:
            raise SystemExit(NO_GO)


@dataclasses.dataclass(frozen=True)
class Evaluate(EvalConfig):
    """Measures avg@n and pass@k of models, and how much of the gap to a teacher was recovered."""

    model: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Models to measure; with three or more, the first is before, the last the teacher, the others after training."""
    dtype: str = "float32"
    """Parameters and activations: float32 or bfloat16."""
    out: str = ""
    """Folder that gets one parquet file a model, a row a question; none by default."""

    def __post_init__(self) -> None:
        pass

    def run(self, console: Console) -> None:
        config = EvalConfig(**_fields(self, EvalConfig))
        if not self.model:
            raise InputError("--model: found none, expected at least one model to evaluate")
        rows = []
        if self.out:
            made_folder(self.out)
        for index, path in enumerate(self.model):
            table = evaluate(load_model(path, dtype=self.dtype), load_tokenizer(path), config)
            rows.append({"model": path} | summary(table))
            if self.out:
                table.to_parquet(Path(self.out) / f"{index}-{Path(path).name}.parquet")
        found = pd.DataFrame(rows)
        if len(found) > 2:
            before, teacher = found["avg"].iloc[0], found["avg"].iloc[-1]
            found["gap_recovery"] = [gap_recovery(before, after, teacher) for after in found["avg"]]
        console.print(as_table(f"{config.task}, {config.samples} responses a question", found))


@dataclasses.dataclass(frozen=True)
class Corpus(CorpusConfig):
    """Writes a teacher's responses to a file, truncated and repetitive ones left out, for a cold start."""

    out: str = "runs/corpus.jsonl"
    """The file."""

    def run(self, console: Console) -> None:
        _check_given(self, "teacher", "questions")
        _made_place(self.out)
        counts = write_corpus(CorpusConfig(**_fields(self, CorpusConfig)), self.out)
        console.print(f"{self.out}: " + ", ".join(f"{count} {name}" for name, count in counts.items()), markup=False)


def _check_given(flags: object, *names: str) -> None:
    wanted = {"questions": "a file of them"}
    for name in names:
        if not getattr(flags, name):
            raise InputError(f"--{name}: found none, expected {wanted.get(name, 'a model folder or hub id')}")


def _made_place(file: str) -> None:
    """Makes the folder of a file that is written at the end, before anything is computed."""
    if Path(file).is_dir():
        raise InputError(f"--out: found the folder {file}, expected a file")
    made_folder(Path(file).parent)


def _fields(flags: object, config: type) -> dict[str, object]:
    """The values that a configuration takes, of flags that have more."""
    return {field.name: getattr(flags, field.name) for field in dataclasses.fields(config)}
