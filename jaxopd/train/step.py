"""The computations of a training step, pure and jitted over the mesh: score rollouts, add up gradients, update.

Rows of a micro-batch are spread over the devices; inside, every device sees whole parameters and its own rows, so the
vocabulary losses run as on one device and only gradients travel. Master parameters and optimizer state lie spread over
the devices (float32); what the forward pass computes in is `dtype`. A teacher may be split over the devices; for the
full-vocabulary losses its head, V D_t numbers, is gathered on each.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxopd_kernels import head_statistics, pair_statistics, weighted_divergence_loss
from jaxtyping import Array, Bool, Float, Int

from jaxopd.distributed import place
from jaxopd.gradients import Position
from jaxopd.models import Qwen, forward
from jaxopd.scoring import over_mesh
from jaxopd.train.batch import Sequences
from jaxopd.train.objectives import Objective, ObjectiveConfig, importance_correction, position_loss
from jaxopd.train.vocabulary import token_log_probs, top_tokens

Frozen = tuple[nnx.GraphDef, nnx.State]  # a model that is not trained


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Targets:
    """What a micro-batch's positions are trained on; weights hold the reduction, so losses are sums.

    ids, support, log_q, log_p_old, advantage  [b, S, K] of the distillation objective's tokens
    weights          [b, S]
    sampled_old, outcome, outcome_weights  [b, S] of the outcome reward at the sampled token
    """

    ids: Int[Array, "b S K"]
    support: Bool[Array, "b S K"]
    log_q: Float[Array, "b S K"]
    log_p_old: Float[Array, "b S K"]
    advantage: Float[Array, "b S K"]
    weights: Float[Array, "b S"]
    sampled_old: Float[Array, "b S"]
    outcome: Float[Array, "b S"]
    outcome_weights: Float[Array, "b S"]


class Sums(NamedTuple):
    """What micro-batches add up to; `pushed` counts the tokens of policy gradients, `clipped` those beyond the clip."""

    loss: Float[Array, ""]
    gradients: nnx.State
    pushed: Float[Array, ""]
    clipped: Float[Array, ""]

    @classmethod
    def zeros(cls, params: nnx.State) -> "Sums":
        """Makes the sums of no micro-batch, float32 as all are."""
        gradients = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
        return cls(jnp.zeros(()), gradients, jnp.zeros(()), jnp.zeros(()))


def spread(tree: Any, mesh: Mesh) -> Any:
    """Place arrays over the mesh: split along the largest axis that the devices divide, else a copy on each."""

    def put(x: Array) -> Array:
        axes = [i for i in range(x.ndim) if x.shape[i] % mesh.size == 0 and mesh.size > 1]
        spec = [None] * x.ndim
        if axes:
            spec[max(axes, key=lambda i: x.shape[i])] = mesh.axis_names
        return place(x, NamedSharding(mesh, P(*spec)))

    return jax.tree.map(put, tree)


def response_states(model: Qwen, sequences: Sequences, length: int, remat: bool = False) -> Float[Array, "b S D"]:
    """Compute the hidden states that predict the `length` tokens of each response."""
    hidden = forward(model, sequences.tokens, sequences.mask, remat=remat)
    at = sequences.start[:, None] - 1 + jnp.arange(length)[None]
    return jnp.take_along_axis(hidden, at[..., None], 1)


def _flat(x: Float[Array, "b S D"]) -> Float[Array, "bS D"]:
    return x.reshape(-1, x.shape[-1])


def _cast(params: Any, dtype: str) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype), params)


@partial(jax.jit, static_argnames=("graph", "teacher_graph", "mesh", "split", "k", "dtype"))
def score(
    graph: nnx.GraphDef,
    params: nnx.State,
    teacher_graph: nnx.GraphDef,
    teacher_params: nnx.State,
    student: Sequences,
    teacher: Sequences,
    responses: Int[Array, "b S"],
    *,
    mesh: Mesh,
    k: int,
    dtype: str,
    split: bool = False,
) -> dict[str, Array]:
    """Describe student and teacher at every position: the arrays of `metrics.Scored`, and teacher_states.

    split: whether the teacher is split over the mesh's "model". XLA then partitions its forward pass, and the models
    are compared on shares of the vocabulary; otherwise each device holds the whole teacher and takes its own rows.
    """
    S, by_rows, sampled = responses.shape[1], P(mesh.axis_names), jnp.maximum(responses, 0)

    def student_of(params: nnx.State) -> Qwen:
        return nnx.merge(graph, _cast(params, dtype))

    def rows(params: nnx.State, teacher_params: nnx.State, student: Sequences, teacher: Sequences, sampled: Array):
        p_model, q_model = student_of(params), nnx.merge(teacher_graph, teacher_params)
        hidden_t = response_states(q_model, teacher, S)
        hidden = _flat(response_states(p_model, student, S)), _flat(hidden_t)
        V = min(p_model.head().shape[0], q_model.head().shape[0])
        heads = p_model.head()[:V], q_model.head()[:V]
        found = _described(heads, *hidden, sampled.reshape(-1, 1), k=k, vocab_size=V)
        return _of_positions(found, S) | {"teacher_states": hidden_t}

    if split:
        q_model = nnx.merge(teacher_graph, teacher_params)
        return _score_split(student_of, params, q_model, student, teacher, sampled, mesh, k)
    specs = P(), P(), by_rows, by_rows, by_rows
    over = jax.shard_map(rows, mesh=mesh, in_specs=specs, out_specs=by_rows, check_vma=False)
    return over(params, teacher_params, student, teacher, sampled)


def _score_split(
    student_of: Callable[[nnx.State], Qwen],
    params: nnx.State,
    q_model: Qwen,
    student: Sequences,
    teacher: Sequences,
    sampled: Int[Array, "b S"],
    mesh: Mesh,
    k: int,
) -> dict[str, Array]:
    """Do what `score` does, the teacher's rows split over "data", the student's over all devices."""
    S, by_rows, whole = sampled.shape[1], P(mesh.axis_names), NamedSharding(mesh, P())
    states = partial(response_states, length=S)
    over = jax.shard_map(
        lambda params, student: states(student_of(params), student),
        mesh=mesh, in_specs=(P(), by_rows), out_specs=by_rows, check_vma=False,
    )  # fmt: skip
    hidden_t = states(q_model, jax.lax.with_sharding_constraint(teacher, NamedSharding(mesh, P("data"))))
    heads = jax.lax.with_sharding_constraint(student_of(params).head(), whole), q_model.head()
    describe = partial(_described, k=k, vocab_size=min(head.shape[0] for head in heads))
    given = _flat(over(params, student)), _flat(hidden_t), sampled.reshape(-1, 1)
    found = _of_positions(over_mesh(describe, heads, given, mesh), S) | {"teacher_states": hidden_t}
    # By rows again: states are kept until the update, once instead of on every device that shares the teacher.
    return jax.lax.with_sharding_constraint(found, NamedSharding(mesh, by_rows))


def _described(
    heads: tuple[Array, Array],
    hidden_s: Float[Array, "R Ds"],
    hidden_t: Float[Array, "R Dt"],
    sampled: Int[Array, "R 1"],
    *,
    k: int,
    vocab_size: int,
    axis: str | None = None,
) -> dict[str, Array]:
    """Describe rows; axis: what the heads' rows are split over, as in jaxopd_kernels."""
    hidden, shared = (hidden_s, hidden_t), {"vocab_size": vocab_size, "axis": axis}
    tops = [top_tokens(h, head, min(k, vocab_size), **shared) for h, head in zip(hidden, heads)]
    ids = jnp.concatenate([*tops, sampled], -1)
    pair = pair_statistics(hidden_s, heads[0], hidden_t, heads[1], ids, second_pass=False, **shared)
    return {
        "student_ids": tops[0],
        "teacher_ids": tops[1],
        "log_p": pair.log_p[:, :-1],
        "log_q": pair.log_q[:, :-1],
        "sampled_log_p": pair.log_p[:, -1],
        "sampled_log_q": pair.log_q[:, -1],
        "entropy_student": pair.entropy_student,
        "entropy_teacher": pair.entropy_teacher,
        "reverse_kl": pair.reverse_kl,
    }


def _of_positions(found: dict[str, Array], length: int) -> dict[str, Array]:
    return {name: x.reshape(-1, length, *x.shape[1:]) for name, x in found.items()}


@partial(jax.jit, static_argnames=("graph", "mesh"))
def log_probs_at(
    graph: nnx.GraphDef, params: nnx.State, sequences: Sequences, ids: Int[Array, "b S K"], *, mesh: Mesh
) -> Float[Array, "b S K"]:
    """Compute a model's log-probs of given tokens at the positions of its responses."""

    def rows(params: nnx.State, sequences: Sequences, ids: Array) -> Array:
        model = nnx.merge(graph, params)
        hidden = _flat(response_states(model, sequences, ids.shape[1]))
        return head_statistics(hidden, model.head(), ids=_flat(ids)).log_p.reshape(ids.shape)

    by_rows = P(mesh.axis_names)
    specs = P(), by_rows, by_rows
    over = jax.shard_map(rows, mesh=mesh, in_specs=specs, out_specs=by_rows, check_vma=False)
    return over(params, sequences, ids)


@dataclass(frozen=True)
class LossSettings:
    """What the loss is made of; hashable, so that one compilation serves a run."""

    objective: Objective
    config: ObjectiveConfig
    outcome: bool
    dtype: str
    remat: bool


def micro_loss(
    graph: nnx.GraphDef,
    params: nnx.State,
    settings: LossSettings,
    student: Sequences,
    targets: Targets,
    responses: Int[Array, "b S"],
    teacher_states: Float[Array, "b S Dt"],
    teacher_head: Float[Array, "V Dt"],
) -> tuple[Float[Array, ""], Float[Array, "2"]]:
    """Compute the weighted sum of losses of a micro-batch, differentiable in params; `pushed` and `clipped` of Sums."""
    model = nnx.merge(graph, _cast(params, settings.dtype))
    hidden = _flat(response_states(model, student, responses.shape[1], settings.remat))
    objective, total, counts = settings.objective, jnp.zeros(()), jnp.zeros(2)
    if objective.reach == "full":
        kind, beta = objective.kernel
        pair = hidden, model.head(), _flat(teacher_states), teacher_head
        total = weighted_divergence_loss(*pair, targets.weights.reshape(-1), kind, beta=beta)[0]
        ids = jnp.maximum(responses, 0)[..., None]
    else:
        ids = targets.ids
        if settings.outcome:
            ids = jnp.concatenate([ids, jnp.maximum(responses, 0)[..., None]], -1)
    if objective.reach == "full" and not settings.outcome:
        return total, counts
    V = model.head().shape[0] if not objective.from_teacher else min(model.head().shape[0], teacher_head.shape[0])
    log_p = token_log_probs(hidden, model.head()[:V], _flat(ids)).reshape(ids.shape)
    if objective.reach != "full":
        inside = log_p[..., : targets.ids.shape[-1]]
        total = _weighted(_distillation(settings, inside, targets), targets.weights)
        if objective.loss is None:
            counts = _counts(settings.config, inside, targets.log_p_old, targets.advantage, targets.weights)
    if settings.outcome:
        given = log_p[..., -1:], targets.sampled_old[..., None], targets.outcome[..., None]
        total = total + _weighted(_update(settings.config, *given), targets.outcome_weights)
        counts = counts + _counts(settings.config, *given, targets.outcome_weights)
    return total, counts


def _counts(
    config: ObjectiveConfig, log_p: Array, log_p_old: Array, advantage: Array, weights: Array
) -> Float[Array, "2"]:
    """Count the tokens that a policy gradient pushes, and those among them whose ratio is clipped."""
    pushed = (advantage != 0) & (weights != 0)[..., None]
    clipped = pushed & importance_correction(config).is_limited(log_p, log_p_old, advantage)
    return jnp.stack([jnp.sum(pushed, dtype=jnp.float32), jnp.sum(clipped, dtype=jnp.float32)])


def _weighted(loss: Float[Array, "b S"], weights: Float[Array, "b S"]) -> Float[Array, ""]:
    """Sum the losses that count: what fills a micro-batch up may have none that is finite."""
    return jnp.sum(jnp.where(weights != 0, loss, 0.0) * weights)


def _distillation(settings: LossSettings, log_p: Float[Array, "b S K"], targets: Targets) -> Float[Array, "b S"]:
    if settings.objective.loss is None:
        return _update(settings.config, log_p, targets.log_p_old, targets.advantage)
    counts = {"counts": jnp.ones_like(log_p), "n_samples": jnp.ones_like(log_p[..., 0])}
    position = Position.create(log_p, targets.log_q, support=targets.support, **counts)
    return jax.vmap(jax.vmap(partial(position_loss, settings.objective)))(position)


def _update(config: ObjectiveConfig, log_p: Array, log_p_old: Array, advantage: Array) -> Float[Array, "b S"]:
    return jax.vmap(jax.vmap(importance_correction(config).loss))(log_p, log_p_old, advantage)


@partial(jax.jit, static_argnames=("graph", "settings", "mesh"), donate_argnames=("so_far",))
def add_gradients(
    graph: nnx.GraphDef,
    settings: LossSettings,
    so_far: Sums,
    params: nnx.State,
    student: Sequences,
    targets: Targets,
    responses: Int[Array, "b S"],
    teacher_states: Float[Array, "b S Dt"],
    teacher_head: Float[Array, "V Dt"],
    *,
    mesh: Mesh,
) -> Sums:
    """Add a micro-batch's loss, float32 gradients and counts to those of the micro-batches before it."""

    def rows(params: nnx.State, teacher_head: Array, *rest: Any) -> Sums:
        loss_of = jax.value_and_grad(lambda p: micro_loss(graph, p, settings, *rest, teacher_head), has_aux=True)
        (loss, counts), gradients = loss_of(params)
        return jax.lax.psum(Sums(loss, gradients, *counts), mesh.axis_names)

    by_rows = P(mesh.axis_names)
    specs = P(), P(), by_rows, by_rows, by_rows, by_rows
    over = jax.shard_map(rows, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    return jax.tree.map(jnp.add, so_far, over(params, teacher_head, student, targets, responses, teacher_states))


@partial(jax.jit, static_argnames=("transform",), donate_argnames=("params", "opt_state"))
def apply_gradients(
    transform: optax.GradientTransformation, params: nnx.State, opt_state: Any, gradients: nnx.State
) -> tuple[nnx.State, Any, dict[str, Array]]:
    """Update the parameters; gives the norms of gradient and update before clipping and after."""
    updates, opt_state = transform.update(gradients, opt_state, params)
    norms = {"train/gradient_norm": optax.tree.norm(gradients), "train/update_norm": optax.tree.norm(updates)}
    return optax.apply_updates(params, updates), opt_state, norms
