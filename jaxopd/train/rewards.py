"""From rewards to advantages and from masks to weights; numpy, a batch of B responses of S tokens."""

from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxopd.errors import InputError

Reduction = Literal["token_mean", "sequence_mean", "sequence_sum", "fixed_length"]
SMALLEST_STD = 1e-6


def group_advantages(
    rewards: Float[np.ndarray, "B"], groups: Int[np.ndarray, "B"]
) -> tuple[Float[np.ndarray, "B"], Float[np.ndarray, "B"]]:
    """Compute R - Rbar and the standard deviation (ddof 1) of R among the responses of each group.

    GRPO divides the one by the other, Dr. GRPO does not. A group of one, or of equal rewards, has
    standard deviation 0 and says nothing.
    """
    _, group = np.unique(groups, return_inverse=True)
    count = np.bincount(group)
    mean = np.bincount(group, rewards) / count
    centered = rewards - mean[group]
    variance = np.bincount(group, centered**2) / np.maximum(count - 1, 1)
    return centered, np.sqrt(variance)[group]


def returns_to_go(
    rewards: Float[np.ndarray, "B S"],
    mask: Bool[np.ndarray, "B S"],
    gamma: float = 1.0,
    *,
    normalized: bool = False,
) -> Float[np.ndarray, "B S"]:
    """Sum discounted rewards to the end, R_t = r_t + gamma R_{t+1}; 0 off the mask.

    normalized: divided by sum_{t' >= t} gamma^(t'-t), a mean instead of a sum (MiniLLM's length normalisation).
    """

    def discounted(values: np.ndarray) -> np.ndarray:
        total, out = np.zeros_like(values[:, 0]), np.zeros_like(values)
        for t in reversed(range(values.shape[1])):
            total = values[:, t] + gamma * total
            out[:, t] = total
        return out

    found = discounted(np.where(mask, rewards, 0.0))
    if normalized:
        found = found / np.maximum(discounted(mask.astype(rewards.dtype)), SMALLEST_STD)
    return np.where(mask, found, 0.0)


def extrapolated(
    log_q: Float[np.ndarray, "*batch"], log_base: Float[np.ndarray, "*batch"], scale: float
) -> Float[np.ndarray, "*batch"]:
    """Move the teacher away from a base model: log base + scale (log q - log base), not normalised.

    The reward log q' - log p is then scale (log q - log base) - (log p - log base): at scale 1 the plain one.
    """
    return log_base + scale * (log_q - log_base)


def token_weights(
    weights: Float[np.ndarray, "B S"], reduction: Reduction, max_length: int | None = None
) -> Float[np.ndarray, "B S"]:
    """Turn weights (0 where masked) into those of a sum: a batch's loss is sum w_bt loss_bt, however it is split.

    token_mean     w / sum w                                    (DAPO, BNPO, paper B)
    sequence_mean  w / (B sum_t w)                              (GRPO)
    sequence_sum   w / B
    fixed_length   w / (B max_length)                           (Dr. GRPO)
    All zero where nothing has weight. Raises InputError on another name and on fixed_length without a length.
    """
    weights = np.asarray(weights)
    B = len(weights)
    if reduction == "token_mean":
        scale = weights.sum()
    elif reduction == "sequence_mean":
        scale = B * weights.sum(-1, keepdims=True)
    elif reduction == "sequence_sum":
        scale = np.asarray(B)
    elif reduction == "fixed_length" and max_length:
        scale = np.asarray(B * max_length)
    else:
        raise InputError(f"reduction: found {reduction!r}, expected one of {', '.join(get_args(Reduction))}")
    return weights / np.where(scale > 0, scale, 1)


def prefix_weights(
    rewards: Float[np.ndarray, "B S"], mask: Bool[np.ndarray, "B S"], strength: float = 0.5
) -> Float[np.ndarray, "B S"]:
    """Weight tokens by how little has gone wrong before them: 1 + strength (1 - sum_{t' < t} |r| / sum |r|).

    The weights of importance-weighted OPD (IW-OPD); 0 off the mask.
    """
    size = np.where(mask, np.abs(rewards), 0.0)
    before = np.cumsum(size, -1) - size
    share = before / np.maximum(size.sum(-1, keepdims=True), 1e-8)
    return np.where(mask, 1.0 + strength * (1.0 - share), 0.0)
