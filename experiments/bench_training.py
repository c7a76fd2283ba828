"""Where does the time of a training step go, and how does it compare with a plain JAX loop and with TRL's GKD trainer?

    PYTHONPATH=.:kernels python experiments/bench_training.py [--smoke] [--repeats 5]

Two cases, float32, the whole vocabulary, reverse KL. `toy`: the shipped student S learns from T2; a whole step, its
parts, and TRL's GKD trainer where it is installed (its step is the same number of on-policy responses, one update).
`V 151,936`: Qwen3's vocabulary on small bodies; the parts that learn, and one jitted JAX update that materialises
the logits of all positions (`plain JAX`). Floors count operations and bytes that no implementation can do without: for
a part, at the best rates measured here. Contestants run in turns: read the ratios. About 4 minutes on 2 CPU cores.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from benchmarking import (
    Floor,
    MachineFloor,
    Measurement,
    Result,
    arguments,
    interleaved,
    machine_floor,
    with_floor,
    write,
)
from flax import nnx
from training_peers import PlainLoop, gkd_steps

from jaxopd import toy
from jaxopd.models import QwenConfig, init_model
from jaxopd.models.sharding import device_mesh
from jaxopd.train.batch import Sequences
from jaxopd.train.config import TrainConfig
from jaxopd.train.loop import Trainer, optimizer
from jaxopd.train.objectives import ObjectiveConfig, make_objective
from jaxopd.train.step import (
    Frozen,
    LossSettings,
    Sums,
    Targets,
    add_gradients,
    apply_gradients,
    response_states,
    score,
)

FULL, K = ObjectiveConfig("full", k=4), 4
RATE = 1e-7  # so small that responses stay alike over the rounds
VOCABULARY = 151_936
STEPS = 2  # of a whole-step contestant's turn
WARM_STEPS = 10  # before any is timed: batches of long and of short prompts have programs of their own
states = jax.jit(
    lambda graph, state, sequences, length: response_states(nnx.merge(graph, state), sequences, length),
    static_argnums=(0, 3),
)


@dataclass(frozen=True)
class Learning:
    """What a batch of responses is learnt from, on one device."""

    student: Frozen
    teacher: Frozen
    sequences: Sequences
    responses: jax.Array

    @property
    def configs(self) -> list[QwenConfig]:
        return [nnx.merge(*model).config for model in (self.student, self.teacher)]


class Step:
    """The learning parts of a jaxopd step, each callable by itself and all in a row."""

    def __init__(self, learning: Learning):
        self.learning, self.mesh, self.transform = learning, device_mesh(1), optimizer(TrainConfig(teacher=("T=",)))
        self.graph, params = learning.student
        self.params = jax.tree.map(jnp.copy, params)
        self.opt_state = self.transform.init(self.params)
        self.settings = LossSettings(make_objective(FULL), FULL, False, "float32", False)
        self.head = nnx.merge(*learning.teacher).head()
        self.targets = _targets(learning.responses)
        self.states = self.teacher_forward()
        self.summed = self.gradients().gradients

    def forward(self, model: Frozen) -> jax.Array:
        return states(*model, self.learning.sequences, self.learning.responses.shape[1])

    def teacher_forward(self) -> jax.Array:
        return self.forward(self.learning.teacher)

    def student_forward(self) -> jax.Array:
        return self.forward((self.graph, self.params))

    def scoring(self) -> dict[str, jax.Array]:
        x = self.learning
        given = self.graph, self.params, *x.teacher, x.sequences, x.sequences, x.responses
        return score(*given, mesh=self.mesh, k=K, dtype="float32")

    def gradients(self, teacher_states: jax.Array | None = None) -> Sums:
        so_far = Sums.zeros(self.params)
        known = self.states if teacher_states is None else teacher_states
        given = self.learning.sequences, self.targets, self.learning.responses, known, self.head
        return add_gradients(self.graph, self.settings, so_far, self.params, *given, mesh=self.mesh)

    def update(self, gradients: nnx.State | None = None) -> Any:
        given = self.transform, self.params, self.opt_state, self.summed if gradients is None else gradients
        self.params, self.opt_state, norms = apply_gradients(*given)
        return norms

    def __call__(self) -> Any:
        return self.update(self.gradients(self.scoring()["teacher_states"]).gradients)


def _targets(responses: jax.Array) -> Targets:
    """Those of the full-vocabulary mean over tokens, which reads weights alone."""
    one = jnp.zeros(responses.shape, jnp.float32)
    many, mask = one[..., None], (responses >= 0).astype(jnp.float32)
    return Targets(many.astype(int), many > 0, many, many, many, mask / mask.sum(), one, one, one)


def large_vocabulary(smoke: bool) -> Learning:
    """Random models with Qwen3's vocabulary, 8 responses of 64 tokens."""
    V, b, S = (2048, 2, 8) if smoke else (VOCABULARY, 8, 64)
    shapes = (QwenConfig(V, 128, 384, 2, 4, 2, 32), QwenConfig(V, 256, 768, 2, 8, 2, 32))
    student, teacher = (nnx.split(init_model(shape, seed=seed)) for seed, shape in enumerate(shapes))
    rng = np.random.default_rng(0)
    responses = rng.integers(0, V, (b, S)).astype(np.int32)
    sequences = Sequences.join(rng.integers(0, V, (b, 16)).tolist(), responses, 16)
    return Learning(student, teacher, *jax.tree.map(jnp.asarray, (sequences, responses)))


def floors(learning: Learning, machine: MachineFloor) -> dict[str, Floor]:
    """Bounds each learning part: bodies cost 2 FLOP a parameter and token, heads 2 V D a row and pass."""
    (student, teacher), (b, S) = learning.configs, learning.responses.shape
    tokens, rows = learning.sequences.tokens.size, b * S
    bodies = [_parameters(model) - config.vocab_size * config.hidden_size for model, config in _models(learning)]
    heads = [2 * rows * config.vocab_size * config.hidden_size for config in (student, teacher)]
    forward = [2 * tokens * body for body in bodies]
    P = _parameters(learning.student)
    flops = {
        "teacher forward": forward[1],
        "student forward": forward[0],
        "scoring": sum(forward) + sum(heads),
        "gradients": 3 * forward[0] + 3 * heads[0] + heads[1],
        "update": 0,
    }
    flops["learning"] = forward[1] + flops["gradients"]
    moved = {"update": 28 * P, "learning": 28 * P}  # of parameters and two moments read and written, gradients read
    return {
        name: machine.at_least(flops=count, dtype="float32", read=moved.get(name, 0)) for name, count in flops.items()
    }


def _models(learning: Learning) -> list[tuple[Frozen, QwenConfig]]:
    return list(zip((learning.student, learning.teacher), learning.configs, strict=True))


def _parameters(model: Frozen) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(model[1]))


def learnt(case: str, learning: Learning, machine: MachineFloor, repeats: int) -> list[Measurement]:
    """Times the learning parts, and the plain loop beside all of them."""
    step, known = Step(learning), floors(learning, machine)
    plain = PlainLoop(
        learning.student,
        learning.teacher,
        learning.sequences,
        learning.responses,
        optimizer(TrainConfig(teacher=("T=",))),
    )
    contestants: dict[str, Callable[[], Any]] = {
        "learning": step,
        "plain JAX": plain,
        "scoring": step.scoring,
        "teacher forward": step.teacher_forward,
        "student forward": step.student_forward,
        "gradients": step.gradients,
        "update": step.update,
    }
    for update in (step, plain):  # compiled again for arrays that lie where an update leaves them
        jax.block_until_ready([update(), update()])
    rows = interleaved(contestants, case=case, repeats=repeats, work=learning.responses.size, unit="tok")
    held = {"plain JAX": plain.temporaries, "gradients": _temporaries(step)}
    known["plain JAX"] = known["learning"]
    extra = {name: {"GB temporaries": size} for name, size in held.items()}
    return [with_floor(row, known[row.name], **extra.get(row.name, {})) if row.seconds else row for row in rows]


def _temporaries(step: Step) -> float:
    so_far = Sums.zeros(step.params)
    given = step.learning.sequences, step.targets, step.learning.responses, step.states, step.head
    lowered = add_gradients.lower(step.graph, step.settings, so_far, step.params, *given, mesh=step.mesh)
    return lowered.compile().memory_analysis().temp_size_in_bytes / 1e9


def toy_trainer(folder: Path, smoke: bool) -> Trainer:
    rows = 4 if smoke else 32
    config = TrainConfig(
        student=str(toy.MODELS / "S"),
        teacher=(f"T2={toy.MODELS / 'T2'}",),
        task="toy",
        questions=f"all:{rows}:7",
        objective=FULL,
        steps=10**6,
        batch=rows,
        mini_batch=rows,
        rollouts=1,
        micro_batch=rows,
        max_tokens=64,
        learning_rate=RATE,
        save_every=10**6,
        show_every=0,
    )
    return Trainer(config, folder / "run", mesh=device_mesh(1))


def whole_steps(trainer: Trainer, folder: Path, machine: MachineFloor, repeats: int) -> list[Measurement]:
    """Times whole steps against TRL's, and the rollouts alone."""
    rows, new = trainer.config.batch, trainer.config.max_tokens
    case = f"toy, {rows} prompts x 1 response, {STEPS} steps"

    def ours() -> Any:
        for _ in range(STEPS):
            trainer.advance()
        return trainer.params

    contestants: dict[str, Callable[[], Any]] = {"jaxopd step": ours}
    paths = toy.MODELS / "S", toy.MODELS / "T2"
    texts = [question.text for question in trainer.setup.questions] * STEPS
    note = ""
    try:
        contestants["TRL GKD step"] = gkd_steps(
            *paths, texts, rows=rows, steps=STEPS, new=new, rate=RATE, out=folder / "trl"
        )
    except ImportError as error:
        note = f"not installed: {error.name}"
    contestants["rollout"] = lambda: [trainer.collect.draw(trainer.params, step).responses for step in range(STEPS)]
    for _ in range(WARM_STEPS):
        trainer.advance()
    found = interleaved(contestants, case=case, repeats=repeats, work=STEPS, unit="steps")
    body = _parameters((trainer.graph, trainer.params))
    tokens = trainer.collect.draw(trainer.params, 0).length.sum() + sum(map(len, trainer.setup.prompts))
    floor = machine.at_least(flops=2 * STEPS * body * tokens, dtype="float32", read=STEPS * new * 4 * body)
    found = [with_floor(row, floor) if row.name == "rollout" else row for row in found]
    return found if not note else [*found, Measurement(case, "TRL GKD step", note=note)]


def toy_learning(trainer: Trainer) -> Learning:
    """The learning of the trainer's first batch."""
    _, updates = trainer.collect.score(trainer.params, trainer.collect.draw(trainer.params, 0))
    micro, teacher = updates[0][0], trainer.setup.teachers[0]
    given = jax.tree.map(jnp.asarray, (micro.student, micro.responses))
    params = jax.tree.map(jnp.copy, trainer.params)  # a step of the trainer gives its own away
    return Learning((trainer.graph, params), (teacher.graph, teacher.state), *given)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    repeats = 2 if options.smoke else options.repeats
    machine = machine_floor(smoke=options.smoke)
    with tempfile.TemporaryDirectory() as name:
        trainer = toy_trainer(Path(name), options.smoke)
        learning = toy_learning(trainer)
        rows = whole_steps(trainer, Path(name), machine, repeats)
        rows += learnt("toy, learning", learning, machine, repeats)
    learning = large_vocabulary(options.smoke)
    V, (b, S) = learning.configs[0].vocab_size, learning.responses.shape
    rows += learnt(f"V {V:,}, {b} x {S} positions", learning, machine, repeats)
    settings = {"smoke": options.smoke, "repeats": repeats, "threads": "all cores, torch and jax alike"}
    write(Result("bench_training", machine, rows, settings), options.folder)


if __name__ == "__main__":
    main()
