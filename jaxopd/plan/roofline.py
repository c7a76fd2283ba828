"""Time of a stage: each operation takes as long as its arithmetic or its memory traffic, whichever is longer."""

from collections.abc import Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxopd.models.config import QwenConfig
from jaxopd.models.sharding import abstract_model
from jaxopd.plan.hardware import Hardware
from jaxopd.rollouts.plan import cached_token
from jaxopd.rollouts.suffix import ring_width

LOGIT_PASSES = 6  # over float32 logits, to draw a token: those that `decode_bytes` counts
SCORE_PASSES = 4  # over a position's logits: written, maximum, sums, centred sums


@dataclass(frozen=True)
class Stage:
    """A part of the work: `tokens` in all, `seconds` on all devices together, and what binds it."""

    name: str
    tokens: float
    seconds: float
    limit: str

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Operation:
    """What a device computes and moves, in a step or for all tokens."""

    flops: float
    bytes: float


def stage(
    name: str, tokens: float, operations: Iterable[Operation], hardware: Hardware, *, times: float, flops: float
) -> Stage:
    """Sums operations that run one after another, `times` over: max(FLOP / flops, bytes / bandwidth) each."""
    by_limit = {"arithmetic": 0.0, "memory bandwidth": 0.0}
    for operation in operations:
        computing, moving = operation.flops / flops, operation.bytes / hardware.bandwidth
        by_limit["arithmetic" if computing > moving else "memory bandwidth"] += max(computing, moving)
    seconds = times * sum(by_limit.values()) / hardware.reached
    return Stage(name, tokens, seconds, max(by_limit, key=lambda limit: by_limit[limit]))


def matrix_numbers(config: QwenConfig) -> int:
    """Counts the numbers of the layers' matrices: L (2 D H h + 2 D K h + 3 D F)."""
    attention = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
    return config.num_layers * config.hidden_size * (attention + 3 * config.intermediate_size)


def decoding(
    name: str, config: QwenConfig, hardware: Hardware, dtype: str, *, tokens: float, length: float, trunk: float,
    slots: int, trunks: int, devices: int, max_tokens: int
) -> Stage:  # fmt: skip
    """Plans the drawing of `tokens` by slots that share trunks, suffixes of `length` in the mean, slots full.

    A step of s slots a device reads the weights, each trunk once, the ring of the last tokens and what left it, and
    LOGIT_PASSES times the logits; it computes 2 s (W + V D) + 4 s L H h (trunk + length / 2).
    """
    e, s = jnp.dtype(dtype).itemsize, -(-slots // devices)
    weights = matrix_numbers(config) + config.vocab_size * config.hidden_size
    heads, token = 4 * config.num_layers * config.num_heads * config.head_dim, cached_token(config, e)
    suffix = max(ring_width(max_tokens), length / 2)
    step = [
        Operation(2 * s * weights, e * weights),
        Operation(heads * s * trunk, token * trunk * max(1, trunks / devices)),
        Operation(heads * s * suffix, token * s * suffix),
        Operation(0, LOGIT_PASSES * 4 * s * config.vocab_size),
    ]
    return stage(name, tokens, step, hardware, times=tokens / (s * devices), flops=hardware.step_flops)


def reading(
    name: str, config: QwenConfig, hardware: Hardware, dtype: str, *, tokens: float, length: float, devices: int,
    scored: float = 0.0, cost: float = 1.0
) -> Stage:  # fmt: skip
    """Plans forward passes over `tokens` in sequences of `length`, and the vocabulary at `scored` of them.

    cost: of a forward pass; 3 with the backward one, 4 where it computes the layers again.
    """
    e = jnp.dtype(dtype).itemsize
    attention = 2 * config.num_layers * config.num_heads * config.head_dim * length
    head = config.vocab_size * config.hidden_size
    work = [
        Operation(cost * tokens * (2 * matrix_numbers(config) + attention), e * cost * matrix_numbers(config)),
        Operation(cost * scored * 2 * head, SCORE_PASSES * 4 * scored * config.vocab_size),
    ]
    return stage(name, tokens, work, hardware, times=1 / devices, flops=hardware.flops)


def weight_bytes(config: QwenConfig, dtype: str) -> int:
    """Counts the bytes of a model's parameters."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract_model(config, dtype)[1]))
