"""The device mesh: one axis, "data", over which rollout slots and batches are spread."""

import jax
from jax.sharding import AxisType


def data_mesh(devices: int | None = None) -> jax.sharding.Mesh:
    """Makes a one-axis mesh, "data", over the first `devices` devices; None: over all, of every process."""
    chosen = jax.devices()[:devices]
    return jax.make_mesh((len(chosen),), ("data",), axis_types=(AxisType.Auto,), devices=chosen)
