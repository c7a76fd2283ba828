"""What the scripts of this folder share: arms trained side by side over seeds, and their students' accuracy.

An arm is a name and what it changes in the training configuration. A run is a folder named by its configuration, so
scripts that need the same run share it, and an interrupted script resumes. Every student is measured on the same
questions with the same random numbers: before training, after a third of the steps, and at the end.

`--scale toy` is the shipped models, minutes a script on two cores. `--scale paper` is Table 2 of the paper, and wants
--questions and --held-out; every flag can be changed in both.
"""

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from jaxopd import load_model, load_tokenizer, toy
from jaxopd.models import Qwen
from jaxopd.train.config import TrainConfig
from jaxopd.train.evaluate import EvalConfig, evaluate, gap_recovery
from jaxopd.train.loop import WHOLE, Trainer
from jaxopd.train.objectives import ObjectiveConfig
from jaxopd.verbs.console import keep_compiled

RESULTS = Path(__file__).parent / "results"
MILESTONES = ("early", "after")  # a third of the steps, and all
CURVES = ("overlap/ratio", "overlap/advantage_paper", "entropy/gap_paper", "train/gradient_norm", "entropy/student")
SUMMED_UP = (*CURVES, "overlap/mass_student_paper", "overlap/mass_teacher_paper", "reward/auroc")
SCALES: dict[str, dict[str, Any]] = {
    "toy": {
        "student": str(toy.MODELS / "S"),
        "teacher": str(toy.MODELS / "T2"),
        "task": "toy",
        "questions": "all:400:7",
        "held_out": "all:60:99",
        "steps": 40,
        "batch": 32,
        "micro_batch": 128,
        "k": 4,
        "max_tokens": 80,
        "evaluation_tokens": 80,
        "learning_rate": 1e-3,
        "temperature": 1.0,
        "top_p": 1.0,
        "dtype": "float32",
    },
    "paper": {
        "student": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
        "teacher": "hbx/JustRL-DeepSeek-1.5B",
        "task": "math",
        "questions": "",
        "held_out": "",
        "steps": 200,
        "batch": 64,
        "micro_batch": 8,
        "k": 16,
        "max_tokens": 7168,
        "evaluation_tokens": 31_744,
        "learning_rate": 1e-6,
        "temperature": 0.7,
        "top_p": 0.95,
        "dtype": "bfloat16",
    },
}


@dataclass(frozen=True)
class Arm:
    """A way to train: changes of the configuration and of its objective; `after` an arm, from its student."""

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    objective: Mapping[str, Any] = field(default_factory=dict)
    after: "Arm | None" = None


@dataclass(frozen=True)
class Setting:
    """The models, questions and budget of a script, from its flags."""

    config: TrainConfig
    evaluation: EvalConfig
    seeds: int
    folder: Path
    smoke: bool

    @property
    def results(self) -> Path:
        """Where results go: smoke results stay beside their runs."""
        return self.folder / "results" if self.smoke else RESULTS

    @property
    def milestones(self) -> tuple[int, int]:
        """The steps at which students are measured."""
        return max(1, self.config.steps // 3), self.config.steps

    def correct(self, model: str | Path, load: Callable[[], Qwen] | None = None) -> pd.Series:
        """Gives the share of right responses to each evaluation question; measured once a model."""
        file = (
            self.folder
            / "evaluations"
            / f"{digest([str(model), self.config.dtype, dataclasses.asdict(self.evaluation)])}.parquet"
        )
        if not file.exists():
            loaded = load() if load else load_model(model, dtype=self.config.dtype)
            file.parent.mkdir(parents=True, exist_ok=True)
            evaluate(loaded, load_tokenizer(self.config.student), self.evaluation).to_parquet(file)
        found = pd.read_parquet(file).set_index("question")
        return found["correct"] / found["samples"]

    def config_of(self, arm: Arm, seed: int) -> TrainConfig:
        """Gives the configuration of an arm and seed; trains the arm that it starts from."""
        changes = dict(arm.changes)
        if arm.after is not None:
            changes["student"] = str(self.trained(self.config_of(arm.after, seed)) / "student")
        objective = replace(self.config.objective, **arm.objective)
        return replace(self.config, objective=objective, seed=seed, **changes)

    def trained(self, config: TrainConfig) -> Path:
        """Trains, or goes on training, measuring the student at the milestones; gives the run's folder."""
        # A run holds the measurements of its way, so another evaluation is another run.
        out = self.folder / digest([dataclasses.asdict(config), dataclasses.asdict(self.evaluation)])
        if not (out / "student" / "model.safetensors").exists():
            trainer = Trainer(config, out)
            with trainer.claims.alone(WHOLE):
                for step in self.milestones:
                    while trainer.step < step:
                        trainer.advance()
                    self.correct(self.at(out, step), lambda: trainer.student)
            trainer.run()
        return out

    @staticmethod
    def at(out: Path, step: int) -> str:
        """Names the student of a run as it was at a step."""
        return f"{out}@{step}"


def digest(value: Any) -> str:
    """Names a JSON value by its content."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def flags(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Gives the parser of a script, to which it may add flags of its own; defaults not given are the scale's."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="two steps and one seed: does it run")
    parser.add_argument("--scale", choices=tuple(SCALES), default="toy")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=16, help="responses a question in evaluation")
    parser.add_argument("--folder", type=Path, default=Path("runs/rethinking"), help="of runs, shared by the scripts")
    for name, value in SCALES["toy"].items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value))
    parser.set_defaults(**defaults)
    return parser


def setting(given: argparse.Namespace) -> Setting:
    """Makes the setting that parsed flags ask for."""
    keep_compiled()
    flag = {
        name: value if getattr(given, name) is None else getattr(given, name)
        for name, value in SCALES[given.scale].items()
    }
    if given.smoke:
        tiny = {"steps": 2, "batch": 4, "micro_batch": 16}
        flag |= tiny | ({"questions": "all:4:7", "held_out": "all:2:99"} if given.scale == "toy" else {})
    shared = {name: flag[name] for name in ("student", "task", "questions", "steps", "batch", "micro_batch", "dtype")}
    config = TrainConfig(
        **shared,
        teacher=(f"{Path(flag['teacher']).name}={flag['teacher']}",),
        objective=ObjectiveConfig(k=flag["k"]),
        mini_batch=flag["batch"],
        max_tokens=flag["max_tokens"],
        learning_rate=flag["learning_rate"],
        show_every=0,
        save_every=max(1, flag["steps"] // 3),
        keep=1,
    )
    samples = 2 if given.smoke else given.samples
    sampling = {name: flag[name] for name in ("temperature", "top_p")} | {"max_tokens": flag["evaluation_tokens"]}
    evaluation = EvalConfig(flag["task"], flag["held_out"], samples, **sampling)
    folder = given.folder.with_name(f"{given.folder.name}-smoke") if given.smoke else given.folder
    return Setting(config, evaluation, 1 if given.smoke else given.seeds, folder, given.smoke)


@dataclass(frozen=True)
class Compared:
    """What `compare` found: a row a run, the runs' curves, and per milestone the share right of [run, question]."""

    arms: Sequence[Arm]
    runs: pd.DataFrame
    curves: pd.DataFrame
    correct: dict[str, pd.DataFrame]


def compare(chosen: Setting, arms: Sequence[Arm]) -> Compared:
    """Trains every arm with every seed."""
    rows, curves, correct = [], [], {name: {} for name in MILESTONES}
    for seed in range(chosen.seeds):
        for arm in arms:
            config = chosen.config_of(arm, seed)
            out = chosen.trained(config)
            logged = metrics(out)
            curves.append(logged[["step", *logged.columns.intersection(("rollout/accuracy", *CURVES))]])
            curves[-1].insert(0, "seed", seed)
            curves[-1].insert(0, "arm", arm.name)
            for name, step in zip(MILESTONES, chosen.milestones):
                correct[name][arm.name, seed] = chosen.correct(chosen.at(out, step))
            reached = {name: runs[arm.name, seed].mean() for name, runs in correct.items()}
            accuracies = _accuracies(chosen, config, reached)
            rows.append({"arm": arm.name, "seed": seed} | accuracies | _dynamics(config, logged))
            print(f"{arm.name} seed {seed}: {rows[-1]['before']:.3f} -> {rows[-1]['after']:.3f}", flush=True)
    measured = {name: pd.DataFrame(runs).T for name, runs in correct.items()}
    return Compared(arms, pd.DataFrame(rows), pd.concat(curves, ignore_index=True), measured)


def metrics(out: Path) -> pd.DataFrame:
    """Reads the logged metrics of a run, a row a step."""
    return pd.DataFrame([json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()])


def _accuracies(chosen: Setting, config: TrainConfig, reached: dict[str, float]) -> dict[str, float]:
    before = chosen.correct(config.student).mean()
    models = [value.partition("=")[2] for value in config.teacher]
    teacher = chosen.correct(models[0]).mean() if models else np.nan
    recovered = gap_recovery(before, reached["after"], teacher)
    return {"before": before} | reached | {"teacher": teacher, "gap_recovery": recovered}


def _dynamics(config: TrainConfig, logged: pd.DataFrame) -> dict[str, float]:
    """Sums a run up: its budget, where the curves begin and end, and how rough they are."""
    responses = config.batch * config.group
    found = {
        "while_training": logged["rollout/accuracy"].mean(),
        "tokens": logged["rollout/length"].sum() * responses,
        "distilled": logged["gate/share"].mean(),
        "gradient_peak": logged["train/gradient_norm"].max() / logged["train/gradient_norm"].median(),
    }
    tenth = max(1, len(logged) // 10)
    for name in logged.columns.intersection(SUMMED_UP):
        short = name.replace("/", "_")
        found[f"{short}_first"] = logged[name].iloc[:tenth].mean()
        found[f"{short}_last"] = logged[name].iloc[-tenth:].mean()
    return found
