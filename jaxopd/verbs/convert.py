"""jaxopd convert."""

import dataclasses
import os
import shutil
from pathlib import Path

import tyro
from rich.console import Console

from jaxopd.distributed import Hosts, decided
from jaxopd.errors import InputError
from jaxopd.models import load_model, save_checkpoint
from jaxopd.models.sharding import device_mesh
from jaxopd.models.weights import INDEX, resolve
from jaxopd.verbs.console import made_folder

BESIDE = ("*.json", "*.txt", "*.jinja")  # tokenizer and generation settings
REPLACED = ("config.json", INDEX)


@dataclasses.dataclass(frozen=True)
class Convert:
    """Turns a Hugging Face model into an orbax checkpoint, from which any number of hosts reads each its own part."""

    model: str
    """Hugging Face folder or hub id."""
    out: str
    """New folder; it serves wherever a model's folder is asked for."""
    dtype: str = "bfloat16"
    """Of the parameters as they are kept: float32 or bfloat16."""
    hosts: tyro.conf.OmitArgPrefixes[Hosts] = dataclasses.field(default_factory=Hosts)

    def run(self, console: Console) -> None:
        source, out = resolve(self.model), Path(self.out).absolute()
        partial = out.with_name(f"{out.name}.converting")
        decided(lambda: _check_new(out))
        model = load_model(source, dtype=self.dtype, mesh=device_mesh(), fsdp=True)
        decided(lambda: _begin(source, partial))
        save_checkpoint(model, partial)
        decided(lambda: os.replace(partial, out))
        console.print(f"checkpoint: {out}")


def _check_new(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: found something there, expected a new folder")
    made_folder(out.parent)


def _begin(source: Path, partial: Path) -> None:
    """Makes the folder that becomes the checkpoint's when it is whole, anew where an earlier conversion was killed."""
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    for file in {file for pattern in BESIDE for file in source.glob(pattern)}:
        if file.name not in REPLACED:
            shutil.copyfile(file, partial / file.name)
