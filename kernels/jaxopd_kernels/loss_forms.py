"""Divergences that sum an elementwise density over the vocabulary: the density, and P f with f = -dL/dP.

Everything here is elementwise in log P and log Q, so that a loss can be taken a block of logits at a time. P f stands
for f itself because it stays finite where P underflows. f counts only up to a constant per row, which the logit
gradient P (f - fbar) does not see; the constants chosen make f exactly zero where P = Q.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# (log_p [V], log_q [V]) -> [V]
Elementwise = Callable[[Float[Array, "*batch V"], Float[Array, "*batch V"]], Float[Array, "*batch V"]]
Kind = Literal["reverse_kl", "forward_kl", "jsd"]


class Divergence(NamedTuple):
    """A loss L(P, Q) = sum_v density_v, with weighted_f = P f = -P dL/dP; both elementwise, of the same arguments."""

    density: Callable[..., Array]
    weighted_f: Callable[..., Array]


def _kl(log_p: Array, log_q: Array) -> Array:
    """Q - P + P log(P / Q), never negative; the sum over the vocabulary is KL(P || Q)."""
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    return jnp.maximum(q - p + p * (log_p - log_q), 0.0)


REVERSE_KL = Divergence(_kl, lambda log_p, log_q: jnp.exp(log_p) * (log_q - log_p))
FORWARD_KL = Divergence(lambda log_p, log_q: _kl(log_q, log_p), lambda log_p, log_q: jnp.exp(log_q) - jnp.exp(log_p))
# Of the student alone; minimising it sharpens P.
ENTROPY = Divergence(lambda log_p: -jnp.exp(log_p) * log_p, lambda log_p: jnp.exp(log_p) * log_p)


@lru_cache  # one object per beta, so that a jitted caller compiles it once
def jsd(beta: float) -> Divergence:
    """Makes beta KL(Q || M) + (1 - beta) KL(P || M), M = beta Q + (1 - beta) P; f = (1 - beta) log(M / P).

    As in TRL's GKD, beta = 0 is forward KL and beta = 1 reverse KL (the limits are 0 instead).
    Raises ValueError on a beta outside 0 to 1.
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta: found {beta}, expected a number from 0 to 1")
    if beta in (0.0, 1.0):
        return FORWARD_KL if beta == 0.0 else REVERSE_KL

    def log_mixture_over_p(log_p: Array, log_q: Array) -> Array:
        x = log_q - log_p
        # exact near 0; exp would overflow past 88, where M / P = beta Q / P in float32
        return jnp.where(x < 80, jnp.log1p(beta * jnp.expm1(jnp.minimum(x, 80.0))), x + math.log(beta))

    def density(log_p: Array, log_q: Array) -> Array:
        over_p = log_mixture_over_p(log_p, log_q)
        over_q = over_p + (log_p - log_q)
        return jnp.maximum(-beta * jnp.exp(log_q) * over_q - (1 - beta) * jnp.exp(log_p) * over_p, 0.0)

    return Divergence(density, lambda log_p, log_q: (1 - beta) * jnp.exp(log_p) * log_mixture_over_p(log_p, log_q))


@lru_cache
def from_density(density: Elementwise) -> Divergence:
    """Makes a divergence of any elementwise density of (log_p, log_q), P f by automatic differentiation.

    It must be finite, with a finite derivative in log_p, wherever log_p and log_q are.
    """

    def weighted_f(log_p: Array, log_q: Array) -> Array:
        return -jax.jvp(lambda log_p: density(log_p, log_q), (log_p,), (jnp.ones_like(log_p),))[1]

    return Divergence(density, weighted_f)


def divergence(kind: Kind | Elementwise, beta: float) -> Divergence:
    """Looks a divergence up by name, or makes one of a density; beta is jsd's. Raises ValueError on other names."""
    if callable(kind):
        return from_density(kind)
    if kind not in get_args(Kind):
        raise ValueError(f"kind: found {kind!r}, expected one of {', '.join(get_args(Kind))} or a density")
    return {"reverse_kl": REVERSE_KL, "forward_kl": FORWARD_KL, "jsd": jsd(beta)}[kind]
