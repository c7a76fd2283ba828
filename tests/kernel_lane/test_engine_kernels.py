"""The engine with the trunk-attention kernels in it, without their hardware: interpreted, lowered, and really compiled.

Needs Python 3.12 and kernels/requirements-lane.txt. Run: pytest -m kernel_lane tests/kernel_lane
"""

import dataclasses
import re
from contextlib import nullcontext

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxopd.models import QwenConfig, init_model
from jaxopd.models.sharding import device_mesh
from jaxopd.rollouts import Engine, Requests, Sampling, decode
from jaxopd.rollouts.layout import Layout
from jaxopd.rollouts.suffix import PAGE, RING, Pages, Ring
from jaxopd.rollouts.wave import trunk_bucket

pytestmark = pytest.mark.kernel_lane

TINY = QwenConfig(97, 64, 64, 2, 4, 2, 128, max_positions=512, initializer_range=0.15)
QWEN3_06B = QwenConfig(151936, 1024, 3072, 28, 16, 8, 128, max_positions=40960, rope_theta=1e6, tie_embeddings=True)
SLOTS, TRUNK, HELD, QUEUE = 256, trunk_bucket(2000), 512, 1024  # HELD: private tokens a slot
LARGEST_SPILL, LARGEST_SHARED_MEMORY = 64, 232_448
INTERPRETED = {
    "xla": nullcontext,
    "hopper": lambda: plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()),
    "tpu": lambda: pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()),
}


@pytest.fixture(scope="module")
def rollouts_of():
    """A function from an implementation to the rollouts of the same 40 requests on two trunks, in groups of slots."""
    rng = np.random.default_rng(0)
    model = init_model(TINY, seed=1, dtype="bfloat16")
    trunks = [rng.integers(0, 97, n) for n in (150, 90)]
    cut = np.concatenate([[1], rng.integers(1, 91, 39)])  # the first attends to nothing of its trunk
    requests = Requests(np.arange(40) % 2, cut, np.full(40, -1), np.arange(40))

    def run(attention: str | None):
        return Engine(model, slots=32, mesh=device_mesh(1), attention=attention).run(
            trunks, requests, Sampling(5, seed=3)
        )

    return run


@pytest.fixture(scope="module")
def plain(rollouts_of):
    return rollouts_of(None)


@pytest.mark.parametrize("attention", INTERPRETED)
def test_every_implementation_gives_the_tokens_of_the_plain_path(rollouts_of, plain, attention) -> None:
    with INTERPRETED[attention]():
        again = rollouts_of(attention)
    np.testing.assert_array_equal(again.tokens, plain.tokens)
    np.testing.assert_allclose(again.raw_logp, plain.raw_logp, atol=3e-2, rtol=0)  # weights are rounded to bfloat16


def traced_block(config: QwenConfig, layout: Layout):
    """Traces a block of decoding steps of SLOTS slots on one trunk, for the layout's device, without an array."""
    graph, state = nnx.split(nnx.eval_shape(lambda: init_model(config, dtype="bfloat16")))
    everywhere = layout.sharding(P())

    def array(*shape: int, dtype=jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

    def caches(*outer: int, length: int) -> list[list[jax.ShapeDtypeStruct]]:
        one = array(*outer, config.num_kv_heads, length, config.head_dim, dtype=jnp.bfloat16)
        return [[one] * config.num_layers for _ in "kv"]

    pages = SLOTS * HELD // PAGE
    slot, request = array(1, SLOTS), array(1, QUEUE)
    return decode.decode_block.trace(
        graph,
        jax.tree.map(lambda leaf: array(*leaf.shape, dtype=leaf.dtype), state),
        decode.Trunks(*caches(1, length=TRUNK)),
        Pages(*caches(1, pages, length=PAGE), array(1, pages), array(1, pages)),
        decode.Queue(request, request, request, request, array(1)),
        Ring(*caches(SLOTS, length=RING)),
        decode.Slots(slot, slot, slot, slot, array(1)),
        array(),
        (array(dtype=jnp.uint32), *(array(dtype=jnp.float32) for _ in "tp"), array(), array(8)),
        layout,
    )


def layout_on(sharding: jax.sharding.NamedSharding, attention: str | None = None) -> Layout:
    return Layout(1, SLOTS, Mesh(sharding.mesh.devices, "data"), attention)


def holds_scores(text: str) -> bool:
    """Whether a compiled program holds the scores of every slot and head against the whole trunk."""
    rows = SLOTS * QWEN3_06B.num_heads // QWEN3_06B.num_kv_heads
    return bool(re.search(rf"f32\[(1,)?{QWEN3_06B.num_kv_heads},{rows},{TRUNK}\]", text))


@pytest.mark.parametrize("attention, platform, call", [("hopper", "cuda", "mosaic_gpu"), ("tpu", "tpu", "tpu_custom")])
def test_a_decoding_block_lowers_with_its_kernel(attention, platform, call) -> None:
    config = dataclasses.replace(QWEN3_06B, num_layers=2)
    traced = traced_block(config, Layout(1, SLOTS, device_mesh(1), attention))
    assert call in traced.lower(lowering_platforms=(platform,)).as_text()


def test_a_decoding_block_compiles_for_an_h200(device, kernel_figures, capsys) -> None:
    compiled = traced_block(QWEN3_06B, layout_on(device("h200"))).lower().compile()
    kernels, memory, text = kernel_figures(), compiled.memory_analysis(), compiled.as_text()
    calls = len(re.findall(r'custom_call_target="mosaic_gpu', text))
    with capsys.disabled():
        print(
            f"\ndecoding block of Qwen3-0.6B on an H200, B={SLOTS}, trunk {TRUNK}, suffix {HELD}: "
            f"{memory.temp_size_in_bytes:,} bytes of temporaries, {memory.argument_size_in_bytes:,} of arguments, "
            f"{calls} kernel calls: {kernels[0]}"
        )
    assert calls == QWEN3_06B.num_layers
    assert all(kernel["spilled"] <= LARGEST_SPILL for kernel in kernels)
    assert all(kernel["shared_memory"] <= LARGEST_SHARED_MEMORY for kernel in kernels)
    assert not holds_scores(text)


def test_the_check_sees_scores_where_there_are_some(device) -> None:
    config = dataclasses.replace(QWEN3_06B, num_layers=1)
    assert holds_scores(traced_block(config, layout_on(device("h200"), "xla")).lower().compile().as_text())


def test_a_decoding_block_compiles_for_a_tpu(device, capsys) -> None:
    config = dataclasses.replace(QWEN3_06B, num_layers=4)
    compiled = traced_block(config, layout_on(device("v6e:2x2"))).lower().compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    with capsys.disabled():
        print(
            f"\ndecoding block of 4 layers of Qwen3-0.6B on a v6e, B={SLOTS}, trunk {TRUNK}, suffix {HELD}: "
            f"{memory.temp_size_in_bytes:,} bytes of temporaries, {memory.argument_size_in_bytes:,} of arguments"
        )
    assert "tpu_custom_call" in text
    assert not holds_scores(text)
