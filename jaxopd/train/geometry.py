"""Where the update points: against the ideal gradient, and whether its tokens pull together.

The ideal gradient of a parameter vector is that of the success probability on probe questions, estimated as Dr. GRPO
does from fresh rollouts. Two estimates from disjoint halves tell how much of the cosine is lost to noise.

Coherence answers the anisotropy question of paper B (section 6.2): the length of the summed gradient against the sum
of the tokens' own lengths, in the LM head, where a token's gradient is an outer product whose length is known. It is
1 when all tokens agree, and near 1 / sqrt(number of tokens) when they point anywhere.
"""

import copy
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxopd_kernels import pair_statistics, weighted_divergence_loss
from jaxtyping import Array, Float

from jaxopd.rollouts.sampling import seed_of
from jaxopd.train.batch import Batch
from jaxopd.train.collect import Collector, Micro
from jaxopd.train.config import TrainConfig
from jaxopd.train.gates import AlignmentTable, gate_weights
from jaxopd.train.metrics import Scored
from jaxopd.train.objectives import make_objective
from jaxopd.train.step import LossSettings, Targets, response_states
from jaxopd.train.targets import make_targets, reduced


class Trained(Protocol):
    """What is needed of a trainer."""

    config: TrainConfig
    settings: LossSettings
    collect: Collector
    params: nnx.State
    table: AlignmentTable | None

    def gradients(
        self, micros: list[Micro], targets: Targets, settings: LossSettings | None = None
    ) -> tuple[Array, nnx.State]: ...


def update_geometry(trainer: Trained) -> dict[str, float]:
    """Measure the distillation update on the probe questions: cosine with the ideal gradient, and its reliability."""
    config, collect = trainer.config, copy.copy(trainer.collect)
    collect.needs_states = True
    questions = np.arange(min(config.probe_questions, len(collect.setup.questions)))
    # The same draws at every probe: what changes between probes is the student.
    seed = seed_of(config.seed, "probe")
    batch = collect.roll_out(trainer.params, questions, config.probe_rollouts, seed)
    scored, updates = collect.score(trainer.params, batch)
    micros = [micro for update in updates for micro in update]
    everything = np.arange(len(batch.question))
    gate = gate_weights(config.gate, batch, scored, trainer.table)
    probing = replace(config, rollouts=config.probe_rollouts)
    targets = reduced(probing, make_targets(probing, batch, scored, gate), everything)
    # One at a time: collectives of several computations in flight can wait for each other on fake CPU devices.
    update = jax.block_until_ready(trainer.gradients(micros, targets, replace(trainer.settings, outcome=False))[1])
    halves = [jax.block_until_ready(_ideal(trainer, batch, scored, micros, half)) for half in (0, 1)]
    ideal = jax.jit(partial(jax.tree.map, jnp.add))(*halves)
    return {
        "geometry/alignment": cosine(update, ideal),
        "geometry/reliability": cosine(*halves),
        "geometry/update_norm": float(optax.tree.norm(update)),
        "geometry/ideal_norm": float(optax.tree.norm(ideal)) / 2,
    } | _coherence(trainer, collect, micros[0])


def _coherence(trainer: Trained, collect: Collector, micro: Micro) -> dict[str, float]:
    """Measure the coherence of the tokens of one micro-batch."""
    student = nnx.merge(collect.setup.graph, trainer.params)
    b, S = micro.responses.shape
    hidden = _states(student, micro.student, S).reshape(b * S, -1)
    V = min(student.head().shape[0], micro.teacher_head.shape[0])
    models = hidden, student.head()[:V], micro.teacher_states.reshape(b * S, -1), micro.teacher_head[:V]
    weights = jnp.asarray(micro.responses >= 0, jnp.float32).reshape(-1)
    return {f"geometry/{name}": float(value) for name, value in head_coherence(*models, weights).items()}


_states = nnx.jit(response_states, static_argnums=2)


def _ideal(trainer: Trained, batch: Batch, scored: Scored, micros: list[Micro], half: int) -> nnx.State:
    """Dr. GRPO's gradient from one half of every question's responses, baseline included."""
    config = trainer.config
    objective = replace(config.objective, objective="dr_grpo", outcome="", importance="none")
    # Groups of half the size: each half has its own baseline, so that the two are independent.
    halved = replace(config, objective=objective, rollouts=config.probe_rollouts // 2, reduction="sequence_sum")
    rows = np.flatnonzero(np.arange(len(batch.question)) // halved.rollouts % 2 == half)
    targets = reduced(halved, make_targets(halved, batch, scored, scored.mask.astype(np.float64)), rows)
    settings = replace(trainer.settings, objective=make_objective(objective), config=objective, outcome=False)
    return trainer.gradients(micros, targets, settings)[1]


def cosine(a: Any, b: Any) -> float:
    """Compute the cosine of two trees of arrays; NaN where one is zero."""
    product = sum(float(jnp.vdot(x, y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    size = float(optax.tree.norm(a)) * float(optax.tree.norm(b))
    return product / size if size > 0 else float("nan")


@partial(jax.jit, static_argnames="wave_bytes")
def head_coherence(
    hidden_s: Float[Array, "T Ds"],
    head_s: Float[Array, "V Ds"],
    hidden_t: Float[Array, "T Dt"],
    head_t: Float[Array, "V Dt"],
    weights: Float[Array, "T"],
    wave_bytes: int | None = None,
) -> dict[str, Array]:
    """Compare the summed reverse-KL gradient of the LM head with its tokens' own.

    coherence = |sum_t w_t g_t| / sum_t |w_t g_t| with g_t = P (f - fbar) outer hidden_t; independent = the value that
    directions independent of each other would have, sqrt(sum |w_t g_t|^2) / sum |w_t g_t|.
    """
    none = jnp.zeros((hidden_s.shape[0], 0), jnp.int32)
    pair = pair_statistics(hidden_s, head_s, hidden_t, head_t, none, second_pass=False)
    sizes = weights * pair.gradient_norm * jnp.linalg.norm(hidden_s, axis=-1)

    def loss(head: Array) -> Array:
        return weighted_divergence_loss(hidden_s, head, hidden_t, head_t, weights, wave_bytes=wave_bytes)[0]

    total = jnp.maximum(jnp.sum(sizes), jnp.finfo(jnp.float32).tiny)
    return {
        "coherence": jnp.linalg.norm(jax.grad(loss)(head_s)) / total,
        "independent": jnp.linalg.norm(sizes) / total,
    }
