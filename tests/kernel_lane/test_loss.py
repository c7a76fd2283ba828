"""The losses' gradients for hardware that is not here: lowering for GPU and TPU, and a real compilation for an H200."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jaxopd_kernels import divergence_loss, weighted_divergence_loss
from jaxopd_kernels.loss import WAVE_BYTES

pytestmark = pytest.mark.kernel_lane

T, V, DS, DT = 8192, 151_936, 1024, 4096


def by_rows(*arrays, kind):
    return jnp.vdot(divergence_loss(*arrays[:-1], kind, wave_bytes=WAVE_BYTES), arrays[-1])


def in_one_pass(*arrays, kind):
    return weighted_divergence_loss(*arrays, kind, wave_bytes=WAVE_BYTES)[0]


def traced(loss, kind, sharding=None):
    """The value and both gradients at training's shapes, traced."""
    shapes = [((T, DS), jnp.bfloat16), ((V, DS), jnp.bfloat16), ((T, DT), jnp.bfloat16), ((V, DT), jnp.bfloat16)]
    specs = [jax.ShapeDtypeStruct(*shape, sharding=sharding) for shape in (*shapes, ((T,), jnp.float32))]
    return jax.jit(jax.value_and_grad(partial(loss, kind=kind), (0, 1))).trace(*specs)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("loss", [by_rows, in_one_pass])
def test_gradients_lower_for_hardware_that_is_not_here(loss, platform):
    text = traced(loss, "jsd").lower(lowering_platforms=(platform,)).as_text()
    assert "dot_general" in text
    assert f"tensor<{T}x{V}x" not in text


@pytest.mark.parametrize("kind", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("loss", [by_rows, in_one_pass])
def test_a_wave_and_the_heads_gradient_are_all_that_an_h200_holds(loss, kind, capsys):
    target = (Path(__file__).parent / "h200.txtpb").read_text()
    topology = topologies.get_topology_desc(platform="cuda", topology_name="", topology="1x1x1", target_config=target)
    mesh = jax.sharding.Mesh([topology.devices[0]], "x")
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    compiled = traced(loss, kind, everywhere).lower().compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    with capsys.disabled():
        print(f"\n{kind} {loss.__name__} T={T} V={V} D={DS}+{DT}: {temporary:,} bytes of temporaries on an H200")
    assert f"[{T},{V}]" not in compiled.as_text()
    # a wave's logits, half as much for P f and a quarter for its bfloat16 logit gradients; both float32 gradients
    assert temporary < 1.75 * WAVE_BYTES + 4 * V * DS + 3 * 4 * T * DS
