"""The scoring kernels without their hardware: interpreted with race detection, lowered, and really compiled.

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
from jaxopd_kernels import head_statistics, hopper, pair_statistics

pytestmark = pytest.mark.kernel_lane

LARGEST_SHARED_MEMORY, LARGEST_SPILL, LARGEST_TEMPORARY = 232_448, 64, 1e9
VMEM = 48 << 20
DS, DT = 128, 256
ATOL = {"variance": 1e-4, "gradient_norm": 3e-5, "js": 2e-6, "total_variation": 2e-6, "l2": 2e-6, "cosine": 2e-6}


def pair_in_float64(z_s, z_t) -> dict[str, np.ndarray]:
    """The statistics by their definitions."""
    log_p, log_q = (z - np.logaddexp.reduce(z, axis=-1, keepdims=True) for z in (z_s, z_t))
    p, q = np.exp(log_p), np.exp(log_q)
    log_m, f = np.logaddexp(log_p, log_q) - np.log(2), log_q - log_p
    centred = f - (p * f).sum(-1, keepdims=True)
    return {
        "logsumexp_student": np.logaddexp.reduce(z_s, axis=-1),
        "logsumexp_teacher": np.logaddexp.reduce(z_t, axis=-1),
        "entropy_student": -(p * log_p).sum(-1),
        "entropy_teacher": -(q * log_q).sum(-1),
        "reverse_kl": (p * (log_p - log_q)).sum(-1),
        "forward_kl": (q * (log_q - log_p)).sum(-1),
        "js": (p * (log_p - log_m) + q * (log_q - log_m)).sum(-1) / 2,
        "js_student": (p * (log_p - log_m)).sum(-1),
        "total_variation": np.abs(p - q).sum(-1) / 2,
        "l2": np.linalg.norm(p - q, axis=-1),
        "cosine": (p * q).sum(-1) / np.linalg.norm(p, axis=-1) / np.linalg.norm(q, axis=-1),
        "variance": (p * centred**2).sum(-1),
        "gradient_norm": np.linalg.norm(p * centred, axis=-1),
        "log_p": log_p[:, [0, -1]],
        "log_q": log_q[:, [0, -1]],
    }


def random_models(T, V):
    """Hidden states and heads of two models; rows that are peaked, constant, and shared by both models."""
    rng = np.random.default_rng(T + V)
    hidden_s, hidden_t = (jnp.asarray(rng.standard_normal((T, D)), jnp.bfloat16) for D in (DS, DT))
    heads = [rng.standard_normal((V + extra, D)) * 3 / np.sqrt(D) for D, extra in ((DS, 9), (DT, 20))]
    for head in heads:
        head[V:] *= 50  # padding would dominate if it counted
    hidden_s, hidden_t = hidden_s.at[0].set(0).at[-1].mul(8), hidden_t.at[0].set(0)
    return hidden_s, jnp.asarray(heads[0], jnp.bfloat16), hidden_t, jnp.asarray(heads[1], jnp.bfloat16)


def check_pair(implementation, T, V) -> None:
    hidden_s, head_s, hidden_t, head_t = random_models(T, V)
    ids = jnp.tile(jnp.array([[0, V - 1]]), (T, 1))
    op = partial(pair_statistics, vocab_size=V, implementation=implementation)
    got = jax.block_until_ready(op(hidden_s, head_s, hidden_t, head_t, ids))
    z_s, z_t = (np.asarray(x, float) @ np.asarray(w, float)[:V].T for x, w in ((hidden_s, head_s), (hidden_t, head_t)))
    for name, expected in pair_in_float64(z_s, z_t).items():
        atol = ATOL.get(name, 1e-5)
        np.testing.assert_allclose(getattr(got, name), expected, rtol=2e-6, atol=atol, err_msg=name)


def check_student_that_is_its_teacher(implementation, T, V) -> None:
    hidden, head, *_ = random_models(T, V)
    ids = jnp.full((T, 1), -1)
    same = pair_statistics(hidden, head, hidden, head, ids, vocab_size=V, implementation=implementation)
    for name in ("reverse_kl", "forward_kl", "total_variation", "l2", "variance", "gradient_norm"):
        assert np.abs(getattr(same, name)).max() <= 1e-6, name
    assert np.abs(same.js).max() < 2e-6
    assert np.isneginf(same.log_p).all()


def check_head(implementation, T, V, k) -> None:
    """The last rows of the head repeat its first, so that each of the top k may come twice: the lower id is first."""
    hidden, head, *_ = random_models(T, V)
    head = head.at[V // 2 : 2 * (V // 2)].set(head[: V // 2])
    got = jax.block_until_ready(head_statistics(hidden, head, k=k, vocab_size=V, implementation=implementation))
    z = np.asarray(hidden, float) @ np.asarray(head, float)[:V].T
    log_p = z - np.logaddexp.reduce(z, axis=-1, keepdims=True)
    best = np.argsort(-z, axis=-1, kind="stable")[:, :k]
    np.testing.assert_allclose(got.logsumexp, np.logaddexp.reduce(z, axis=-1), atol=1e-5)
    np.testing.assert_allclose(got.entropy, -(np.exp(log_p) * log_p).sum(-1), atol=1e-5)
    np.testing.assert_array_equal(got.top_ids, best)
    np.testing.assert_allclose(got.top_log_p, np.take_along_axis(log_p, best, -1), atol=1e-5)


@pytest.fixture
def hopper_interpreted(monkeypatch):
    """Few thread blocks, so that each has many tiles; fails on a race.

    Clusters share along one axis: in the interpreter a copy lands without its neighbour's half, so that across a square
    a block could signal its diagonal neighbour's neighbours twice in one phase.
    """

    def run(check, cluster, *args) -> None:
        monkeypatch.setattr(hopper, "BLOCKS", 2)
        monkeypatch.setattr(hopper, "SHAPES", {1: (256, 4, cluster), 2: (128, 5, cluster)})
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
            check("hopper", *args)
        assert not gpu_interpreter.get_races().races_found

    return run


@pytest.mark.parametrize(
    "cluster, T, V", [((1, 1), 1, 127), ((1, 1), 63, 1031), ((2, 1), 129, 512), ((1, 2), 257, 1031)]
)
def test_hopper_pair_in_the_interpreter(cluster, T, V, hopper_interpreted) -> None:
    hopper_interpreted(check_pair, cluster, T, V)


@pytest.mark.parametrize("cluster, T, V, k", [((1, 1), 128, 1031, 64), ((1, 1), 1, 127, 20), ((2, 1), 129, 1031, 1)])
def test_hopper_head_in_the_interpreter(cluster, T, V, k, hopper_interpreted) -> None:
    hopper_interpreted(check_head, cluster, T, V, k)


def test_hopper_student_that_is_its_teacher(hopper_interpreted) -> None:
    hopper_interpreted(check_student_that_is_its_teacher, (1, 1), 63, 512)


def tpu_interpreted(check, *args) -> None:
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        check("tpu", *args)
    assert not tpu_interpreter.races.races_found


@pytest.mark.parametrize("T, V", [(1, 127), (63, 512), (129, 1031)])
def test_tpu_pair_in_the_interpreter(T, V) -> None:
    tpu_interpreted(check_pair, T, V)


@pytest.mark.parametrize("T, V, k", [(1, 127, 20), (129, 1031, 64)])
def test_tpu_head_in_the_interpreter(T, V, k) -> None:
    tpu_interpreted(check_head, T, V, k)


def test_tpu_student_that_is_its_teacher() -> None:
    tpu_interpreted(check_student_that_is_its_teacher, 63, 512)


T, V = 32_768, 151_936
TOKENIZER_V = 151_669  # what Qwen3's tokenizer produces: the rest of the head is padding


def traced(op, implementation, vocab_size=V, sharding=None):
    """A call at full size: student 1,024 wide, teacher 4,096, one id; or one model and its top 20."""
    shapes = [(shape, jnp.bfloat16) for D in (1024, 4096) for shape in ((T, D), (V, D))]
    if op == "pair":
        call = partial(pair_statistics, vocab_size=vocab_size, implementation=implementation)
        shapes.append(((T, 1), jnp.int32))
    else:
        call = partial(head_statistics, k=20, vocab_size=vocab_size, implementation=implementation)
        shapes = shapes[:2]
    return jax.jit(call).trace(*(jax.ShapeDtypeStruct(*shape, sharding=sharding) for shape in shapes))


@pytest.mark.parametrize("op", ["pair", "head"])
@pytest.mark.parametrize(
    "implementation, platform, call", [("hopper", "cuda", "mosaic_gpu_v2"), ("tpu", "tpu", "tpu_custom_call")]
)
def test_lowering(implementation, platform, call, op) -> None:
    text = traced(op, implementation).lower(lowering_platforms=(platform,)).as_text()
    assert call in text
    assert f"tensor<{T}x{V}xf32>" not in text


def check_memory(program) -> int:
    temporary = program.memory_analysis().temp_size_in_bytes
    assert temporary < LARGEST_TEMPORARY
    assert not re.search(rf"f32\[({T},{V}|{V},{T}|{T},{TOKENIZER_V})\]", program.as_text())
    return temporary


@pytest.mark.parametrize("op, vocab_size", [("pair", V), ("pair", TOKENIZER_V), ("head", V)])
def test_hopper_kernels_compile_for_an_h200(op, vocab_size, device, kernel_figures, capsys) -> None:
    temporary = check_memory(traced(op, "hopper", vocab_size, device("h200")).lower().compile())
    kernels = kernel_figures()
    with capsys.disabled():
        print(f"\nhopper {op} T={T:,} V={vocab_size:,} on an H200: {temporary:,} bytes of temporaries")
        print(*kernels, sep="\n")
    assert len(kernels) == (2 if op == "pair" else 1)  # the second launch is for JS and total variation
    for kernel in kernels:
        assert kernel["spilled"] <= LARGEST_SPILL
        assert kernel["shared_memory"] <= LARGEST_SHARED_MEMORY
        assert kernel["HGMMA"] > 0
        assert kernel["HMMA"] == 0


@pytest.mark.parametrize("op", ["pair", "head"])
@pytest.mark.parametrize("generation", ["v5e", "v6e"])
def test_tpu_kernels_compile(generation, op, device, capsys) -> None:
    program = traced(op, "tpu", V, device(f"{generation}:2x2")).lower().compile()
    temporary = check_memory(program)
    calls = [line for line in program.as_text().splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    scoped = r'"used_scoped_memory_configs":\[{"memory_space":"1","offset":"0","size":"(\d+)"'
    vmem = [int(re.search(scoped, call)[1]) for call in calls]
    with capsys.disabled():
        print(f"\ntpu {op} T={T:,} V={V:,} on a {generation}: {vmem} bytes of VMEM, {temporary:,} bytes of temporaries")
    assert len(vmem) == (2 if op == "pair" else 1)
    assert max(vmem) <= VMEM
