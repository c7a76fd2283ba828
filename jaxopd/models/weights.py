"""Hugging Face folders <-> Qwen modules, on one device or spread over a mesh."""

import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from jaxopd.errors import InputError, first_line
from jaxopd.models.checkpoints import DTYPES, abstract_checkpoint, is_checkpoint, load_checkpoint, write_config
from jaxopd.models.config import QwenConfig, read_json, shown
from jaxopd.models.qwen import Qwen
from jaxopd.models.sharding import abstract_model

STORED = ("F32", "BF16", "F16")
INDEX = "model.safetensors.index.json"


def load_model(path: str | Path, *, dtype: str = "float32", mesh: Mesh | None = None, fsdp: bool = False) -> Qwen:
    """Loads a dense Qwen3 or Qwen2 model: a Hugging Face folder, a hub id, or what `save_checkpoint` wrote.

    mesh: where the model lies, see `parameter_shardings`; each process reads only the bytes that its devices hold. A
    mesh whose axis "model" is 1, without fsdp, gets a copy on every device; None, the default device one.
    Single or sharded safetensors, tied or untied; a redundant stored head of a tied model is not read. Shards of
    tensors go to the devices one at a time, the largest tensors first, so that host memory holds little beside them.
    bfloat16 keeps the file's bits; float32 widens them. Raises InputError naming the file or tensor at fault.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype: found {dtype!r}, expected one of {', '.join(DTYPES)}")
    folder = resolve(path)
    if is_checkpoint(folder):
        return load_checkpoint(folder, dtype=dtype, mesh=mesh, fsdp=fsdp)
    graph, state, wanted, files = _plan(folder, dtype, mesh, fsdp)
    loaded = {}
    for name in sorted(wanted, key=lambda n: -np.prod(wanted[n].shape)):
        # Reopened per tensor: the pages of a mapped file count as memory until it is closed.
        with safe_open(files[name], "numpy") as file:
            loaded[name] = _read(file.get_slice(name), wanted[name])
    flat = [(p, v.replace(loaded.pop(hf_name(p)))) for p, v in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def _read(stored: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Reads a tensor onto one device; or the shards of it that devices of this process hold, each of them once."""
    if like.sharding is None:
        return jax.block_until_ready(jnp.array(stored[:], dtype=like.dtype))
    holders = defaultdict(list)
    for device, index in like.sharding.addressable_devices_indices_map(like.shape).items():
        holders[tuple((part.start, part.stop) for part in index or ())].append(device)
    pieces = []
    for bounds, devices in holders.items():
        shard = stored[tuple(slice(*bound) for bound in bounds)].astype(like.dtype, copy=False)
        pieces += jax.block_until_ready([jax.device_put(shard, device) for device in devices])
    return jax.make_array_from_single_device_arrays(like.shape, like.sharding, pieces, dtype=like.dtype)


def check_model(path: str | Path) -> QwenConfig:
    """Reads a model's config and headers, no tensor; raises InputError where `load_model` would."""
    folder = resolve(path)
    abstract = abstract_checkpoint(folder) if is_checkpoint(folder) else _plan(folder, "float32")[:2]
    return nnx.merge(*abstract).config


def save_model(model: Qwen, path: str | Path, *, tokenizer: Any = None) -> None:
    """Saves `model` as a Hugging Face folder (config.json, model.safetensors), with the tokenizer when given."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {hf_name(p): v[...] for p, v in nnx.to_flat_state(nnx.split(model)[1])}
    partial = folder / "model.safetensors.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, folder / "model.safetensors")
    write_config(model, folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def hf_name(path: tuple) -> str:
    """Gives Hugging Face's name of the parameter at an NNX path."""
    dotted = ".".join(str(part) for part in path)
    return dotted if dotted.startswith("lm_head") else f"model.{dotted}"


def resolve(path: str | Path) -> Path:
    """Gives the local folder of `path`; downloads a hub id (safetensors, JSON and tokenizer files only)."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists() or str(path).count("/") != 1 or str(path).startswith(("/", ".")):
        raise InputError(f"{path}: found no such folder, expected a Hugging Face model folder or a hub id")
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(str(path), allow_patterns=patterns))
    except Exception as error:  # the hub's client raises many kinds; all mean the same to the user
        raise InputError(f"{path}: found no such folder and the hub gave none ({first_line(error)})") from None


def _plan(
    folder: Path, dtype: str, mesh: Mesh | None = None, fsdp: bool = False
) -> tuple[nnx.GraphDef, nnx.State, dict[str, Any], dict[str, Path]]:
    """Gives the module without arrays, the shape and place of each tensor and the file that holds it."""
    config = QwenConfig.from_json(folder / "config.json")
    files = _locate(folder)
    last = f"model.layers.{config.num_layers - 1}.self_attn.q_proj.weight"
    if last not in files:  # known before a module of as many layers as a config may claim is traced
        raise InputError(f"{folder}: found no tensor {last}, expected it for this config.json")
    graph, state = abstract_model(config, dtype, mesh, fsdp=fsdp)
    wanted = {hf_name(p): v for p, v in nnx.to_flat_state(state)}
    _check_tensors(folder, files, wanted)
    return graph, state, wanted, files


def _locate(folder: Path) -> dict[str, Path]:
    """Maps each stored tensor to its file."""
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise InputError(f"{folder / INDEX}: field weight_map: found {shown(weight_map)}, expected an object")
        wrong = [shard for shard in weight_map.values() if not isinstance(shard, str)]
        if wrong:
            raise InputError(f"{folder / INDEX}: field weight_map: found {shown(wrong[0])}, expected file names")
        # A shard is a file of this folder, never a path that leads elsewhere.
        files = {name: folder / Path(shard).name for name, shard in weight_map.items()}
    else:
        file = folder / "model.safetensors"
        with _open(file) as opened:
            files = dict.fromkeys(opened.keys(), file)
    return files


def _check_tensors(folder: Path, files: dict[str, Path], wanted: dict[str, Any]) -> None:
    missing = sorted(set(wanted) - set(files))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{folder}: found no tensor {missing[0]}{more}, expected it for this config.json")
    for file in sorted({files[name] for name in wanted}):
        with _open(file) as opened:
            stored = set(opened.keys())
            for name in (n for n in wanted if files[n] == file):
                if name not in stored:
                    raise InputError(f"{file}: found no tensor {name}, expected it there by {INDEX}")
                stored_as = opened.get_slice(name)
                shape, kind = tuple(stored_as.get_shape()), stored_as.get_dtype()
                if kind not in STORED:
                    raise InputError(f"{file}: tensor {name}: found {kind}, expected one of {', '.join(STORED)}")
                if shape != wanted[name].shape:
                    raise InputError(f"{file}: tensor {name}: found shape {shape}, expected {wanted[name].shape}")


def _open(file: Path) -> Any:
    try:
        if file.is_file():  # a pipe would be waited for
            return safe_open(file, "numpy")
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{file}: found no valid safetensors file ({error}), expected a complete one") from None
    raise InputError(f"{file}: found no such file, expected safetensors weights there")
