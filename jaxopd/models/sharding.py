"""The device mesh: one axis, "data", over which rollout slots and batches are spread."""

import jax
from jax.sharding import AxisType


def data_mesh() -> jax.sharding.Mesh:
    """Makes a one-axis mesh, "data", over all local devices."""
    return jax.make_mesh(
        (jax.local_device_count(),), ("data",), axis_types=(AxisType.Auto,), devices=jax.local_devices()
    )
