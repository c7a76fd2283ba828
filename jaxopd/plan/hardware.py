"""Hardware as a plan sees it: memory, FLOP/s and bytes/s of a device; published ones, or this machine's measured."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh
from jaxopd_kernels.choice import DEVICES

from jaxopd.errors import InputError
from jaxopd.models.config import QwenConfig
from jaxopd.models.qwen import linear
from jaxopd.rollouts.plan import free_memory


@dataclass(frozen=True)
class Hardware:
    """One device. flops in bfloat16; step_flops of products of few rows, those of a decoding step.

    reached: the share of these rates that programs reach, 1 where the rates were measured with such programs.
    """

    kind: str  # as JAX names the device
    memory: float  # bytes
    flops: float
    bandwidth: float  # bytes a second
    step_flops: float
    reached: float = 1.0


# Neither kernels nor the engine were timed on an accelerator: half of the published rates is an assumption.
REACHED = 0.5


def _published(kind: str, gigabytes: float) -> Hardware:
    device = DEVICES[kind]
    return Hardware(kind, gigabytes * 1e9, device.flops, device.bytes, device.flops, REACHED)


HARDWARE = {
    "h200": _published("NVIDIA H200", 141),
    "h100": _published("NVIDIA H100", 80),
    "a100": Hardware("NVIDIA A100-SXM4-80GB", 80e9, 312e12, 2.04e12, 312e12, REACHED),
    "v5e": _published("TPU v5 lite", 16),
    "v5p": _published("TPU v5p", 95),
    "v6e": _published("TPU v6 lite", 32),
}
SECONDS = 0.3  # a rate is measured for
LONG_ROWS = 256
MATRIX_BYTES = 64 << 20


class ImaginedMesh:
    """A mesh ("data", "model") of devices that need not exist, as far as memory plans ask a mesh."""

    def __init__(self, size: int, kind: str, model: int = 1):
        if model < 1 or size % model:
            raise InputError(f"--model-parallel: found {model}, expected a divisor of --devices, {size}")
        self.size, self.shape = size, {"data": size // model, "model": model}
        self.devices = np.array([SimpleNamespace(device_kind=kind)] * size)
        self.abstract = AbstractMesh(tuple(self.shape.values()), tuple(self.shape))  # as shardings ask for one


def find_hardware(name: str, config: QwenConfig, dtype: str, slots: int) -> Hardware:
    """Gives a device of the table, or measures this machine ("here") with products of the model's shape.

    Raises InputError on an unknown name.
    """
    if name == "here":
        return measured(config, dtype, slots)
    if name not in HARDWARE:
        raise InputError(f"--hardware: found {name!r}, expected one of {', '.join(HARDWARE)} or here")
    return HARDWARE[name]


def measured(config: QwenConfig, dtype: str, slots: int, clock: Callable[[], float] = time.perf_counter) -> Hardware:
    """Measures this machine: products with a matrix out of the cache, of many rows and of a step's; a logits pass.

    clock: time.process_time on one core that other programs use too.
    """
    D = config.hidden_size
    outputs = max(config.intermediate_size, MATRIX_BYTES // (D * jnp.dtype(dtype).itemsize))
    matrix = jax.random.normal(jax.random.key(0), (outputs, D), jnp.float32).astype(dtype)
    multiplied = jax.jit(linear)
    softened = jax.jit(lambda x: jnp.exp(x - x.max(-1, keepdims=True)))  # reads them twice and writes once

    def rate(rows: int) -> float:
        x = jnp.ones((rows, D), dtype)
        return 2 * rows * matrix.size / _seconds(lambda: multiplied(x, matrix), clock)

    logits = jnp.ones((slots, config.vocab_size), jnp.float32)
    bandwidth = 3 * logits.nbytes / _seconds(lambda: softened(logits), clock)
    return Hardware(jax.devices()[0].device_kind, free_memory(), rate(LONG_ROWS), bandwidth, rate(slots))


def _seconds(run: Callable[[], jax.Array], clock: Callable[[], float]) -> float:
    """Times a call that is compiled: the fastest of those that fit into SECONDS, as others share the machine."""
    jax.block_until_ready(run())
    fastest, end = np.inf, time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        began = clock()
        jax.block_until_ready(run())
        fastest = min(fastest, clock() - began)
    return fastest
