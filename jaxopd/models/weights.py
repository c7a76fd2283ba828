"""Hugging Face folders <-> Qwen modules, and orbax checkpoints."""

import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from jaxopd.errors import InputError
from jaxopd.models.config import QwenConfig, read_json, shown
from jaxopd.models.qwen import Qwen

DTYPES = ("float32", "bfloat16")
STORED = ("F32", "BF16", "F16")
INDEX = "model.safetensors.index.json"


def load_model(path: str | Path, *, dtype: str = "float32") -> Qwen:
    """Loads a Hugging Face folder (or, with a network, a hub id) of a dense Qwen3 or Qwen2 model.

    Single or sharded safetensors, tied or untied; a redundant stored head of a tied model is not read. Tensors
    go to the device one at a time, the largest first, so that host memory holds the file about once. bfloat16
    keeps the file's bits; float32 widens them. Raises InputError naming the file or tensor at fault.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype: found {dtype!r}, expected one of {', '.join(DTYPES)}")
    graph, state, wanted, files = _plan(path, dtype)
    loaded = {}
    for name in sorted(wanted, key=lambda n: -np.prod(wanted[n].shape)):
        # Reopened per tensor: the pages of a mapped file count as memory until it is closed.
        with safe_open(files[name], "numpy") as file:
            loaded[name] = jax.block_until_ready(jnp.array(file.get_tensor(name), dtype=dtype))
    flat = [(p, v.replace(loaded.pop(hf_name(p)))) for p, v in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def check_model(path: str | Path) -> QwenConfig:
    """Reads a checkpoint's config and headers, no tensor; raises InputError where `load_model` would."""
    return nnx.merge(*_plan(path, "float32")[:2]).config


def save_model(model: Qwen, path: str | Path, *, tokenizer: Any = None) -> None:
    """Saves `model` as a Hugging Face folder (config.json, model.safetensors), with the tokenizer when given."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {hf_name(p): v[...] for p, v in nnx.to_flat_state(nnx.split(model)[1])}
    partial = folder / "model.safetensors.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config.to_json(str(model.dtype)), indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def save_checkpoint(model: Qwen, path: str | Path) -> None:
    """Saves `model` through orbax, with its config.json beside the arrays."""
    path = Path(path).absolute()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "state", nnx.to_pure_dict(nnx.split(model)[1]), force=True)
    (path / "config.json").write_text(json.dumps(model.config.to_json(str(model.dtype)), indent=2) + "\n")


def load_checkpoint(path: str | Path) -> Qwen:
    """Loads a model that `save_checkpoint` wrote. Raises InputError when the folder holds none."""
    path = Path(path).absolute()
    config = QwenConfig.from_json(path / "config.json")
    dtype = read_json(path / "config.json").get("dtype", "float32")
    if dtype not in DTYPES:
        raise InputError(f"{path / 'config.json'}: field dtype: found {shown(dtype)}, expected {' or '.join(DTYPES)}")
    graph, state = nnx.split(nnx.eval_shape(lambda: Qwen(config, jnp.dtype(dtype), nnx.Rngs(0))))
    if not (path / "state").exists():
        raise InputError(f"{path / 'state'}: found no such folder, expected an orbax checkpoint there")
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(path / "state", nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, restored)
    return nnx.merge(graph, state)


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
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: found no such folder and the hub gave none ({reason})") from None


def _plan(path: str | Path, dtype: str) -> tuple[nnx.GraphDef, nnx.State, dict[str, Any], dict[str, Path]]:
    """Gives the module without arrays, the shape of each tensor and the file that holds it."""
    folder = resolve(path)
    config = QwenConfig.from_json(folder / "config.json")
    files = _locate(folder)
    last = f"model.layers.{config.num_layers - 1}.self_attn.q_proj.weight"
    if last not in files:  # known before a module of as many layers as a config may claim is traced
        raise InputError(f"{folder}: found no tensor {last}, expected it for this config.json")
    graph, state = nnx.split(nnx.eval_shape(lambda: Qwen(config, jnp.dtype(dtype), nnx.Rngs(0))))
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
