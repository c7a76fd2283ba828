"""jaxopd plan."""

import dataclasses
from pathlib import Path
from typing import Annotated

import pandas as pd
import tyro
from rich.console import Console

from jaxopd.errors import InputError
from jaxopd.models import QwenConfig
from jaxopd.plan import DiagnosisWork, Stage, TrainingWork, find_hardware, plan_diagnosis, plan_training_run
from jaxopd.plan.diagnosis import Plan
from jaxopd.verbs.console import as_table

Work = (
    Annotated[DiagnosisWork, tyro.conf.subcommand("diagnosis")]
    | Annotated[TrainingWork, tyro.conf.subcommand("training")]
)

MORE = "spread over more memory, or take smaller models"
FEWER_SLOTS = "--slots with fewer of them"
ADVICE = {  # what lowers a part of a plan
    "activations": "--remat, then a smaller --micro-batch",
    "head": "a smaller --micro-batch",
    "suffix": FEWER_SLOTS,
    "trunks": FEWER_SLOTS,
    "workspace": FEWER_SLOTS,
    "states": "a smaller --batch",
    "teacher": "--model-parallel",
    "teachers": "--model-parallel",
}


@dataclasses.dataclass(frozen=True)
class MakePlan:
    """Computes from config.json files alone what a run would hold and take; loads no weights and needs no device."""

    student: tyro.conf.Positional[str]
    """config.json of the student."""
    work: tyro.conf.OmitSubcommandPrefixes[tyro.conf.OmitArgPrefixes[Work]] = dataclasses.field(
        default_factory=DiagnosisWork
    )
    """What is planned; its own flags come last: `jaxopd plan config.json --devices 8 training --steps 100`."""
    teacher: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=config.json of a teacher that is a model of its own; may be repeated."""
    large: str | None = None
    """config.json of the larger model that writes demonstrations."""
    hardware: str = "h200"
    """h200, h100, a100, v5e, v5p, v6e, or here: this machine, measured first."""
    devices: int = 1
    """Devices of this kind."""
    reached: float | None = None
    """Share of the device's published rates that programs reach; 0.5 by default, an assumption."""

    def run(self, console: Console) -> None:
        if self.devices < 1:
            raise InputError(f"--devices: found {self.devices}, expected at least 1")
        for field in dataclasses.fields(self.work):
            value = getattr(self.work, field.name)
            if type(value) is int and value < (field.name in ("slots", "max_tokens", "micro_batch", "batch")):
                raise InputError(f"{field.name}: found {value}, expected a number that a run can have")
        mean, most = self.work.response_tokens, self.work.max_tokens
        if mean > most:
            raise InputError(f"response_tokens: found {mean}, expected at most max_tokens, {most}")
        if self.reached is not None and not 0 < self.reached <= 1:
            raise InputError(f"--reached: found {self.reached}, expected a share above 0 up to 1")
        student = _config(self.student)
        named = [_named(argument) for argument in self.teacher]
        teachers = dict(named)
        if len(teachers) < len(named):
            name = max((name for name, _ in named), key=[name for name, _ in named].count)
            raise InputError(f"--teacher {name}: found the name twice, expected different names")
        hardware = find_hardware(self.hardware, student, self.work.dtype, self.work.slots)
        if self.reached is not None:
            hardware = dataclasses.replace(hardware, reached=self.reached)
        if isinstance(self.work, TrainingWork):
            plan = plan_training_run(student, teachers, self.work, hardware, self.devices)
        else:
            large = _config(self.large) if self.large else None
            plan = plan_diagnosis(student, teachers, large, self.work, hardware, self.devices)
        console.print(memory_table(plan))
        console.print(as_table("Time", time_table(plan.stages)))
        if not isinstance(self.work, TrainingWork):
            console.print("rewards: a teacher reads all initial rollouts, for the forms that average them")
        console.print(summary(plan, self.devices), markup=False)
        if hardware.kind.startswith("NVIDIA"):
            told = "by default; with XLA_PYTHON_CLIENT_MEM_FRACTION=1 a run has what is planned with here"
            console.print(f"JAX takes 75 % of a GPU's memory {told}", markup=False)


def _named(argument: str) -> tuple[str, QwenConfig]:
    name, equals, path = argument.partition("=")
    if not (name and equals and path):
        raise InputError(f"--teacher: found {argument!r}, expected NAME=path/to/config.json")
    if path.startswith("self:"):
        raise InputError(f"--teacher {argument}: found a teacher with a context, expected its number, --self-teachers")
    return name, _config(path)


def _config(path: str) -> QwenConfig:
    """Reads a config.json, or the one of a model's folder."""
    return QwenConfig.from_json(Path(path) / "config.json" if Path(path).is_dir() else path)


def memory_table(plan: Plan):
    """Renders gigabytes per device, a row a phase and part."""
    rows = [
        {"phase": phase, "part": part, "GB a device": f"{size / 1e9:.3f}"}
        for phase, parts in plan.memory.items()
        for part, size in [*parts.items(), ("together", sum(parts.values()))]
    ]
    return as_table("Memory", pd.DataFrame(rows))


def time_table(stages: list[Stage]) -> pd.DataFrame:
    """Gives tokens, tokens a second and hours of each stage, and what binds it."""
    rows = [
        {
            "stage": stage.name,
            "tokens": f"{stage.tokens:,.0f}",
            "tokens/s": f"{stage.rate:,.0f}",
            "hours": f"{stage.seconds / 3600:.3f}",
            "bound by": stage.limit,
        }
        for stage in stages
    ]
    return pd.DataFrame(rows)


def summary(plan: Plan, devices: int) -> str:
    """Says in a few sentences whether it fits, how long it takes and what binds."""
    phase, held = plan.largest
    part = max(plan.memory[phase], key=lambda name: plan.memory[phase][name])
    fits = "fits" if held <= plan.budget else f"does not fit, most of it {part}: {ADVICE.get(part, MORE)}"
    binding = max(plan.stages, key=lambda stage: stage.seconds)
    hours = plan.seconds / 3600
    return (
        f"memory: {held / 1e9:.2f} of {plan.budget / 1e9:.2f} GB a device, most in {phase}; {fits}\n"
        f"time: {hours:.2f} hours, {hours * devices / 24:.3f} device-days; "
        f"{binding.seconds / plan.seconds:.0%} of it in {binding.name}, bound by {binding.limit}"
    )
