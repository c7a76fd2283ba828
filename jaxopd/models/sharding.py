"""Where models lie: one mesh, axis "data" for rows and slots, axis "model" for what a model is split into.

Along "model" the vocabulary, the heads and the FFN are split (tensor parallelism: sums over heads, FFN and vocabulary
cross devices); along "data", where `fsdp` is asked for, what is left of each matrix, which is gathered when it is used.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxopd.errors import InputError
from jaxopd.models.config import QwenConfig

SPLIT_OUTPUTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
SPLIT_INPUTS = ("o_proj", "down_proj")


def device_mesh(devices: int | Sequence[Any] | None = None, *, model: int = 1) -> Mesh:
    """Makes the mesh ("data", "model") of these devices, or the first so many, or all devices of every process.

    model: how many neighbouring devices share one copy of a model. Raises InputError where it does not divide them.
    """
    chosen = np.array(jax.devices()[:devices] if devices is None or isinstance(devices, int) else devices)
    if model < 1 or chosen.size % model:
        raise InputError(f"--model-parallel: found {model}, expected a divisor of the number of devices, {chosen.size}")
    return Mesh(chosen.reshape(-1, model), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


def parameter_shardings(state: nnx.State, config: QwenConfig, mesh: Mesh, *, fsdp: bool = False) -> nnx.State:
    """Gives each parameter of a (possibly abstract) model its sharding; with one device a model, a copy on each.

    Matrices are [out, in]. An axis of the mesh that does not divide what it would split (whole heads, vocabulary, FFN
    or width) is left out, and the parameter is repeated along it.
    """
    flat = [
        (path, leaf.replace(NamedSharding(mesh, _partition(path, leaf.shape, config, mesh, fsdp))))
        for path, leaf in nnx.to_flat_state(state)
    ]
    return nnx.from_flat_state(flat)


def _partition(path: tuple, shape: tuple[int, ...], config: QwenConfig, mesh: Mesh, fsdp: bool) -> P:
    """Splits the out axis of some matrices over "model", the in axis of the others, and the other axis over "data"."""
    name = next((str(part) for part in path if part in SPLIT_OUTPUTS + SPLIT_INPUTS), None)
    if name is None:
        return P()
    heads = {"q_proj": config.num_heads, "o_proj": config.num_heads}
    heads |= dict.fromkeys(("k_proj", "v_proj"), config.num_kv_heads)
    split = len(shape) - 1 if name in SPLIT_INPUTS else 0
    spec: list[str | None] = [None] * len(shape)
    if heads.get(name, shape[split]) % mesh.shape["model"] == 0 and mesh.shape["model"] > 1:
        spec[split] = "model"
    if fsdp and len(shape) == 2 and shape[1 - split] % mesh.shape["data"] == 0 and mesh.shape["data"] > 1:
        spec[1 - split] = "data"
    return P(*spec)


def mesh_of(tree: nnx.Module | nnx.State | jax.Array) -> Mesh | None:
    """Gives the mesh that arrays lie on, None on a single device that no mesh named."""
    sharding = jax.tree.leaves(tree)[0].sharding
    return sharding.mesh if isinstance(sharding, NamedSharding) else None
