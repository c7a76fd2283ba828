"""What the scripts of this folder share: arms trained side by side over seeds, measured before and after.

An arm is a name and what it changes in the training configuration. Every run is a folder that resumes, so a script
that was interrupted is started again; finished arms cost nothing. Defaults are the toy suite, minutes a script on two
cores; the flags take the same script to other models and files.
"""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd

from jaxopd import load_model, load_tokenizer, toy
from jaxopd.train.config import TrainConfig
from jaxopd.train.evaluate import EvalConfig, evaluate, gap_recovery, summary
from jaxopd.train.loop import train
from jaxopd.train.objectives import ObjectiveConfig

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
CURVES = ("overlap/ratio", "overlap/advantage_paper", "entropy/gap_paper", "train/gradient_norm", "entropy/student")


@dataclass(frozen=True)
class Arm:
    """A way to train: changes of the configuration and of its objective; `student` None is the script's."""

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    objective: Mapping[str, Any] = field(default_factory=dict)
    student: str | None = None


@dataclass(frozen=True)
class Setting:
    """The models, questions and budget of a script, from its flags."""

    config: TrainConfig
    evaluation: EvalConfig
    seeds: int
    folder: Path
    smoke: bool

    def accuracy(self, path: str | Path) -> float:
        """avg@n of a model folder on the evaluation questions; measured once."""
        kept = self.folder / "accuracy.json"
        known = json.loads(kept.read_text()) if kept.exists() else {}
        key = str(path)
        if key not in known:
            found = evaluate(load_model(path), load_tokenizer(path), self.evaluation)
            known[key] = summary(found)["avg"]
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(known, indent=1))
        return known[key]


def setting(name: str, description: str | None, **defaults: Any) -> Setting:
    """Reads a script's flags."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--smoke", action="store_true", help="two steps and one seed: seconds")
    flag("--seeds", type=int, default=3)
    flag("--steps", type=int, default=defaults.get("steps", 60))
    flag("--student", default=defaults.get("student", str(toy.MODELS / "S")))
    flag("--teacher", default=defaults.get("teacher", str(toy.MODELS / "T2")))
    flag("--task", default="toy")
    flag("--questions", default="all:400:7")
    flag("--held-out", default="all:60:99", help="evaluation questions")
    flag("--batch", type=int, default=32, help="prompts a batch")
    flag("--k", type=int, default=4, help="tokens of a top-k set; the toy vocabulary has 71")
    flag("--max-tokens", type=int, default=80)
    flag("--learning-rate", type=float, default=defaults.get("learning_rate", 1e-3))
    flag("--samples", type=int, default=16, help="responses a question in evaluation")
    flag("--folder", type=Path, default=Path("runs/rethinking") / name)
    given = parser.parse_args()
    config = TrainConfig(
        student=given.student,
        teacher=(f"teacher={given.teacher}",),
        task=given.task,
        questions=given.questions,
        objective=ObjectiveConfig(k=given.k),
        steps=2 if given.smoke else given.steps,
        batch=4 if given.smoke else given.batch,
        mini_batch=4 if given.smoke else given.batch,
        micro_batch=16 if given.smoke else 4 * given.batch,
        max_tokens=given.max_tokens,
        learning_rate=given.learning_rate,
        show_every=0,
        save_every=max(1, given.steps // 3),
        keep=1,
    )
    samples = 2 if given.smoke else given.samples
    held_out = "all:4:99" if given.smoke and given.task == "toy" else given.held_out
    evaluation = EvalConfig(given.task, held_out, samples, 1.0, 1.0, given.max_tokens)
    folder = given.folder.with_name(f"{given.folder.name}-smoke") if given.smoke else given.folder
    return Setting(config, evaluation, 1 if given.smoke else given.seeds, folder, given.smoke)


def configured(base: TrainConfig, arm: Arm, seed: int) -> TrainConfig:
    """The configuration of an arm and seed."""
    objective = replace(base.objective, **arm.objective)
    changes = {"student": arm.student or base.student, **arm.changes}
    return replace(base, objective=objective, seed=seed, **changes)


def compare(chosen: Setting, arms: Sequence[Arm]) -> pd.DataFrame:
    """Trains every arm with every seed; a row each with accuracy before and after, the teacher's, and gap recovery."""
    rows = []
    for seed in range(chosen.seeds):
        for arm in arms:
            config, out = configured(chosen.config, arm, seed), chosen.folder / arm.name / str(seed)
            if not (out / "student" / "model.safetensors").exists():
                train(config, out, print)
            teachers = [
                value.partition("=")[2] for value in config.teacher if not value.partition("=")[2].startswith("self:")
            ]
            before, after = chosen.accuracy(config.student), chosen.accuracy(out / "student")
            teacher = chosen.accuracy(teachers[0]) if teachers else float("nan")
            last = curves(out).iloc[-min(10, config.steps) :].mean(numeric_only=True)
            row = {"arm": arm.name, "seed": seed, "before": before, "after": after, "teacher": teacher}
            row["gap_recovery"] = gap_recovery(before, after, teacher)
            rows.append(row | {name: last.get(name, np.nan) for name in CURVES})
            print(f"{arm.name} seed {seed}: {before:.3f} -> {after:.3f} (teacher {teacher:.3f})", flush=True)
    return pd.DataFrame(rows)


def curves(out: Path) -> pd.DataFrame:
    """The logged metrics of a run, a row a step."""
    return pd.DataFrame([json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()])


def table(runs: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds of every column, and the standard error of the accuracy after training."""
    grouped = runs.drop(columns="seed").groupby("arm", sort=False)
    found = grouped.mean(numeric_only=True)
    found.insert(2, "after_error", grouped["after"].sem())
    return found.reset_index()


def write(name: str, chosen: Setting, arms: Sequence[Arm], runs: pd.DataFrame) -> None:
    """Prints the table; writes runs and settings as JSON and the curves as a figure, smoke results beside the run."""
    folder = chosen.folder if chosen.smoke else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    found = table(runs)
    print(found.to_string(index=False, float_format="{:.3f}".format))
    settings = {"config": dataclasses.asdict(chosen.config), "evaluation": dataclasses.asdict(chosen.evaluation)}
    (folder / f"{name}.json").write_text(json.dumps(settings | {"runs": runs.to_dict("records")}, indent=1) + "\n")
    figure, axes = plt.subplots(1, len(CURVES) + 1, figsize=(4 * (len(CURVES) + 1), 3), layout="constrained")
    for arm in arms:
        lines = [curves(chosen.folder / arm.name / str(seed)) for seed in range(chosen.seeds)]
        for axis, metric in zip(axes, ("rollout/accuracy", *CURVES)):
            present = [line[metric].to_numpy(float) for line in lines if metric in line]
            if present:
                axis.plot(np.nanmean(present, 0), label=arm.name)
            axis.set(title=metric, xlabel="step")
    axes[0].legend(fontsize="small")
    figure.savefig(folder / f"{name}.png", dpi=100)
    plt.close(figure)
