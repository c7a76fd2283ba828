"""Where rollouts run: groups of slots on a mesh of devices, and how the slots of a group attend to its trunk."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxopd_kernels import Part, trunk_attention
from jaxopd_kernels.trunk_attention import chosen_implementation
from jaxtyping import Array, Float, Int

from jaxopd.models.config import QwenConfig


@dataclass(frozen=True)
class Layout:
    """N groups of B slots on a mesh; a group serves one trunk. Groups are spread over "data"; of one, its slots.

    attention: a name of jaxopd_kernels.TRUNK_IMPLEMENTATIONS; None: a kernel where its rule expects one to win.
    heads: the axis of the mesh that heads are split over, in attention and in what is cached; None: on each device all.
    """

    groups: int
    slots: int
    mesh: jax.sharding.Mesh
    attention: str | None = None
    heads: str | None = None

    @property
    def groups_axis(self) -> P:
        return P("data") if self.groups > 1 else P()

    @property
    def slots_axes(self) -> P:
        return P("data") if self.groups > 1 else P(None, "data")

    @property
    def queries_axes(self) -> P:
        return P("data", None, self.heads) if self.groups > 1 else P(None, "data", self.heads)

    @property
    def trunks_axes(self) -> P:
        return P("data" if self.groups > 1 else None, self.heads)

    def sharding(self, axes: P) -> NamedSharding:
        return NamedSharding(self.mesh, axes)

    def implementation(self, dtype: jnp.dtype, length: int, head_dim: int) -> str:
        """Names what attends the slots to trunks of `length` tokens on this mesh's kind of device."""
        if self.attention is not None:
            return self.attention
        here = self.slots if self.groups > 1 else self.slots // self.mesh.shape["data"]
        kind = self.mesh.devices.flat[0].device_kind
        return chosen_implementation(kind, dtype, slots=here, trunk=length, head_dim=head_dim)

    def attend_trunks(
        self, q: Float[Array, "N B H h"], k: Float[Array, "N K L h"], v: Float[Array, "N K L h"], end: Int[Array, "N B"]
    ) -> Part:
        """Attends each slot to the first `end` tokens of its group's trunk, on the device where the slot is."""
        attend = partial(trunk_attention, implementation=self.implementation(k.dtype, *k.shape[2:]))
        if self.mesh.size > 1:  # XLA cannot partition a kernel
            queries, trunks = self.queries_axes, self.trunks_axes
            specs = {"in_specs": (queries, trunks, trunks, self.slots_axes), "out_specs": (queries, queries)}
            attend = jax.shard_map(attend, mesh=self.mesh, check_vma=False, **specs)
        return attend(q, k, v, end)


def split_heads(config: QwenConfig, mesh: jax.sharding.Mesh) -> str | None:
    """Names the axis to split heads over: "model", where it divides those of keys and values."""
    split = mesh.shape["model"] > 1 and config.num_kv_heads % mesh.shape["model"] == 0
    return "model" if split else None
