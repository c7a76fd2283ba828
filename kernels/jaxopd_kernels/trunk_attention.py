"""Decode attention of many slots to one shared trunk: the op, its XLA reference, its table of implementations."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxopd_kernels import choice, trunk_attention_hopper, trunk_attention_tpu
from jaxopd_kernels.attention import Part, cache_attention

LEAST_TRUNK, LEAST_SLOTS = 256, 32  # below, the trunk's keys fit in caches and a plain product is as fast


class TrunkAttention(NamedTuple):
    """A row of the table: a function of grouped arrays, and the head sizes it takes, in bfloat16; (): anything."""

    attend: Callable[..., tuple[Array, Array]]
    head_dims: tuple[int, ...] = ()


def trunk_attention(
    q: Float[Array, "*N B H h"],
    k: Float[Array, "*N K L h"],
    v: Float[Array, "*N K L h"],
    end: Int[Array, "*N B"],
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "*N B H h"], Float[Array, "*N B H"]]:
    """Attends each slot's one query per head to the first `end` positions of the trunk all slots share.

    out[b] = softmax_j(q[b] k[j] / sqrt(h)) v[j] over j < end[b], and lse[b], the log-sum-exp of those scores, by which
    the result merges with attention over other keys. Both are float32. H is a multiple of K (grouped queries). An end
    beyond L counts as L; where end is 0, out is 0 and lse NO_KEYS. Keys and values past every end must be finite, too.

    Arrays may share one leading axis of N groups, each with its own trunk. implementation: a name of
    TRUNK_IMPLEMENTATIONS, None for `chosen_implementation`'s. The kernels read keys and values where they lie if L is a
    multiple of 128 (TPU) or 64 (Hopper), else they copy them. XLA cannot partition a kernel: over several devices, call
    this inside jax.shard_map.
    Raises ValueError on shapes that do not fit, on an unknown implementation and on inputs that it does not take.
    """
    _check_shapes(q, k, v, end)
    L, h = k.shape[-2:]
    if implementation is None:
        dtype, slots = jnp.result_type(q, k, v), q.shape[-3]
        implementation = chosen_implementation(choice.local_kind(), dtype, slots=slots, trunk=L, head_dim=h)
    if implementation not in TRUNK_IMPLEMENTATIONS:
        names = ", ".join(TRUNK_IMPLEMENTATIONS)
        raise ValueError(f"implementation: found {implementation!r}, expected one of {names}")
    row = TRUNK_IMPLEMENTATIONS[implementation]
    if row.head_dims and (h not in row.head_dims or any(x.dtype != jnp.bfloat16 for x in (q, k, v))):
        raise ValueError(
            f"q, k, v: found head size {h} of {q.dtype}, {k.dtype}, {v.dtype}; {implementation!r} takes bfloat16 of "
            f"head size {' or '.join(map(str, row.head_dims))}"
        )
    arrays = (q, k, v, jnp.clip(end, 0, L))
    if q.ndim == 4:
        return row.attend(*arrays)
    out, lse = row.attend(*(x[None] for x in arrays))
    return out[0], lse[0]


def chosen_implementation(device_kind: str, dtype: jnp.dtype, *, slots: int, trunk: int, head_dim: int) -> str:
    """Names the kernel made for this device where it is expected to win, else "xla".

    It wins on a trunk of at least LEAST_TRUNK positions, shared by at least LEAST_SLOTS slots, in bfloat16: shorter
    trunks are read from cache anyhow, and few slots leave the read of the trunk the whole cost.
    """
    device = choice.device_of(device_kind)
    fits = device is not None and head_dim in TRUNK_IMPLEMENTATIONS[device.kernel].head_dims
    worthwhile = trunk >= LEAST_TRUNK and slots >= LEAST_SLOTS and dtype == jnp.bfloat16
    return device.kernel if fits and worthwhile else "xla"


def _check_shapes(q: Array, k: Array, v: Array, end: Array) -> None:
    fits = (
        q.ndim in (3, 4)
        and k.ndim == q.ndim
        and k.shape == v.shape
        and end.shape == q.shape[:-2]
        and q.shape[:-3] == k.shape[:-3]
        and q.shape[-1] == k.shape[-1]
        and q.shape[-2] % k.shape[-3] == 0
    )
    if not fits:
        raise ValueError(
            f"q, k, v, end: found shapes {q.shape}, {k.shape}, {v.shape}, {end.shape}, expected [B, H, h], [K, L, h], "
            "[K, L, h], [B] with H a multiple of K, all with or all without a leading axis of groups"
        )
    if not jax.dtypes.issubdtype(end.dtype, jnp.integer):
        raise ValueError(f"end: found {end.dtype}, expected integers")


def _xla(
    q: Float[Array, "N B H h"], k: Float[Array, "N K L h"], v: Float[Array, "N K L h"], end: Int[Array, "N B"]
) -> Part:
    """Materialises the scores, N B H L floats; any dtype, float32 softmax."""
    return cache_attention(q, k, v, jnp.arange(k.shape[2])[None, None] < end[..., None])


TRUNK_IMPLEMENTATIONS: Mapping[str, TrunkAttention] = MappingProxyType(
    {
        "xla": TrunkAttention(_xla),
        "hopper": TrunkAttention(trunk_attention_hopper.trunk_attention, (64, 128)),
        "tpu": TrunkAttention(trunk_attention_tpu.trunk_attention, (128,)),
    }
)
