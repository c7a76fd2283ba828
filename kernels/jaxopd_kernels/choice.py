"""Which implementation serves a call, from what the hardware can do at best; a measurement may replace the numbers.

A kernel pays 2 T V D FLOP per launch and nothing for the logits. The chunked XLA implementation pays them once and
moves float32 logits: written once, read by the row maximum, by the sums against it, and by what is centred on those.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

LOGIT_MOVES = 4  # of 4 bytes each, by the chunked implementation
FEWEST_ROWS = 256  # below, both are bound by reading the heads
SMALLEST_VOCABULARY = 8192  # below, the logits of a chunk stay in the cache


class Device(NamedTuple):
    """A kind of accelerator: which kernel runs on it, what divides the widths, FLOP/s in bfloat16, bytes/s."""

    kernel: str
    width: int
    flops: float
    bytes: float


DEVICES = {
    "NVIDIA H200": Device("hopper", 64, 990e12, 4.8e12),
    "NVIDIA H100": Device("hopper", 64, 990e12, 3.35e12),
    "TPU v5 lite": Device("tpu", 128, 197e12, 0.82e12),
    "TPU v5": Device("tpu", 128, 459e12, 2.77e12),  # as v5p names itself
    "TPU v5p": Device("tpu", 128, 459e12, 2.77e12),
    "TPU v6 lite": Device("tpu", 128, 918e12, 1.64e12),
    "TPU7x": Device("tpu", 128, 2307e12, 7.4e12),
}


def kernel_widths(name: str) -> int:
    """Gives what the hidden sizes must be multiples of for a kernel."""
    return next(device.width for device in DEVICES.values() if device.kernel == name)


def device_of(kind: str) -> Device | None:
    """Looks up a device by the name that JAX gives it, which may carry more than the kind: "NVIDIA H200 NVL"."""
    exact = DEVICES.get(kind)
    prefixes = (device for name, device in DEVICES.items() if device.kernel == "hopper" and kind.startswith(name))
    return exact or next(prefixes, None)


def choose(
    kind: str, T: int, vocab_size: int, widths: tuple[int, ...], dtypes: tuple[jnp.dtype, ...], launches: int, k: int
) -> str:
    """Names the implementation for T rows of one or two models of the given widths on a kind of device.

    launches: passes over the vocabulary that the kernel would need. k: of the top k, whose 8 k candidates per row are
    gathered, 2 D bytes each.
    """
    device = device_of(kind)
    fits = device is not None and all(width % device.width == 0 for width in widths)
    if not fits or T < FEWEST_ROWS or vocab_size < SMALLEST_VOCABULARY or any(d != jnp.bfloat16 for d in dtypes):
        return "xla"
    product = 2 * vocab_size * sum(widths) / device.flops  # seconds per row, as are those below
    moves = LOGIT_MOVES * 4 * vocab_size * len(widths) / device.bytes
    gathers = 8 * (k + 8) * (k > 0) * 2 * sum(widths) / device.bytes
    return device.kernel if launches * product + gathers < product + moves else "xla"


def local_kind() -> str:
    """The kind of the device that JAX computes on by default."""
    return jax.devices()[0].device_kind
