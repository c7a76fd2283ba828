"""The trunk-attention kernels without their hardware: interpreted with race detection, lowered, and really compiled.

Needs Python 3.12 and kernels/requirements-lane.txt. Run: pytest -m kernel_lane tests/kernel_lane
"""

import os
import re
from functools import partial
from pathlib import Path

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as tpu_interpreter
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as gpu_interpreter
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jaxopd_kernels import TRUNK_IMPLEMENTATIONS, trunk_attention, trunk_attention_hopper

pytestmark = pytest.mark.kernel_lane

os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # there is no TPU whose metadata could be asked for
LARGEST_SHARED_MEMORY, LARGEST_SPILL = 232_448, 64
LARGEST_VMEM = 16 << 20  # what a kernel gets on every generation without asking
# Weights are rounded to bfloat16, values are standard normal: a row's error is at most 2^-9 sum_j w_j |v_j|.
OUT_ERROR, LSE_ERROR = 8e-3, 2e-6


def random_case(N, B, H, K, L, h):
    """Arrays of one op call: in the first slots ends at both sides of tile edges, in the others late ends, sorted.

    So there are blocks of rows that need a mask from their first tile on, and blocks that need none for a while.
    """
    rng = np.random.default_rng(N * B + H * L + h)
    q, k, v = (jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in ((N, B, H, h), (N, L, K, h), (N, L, K, h)))
    end = np.sort(rng.integers(L // 2, L + 1, (N, B)), axis=1)
    edges = [e for e in (0, 1, 63, 64, 65, 128, 511, 512, 513, L - 1, L) if e <= L]
    end[0, : len(edges)] = edges
    return q, k, v, end


def in_float64(q, k, v, end):
    """Attends row by row to exactly the keys before its end."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    G = q.shape[2] // k.shape[2]
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
    for n, b, head in np.argwhere(np.broadcast_to(end[..., None] > 0, q.shape[:3])):
        keys = np.s_[n, : end[n, b], head // G]
        scores = k[keys] @ q[n, b, head] / np.sqrt(q.shape[3])
        lse[n, b, head] = np.logaddexp.reduce(scores)
        out[n, b, head] = np.exp(scores - lse[n, b, head]) @ v[keys]
    return out, lse


def check(name: str, got: tuple, expected: tuple, say) -> None:
    (out, lse), (true_out, true_lse) = (tuple(map(np.asarray, pair)) for pair in (got, expected))
    known = np.isfinite(true_lse)
    errors = np.abs(out - true_out).max(), np.abs(lse[known] - true_lse[known]).max()
    with say.disabled():
        print(f"\n{name}: largest error of out {errors[0]:.1e}, of lse {errors[1]:.1e}")
    assert errors[0] < OUT_ERROR
    assert errors[1] < LSE_ERROR
    assert (lse[~known] == -np.inf).all()
    assert (out[~known] == 0).all()


@pytest.mark.parametrize(
    "shape",
    [
        (2, 32, 4, 2, 300, 128),  # groups; a block of rows partly filled; the trunk padded; its 5 tiles split
        (1, 192, 2, 2, 128, 64),  # a query head per key-value head, two blocks of rows
        (1, 33, 8, 1, 64, 64),  # rows that are not whole slots per block, one tile
        (1, 40, 8, 4, 1000, 128),  # tiles enough for every stage to be used again in each split
    ],
)
def test_hopper_kernel_in_the_interpreter(shape, capsys, monkeypatch) -> None:
    monkeypatch.setattr(trunk_attention_hopper, "MULTIPROCESSORS", 16)  # few splits, so that each has many tiles
    q, k, v, end = random_case(*shape)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        got = jax.block_until_ready(trunk_attention(q, k, v, jnp.asarray(end), implementation="hopper"))
    assert not gpu_interpreter.get_races().races_found
    check(f"hopper interpreted {shape}", got, in_float64(q, k, v, end), capsys)


@pytest.mark.parametrize("shape", [(2, 32, 4, 2, 1100, 128), (1, 300, 4, 2, 1536, 128)])
def test_tpu_kernel_in_the_interpreter(shape, capsys) -> None:
    q, k, v, end = random_case(*shape)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        got = jax.block_until_ready(trunk_attention(q, k, v, jnp.asarray(end), implementation="tpu"))
    assert not tpu_interpreter.races.races_found
    check(f"tpu interpreted {shape}", got, in_float64(q, k, v, end), capsys)


def arguments(B, H, K, L, h, sharding=None):
    shapes = [((B, H, h), jnp.bfloat16), ((L, K, h), jnp.bfloat16), ((L, K, h), jnp.bfloat16), ((B,), jnp.int32)]
    return [jax.ShapeDtypeStruct(*shape, sharding=sharding) for shape in shapes]


def traced(implementation, *shape, sharding=None):
    op = partial(trunk_attention, implementation=implementation)
    return jax.jit(op).trace(*arguments(*shape, sharding=sharding))


@pytest.mark.parametrize(
    "implementation, platform, call",
    [
        ("hopper", "cuda", "mosaic_gpu_v2"),
        ("tpu", "tpu", "tpu_custom_call"),
        ("xla", "cuda", "dot_general"),
        ("xla", "tpu", "dot_general"),
    ],
)
def test_lowering(implementation, platform, call) -> None:
    assert implementation in TRUNK_IMPLEMENTATIONS
    text = traced(implementation, 256, 16, 8, 2048, 128).lower(lowering_platforms=(platform,)).as_text()
    assert call in text


def one_device(**topology) -> jax.sharding.Sharding:
    device = topologies.get_topology_desc(**topology).devices[0]
    return jax.sharding.NamedSharding(jax.sharding.Mesh([device], "x"), jax.sharding.PartitionSpec())


@pytest.mark.parametrize("trunk", [2048, 30208])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_hopper_kernel_compiles_for_an_h200(head_dim, trunk, tmp_path, monkeypatch, capsys) -> None:
    target = (Path(__file__).parent / "h200.txtpb").read_text()
    sharding = one_device(platform="cuda", topology_name="", topology="1x1x1", target_config=target)
    for name, value in {"TO": str(tmp_path), "PTXAS": "1", "SASS": "1"}.items():
        monkeypatch.setenv(f"MOSAIC_GPU_DUMP_{name}", value)
    compiled = traced("hopper", 256, 16, 8, trunk, head_dim, sharding=sharding).lower().compile()
    [ptxas], [sass], [launch] = (
        [path.read_text() for path in tmp_path.glob(pattern)] for pattern in ("*.ptxas", "*.sass*", "*after_layout*")
    )
    spills = [int(x) for x in re.findall(r"(\d+) bytes spill", ptxas)]
    registers = int(re.search(r"Used (\d+) registers", ptxas)[1])
    shared_memory = int(re.search(r"dynamic_shared_memory_size %c(\d+)", launch)[1])
    products, small_products = len(re.findall(r"HGMMA", sass)), len(re.findall(r"\bHMMA", sass))
    temporary = compiled.memory_analysis().temp_size_in_bytes
    with capsys.disabled():
        print(
            f"\ntrunk attention on an H200, B=256 H=16 K=8 L={trunk} h={head_dim}: {registers} registers at entry, "
            f"{sum(spills)} bytes spilled, {shared_memory:,} bytes of shared memory, {products} HGMMA, "
            f"{temporary:,} bytes of temporaries"
        )
    assert len(spills) == 2
    assert sum(spills) <= LARGEST_SPILL
    assert shared_memory <= LARGEST_SHARED_MEMORY
    assert products > 0
    assert small_products == 0
    # Partial sums of the splits, and no copy of the trunk.
    assert temporary < 4 * 4 * 256 * 16 * (head_dim + 4) * 1.1


@pytest.mark.parametrize("generation", ["v5e", "v6e"])
def test_tpu_kernel_compiles(generation, capsys) -> None:
    sharding = one_device(platform="tpu", topology_name=f"{generation}:2x2")
    compiled = traced("tpu", 256, 16, 8, 30208, 128, sharding=sharding).lower().compile()
    [call] = [line for line in compiled.as_text().splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    vmem = int(re.search(r'"used_scoped_memory_configs":\[{"memory_space":"1","offset":"0","size":"(\d+)"', call)[1])
    temporary = compiled.memory_analysis().temp_size_in_bytes
    with capsys.disabled():
        print(f"\ntrunk attention on a {generation}: {vmem:,} bytes of VMEM, {temporary:,} bytes of temporaries")
    assert vmem <= LARGEST_VMEM


def test_a_decoding_loop_lays_the_trunk_out_once_on_a_tpu() -> None:
    """The copy of keys and values that the TPU kernel needs is not in the body of the loop over steps."""

    def decode(q, k, v, end):
        def step(_, q):
            return trunk_attention(q, k, v, end, implementation="tpu")[0].astype(q.dtype)

        return jax.lax.fori_loop(0, 32, step, q)

    specs = arguments(256, 16, 8, 30208, 128, sharding=one_device(platform="tpu", topology_name="v5e:2x2"))
    computations = jax.jit(decode).trace(*specs).lower().compile().as_text().split("\n\n")
    laid_out = re.compile(r"bf16\[1,30208,1024\]\S* (reshape|copy|fusion|transpose)\(")
    entry, others = [c for c in computations if "ENTRY" in c], [c for c in computations if "ENTRY" not in c]
    assert laid_out.search(entry[0])
    assert not any(laid_out.search(c) for c in others)
