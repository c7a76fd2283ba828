"""Divergences between student P and teacher Q over the vocabulary: each loss beside its form f = -dL/dP.

The losses take log-probabilities, sum over the last axis and are in nats; temperatures, masks and reductions are
the caller's. They may differ from f by a constant per position, which the logit gradient does not see.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxopd.errors import InputError
from jaxopd.gradients.core import Form, Position, finite_log, probability


def reverse_kl_loss(log_p: Float[Array, "*batch K"], log_q: Float[Array, "*batch K"]) -> Float[Array, "*batch"]:
    """Return KL(student || teacher) = sum P (log P - log Q) (paper A, Eq. 2.6, there called GKD)."""
    log_p, log_q = finite_log(log_p), finite_log(log_q)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def reverse_kl(position: Position) -> Float[Array, "K"]:
    """Return f = log Q - log P (paper A, Eq. 2.8 with the sign of ascent)."""
    return finite_log(position.log_q) - finite_log(position.log_p)


def forward_kl_loss(log_p: Float[Array, "*batch K"], log_q: Float[Array, "*batch K"]) -> Float[Array, "*batch"]:
    """Return KL(teacher || student) = sum Q (log Q - log P)."""
    return reverse_kl_loss(log_q, log_p)


def forward_kl(position: Position) -> Float[Array, "K"]:
    """Return f = Q / P, so that P (f - fbar) = Q - P over the full vocabulary."""
    return jnp.exp(position.log_q) / probability(position.log_p)


def _log_mixture(log_p: Array, log_q: Array, beta: float) -> Array:
    return jnp.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))


def _check_beta(beta: float) -> None:
    if not 0.0 <= beta <= 1.0:
        raise InputError(f"jsd beta: found {beta}, expected a number from 0 to 1")


def jsd_loss(
    log_p: Float[Array, "*batch K"], log_q: Float[Array, "*batch K"], beta: float = 0.5
) -> Float[Array, "*batch"]:
    """Return the generalised JSD, beta KL(Q || M) + (1 - beta) KL(P || M) with M = beta Q + (1 - beta) P.

    As in TRL's GKD, beta = 0 is forward KL and beta = 1 reverse KL (the limits are 0 instead).
    """
    _check_beta(beta)
    if beta == 0.0:
        return forward_kl_loss(log_p, log_q)
    if beta == 1.0:
        return reverse_kl_loss(log_p, log_q)
    log_p, log_q = finite_log(log_p), finite_log(log_q)
    log_m = _log_mixture(log_p, log_q, beta)
    return beta * reverse_kl_loss(log_q, log_m) + (1.0 - beta) * reverse_kl_loss(log_p, log_m)


@lru_cache  # one function per beta, so that a jitted caller compiles it once
def jsd(beta: float = 0.5) -> Form:
    """Make the form of `jsd_loss`: f = (1 - beta) (log M - log P), forward KL at beta = 0 and reverse KL at 1."""
    _check_beta(beta)
    if beta == 0.0:
        return forward_kl
    if beta == 1.0:
        return reverse_kl

    def form(position: Position) -> Float[Array, "K"]:
        log_p, log_q = finite_log(position.log_p), finite_log(position.log_q)
        return (1.0 - beta) * (_log_mixture(log_p, log_q, beta) - log_p)

    return form


def from_loss(loss: Callable[[Float[Array, "K"], Float[Array, "K"]], Float[Array, ""]]) -> Form:
    """Make a form of any loss L(P, Q) of the two probability vectors: f = -dL/dP by automatic differentiation."""

    def form(position: Position) -> Float[Array, "K"]:
        return -jax.grad(loss)(probability(position.log_p), probability(position.log_q))

    return form
