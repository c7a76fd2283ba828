"""Where the update points: against the ideal gradient, and whether its tokens pull together.

The ideal gradient of a parameter vector is that of the success probability on probe questions, estimated as Dr. GRPO
does from fresh rollouts. Both it and the update are known with noise, which draws their plain cosine to 0 and, as both
come from the same rollouts, also ties them together. So each is estimated twice, from disjoint halves of every
question's responses, and only products across the halves enter `Probe.alignment`. That removes the bias, not the
scatter: on the toy student probes of 960 responses lie .2 around .14 (experiments/rethinking/geometry.py, which also
checks the predicted slope of the accuracy by finite differences). Read a trend over steps, or probe widely.

Coherence answers the anisotropy question of paper B (section 6.2): the length of the summed gradient against the sum
of the tokens' own lengths, in the LM head, where a token's gradient is an outer product whose length is known. It is
1 when all tokens agree, and near 1 / sqrt(number of tokens) when they point anywhere.
"""

import copy
from dataclasses import dataclass, replace
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
from jaxopd.train.collect import Collector, Micro
from jaxopd.train.config import TrainConfig
from jaxopd.train.gates import AlignmentTable, gate_weights
from jaxopd.train.objectives import ObjectiveConfig, make_objective
from jaxopd.train.step import LossSettings, Sums, Targets, response_states
from jaxopd.train.targets import make_targets, reduced


class Trained(Protocol):
    """What is needed of a trainer."""

    config: TrainConfig
    settings: LossSettings
    collect: Collector
    params: nnx.State
    table: AlignmentTable | None

    def gradients(self, micros: list[Micro], targets: Targets, settings: LossSettings | None = None) -> Sums: ...


@dataclass(frozen=True)
class Probe:
    """Loss gradients from each half of the probe's responses: of the trained objective, and of -success."""

    update: tuple[nnx.State, nnx.State]
    ideal: tuple[nnx.State, nnx.State]

    @property
    def alignment(self) -> float:
        """The cosine of the two gradients without their estimates' noise; NaN where a gradient drowns in it.

        (u_0.g_1 + u_1.g_0) / 2 / sqrt(u_0.u_1 g_0.g_1): numerator and both factors of the denominator are
        unbiased, as the halves are independent. Where reliability is low the value scatters, and may leave [-1, 1].
        """
        (u0, u1), (g0, g1) = self.update, self.ideal
        squares = inner(u0, u1), inner(g0, g1)
        if min(squares) <= 0:
            return float("nan")
        return (inner(u0, g1) + inner(u1, g0)) / 2 / (squares[0] * squares[1]) ** 0.5

    def metrics(self) -> dict[str, float]:
        """Summarise: alignment, the plain cosine, what share of each gradient is signal, and their norms."""
        update, ideal = (_mean(*halves) for halves in (self.update, self.ideal))
        return {
            "geometry/alignment": self.alignment,
            "geometry/cosine": cosine(update, ideal),
            "geometry/reliability": cosine(*self.ideal),
            "geometry/update_reliability": cosine(*self.update),
            "geometry/update_norm": float(optax.tree.norm(update)),
            "geometry/ideal_norm": float(optax.tree.norm(ideal)),
        }


def update_geometry(trainer: Trained) -> dict[str, float]:
    """Measure the update on the probe questions: its alignment with the ideal gradient, and its tokens' coherence."""
    found, collect, micro = probe(trainer)
    return found.metrics() | _coherence(trainer, collect, micro)


def probe(trainer: Trained, seed: int = 0) -> tuple[Probe, Collector, Micro]:
    """Roll the probe questions out and differentiate; gives also what scored them, and the first micro-batch.

    The same draws at every probe of one seed: what changes between probes is the student.
    """
    config, collect = trainer.config, copy.copy(trainer.collect)
    collect.needs_states = True
    # Spread over the file: its beginning may be one subject, or one level of difficulty.
    count = len(collect.setup.questions)
    questions = np.linspace(0, count - 1, min(config.probe_questions, count)).astype(int)
    batch = collect.roll_out(trainer.params, questions, config.probe_rollouts, seed_of(config.seed, "probe", seed))
    scored, updates = collect.score(trainer.params, batch)
    micros = [micro for update in updates for micro in update]
    # Groups of half the size: each half has its own baseline, so that the two are independent.
    halved = replace(config, corpus="", rollouts=config.probe_rollouts // 2)  # the probe has groups, a corpus has none
    half = np.arange(len(batch.question)) // halved.rollouts % 2
    outcome = ObjectiveConfig("dr_grpo", config.objective.k, importance="none")
    success = replace(halved, objective=outcome, reduction="sequence_sum")
    settings = replace(trainer.settings, objective=make_objective(outcome), config=outcome, outcome=False)
    sides = (
        (halved, trainer.settings, gate_weights(config.gate, batch, scored, trainer.table)),
        (success, settings, scored.mask.astype(np.float64)),
    )
    gradients = []
    for side, settings, gate in sides:
        targets = make_targets(side, batch, scored, gate)
        for rows in (np.flatnonzero(half == 0), np.flatnonzero(half == 1)):
            found = trainer.gradients(micros, reduced(side, targets, rows), settings).gradients
            # One at a time: collectives of several computations in flight can wait for each other on fake CPU devices.
            gradients.append(jax.block_until_ready(found))
    return Probe((gradients[0], gradients[1]), (gradients[2], gradients[3])), collect, micros[0]


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


@jax.jit
def _mean(a: Any, b: Any) -> Any:
    return jax.tree.map(lambda x, y: (x + y) / 2, a, b)


def inner(a: Any, b: Any) -> float:
    """Compute the inner product of two trees of arrays."""
    return sum(float(jnp.vdot(x, y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def cosine(a: Any, b: Any) -> float:
    """Compute the cosine of two trees of arrays; NaN where one is zero."""
    size = float(optax.tree.norm(a)) * float(optax.tree.norm(b))
    return inner(a, b) / size if size > 0 else float("nan")


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
