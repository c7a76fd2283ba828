"""Orbax checkpoints of models: saved from one mesh and restored on another, each process its own part of the bytes."""

import asyncio
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

from jaxopd.distributed import is_first
from jaxopd.errors import InputError, first_line
from jaxopd.models.config import QwenConfig, read_json, shown
from jaxopd.models.qwen import Qwen
from jaxopd.models.sharding import abstract_model

DTYPES = ("float32", "bfloat16")
ARRAYS = "state"  # folder of the arrays, beside config.json
CHUNK_BYTES = 16 << 20  # a file's chunk is read whole, and a shard of another mesh needs parts of it
LONGEST_REASON = 200
READ_AT_ONCE_GB = 8  # by a process, beside its devices' memory; more than any one parameter


def save_checkpoint(model: Qwen, path: str | Path) -> None:
    """Saves `model` through orbax, with its config.json beside the arrays; every process of a mesh calls this.

    Killed at any moment it leaves a whole checkpoint or, by `is_checkpoint`, none: orbax's commit is the last act.
    """
    path = Path(path).absolute()
    if is_first():
        _begin(path, model)
    arrays = nnx.to_pure_dict(nnx.split(model)[1])
    chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), arrays)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / ARRAYS, arrays, save_args=chunks, force=True)


def _begin(path: Path, model: Qwen) -> None:
    """Clears an older checkpoint away and writes config.json; the other processes wait for it inside orbax's save."""
    (path / "config.json").unlink(missing_ok=True)
    if (path / ARRAYS).exists():
        shutil.rmtree(path / ARRAYS)
    path.mkdir(parents=True, exist_ok=True)
    write_config(model, path)


def write_config(model: Qwen, folder: Path) -> None:
    """Writes a model's config.json, whole or not at all."""
    partial = folder / "config.json.partial"
    partial.write_text(json.dumps(model.config.to_json(str(model.dtype)), indent=2) + "\n")
    os.replace(partial, folder / "config.json")


def load_checkpoint(
    path: str | Path, *, dtype: str | None = None, mesh: Mesh | None = None, fsdp: bool = False
) -> Qwen:
    """Loads a model that `save_checkpoint` wrote, whatever mesh it lay on, as `load_model` would place it.

    dtype: by default that of the checkpoint. Raises InputError where the folder holds no such model.
    """
    path = Path(path).absolute()
    graph, state = abstract_checkpoint(path, dtype=dtype, mesh=mesh, fsdp=fsdp)
    if mesh is None:
        here = SingleDeviceSharding(jax.local_devices()[0])
        state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), state)
    with readable(path / ARRAYS), ocp.StandardCheckpointer(restore_concurrent_gb=READ_AT_ONCE_GB) as checkpointer:
        restored = checkpointer.restore(path / ARRAYS, nnx.to_pure_dict(state))
    if mesh is None:
        restored = _uncommitted(restored)
    nnx.replace_by_pure_dict(state, restored)
    return nnx.merge(graph, state)


def is_checkpoint(path: Path) -> bool:
    """Says whether a folder is one that `save_checkpoint` wrote, to its end."""
    return (path / "config.json").is_file() and (path / ARRAYS).is_dir()  # orbax commits the arrays by their name


def _uncommitted(arrays: Any) -> Any:
    """Frees arrays of their device, to be used beside those of any mesh, as what `load_model` reads; one at a time."""
    leaves, structure = jax.tree.flatten(arrays)
    del arrays
    leaves.reverse()
    return jax.tree.unflatten(structure, [jnp.array(np.asarray(leaves.pop())) for _ in range(len(leaves))])


def abstract_checkpoint(
    path: Path, *, dtype: str | None = None, mesh: Mesh | None = None, fsdp: bool = False
) -> tuple[nnx.GraphDef, nnx.State]:
    """Gives a checkpoint's `abstract_model`; raises InputError where config.json and the arrays do not fit."""
    config = QwenConfig.from_json(path / "config.json")
    stored = read_json(path / "config.json").get("dtype", "float32")
    if stored not in DTYPES:
        raise InputError(f"{path / 'config.json'}: field dtype: found {shown(stored)}, expected {' or '.join(DTYPES)}")
    if not is_checkpoint(path):
        raise InputError(f"{path / ARRAYS}: found no such folder, expected an orbax checkpoint there")
    graph, state = abstract_model(config, dtype or stored, mesh, fsdp=fsdp)
    wanted = {".".join(map(str, name)): x.shape for name, x in nnx.to_flat_state(state)}
    with readable(path / ARRAYS), ocp.StandardCheckpointer() as checkpointer:
        arrays = checkpointer.metadata((path / ARRAYS).absolute()).item_metadata
        if arrays is None:
            raise ValueError("its arrays are not described")
        found = {x.name: x.shape for x in jax.tree.leaves(arrays.tree)}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            shapes = (shapes.get(name, "none") for shapes in (found, wanted))
            raise InputError("{}: tensor {}: found {}, expected {}".format(path / ARRAYS, name, *shapes))
    return graph, state


class _TidyLoop(asyncio.SelectorEventLoop):
    """An event loop that ends its tasks as it closes, and to which files read after that are no error."""

    def close(self) -> None:
        left = asyncio.all_tasks(self)
        for task in left:
            task.cancel()
        if left:
            self.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        super().close()

    def call_soon_threadsafe(self, *args: Any, **context: Any) -> Any:
        with suppress(RuntimeError):  # the loop is closed
            return super().call_soon_threadsafe(*args, **context)


@contextmanager
def readable(folder: Path, otherwise: str = "") -> Iterator[None]:
    """Turns what orbax says of unreadable files, in exceptions of many kinds, into one sentence, and says what to do.

    After a read that fails, orbax closes its loop over all others; they would go on, and complain at any later time.
    """
    try:
        with mock.patch.object(asyncio, "new_event_loop", _TidyLoop):
            yield
    except (InputError, jax.errors.JaxRuntimeError, MemoryError):  # memory: of the devices, of the host
        raise
    except Exception as error:
        reason = first_line(error).partition(" See full ")[0].partition(" [")[0]  # TensorStore describes itself there
        found = f"no readable checkpoint ({reason[:LONGEST_REASON]})"
        raise InputError(f"{folder}: found {found}, expected a whole one{otherwise}") from None
