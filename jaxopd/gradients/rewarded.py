"""Forms that follow the reward: the ideal gradient and its Dr. GRPO estimates."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxopd.gradients.core import Position
from jaxopd.gradients.sampled import score_function


def ideal(position: Position) -> Float[Array, "K"]:
    """Return f = P_succ on S_u and 0 elsewhere (paper A, Eq. 2.3).

    In the restricted reading fbar is therefore sum_{S_u} P P_succ with P not renormalised.
    """
    return jnp.where(position.support, position.success, 0.0)


def dr_grpo(position: Position) -> Float[Array, "K"]:
    """Return f of (1/N) sum_i (R_i - Rbar) (delta - P), without the standard deviation (Dr. GRPO's authors)."""
    return score_function(position, position.advantage)


def dr_grpo_std(position: Position) -> Float[Array, "K"]:
    """Return f of (1/N) sum_i A_i (delta - P) with A = (R - Rbar) / std(R) (paper A, Eq. 2.4); 0 where std is 0."""
    std = position.advantage_std
    return jnp.where(std > 0, dr_grpo(position) / jnp.where(std > 0, std, 1.0), 0.0)
