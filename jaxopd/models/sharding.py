"""Where models lie: one mesh, axis "data" for rows and slots, axis "model" for what a model is split into.

Along "model" the vocabulary, the heads and the FFN are split (tensor parallelism: sums over heads, FFN and vocabulary
cross devices); along "data", where `fsdp` is asked for, the other axis of each matrix, which is gathered when it is
used, and the vocabulary once more.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxopd.errors import InputError
from jaxopd.models.config import QwenConfig
from jaxopd.models.qwen import Qwen

TABLES = ("embed_tokens", "lm_head")  # a row a vocabulary entry
SPLIT_OUTPUTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", *TABLES)
SPLIT_INPUTS = ("o_proj", "down_proj")


def device_mesh(devices: int | Sequence[Any] | None = None, *, model: int = 1) -> Mesh:
    """Makes the mesh ("data", "model") of these devices, or the first so many, or all devices of every process.

    model: how many neighbouring devices share one copy of a model. Raises InputError where it does not divide them.
    """
    chosen = np.array(jax.devices()[:devices] if devices is None or isinstance(devices, int) else devices)
    if model < 1 or chosen.size % model:
        raise InputError(f"--model-parallel: found {model}, expected a divisor of the number of devices, {chosen.size}")
    return Mesh(chosen.reshape(-1, model), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


def abstract_model(
    config: QwenConfig, dtype: str, mesh: Mesh | AbstractMesh | None = None, *, fsdp: bool = False
) -> tuple[nnx.GraphDef, nnx.State]:
    """Gives a model as its graph and the shape, dtype and, on a mesh, sharding of each parameter; no arrays."""
    graph, state = _shapes(config, dtype)
    if mesh is None:
        return graph, jax.tree.map(lambda x: x, state)
    shardings = parameter_shardings(state, config, mesh, fsdp=fsdp)
    return graph, jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)


@cache
def _shapes(config: QwenConfig, dtype: str) -> tuple[nnx.GraphDef, nnx.State]:
    """Traces the making of a model: seconds where it has many layers."""
    return nnx.split(nnx.eval_shape(lambda: Qwen(config, jnp.dtype(dtype), nnx.Rngs(0))))


def parameter_shardings(
    state: nnx.State, config: QwenConfig, mesh: Mesh | AbstractMesh, *, fsdp: bool = False
) -> nnx.State:
    """Gives each parameter of a (possibly abstract) model its sharding; with one device a model, a copy on each.

    Matrices are [out, in]. An axis of the mesh that does not divide what it would split (whole heads, vocabulary, FFN
    or width) is left out, and the parameter is repeated along it.
    """
    flat = [
        (path, leaf.replace(NamedSharding(mesh, _partition(path, leaf.shape, config, mesh, fsdp))))
        for path, leaf in nnx.to_flat_state(state)
    ]
    return nnx.from_flat_state(flat)


def _partition(path: tuple, shape: tuple[int, ...], config: QwenConfig, mesh: Mesh | AbstractMesh, fsdp: bool) -> P:
    """Splits the out axis of some matrices over "model", the in axis of the others, and the other axis over "data"."""
    name = next((str(part) for part in path if part in SPLIT_OUTPUTS + SPLIT_INPUTS), None)
    if name is None:
        return P()
    heads = {"q_proj": config.num_heads, "o_proj": config.num_heads}
    heads |= dict.fromkeys(("k_proj", "v_proj"), config.num_kv_heads)
    split = len(shape) - 1 if name in SPLIT_INPUTS else 0

    def divides(axes: tuple[str, ...], count: int) -> bool:
        devices = math.prod(mesh.shape[axis] for axis in axes)
        return devices > 1 and count % devices == 0

    # A table split by width would have XLA split the activations so, and sum products where it should gather weights.
    if fsdp and name in TABLES and divides(("model", "data"), shape[0]):
        return P(("model", "data"))
    spec: list[str | None] = [None] * len(shape)
    if divides(("model",), heads.get(name, shape[split])):
        spec[split] = "model"
    if fsdp and name not in TABLES and len(shape) == 2 and divides(("data",), shape[1 - split]):
        spec[1 - split] = "data"
    return P(*spec)


def mesh_of(tree: nnx.Module | nnx.State | jax.Array) -> Mesh | None:
    """Gives the mesh that arrays lie on, None on a single device that no mesh named."""
    sharding = jax.tree.leaves(tree)[0].sharding
    return sharding.mesh if isinstance(sharding, NamedSharding) else None


def split_mesh(tree: nnx.Module | nnx.State) -> Mesh | None:
    """Gives the mesh over whose axis "model" a model is split, None where each device that has it has the whole."""
    mesh = mesh_of(tree)
    split = any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(tree))
    return mesh if mesh is not None and mesh.shape.get("model", 1) > 1 and split else None


def held_bytes(tree: nnx.Module | nnx.State) -> int:
    """Counts the bytes that arrays take on all devices together, copies included."""
    leaves = [(leaf.sharding, leaf) for leaf in jax.tree.leaves(tree)]
    return sum(at.num_devices * math.prod(at.shard_shape(x.shape)) * x.dtype.itemsize for at, x in leaves)


def gathered_bytes(tree: nnx.Module | nnx.State) -> int:
    """Counts the bytes that matrices split over "data" take on all devices together once they are gathered along it.

    Tables are not among them: rows are looked up where they lie, and hidden states go to where the head is.
    """
    split = [x for x in jax.tree.leaves(tree) if "data" in x.sharding.spec]
    return held_bytes(split) * split[0].sharding.mesh.shape["data"] if split else 0


def part_of(count: int, devices: int) -> int:
    """Gives how many of `count` heads or columns each device has: an equal part, all where they do not divide."""
    return count if count % devices else count // devices
