"""From scored rollouts to what each position is trained on."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxopd.gradients import Position
from jaxopd.train.batch import Batch
from jaxopd.train.config import TrainConfig
from jaxopd.train.metrics import Scored
from jaxopd.train.objectives import Objective, frozen_advantage, make_objective, make_outcome
from jaxopd.train.rewards import group_advantages, returns_to_go, token_weights
from jaxopd.train.step import Targets
from jaxopd.train.supports import support_mask


@partial(jax.jit, static_argnames="objective")
def _advantages(objective: Objective, positions: Position) -> Float[Array, "B S K"]:
    return jax.vmap(jax.vmap(partial(frozen_advantage, objective)))(positions)


def make_targets(config: TrainConfig, batch: Batch, scored: Scored, gate: Float[np.ndarray, "B S"]) -> Targets:
    """Make the targets of a whole batch, weights not yet reduced (see `reduced`)."""
    objective, outcome = make_objective(config.objective), make_outcome(config.objective)
    sampled = _sampled_position(config, batch, scored)
    ids = np.maximum(batch.responses, 0)[..., None]
    if objective.reach == "support":
        ids = np.concatenate([scored.student_ids, scored.teacher_ids], -1)
        mask = support_mask(scored.student_ids, scored.teacher_ids, objective.support)
        positions = Position.create(scored.log_p, scored.log_q, support=mask)
    else:
        positions = sampled
    frozen = objective.loss is None
    advantage = _advantages(objective, positions) if frozen else jnp.zeros_like(positions.log_p)
    reward = np.zeros(scored.mask.shape, np.float32)
    if outcome is not None:
        reward = np.asarray(_advantages(outcome, sampled))[..., 0]
    arrays = ids, positions.support, positions.log_q, positions.log_p, advantage, gate
    weight = config.objective.outcome_weight * scored.mask
    return Targets(*map(np.asarray, arrays), scored.sampled_log_p, reward, weight)


def _sampled_position(config: TrainConfig, batch: Batch, scored: Scored) -> Position:
    """One candidate a position, the token drawn, with what each sampled form listens to."""
    group = np.arange(len(batch.question)) // config.group
    centered, std = group_advantages((batch.correct == 1).astype(np.float32), group)
    shape = scored.mask.shape
    future = returns_to_go(scored.reward, scored.mask, config.objective.gamma)
    return Position.create(
        scored.sampled_log_p[..., None],
        scored.sampled_log_q[..., None],
        counts=np.ones((*shape, 1)),
        n_samples=np.ones(shape),
        reward_to_go=future[..., None],
        advantage=np.broadcast_to(centered[:, None, None], (*shape, 1)),
        advantage_std=np.broadcast_to(std[:, None], shape),
    )


def reduced(config: TrainConfig, targets: Targets, rows: Int[np.ndarray, "n"]) -> Targets:
    """Turn the weights of an update's rows into those of a sum, by the configured reduction; the other rows get 0."""

    def weights(values: np.ndarray) -> np.ndarray:
        found = np.zeros(values.shape, np.float32)
        found[rows] = token_weights(values[rows], config.reduction, config.max_tokens)
        return found

    kept = targets.outcome_weights > 0
    outcome = weights(kept.astype(np.float32)) * config.objective.outcome_weight
    return Targets(
        **{name: getattr(targets, name) for name in Targets.__dataclass_fields__}
        | {"weights": weights(targets.weights), "outcome_weights": outcome}
    )
