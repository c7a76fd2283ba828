"""The XLA implementations for hardware that is not here: lowered for GPU and TPU, and really compiled for an H200.

Needs Python 3.12 and kernels/requirements-lane.txt. Run: pytest -m kernel_lane tests/kernel_lane
"""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jaxopd_kernels import head_statistics, pair_statistics

pytestmark = pytest.mark.kernel_lane

T, V, DS, DT, K = 4096, 151_936, 1024, 4096, 32
TOKENIZER_V = 151_669  # what Qwen3's tokenizer produces: the rest of the head is padding
LARGEST_TEMPORARY = 1e9


def case(op: str, implementation: str | None, vocab_size: int | None = None):
    """A jitted op and the shapes of its arguments."""
    if op == "pair":
        call = partial(pair_statistics, implementation=implementation, vocab_size=vocab_size)
        shapes = [(T, DS), (V, DS), (T, DT), (V, DT)]
    else:

        def call(hidden, head, ids):
            return head_statistics(hidden, head, ids=ids, k=64, implementation=implementation, vocab_size=vocab_size)

        shapes = [(T, DS), (V, DS)]
    return jax.jit(call), [*((shape, jnp.bfloat16) for shape in shapes), ((T, K), jnp.int32)]


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("implementation", ["xla", "xla_materialized"])
@pytest.mark.parametrize("op", ["pair", "head"])
def test_ops_lower_for_hardware_that_is_not_here(op, implementation, platform):
    function, arguments = case(op, implementation)
    specs = [jax.ShapeDtypeStruct(*argument) for argument in arguments]
    text = function.trace(*specs).lower(lowering_platforms=(platform,)).as_text()
    assert "dot_general" in text
    assert "bf16" in text
    assert f"tensor<{T}x{V}xf32>" not in text or implementation == "xla_materialized"


def compiled_for(sharding, op, implementation, vocab_size=None):
    function, arguments = case(op, implementation, vocab_size)
    specs = [jax.ShapeDtypeStruct(*argument, sharding=sharding) for argument in arguments]
    return function.trace(*specs).lower().compile()


@pytest.mark.parametrize("vocab_size", [None, TOKENIZER_V])
@pytest.mark.parametrize("op", ["pair", "head"])
def test_no_logits_of_all_rows_on_an_h200(op, vocab_size, device, capsys):
    compiled = compiled_for(device("h200"), op, None, vocab_size)
    temporary = compiled.memory_analysis().temp_size_in_bytes
    with capsys.disabled():
        print(f"\n{op} T={T} V={vocab_size or V}: {temporary:,} bytes of temporaries on an H200")
    text = compiled.as_text()
    assert not any(f"f32[{T},{columns}]" in text for columns in (V, TOKENIZER_V))
    assert temporary < LARGEST_TEMPORARY


def test_the_check_sees_logits_where_there_are_some(device):
    compiled = compiled_for(device("h200"), "head", "xla_materialized")
    assert f"f32[{T},{V}]" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes > 4 * T * V
