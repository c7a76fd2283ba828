"""jaxopd toy train and jaxopd toy check."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from jaxopd import toy


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
