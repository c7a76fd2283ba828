"""Draws tokens: temperature, top-k, top-p, greedy; every setting is a traced scalar, so none recompiles."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key

from jaxopd.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How rollouts are drawn. Temperature 0 is greedy; top_p 1 and top_k 0 truncate nothing."""

    max_tokens: int
    stop_ids: tuple[int, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, good, expected in (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "a finite number, 0 or more"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k >= 0, "0 or more"),
        ):
            if not good:
                raise InputError(f"{name}: found {getattr(self, name)}, expected {expected}")


def warp(
    logits: Float[Array, "B V"], temperature: Float[Array, ""], top_p: Float[Array, ""], top_k: Int[Array, ""]
) -> Float[Array, "B V"]:
    """Scales logits by 1/temperature, then removes (-inf) what top-k and top-p leave out.

    top-k keeps the k largest and everything tied with the k-th; top-p then keeps the smallest set of largest
    tokens whose renormalised mass reaches p, with ties of its last token. Temperature 0 keeps the argmax alone.
    """
    greedy = temperature == 0
    logits = logits / jnp.where(greedy, 1.0, temperature)
    # A branch not taken costs nothing: plain sampling never pays the 32 passes of a threshold search.
    logits = lax.cond(top_k > 0, lambda x: _keep_top_k(x, top_k), lambda x: x, logits)
    logits = lax.cond(top_p < 1, lambda x: _keep_top_p(x, top_p), lambda x: x, logits)
    best = jnp.arange(logits.shape[-1])[None] == jnp.argmax(logits, -1)[:, None]
    return jnp.where(greedy & ~best, -jnp.inf, logits)


def draw(keys: Key[Array, " B"], logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    """Draws one token a row from softmax(logits), each row with its own key.

    mode="high" spends two words a token: the default biases events under 1e-7.
    """
    return jax.vmap(lambda key, row: jax.random.categorical(key, row, mode="high"))(keys, logits)


def request_keys(seed: Int[Array, ""], request: Int[Array, " B"], step: Int[Array, " B"]) -> Key[Array, " B"]:
    """Gives the key of draw `step` of `request`: a function of (seed, request, step) and of nothing else."""
    root = jax.random.key(seed)
    return jax.vmap(lambda r, t: jax.random.fold_in(jax.random.fold_in(root, r), t))(request, step)


def _ordered_bits(x: Float[Array, "B V"]) -> Int[Array, "B V"]:
    """Maps float32 to uint32 so that the order of the values is the order of the bits."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32) + 0.0, jnp.uint32)  # + 0.0 makes -0 and 0 one value
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _keep_largest(logits: Array, weight: Array, enough: Array) -> Array:
    """Keeps values from the largest down until their weights reach `enough`, with the ties of the last one."""
    bits = _ordered_bits(logits)

    def bisect(i: Array, threshold: Array) -> Array:
        raised = threshold | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        reached = jnp.where(bits >= raised[:, None], weight, 0).sum(-1) >= enough
        return jnp.where(reached, raised, threshold)

    threshold = lax.fori_loop(0, 32, bisect, jnp.zeros(logits.shape[0], jnp.uint32))
    return jnp.where(bits >= threshold[:, None], logits, -jnp.inf)


def _keep_top_k(logits: Array, top_k: Array) -> Array:
    return _keep_largest(logits, jnp.ones(logits.shape, jnp.int32), top_k)


def _keep_top_p(logits: Array, top_p: Array) -> Array:
    return _keep_largest(logits, jax.nn.softmax(logits, -1), top_p)
