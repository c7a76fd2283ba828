"""The scoring kernels with the vocabulary split over devices that are not here: interpreted, lowered, really compiled.

Needs Python 3.12 and kernels/requirements-lane.txt. Run: pytest -m kernel_lane tests/kernel_lane
"""

import re
from functools import partial

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as tpu_interpreter
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as gpu_interpreter
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxopd_kernels import head_statistics, hopper, pair_statistics, streaming

from jaxopd import scoring
from jaxopd.models.sharding import device_mesh

pytestmark = pytest.mark.kernel_lane

LARGEST_SPILL, LARGEST_SHARED_MEMORY, LARGEST_TEMPORARY = 64, 232_448, 2e8
T, V, DS, DT, SHARDS = 4096, 151_936, 1024, 4096, 8
TOKENIZER_V = 151_669  # the last of eight shards has 267 columns fewer


def random_models(T, V, widths=(128, 256)):
    rng = np.random.default_rng(T + V)
    shapes = [shape for D in widths for shape in ((T, D), (V, D))]
    return [jnp.asarray(rng.standard_normal(shape) * shape[-1] ** -0.25, jnp.bfloat16) for shape in shapes]


def check_close(got, expected) -> None:
    """Compares every statistic, leaf by leaf."""
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-6, atol=1e-5)


def test_tpu_on_two_devices_in_the_interpreter() -> None:
    # The second device has two columns fewer; with none it would launch nothing, and the interpreter wait for it.
    vocab_size, arrays = 270, random_models(40, 272)
    ids = jnp.tile(jnp.array([[0, 129, 136, -1]]), (40, 1))

    def op(hidden_s, head_s, hidden_t, head_t, implementation, axis=None):
        row = {"vocab_size": vocab_size, "implementation": implementation, "axis": axis}
        statistics = pair_statistics(hidden_s, head_s, hidden_t, head_t, ids, **row)
        return statistics, head_statistics(hidden_s, head_s, ids=ids, k=20, **row)

    split = jax.shard_map(
        partial(op, implementation="tpu", axis="model"),
        mesh=device_mesh(2, model=2),
        in_specs=(P(), P("model"), P(), P("model")),
        out_specs=P(),
        check_vma=False,
    )
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        got = jax.block_until_ready(jax.jit(split)(*arrays))
    assert not tpu_interpreter.races.races_found
    check_close(got, jax.jit(partial(op, implementation="xla"))(*arrays))


def test_hopper_launches_over_parts_of_the_vocabulary_merge(monkeypatch) -> None:
    """What two devices would launch, one after the other: the GPU interpreter knows one device at a time."""
    hidden_s, head_s, hidden_t, head_t = random_models(40, 272)
    monkeypatch.setattr(hopper, "BLOCKS", 2)
    monkeypatch.setattr(hopper, "SHAPES", {2: (128, 5, (1, 1))})

    def launch(first, columns):
        heads = tuple(head[first : first + 136] for head in (head_s, head_t)) if columns <= 136 else (head_s, head_t)
        return hopper.launch(streaming.PAIR, (hidden_s, hidden_t), heads, columns).sums

    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        parts = [jax.block_until_ready(launch(first, columns)) for first, columns in ((0, 136), (136, 134))]
        whole = jax.block_until_ready(launch(0, 270))
    assert not gpu_interpreter.get_races().races_found
    merged = streaming.PAIR.merged(streaming.PairSums(*map(jnp.stack, zip(*parts))))
    check_close(streaming.divergences(merged), streaming.divergences(whole))


def traced(mesh, implementation, vocab_size=V):
    """A block of score_pair at full size, student 1,024 wide and teacher 4,096, heads split over the mesh."""

    def array(shape, spec, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    heads = [array((V, D), P("model")) for D in (DS, DT)]
    rows = [array((T, D), P("data")) for D in (DS, DT)] + [array((T, 32), P("data"), jnp.int32)]
    settings = {"vocab_size": vocab_size, "second_pass": True, "implementation": implementation}
    return scoring._pair.trace(*heads, *rows, forms=(), mesh=mesh, **settings)


def check_memory(program) -> int:
    """Asks for no logits of a shard, and no head but the shard's own."""
    text, shard = program.as_text(), V // SHARDS
    assert not re.search(rf"f32\[({T},{shard}|{shard},{T})\]", text)
    assert f"bf16[{shard},{DT}]" in text
    assert f"bf16[{V},{DT}]" not in text
    temporary = program.memory_analysis().temp_size_in_bytes
    assert temporary < LARGEST_TEMPORARY
    return temporary


@pytest.mark.parametrize(
    "implementation, platform, call", [("hopper", "cuda", "mosaic_gpu_v2"), ("tpu", "tpu", "tpu_custom_call")]
)
def test_lowering(implementation, platform, call) -> None:
    text = traced(device_mesh(8, model=8), implementation).lower(lowering_platforms=(platform,)).as_text()
    assert call in text
    assert "all_gather" in text


@pytest.mark.parametrize("vocab_size", [V, TOKENIZER_V])
def test_a_pair_compiles_for_eight_h200s(vocab_size, devices, kernel_figures, capsys) -> None:
    mesh = device_mesh(devices("h200", SHARDS), model=SHARDS)
    temporary = check_memory(traced(mesh, "hopper", vocab_size).lower().compile())
    kernels = kernel_figures()
    with capsys.disabled():
        print(f"\nhopper pair T={T:,} V={vocab_size:,} on {SHARDS} H200s: {temporary:,} bytes of temporaries on each")
        print(*kernels, sep="\n")
    assert len(kernels) == (2 if vocab_size == V else 4)  # two launches; two sizes of shards
    for kernel in kernels:
        assert kernel["spilled"] <= LARGEST_SPILL
        assert kernel["shared_memory"] <= LARGEST_SHARED_MEMORY
        assert kernel["HGMMA"] > 0


def test_a_pair_compiles_for_eight_tpus(devices, capsys) -> None:
    mesh = device_mesh(devices("v6e:2x4", SHARDS), model=SHARDS)
    temporary = check_memory(traced(mesh, "tpu", TOKENIZER_V).lower().compile())
    with capsys.disabled():
        print(f"\ntpu pair T={T:,} V={TOKENIZER_V:,} on {SHARDS} v6e: {temporary:,} bytes of temporaries on each")
