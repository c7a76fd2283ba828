"""A teacher of Qwen3-32B's shape on eight devices that are not here: memory of each, and what crosses between them.

Needs Python 3.12 and kernels/requirements-lane.txt. Run:
pytest -s -m kernel_lane tests/kernel_lane/test_large_teacher.py
"""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxopd_kernels import choice

from jaxopd import scoring
from jaxopd.models import QwenConfig, forward
from jaxopd.models.sharding import abstract_model, device_mesh
from jaxopd.responses import TOKENS_AT_ONCE

pytestmark = pytest.mark.kernel_lane

V, KV, h = 151_936, 8, 128
STUDENT = QwenConfig(V, 1024, 3072, 28, 16, KV, h, max_positions=40960, tie_embeddings=True)
TEACHER = QwenConfig(V, 5120, 25600, 64, 64, KV, h, max_positions=40960, tie_embeddings=False)
DEVICES, WIDTH = 8, 1024  # tokens of a row
MEMORY = {"NVIDIA H200": 141e9}  # bytes of a device


def forward_on(mesh: Mesh, layers: int, fsdp: bool):
    """A forward pass of as many rows as `jaxopd.responses` takes, compiled."""
    graph, state = abstract_model(dataclasses.replace(TEACHER, num_layers=layers), "bfloat16", mesh, fsdp=fsdp)
    shape, place = (mesh.shape["data"] * TOKENS_AT_ONCE // WIDTH, WIDTH), NamedSharding(mesh, P("data"))
    rows = (jax.ShapeDtypeStruct(shape, dtype, sharding=place) for dtype in (jnp.int32, jnp.bool_))
    return jax.jit(lambda state, *rows: forward(nnx.merge(graph, state), *rows)).lower(state, *rows).compile()


def memory(compiled) -> np.ndarray:
    """Bytes of a device: arguments, temporaries, output."""
    found = compiled.memory_analysis()
    return np.array([found.argument_size_in_bytes, found.temp_size_in_bytes, found.output_size_in_bytes])


def held(state: nnx.State) -> tuple[int, int]:
    """Bytes of a model's parameters: on one device, and in all."""
    leaves = jax.tree.leaves(state)
    return tuple(
        sum(math.prod(shape(x)) * x.dtype.itemsize for x in leaves)
        for shape in (lambda x: x.sharding.shard_shape(x.shape), lambda x: x.shape)
    )


def collectives(compiled) -> list[tuple[str, int]]:
    """The collectives of a program and how many elements the largest array of each has on a device."""
    pattern = r" = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
    found = re.findall(pattern, compiled.as_text())
    return [(op, max(math.prod(map(int, s.split(","))) for s in re.findall(r"\[([\d,]+)\]", out))) for out, op in found]


def told(name: str, model: int, fsdp: bool) -> str:
    return f"{DEVICES // model} x {model} of {name}{', fsdp' if fsdp else ''}"


# Of two numbers of layers the difference is what each further layer adds; all 64 compile for most of a minute.
@pytest.mark.parametrize("name, model, fsdp, layers", [("h200", 8, False, [64]), ("h200", 4, True, [4, 8])])
def test_a_forward_pass_fits(name, model, fsdp, layers, devices, capsys) -> None:
    mesh = device_mesh(devices(name, DEVICES), model=model)
    compiled = [forward_on(mesh, n, fsdp) for n in layers]
    taken = [memory(program) for program in compiled]
    if len(layers) > 1:
        taken.append(taken[-1] + (taken[1] - taken[0]) * (TEACHER.num_layers - layers[1]) / (layers[1] - layers[0]))
    one, whole = held(abstract_model(TEACHER, "bfloat16", mesh, fsdp=fsdp)[1])
    arguments, temporaries, output = taken[-1]
    with capsys.disabled():
        print(
            f"\n{told(name, model, fsdp)}, {TOKENS_AT_ONCE:,} tokens a copy, compiled with {layers} layers: "
            f"a device has {one:,} of {whole:,} bytes of weights; forward {arguments:,.0f} of arguments (no head), "
            f"{temporaries:,.0f} of temporaries, {output:,.0f} of output"
        )
    assert one < 1.01 * whole / DEVICES
    head = V * TEACHER.hidden_size * 2 // DEVICES
    assert arguments + head == pytest.approx(one, rel=1e-3)
    assert one + temporaries + output < 0.8 * MEMORY[mesh.devices.flat[0].device_kind]

    crossing = collectives(compiled[-1])
    sums, activations = [size for op, size in crossing if op == "all-reduce"], TOKENS_AT_ONCE * TEACHER.hidden_size
    # A layer's two, and the embedding's: with fsdp each device looks up the rows of all in its part of the table.
    assert sorted(sums) == [activations] * 2 * layers[-1] + [activations * mesh.shape["data"]]
    assert fsdp or len(crossing) == len(sums)


def test_scoring_against_a_small_student_fits(devices, monkeypatch, capsys) -> None:
    mesh = device_mesh(devices("h200", DEVICES), model=DEVICES)
    monkeypatch.setattr(choice, "local_kind", lambda: mesh.devices.flat[0].device_kind)
    student, teacher = (nnx.merge(*abstract_model(config, "bfloat16", mesh)) for config in (STUDENT, TEACHER))
    heads = [table.weight.get_value() for table in (student.embed_tokens, teacher.lm_head)]
    place = NamedSharding(mesh, P("data"))
    rows = [jax.ShapeDtypeStruct((scoring.BLOCK, head.shape[1]), jnp.bfloat16, sharding=place) for head in heads]
    ids = jax.ShapeDtypeStruct((scoring.BLOCK, 16), jnp.int32, sharding=place)
    settings = {"vocab_size": V, "second_pass": True, "implementation": None}
    compiled = scoring._pair.lower(*heads, *rows, ids, forms=(), mesh=mesh, **settings).compile()
    arguments, temporaries, output = memory(compiled)
    with capsys.disabled():
        print(
            f"\nscoring {scoring.BLOCK:,} positions on {told('h200', DEVICES, False)}: {arguments:,} bytes of "
            f"arguments, {temporaries:,} of temporaries, {output:,} of output a device"
        )
    assert arguments < 1.1 * sum(head.size * 2 for head in heads) / DEVICES + sum(x.size * 2 for x in rows)
    assert temporaries < 1e9
    assert not {head.size for head in heads} & {size for _, size in collectives(compiled)}, "a head is gathered"
