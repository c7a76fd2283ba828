"""The memory plan of a training step: what each of its phases will hold, computed before the first one runs."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxopd_kernels.loss import wave_shape
from jaxopd_kernels.xla import CHUNK_BYTES_CPU

from jaxopd.models import QwenConfig
from jaxopd.models.attention import BLOCK
from jaxopd.models.sharding import gathered_bytes, held_bytes, part_of
from jaxopd.rollouts.plan import MemoryPlan, device_budget, over_devices, plan_memory
from jaxopd.train.config import TrainConfig
from jaxopd.train.objectives import make_objective
from jaxopd.train.setup import Setup, Teacher
from jaxopd.train.vocabulary import WAVE_BYTES

FLOAT = 4  # bytes of a float32
# Arrays of a wave's or chunk's logits that exist at a time, as compiled programs hold them on a CPU; others fuse more.
LOSS_COPIES, SCORING_COPIES = 4, 5


@dataclass(frozen=True)
class TrainingPlan:
    """Bytes over all devices of a step whose prompts and responses have the largest length.

    masters, optimizer  float32 parameters and their two moments
    teachers            every teacher's parameters, and those of the base of reward extrapolation
    states              a batch's teacher hidden states, which full-vocabulary objectives are trained on
    weights             the student in the precision that it computes in
    gradients           float32 sums so far, and those of a micro-batch
    activations         of a micro-batch, kept for the backward pass, and the layer being differentiated
    head                the vocabulary's part of the loss: a wave of logits, the gradients of head and hidden states,
                        and on each device the head of a teacher that is split over them
    scoring             both models' forward pass, a layer at a time, a chunk of logits, and what is gathered
                        of a teacher
    """

    masters: int
    optimizer: int
    teachers: int
    states: int
    weights: int
    gradients: int
    activations: int
    activations_with_remat: int
    head: int
    scoring: int
    rollout: MemoryPlan
    budget: int

    @property
    def held(self) -> int:
        """What every phase holds."""
        return self.masters + self.optimizer + self.teachers

    @property
    def phases(self) -> dict[str, int]:
        """Everything held in each phase of a step."""
        return {
            "rollout": self.held + self.rollout.total,
            "scoring": self.held + self.states + self.weights + self.scoring,
            "update": self.held + self.states + self.weights + self.gradients + self.activations + self.head,
        }

    @property
    def total(self) -> int:
        return max(self.phases.values())

    def __str__(self) -> str:
        def listed(*names: str) -> str:
            return ", ".join(f"{name} {getattr(self, name) / 1e9:.3g}" for name in names)

        rollout, scoring, update = (f"{size / 1e9:.3g}" for size in self.phases.values())
        advice = ": more than there is; a smaller micro_batch or remat takes less" if self.total > self.budget else ""
        return (
            f"memory plan of a step: {self.total / 1e9:.3g} of {self.budget / 1e9:.3g} GB{advice}\n"
            f"  throughout ({listed('masters', 'optimizer', 'teachers')})\n"
            f"  rollout {rollout}: {self.rollout}\n"
            f"  scoring {scoring} ({listed('states', 'weights', 'scoring')})\n"
            f"  update {update} ({listed('states', 'weights', 'gradients', 'activations', 'head')}; activations with "
            f"remat, on an accelerator: {self.activations_with_remat / 1e9:.3g})"
        )


@dataclass(frozen=True)
class Reader:
    """A model that reads `rows` of `width` positions in one pass, each copy split over `shards` devices."""

    config: QwenConfig
    rows: int
    width: int
    shards: int = 1
    gathered: int = 0  # bytes on all devices, of what is split over "data" besides


def plan_training(config: TrainConfig, setup: Setup, budget: int | None = None) -> TrainingPlan:
    """Plans a step of micro-batches of b rows and W positions, S of them in the response, over n devices.

    With P parameters, e bytes a number of the computing precision, L layers that keep `kept_by_layer` A and compute in
    `layer_workspace` X:

        masters, optimizer    4 P, 8 P              gradients      8 n P
        weights               n e P for e < 4       activations    L A + X;  with remat L b W D e + A + X
                              and 4 n P for n > 1   states         responses S D_t e

    Masters and optimizer are spread over the devices and gathered where they are used; rows are split over them.
    budget: what may be used, default `device_budget`, which on a CPU is what is free: ask before models are loaded.
    """
    n, b, S, W = setup.mesh.size, config.micro_batch, config.max_tokens, setup.width + config.max_tokens
    student, e = setup.model_config, jnp.dtype(config.dtype).itemsize
    P = sum(leaf.size for leaf in jax.tree.leaves(setup.initial))
    full = make_objective(config.objective).reach == "full"
    readers = [Reader(student, b, W), *(_reader(t, b, S, setup.mesh) for t in setup.teachers if t.state is not None)]
    frozen = sum(held_bytes(t.state) for t in setup.teachers) + n * FLOAT * P * (config.objective.reward_scale != 1)
    split = [nnx.merge(t.graph, t.state).config for t in setup.teachers if t.split]
    head = max((config.vocab_size * config.hidden_size * e for config in split), default=0) * full
    weights = n * P * (e * (e < FLOAT) + FLOAT * (n > 1))
    width = max(r.config.hidden_size for r in readers)
    vocabulary = student.vocab_size + max(r.config.vocab_size for r in readers)
    budget = device_budget(setup.mesh) if budget is None else budget
    return TrainingPlan(
        masters=FLOAT * P,
        optimizer=2 * FLOAT * P,
        teachers=frozen,
        states=config.batch * config.group * S * width * e * full,
        weights=weights,
        gradients=2 * n * FLOAT * P,
        activations=activation_bytes(student, b, W, e, recomputes(config.remat)),
        activations_with_remat=activation_bytes(student, b, W, e, True),
        head=n * (head + head_bytes(student, vocabulary, b * S // n, full)),
        scoring=scoring_bytes(readers, vocabulary, S, n),
        rollout=plan_memory(
            student,
            jnp.dtype(config.dtype),
            weights=weights,
            trunks=min(config.batch, len(setup.questions)),
            trunk_length=max(map(len, setup.prompts)),
            most=config.rollouts,
            max_tokens=S,
            slots=config.slots,
            mesh=setup.engine_mesh,
            budget=budget - 3 * FLOAT * P - frozen,
        ),
        budget=budget,
    )


def _reader(teacher: Teacher, rows: int, length: int, mesh: jax.sharding.Mesh) -> Reader:
    config, split = nnx.merge(teacher.graph, teacher.state).config, teacher.split
    gathered = gathered_to_read(config, teacher.state) if split else 0
    return Reader(config, rows, teacher.width + length, mesh.shape["model"] if split else 1, gathered)


def recomputes(remat: bool) -> bool:
    """Says whether remat saves memory here: on a CPU, XLA merges the second computation with the first."""
    return remat and jax.default_backend() != "cpu"


def activation_bytes(config: QwenConfig, rows: int, width: int, itemsize: int, remat: bool) -> int:
    """Counts what all layers keep for the backward pass, or only their inputs, and the layer that is in work."""
    layer = kept_by_layer(config, rows, width)
    inputs = rows * width * config.hidden_size * itemsize
    kept = config.num_layers * inputs + layer if remat else config.num_layers * layer
    return kept + layer_workspace(config, rows, width)


def kept_by_layer(config: QwenConfig, rows: int, width: int) -> int:
    """Counts what a layer keeps for its backward pass: per position 6 D + 5 I + 8 H h + 4 K h float32 numbers.

    And 13 H W / 4 of scores, unless `causal_attention` takes the sequence in blocks, whose scores it computes again.
    Fitted to programs compiled for a CPU; an accelerator keeps bfloat16 as such.
    """
    heads = (8 * config.num_heads + 4 * config.num_kv_heads) * config.head_dim
    scores = 13 * config.num_heads * width // 4 if width <= BLOCK else 0
    numbers = 6 * config.hidden_size + 5 * config.intermediate_size + heads + scores
    return FLOAT * rows * width * numbers


def layer_workspace(config: QwenConfig, rows: int, width: int) -> int:
    """Counts three float32 copies of a block's scores, or of the inner MLP state where that is larger."""
    return 3 * FLOAT * rows * max(config.num_heads * min(width, BLOCK) * width, config.intermediate_size * width)


def head_bytes(config: QwenConfig, vocabulary: int, rows: int, full: bool) -> int:
    """Counts LOSS_COPIES of a wave of logits, and float32 gradients of the head and, thrice, of hidden states.

    vocabulary: columns of all models together, which a full-vocabulary loss goes through; others see the student's.
    """
    columns = vocabulary if full else config.vocab_size
    wave = wave_shape(rows, FLOAT * columns)[1] if full else min(rows, max(1, WAVE_BYTES // (FLOAT * columns)))
    logits = LOSS_COPIES * FLOAT * columns * wave
    return logits + FLOAT * config.hidden_size * (config.vocab_size + 3 * rows)


def gathered_to_read(config: QwenConfig, state: nnx.State) -> int:
    """Counts what all devices gather of a model split over "data", at a time: a layer's matrices, then the head."""
    leaf = jax.tree.leaves(state)[0]
    if not (matrices := gathered_bytes(state)):
        return 0
    mesh = leaf.sharding.mesh
    head = mesh.size * part_of(config.vocab_size, mesh.shape["model"]) * config.hidden_size * leaf.dtype.itemsize
    return max(matrices // config.num_layers, head)


def scoring_bytes(readers: list[Reader], vocabulary: int, length: int, devices: int) -> int:
    """Counts the largest layer's workspace, two copies of every model's hidden states, and chunks of logits.

    Heads and FFN are split over a model's shards, hidden states are not: rows lie over the other devices alone.
    """
    layers = max(layer_workspace(over_devices(r.config, r.shards), r.rows, r.width) for r in readers)
    hidden = sum(2 * FLOAT * r.rows * r.shards * r.width * r.config.hidden_size for r in readers)
    chunk = min(devices * CHUNK_BYTES_CPU, FLOAT * vocabulary * max(r.rows for r in readers) * length)
    return layers + hidden + sum(r.gathered for r in readers) + SCORING_COPIES * chunk
