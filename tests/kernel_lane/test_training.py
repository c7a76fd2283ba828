"""A training step for hardware that is not here: Qwen3-0.6B's shape under an 8B-shaped teacher, compiled for an H200.

Needs Python 3.12 and kernels/requirements-lane.txt. Run: pytest -s -m kernel_lane tests/kernel_lane/test_training.py
"""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import jaxopd_kernels.loss
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxopd_kernels import choice

from jaxopd.models import QwenConfig, init_model
from jaxopd.train.batch import Sequences
from jaxopd.train.config import TrainConfig
from jaxopd.train.loop import optimizer
from jaxopd.train.objectives import ObjectiveConfig, make_objective
from jaxopd.train.plan import activation_bytes, head_bytes
from jaxopd.train.step import LossSettings, Sums, Targets, add_gradients, apply_gradients, score

pytestmark = pytest.mark.kernel_lane

V, KV, h = 151_936, 8, 128
STUDENT = QwenConfig(V, 1024, 3072, 28, 16, KV, h, max_positions=40960, tie_embeddings=True)
TEACHER = QwenConfig(V, 4096, 12288, 36, 32, KV, h, max_positions=40960, tie_embeddings=False)
ROWS, RESPONSE, PROMPT, K = 8, 1024, 1024, 16
LARGEST_WORKSPACE = 4e9


@pytest.fixture(autouse=True)
def _as_on_an_h200(monkeypatch):
    """What asks for the device at hand would find the CPU that compiles."""
    monkeypatch.setattr(choice, "local_kind", lambda: "NVIDIA H200")
    monkeypatch.setattr(jaxopd_kernels.loss, "WAVE_BYTES_CPU", jaxopd_kernels.loss.WAVE_BYTES)


@pytest.fixture(scope="module")
def mesh(device) -> Mesh:
    return Mesh(device("h200").mesh.devices, "data")


def placed(tree, mesh: Mesh):
    """The shapes of a tree's arrays, on the one device."""
    everywhere = NamedSharding(mesh, P())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), tree)


def model(config: QwenConfig, dtype: str, mesh: Mesh) -> tuple[nnx.GraphDef, nnx.State]:
    graph, state = nnx.split(nnx.eval_shape(lambda: init_model(config, dtype=dtype)))
    return graph, placed(state, mesh)


def batch(mesh: Mesh) -> tuple[Sequences, Targets, jax.ShapeDtypeStruct]:
    """Sequences, targets and responses of a micro-batch."""

    def array(*shape: int, dtype=jnp.float32) -> np.ndarray:
        return np.empty(shape, dtype)

    one, each = (ROWS, RESPONSE), (ROWS, RESPONSE, 2 * K)
    width = PROMPT + RESPONSE
    sequences = Sequences(
        array(ROWS, width, dtype=jnp.int32), array(ROWS, width, dtype=bool), array(ROWS, dtype=jnp.int32)
    )
    found = (
        array(*each, dtype=jnp.int32),
        array(*each, dtype=bool),
        *(array(*each) for _ in range(3)),
        *(array(*one) for _ in range(4)),
    )
    return placed((sequences, Targets(*found), array(*one, dtype=jnp.int32)), mesh)


def nbytes(tree) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def largest_array(text: str) -> int:
    """The elements of the largest array of a compiled program."""
    shapes = set(re.findall(r"\b(?:f32|bf16|f16|s32|u32|pred)\[([\d,]+)\]", text))
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def gradients_on(mesh: Mesh, objective: str, student: QwenConfig):
    graph, params = model(student, "float32", mesh)
    config = ObjectiveConfig(objective, k=K)
    settings = LossSettings(make_objective(config), config, False, "bfloat16", True)
    sequences, targets, responses = batch(mesh)
    wide = TEACHER.hidden_size if settings.objective.reach == "full" else 1
    states, head = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((ROWS, RESPONSE, wide), (V, wide)))
    number = jax.ShapeDtypeStruct((), jnp.float32)
    so_far = placed(Sums(number, params, number, number), mesh)
    arguments = so_far, params, sequences, targets, responses, *placed((states, head), mesh)
    return add_gradients.lower(graph, settings, *arguments, mesh=mesh).compile()


# Top-k with a few of the layers: with all 28 it compiles for minutes, to 4.10 GB.
@pytest.mark.parametrize(("objective", "layers"), [("full", STUDENT.num_layers), ("topk_paper", 4)])
def test_gradients_of_8_192_positions_fit_beside_an_8b_teacher(objective, layers, mesh, capsys) -> None:
    student = dataclasses.replace(STUDENT, num_layers=layers)
    compiled = gradients_on(mesh, objective, student)
    taken = compiled.memory_analysis().temp_size_in_bytes
    _, params = model(student, "bfloat16", mesh)
    weights, inputs = nbytes(params), layers * ROWS * (PROMPT + RESPONSE) * student.hidden_size * 2
    planned = activation_bytes(student, ROWS, PROMPT + RESPONSE, 2, True) + 3 * weights
    planned += head_bytes(student, 2 * V, ROWS * RESPONSE, objective == "full")
    largest = largest_array(compiled.as_text())
    with capsys.disabled():
        print(
            f"\n{objective}, {layers} layers, loss and gradients of {ROWS} x {RESPONSE:,} positions after prompts of "
            f"{PROMPT:,}, on an H200: {taken:,} bytes of temporaries ({planned:,} planned), of which {weights:,} "
            f"bfloat16 weights, {inputs:,} inputs of layers, {taken - weights - inputs:,} the rest; largest array "
            f"{largest:,} elements"
        )
    assert taken - weights - inputs < LARGEST_WORKSPACE
    assert taken < planned
    assert largest < ROWS * RESPONSE * V


def test_scoring_fits_beside_an_8b_teacher(mesh, capsys) -> None:
    sequences, _, responses = batch(mesh)
    student, teacher = model(STUDENT, "float32", mesh), model(TEACHER, "bfloat16", mesh)
    given = *student, *teacher, sequences, sequences, responses
    compiled = score.lower(*given, mesh=mesh, k=K, dtype="bfloat16").compile()
    taken, weights = compiled.memory_analysis().temp_size_in_bytes, nbytes(model(STUDENT, "bfloat16", mesh)[1])
    with capsys.disabled():
        print(f"\nscoring on an H200: {taken:,} bytes of temporaries, of which {weights:,} bfloat16 weights")
    assert taken - weights < LARGEST_WORKSPACE
    assert largest_array(compiled.as_text()) < ROWS * RESPONSE * V


def test_an_update_happens_in_place(mesh, capsys) -> None:
    _, params = model(STUDENT, "float32", mesh)
    transform = optimizer(TrainConfig(teacher=("T=",)))
    opt_state = placed(jax.eval_shape(transform.init, params), mesh)
    compiled = apply_gradients.lower(transform, params, opt_state, params).compile()
    taken = compiled.memory_analysis().temp_size_in_bytes
    with capsys.disabled():
        print(f"\nupdate on an H200: {taken:,} bytes of temporaries for {nbytes(params):,} of parameters")
    assert taken < 0.1 * nbytes(params)


def test_the_check_sees_logits_where_there_are_some(mesh) -> None:
    hidden, head = (
        jax.ShapeDtypeStruct((ROWS * RESPONSE, 64), jnp.bfloat16),
        jax.ShapeDtypeStruct((V, 64), jnp.bfloat16),
    )
    naive = jax.jit(lambda x, head: jax.nn.log_softmax(x @ head.T)).lower(*placed((hidden, head), mesh)).compile()
    assert largest_array(naive.as_text()) >= ROWS * RESPONSE * V
