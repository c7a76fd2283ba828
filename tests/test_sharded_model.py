"""A model split over a mesh computes what one on a single device computes, and lies where it should."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxopd.errors import InputError
from jaxopd.models import Qwen, QwenConfig, forward, hidden_states, init_model, logits
from jaxopd.models.sharding import abstract_model, device_mesh, mesh_of, parameter_shardings

TOY = QwenConfig(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=40,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=6,
    rope_theta=1e4,
    max_positions=64,
    initializer_range=0.3,
)
QWEN2 = {"model_type": "qwen2", "tie_embeddings": False}


def random_model(**fields) -> Qwen:
    """A model whose norms and biases are random too."""
    model, rng = init_model(dataclasses.replace(TOY, **fields)), np.random.default_rng(0)
    nnx.update(model, jax.tree.map(lambda x: x + 0.3 * rng.standard_normal(x.shape, np.float32), nnx.state(model)))
    return model


def split(model: Qwen, devices: int, fsdp: bool) -> Qwen:
    graph, state = nnx.split(model)
    places = parameter_shardings(state, model.config, device_mesh(model=devices), fsdp=fsdp)
    return nnx.merge(graph, jax.device_put(state, places))


@pytest.mark.parametrize(
    "compute, fields, devices, fsdp",
    [
        (logits, {}, 8, False),  # more devices than key heads
        (hidden_states, {}, 4, False),
        (logits, {}, 4, True),
        (logits, QWEN2, 4, False),
        (hidden_states, QWEN2, 2, True),
        (logits, QWEN2, 1, True),
    ],
)
def test_split_model_computes_the_same(compute, fields, devices, fsdp) -> None:
    model = random_model(**fields)
    ids = np.random.default_rng(1).integers(0, TOY.vocab_size, (8, 12))
    mask = np.arange(12)[None] >= np.arange(8)[:, None]  # padding on the left
    found, expected = (np.asarray(compute(m, ids, mask))[mask] for m in (split(model, devices, fsdp), model))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def specs(config: QwenConfig, devices: int, fsdp: bool = False) -> dict[str, P]:
    """How each parameter of the first layer and outside of layers is split."""
    flat = nnx.to_flat_state(abstract_model(config, "bfloat16", device_mesh(model=devices), fsdp=fsdp)[1])
    named = {".".join(map(str, path)).removesuffix(".weight"): x.get_value().sharding.spec for path, x in flat}
    return {name.removeprefix("layers.0."): spec for name, spec in named.items() if "layers.1" not in name}


def test_where_parameters_lie() -> None:
    norms = ("input_layernorm", "post_attention_layernorm", "norm")
    biases = tuple(f"self_attn.{name}_proj.bias" for name in "qkv")
    out = *(f"self_attn.{name}_proj" for name in "qkv"), "mlp.gate_proj", "mlp.up_proj"
    into, tables = ("self_attn.o_proj", "mlp.down_proj"), ("embed_tokens", "lm_head")
    config = dataclasses.replace(TOY, **QWEN2)
    expected = dict.fromkeys(norms, P()) | dict.fromkeys(biases, P("model"))
    assert specs(config, 4) == expected | dict.fromkeys(out + tables, P("model", None)) | dict.fromkeys(
        into, P(None, "model")
    )
    assert specs(config, 4, fsdp=True) == expected | dict.fromkeys(out, P("model", "data")) | dict.fromkeys(
        into, P("data", "model")
    ) | dict.fromkeys(tables, P(("model", "data")))
    whole = specs(config, 1)
    assert whole.keys() == expected.keys() | {*out, *into, *tables}
    assert all(NamedSharding(device_mesh(), spec).is_fully_replicated for spec in whole.values())


@pytest.mark.parametrize(
    "fields, repeated",
    [
        ({"num_heads": 6, "num_kv_heads": 3}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ({"num_kv_heads": 2}, {"k_proj", "v_proj"}),
        ({"vocab_size": 50}, {"embed_tokens"}),
        ({"intermediate_size": 42}, {"gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_what_an_axis_does_not_divide_is_repeated_along_it(fields, repeated) -> None:
    found = specs(dataclasses.replace(TOY, **fields), 4)
    matrices = {name.split(".")[-1]: spec for name, spec in found.items() if "norm" not in name}
    assert {name for name, spec in matrices.items() if "model" not in spec} == repeated


def collectives(devices: int, fsdp: bool) -> set[tuple[str, tuple[int, ...]]]:
    """Which collectives a forward pass of 8 rows has, and how many elements each gives."""
    mesh = device_mesh(model=devices)
    graph, state = abstract_model(TOY, "float32", mesh, fsdp=fsdp)
    rows = [jax.ShapeDtypeStruct((8, 12), kind, sharding=NamedSharding(mesh, P("data"))) for kind in (np.int32, bool)]
    text = jax.jit(lambda s, *given: forward(nnx.merge(graph, s), *given)).lower(state, *rows).compile().as_text()
    pattern = r" = \w+\[([\d,]+)\]\S* (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\("
    return {(op, tuple(sorted(map(int, shape.split(","))))) for shape, op in re.findall(pattern, text)}


def test_tensor_parallelism_sums_activations_and_moves_nothing_else() -> None:
    assert collectives(4, False) == {("all-reduce", (32, 48)), ("all-reduce", (4, 12, 32))}


def test_fsdp_gathers_weights_and_never_sums_their_products() -> None:
    found = collectives(1, True)
    assert {shape for op, shape in found if op == "all-reduce"} <= {(8, 12, 32)}, "of the split table's rows alone"
    assert {(32, 48), (32, 40)} <= {shape for op, shape in found if op == "all-gather"}


def test_mesh_of_a_model() -> None:
    model = init_model(TOY)
    assert mesh_of(model) is None
    assert mesh_of(split(model, 4, False)) == device_mesh(model=4)


def test_devices_that_a_model_cannot_share() -> None:
    with pytest.raises(InputError, match="--model-parallel: found 3, expected a divisor of the number of devices, 8"):
        device_mesh(model=3)
