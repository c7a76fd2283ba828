"""Forms estimated from on-policy samples: the single-sample reverse KL and MiniLLM."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxopd.gradients.core import LOG_ZERO, Position, finite_log, probability


def score_function(position: Position, weight: Float[Array, "K"]) -> Float[Array, "K"]:
    """Return the f whose P (f - fbar) is the score-function estimate (1/N) sum_i w_i (delta_{r_i} - P).

    f_k = c_k w_k / (N P_k), with c_k samples of token k and weight w_k the mean weight of those samples.
    """
    taken = (position.counts > 0) & (position.log_p > LOG_ZERO)
    share = jnp.where(taken, position.counts / jnp.maximum(position.n_samples, 1.0), 0.0)
    return share * jnp.where(taken, weight, 0.0) / probability(position.log_p)


def single_sample(position: Position) -> Float[Array, "K"]:
    """Return f of the single-sample estimator, w = log q - log p - 1 at the sampled token (paper A, Eq. 2.9)."""
    return score_function(position, finite_log(position.log_q) - finite_log(position.log_p) - 1.0)


def minillm(position: Position) -> Float[Array, "K"]:
    """Return f of MiniLLM, w = sum_{t' >= t} (log q - log p) - 1: Eq. 2.10 of paper A with the sign of ascent."""
    return score_function(position, position.reward_to_go - 1.0)
