"""The waist of the design: a position, something reward-like per token, and the logit gradient P (f - fbar)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxopd.errors import InputError

Reading = Literal["renormalized", "restricted"]
READINGS: tuple[Reading, ...] = get_args(Reading)

# Stands for log 0. Far below any log-softmax of real logits, and its square is still a float32.
LOG_ZERO = -1e4


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Position:
    """One student position: what is known about K tokens (the vocabulary, or the candidates of a tree node).

    Unbatched; add leading axes to every field and use jax.vmap. Build one with `Position.create`.

    log_p, log_q    [K] log-probabilities of student and teacher over the FULL vocabulary, temperature 1, nats
    support         [K] True on S_u, the tokens whose success is known (paper A, section 2.4)
    success         [K] P_succ: probability of success after token k; ignored outside the support
    counts          [K] on-policy samples that took token k here
    reward_to_go    [K] mean over those samples of sum_{t' >= t} (log q - log p)
    advantage       [K] mean over those samples of R - Rbar, not divided by the standard deviation
    advantage_std   []  standard deviation of R over the batch
    n_samples       []  samples at this position, those of tokens outside the K included
    """

    log_p: Float[Array, "K"]
    log_q: Float[Array, "K"]
    support: Bool[Array, "K"]
    success: Float[Array, "K"]
    counts: Float[Array, "K"]
    reward_to_go: Float[Array, "K"]
    advantage: Float[Array, "K"]
    advantage_std: Float[Array, ""]
    n_samples: Float[Array, ""]

    @classmethod
    def create(cls, log_p: Float[Array, "*batch K"], log_q: Float[Array, "*batch K"] | None = None, **known: Any):
        """Build a position from what is known: no teacher means log_q = log_p, no support all tokens, the rest 0."""
        log_p = jnp.asarray(log_p)
        fields = {
            **dict.fromkeys(("success", "counts", "reward_to_go", "advantage"), jnp.zeros_like(log_p)),
            **dict.fromkeys(("advantage_std", "n_samples"), jnp.zeros_like(log_p[..., 0])),
            "log_q": log_p if log_q is None else log_q,
            "support": jnp.ones(log_p.shape, bool),
            **known,
        }
        arrays = {k: jnp.asarray(v, bool if k == "support" else log_p.dtype) for k, v in fields.items()}
        return cls(log_p=log_p, **arrays)


Form = Callable[[Position], Float[Array, "K"]]


def finite_log(log_p: Float[Array, "*batch K"]) -> Float[Array, "*batch K"]:
    """Replace log 0 by LOG_ZERO, so that ratios, products and derivatives stay finite."""
    return jnp.maximum(log_p, LOG_ZERO)


def probability(log_p: Float[Array, "*batch K"]) -> Float[Array, "*batch K"]:
    """Return P, kept so far above underflow that f = Q / P is finite and P f = Q still holds."""
    smallest = jnp.finfo(log_p.dtype).tiny * 1e8
    return jnp.maximum(jnp.exp(log_p), smallest)


def logit_gradient(
    log_p: Float[Array, "*batch K"], f: Float[Array, "*batch K"], fbar: Float[Array, "*batch"] | None = None
) -> Float[Array, "*batch K"]:
    """Return P (f - fbar), the ascent direction on the student's logits (paper A, Eq. 2.11).

    fbar is sum_k P_k f_k over the last axis unless given (it must be, where the axis does not hold all of the
    vocabulary that f covers). A token of probability zero gets gradient zero, whatever its f.
    """
    possible = log_p > LOG_ZERO
    p, f = jnp.where(possible, probability(log_p), 0.0), jnp.where(possible, f, 0.0)
    if fbar is None:
        fbar = jnp.sum(p * f, axis=-1)
    return p * (f - fbar[..., None])


def surrogate(log_p: Float[Array, "*batch K"], f: Float[Array, "*batch K"]) -> Float[Array, "*batch"]:
    """Return the loss -sum_k P_k f_k, whose gradient in the student's logits is -P (f - fbar) with f held constant.

    log_p must be differentiable in the logits (a log-softmax over the full vocabulary, perhaps gathered at K
    tokens). The derivative runs through log_p with weight P f, so it survives where P underflows.
    """
    log_p = finite_log(log_p)
    weight = jax.lax.stop_gradient(jnp.where(log_p > LOG_ZERO, probability(log_p) * f, 0.0))
    return -jnp.sum(weight * (1.0 + log_p - jax.lax.stop_gradient(log_p)), axis=-1)


def _log_mass(log_p: Float[Array, "*batch K"], support: Bool[Array, "*batch K"]) -> Float[Array, "*batch"]:
    """Log of the mass on the support; finite, also where that mass is zero."""
    return jax.nn.logsumexp(jnp.where(support, finite_log(log_p), LOG_ZERO), axis=-1)


def renormalize(log_p: Float[Array, "*batch K"], support: Bool[Array, "*batch K"]) -> Float[Array, "*batch K"]:
    """Return log-probabilities that sum to one over the support, -inf outside it and on tokens of probability zero."""
    keep = support & (log_p > LOG_ZERO)
    return jnp.where(keep, finite_log(log_p) - _log_mass(log_p, support)[..., None], -jnp.inf)


def on_support(position: Position) -> Position:
    """Condition a position on S_u: P and Q renormalised, samples outside dropped.

    The reward-to-go follows its first term, log q - log p, which is renormalised like P and Q; at the last token
    of a response MiniLLM therefore equals the single-sample estimator in this reading too.
    """
    support = position.support
    counts = jnp.where(support, position.counts, 0.0)
    shift = _log_mass(position.log_p, support) - _log_mass(position.log_q, support)
    return replace(
        position,
        log_p=renormalize(position.log_p, support),
        log_q=renormalize(position.log_q, support),
        counts=counts,
        n_samples=jnp.sum(counts, axis=-1),
        reward_to_go=position.reward_to_go + shift[..., None],
    )


def gradient(
    form: Form,
    position: Position,
    reading: Reading = "renormalized",
    known: tuple[Float[Array, "K"], Float[Array, ""]] | None = None,
) -> Float[Array, "K"]:
    """Return the logit gradient of a form at one position, zero outside S_u; vmap for a batch.

    renormalized: P and Q renormalised on S_u and fbar over S_u.  restricted: f and fbar over the whole axis, then
    S_u kept. Where the axis is not the whole vocabulary, pass known = (f [K], fbar []) computed over all of it.
    """
    if reading == "renormalized":
        position = on_support(position)
        f = form(position)
        # P sums to one here, so the shift changes rounding only: a constant f gives exactly zero, however peaked P is.
        ascent = logit_gradient(position.log_p, f - f[jnp.argmax(position.log_p)])
    elif reading == "restricted":
        f, fbar = known if known is not None else (form(position), None)
        ascent = logit_gradient(position.log_p, f, fbar)
    else:
        raise InputError(f"reading: found {reading!r}, expected one of {', '.join(READINGS)}")
    return jnp.where(position.support, ascent, 0.0)
