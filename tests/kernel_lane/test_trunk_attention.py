"""The trunk-attention kernels without their hardware: interpreted with race detection, lowered, and really compiled.

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
from jaxopd_kernels import NO_KEYS, TRUNK_IMPLEMENTATIONS, trunk_attention, trunk_attention_hopper

pytestmark = pytest.mark.kernel_lane

LARGEST_SHARED_MEMORY, LARGEST_SPILL = 232_448, 64
LARGEST_VMEM = 16 << 20  # what a kernel gets on every generation without asking
# Weights are rounded to bfloat16, values are standard normal: a row's error is at most 2^-9 sum_j w_j |v_j|.
OUT_ERROR, LSE_ERROR = 8e-3, 2e-6


def random_case(N, B, H, K, L, h):
    """Arrays of one op call: in the first slots ends at both sides of tile edges, in the others late ends, in no order.

    Sorted, they give blocks of rows that need a mask from their first tile on, and blocks that need none for a while.
    """
    rng = np.random.default_rng(N * B + H * L + h)
    q, k, v = (jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in ((N, B, H, h), (N, K, L, h), (N, K, L, h)))
    end = rng.integers(L // 2, L + 1, (N, B))
    edges = [e for e in (0, 1, 63, 64, 65, 128, 511, 512, 513, L - 1, L) if e <= L]
    end[0, : len(edges)] = edges
    return q, k, v, end


def in_float64(q, k, v, end):
    """Attends row by row to exactly the keys before its end."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    G = q.shape[2] // k.shape[1]
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], NO_KEYS)
    for n, b, head in np.argwhere(np.broadcast_to(end[..., None] > 0, q.shape[:3])):
        keys = np.s_[n, head // G, : end[n, b]]
        scores = k[keys] @ q[n, b, head] / np.sqrt(q.shape[3])
        lse[n, b, head] = np.logaddexp.reduce(scores)
        out[n, b, head] = np.exp(scores - lse[n, b, head]) @ v[keys]
    return out, lse


def check(name: str, got: tuple, expected: tuple, say) -> None:
    (out, lse), (true_out, true_lse) = (tuple(map(np.asarray, pair)) for pair in (got, expected))
    known = true_lse != NO_KEYS
    errors = np.abs(out - true_out).max(), np.abs(lse[known] - true_lse[known]).max()
    with say.disabled():
        print(f"\n{name}: largest error of out {errors[0]:.1e}, of lse {errors[1]:.1e}")
    assert errors[0] < OUT_ERROR
    assert errors[1] < LSE_ERROR
    assert (lse[~known] == np.float32(NO_KEYS)).all()
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
    shapes = [((B, H, h), jnp.bfloat16), *[((K, L, h), jnp.bfloat16)] * 2, ((B,), jnp.int32)]
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


@pytest.mark.parametrize("trunk", [2048, 30208])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_hopper_kernel_compiles_for_an_h200(head_dim, trunk, device, kernel_figures, capsys) -> None:
    compiled = traced("hopper", 256, 16, 8, trunk, head_dim, sharding=device("h200")).lower().compile()
    [kernel] = kernel_figures()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    with capsys.disabled():
        print(
            f"\ntrunk attention on an H200, B=256 H=16 K=8 L={trunk} h={head_dim}: {kernel}, {temporary:,} bytes of "
            "temporaries"
        )
    assert kernel["spilled"] <= LARGEST_SPILL
    assert kernel["shared_memory"] <= LARGEST_SHARED_MEMORY
    assert kernel["HGMMA"] > 0
    assert kernel["HMMA"] == 0
    # Partial sums of the splits, sorted queries and output, and no copy of the trunk.
    assert temporary < 4 * (4 + 2) * 256 * 16 * (head_dim + 4) * 1.1


@pytest.mark.parametrize("generation", ["v5e", "v6e"])
def test_tpu_kernel_compiles(generation, device, capsys) -> None:
    compiled = traced("tpu", 256, 16, 8, 30208, 128, sharding=device(f"{generation}:2x2")).lower().compile()
    [call] = [line for line in compiled.as_text().splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    vmem = int(re.search(r'"used_scoped_memory_configs":\[{"memory_space":"1","offset":"0","size":"(\d+)"', call)[1])
    temporary = compiled.memory_analysis().temp_size_in_bytes
    with capsys.disabled():
        print(f"\ntrunk attention on a {generation}: {vmem:,} bytes of VMEM, {temporary:,} bytes of temporaries")
    assert vmem <= LARGEST_VMEM
    assert not re.search(
        r"bf16\[(1,)?8,30208,128\]\S* (copy|fusion|transpose)\(", compiled.as_text()
    )  # read where it lies
