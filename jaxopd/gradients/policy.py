"""Losses and forms of policy gradients: returns, likelihood, advantages on a support, clipping and truncation."""

from collections.abc import Callable
from functools import lru_cache
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxopd.errors import InputError
from jaxopd.gradients.core import LOG_ZERO, Form, Position, finite_log, probability, renormalize
from jaxopd.gradients.sampled import score_function

Weighting = Literal["student", "teacher", "uniform"]
MOST_LOG_RATIO = 20.0  # importance ratios stay finite in float32


def returns(position: Position) -> Float[Array, "K"]:
    """Return f of the sampled reward alone, w = sum_{t' >= t} (log q - log p): `minillm` without its constant -1.

    The constant has mean zero; without it a teacher equal to the student says nothing on every draw.
    """
    return score_function(position, position.reward_to_go)


def likelihood(position: Position) -> Float[Array, "K"]:
    """Return f of maximum likelihood of the counted tokens, w = 1: supervised fine-tuning."""
    return score_function(position, jnp.ones_like(position.log_p))


@lru_cache  # one function a choice, so that a jitted caller compiles it once
def direct(weighting: Weighting = "student", normalized: bool = True) -> Form:
    """Make the form whose advantages P f are w (log Q - log P) on the support, log P and log Q over the vocabulary.

    w is P, Q or 1, divided by its sum over the support if `normalized`. This is how the code of paper B trains on k
    tokens; at k = 1 it is a policy gradient of the one token, where the paper's Eq. 5 is zero.
    """
    if weighting not in get_args(Weighting):
        raise InputError(f"weighting: found {weighting!r}, expected one of {', '.join(get_args(Weighting))}")

    def form(position: Position) -> Float[Array, "K"]:
        log_p, log_q = finite_log(position.log_p), finite_log(position.log_q)
        log_w = {"student": log_p, "teacher": log_q, "uniform": jnp.zeros_like(log_p)}[weighting]
        weight = jnp.exp(renormalize(log_w, position.support) if normalized else log_w)
        kept = position.support & (log_p > LOG_ZERO)
        return jnp.where(kept, weight * (log_q - log_p), 0.0) / probability(log_p)

    return form


def importance_ratio(log_p: Float[Array, "*batch"], log_p_old: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Return P / P_old, the logarithm clamped to +-20."""
    return jnp.exp(jnp.clip(log_p - log_p_old, -MOST_LOG_RATIO, MOST_LOG_RATIO))


def clipped_surrogate(
    log_p: Float[Array, "*batch K"],
    log_p_old: Float[Array, "*batch K"],
    advantage: Float[Array, "*batch K"],
    low: float = 0.2,
    high: float = 0.2,
    dual: float = float("inf"),
) -> Float[Array, "*batch"]:
    """Return the PPO loss -sum_k min(A rho, A clip(rho, 1 - low, 1 + high)), never above -dual A where A < 0.

    rho = P / P_old, A = P_old f held constant. At P = P_old it has the value and the gradient of `surrogate`.
    """
    advantage = jax.lax.stop_gradient(advantage)
    ratio = importance_ratio(log_p, jax.lax.stop_gradient(log_p_old))
    gain = jnp.minimum(advantage * ratio, advantage * jnp.clip(ratio, 1.0 - low, 1.0 + high))
    if dual != float("inf"):
        gain = jnp.where(advantage < 0, jnp.maximum(gain, dual * advantage), gain)
    return -jnp.sum(gain, axis=-1)


def is_clipped(
    log_p: Float[Array, "*batch K"],
    log_p_old: Float[Array, "*batch K"],
    advantage: Float[Array, "*batch K"],
    low: float = 0.2,
    high: float = 0.2,
    dual: float = float("inf"),
) -> Bool[Array, "*batch K"]:
    """Tell where `clipped_surrogate` has no gradient: rho > 1 + high if A > 0, rho < 1 - low or rho > dual if A < 0."""
    ratio = importance_ratio(log_p, log_p_old)
    return ((advantage > 0) & (ratio > 1.0 + high)) | ((advantage < 0) & ((ratio < 1.0 - low) | (ratio > dual)))


def truncated_surrogate(
    log_p: Float[Array, "*batch K"],
    log_p_old: Float[Array, "*batch K"],
    advantage: Float[Array, "*batch K"],
    most: float = 2.0,
) -> Float[Array, "*batch"]:
    """Return -sum_k min(rho, most) A log P with rho = P / P_old and A held constant: truncated importance sampling.

    Its value is that of -sum_k min(rho, most) A.
    """
    weight = jnp.minimum(importance_ratio(log_p, log_p_old), most) * advantage
    return -jnp.sum(jax.lax.stop_gradient(weight) * (1.0 + log_p - jax.lax.stop_gradient(log_p)), axis=-1)


def _k3(log_ratio: Array) -> Array:
    bounded = jnp.clip(log_ratio, -MOST_LOG_RATIO, MOST_LOG_RATIO)
    return jnp.clip(jnp.exp(bounded) - bounded - 1.0, -10.0, 10.0)


# Of log p - log q at a token drawn from P. k1 and unclamped k3 have mean reverse KL; k2 where P and Q are close.
ESTIMATES: dict[str, Callable[[Array], Array]] = {
    "k1": lambda x: x,
    "abs": jnp.abs,
    "k2": lambda x: 0.5 * jnp.square(x),
    "k3": lambda x: _k3(-x),
}


def kl_estimate(
    log_p: Float[Array, "*batch"], log_q: Float[Array, "*batch"], kind: str = "k3"
) -> Float[Array, "*batch"]:
    """Return the one-sample estimate of KL(P || Q) of a drawn token: k1, abs, k2 or k3 (clamped to 10), in nats.

    For a penalty toward a reference model. Raises InputError on another kind.
    """
    if kind not in ESTIMATES:
        raise InputError(f"estimate: found {kind!r}, expected one of {', '.join(ESTIMATES)}")
    return ESTIMATES[kind](log_p - log_q)
