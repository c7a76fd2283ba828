"""Models split over the axis "model": rollouts, responses and plans are those of a model on one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxopd.models import Qwen, QwenConfig, init_model
from jaxopd.models.sharding import device_mesh, held_bytes, parameter_shardings
from jaxopd.responses import response_hidden, response_log_probs
from jaxopd.rollouts import Engine, Requests, Sampling, wave
from jaxopd.rollouts.plan import plan_memory
from jaxopd.rollouts.suffix import RING, ring_width

CONFIG = QwenConfig(96, 32, 64, 1, 8, 4, 8, max_positions=256, initializer_range=0.25, tie_embeddings=False)
MESHES = [(8, 1), (2, 4), (1, 8)]  # the key heads divide four devices, not eight


@pytest.fixture(scope="module")
def model() -> Qwen:
    return init_model(CONFIG, seed=1)


@pytest.fixture(scope="module")
def trunks() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 96, n) for n in (30, 17)]


@pytest.fixture(scope="module")
def requests(trunks) -> Requests:
    return dataclasses.replace(Requests.continuations(trunks, 12), forced=np.arange(24))


def placed(model: Qwen, shape: tuple[int, int], fsdp: bool = False) -> Qwen:
    graph, state = nnx.split(model)
    shardings = parameter_shardings(state, model.config, device_mesh(model=shape[1]), fsdp=fsdp)
    return nnx.merge(graph, jax.device_put(state, shardings))


@pytest.mark.parametrize(
    ("shape", "tokens"),
    [((2, 4), 30), ((1, 8), 30), pytest.param((2, 4), RING + 40, id="beyond the ring", marks=pytest.mark.slow)],
)
def test_rollouts_of_a_split_model(model, trunks, requests, shape, tokens, monkeypatch) -> None:
    sampling = Sampling(tokens, stop_ids=(3, 4), seed=7)
    answered = Engine(model, slots=8, mesh=device_mesh(1)).run(trunks, requests, sampling)
    held, original = [], wave.decode_block

    def watching(graph, state, trunk_cache, pages, queue, ring, *rest):
        held.append((held_bytes(state), held_bytes(trunk_cache), held_bytes(ring)))
        return original(graph, state, trunk_cache, pages, queue, ring, *rest)

    monkeypatch.setattr(wave, "decode_block", watching)
    engine = Engine(placed(model, shape), slots=8)
    assert dict(engine.mesh.shape) == {"data": shape[0], "model": shape[1]}
    plan = engine.plan(trunks, requests, sampling)
    found = engine.run(trunks, requests, sampling)
    assert (answered.length.max() > RING) == (tokens > RING)
    np.testing.assert_array_equal(found.tokens, answered.tokens)
    np.testing.assert_array_equal(found.finish, answered.finish)
    np.testing.assert_allclose(found.raw_logp, answered.raw_logp, atol=1e-5, rtol=0)
    assert (plan.weights, plan.trunks, plan.suffix) == (held[0][0], 2 * held[0][1], held[0][2])


def test_a_whole_model_gets_slots_on_all_devices_of_any_mesh(model) -> None:
    for engine in (Engine(model), Engine(model, mesh=device_mesh(model=4)), Engine(placed(model, (8, 1)))):
        assert dict(engine.mesh.shape) == {"data": 8, "model": 1}
        assert engine.weights == 8 * held_bytes(nnx.split(model)[1])


def test_the_plan_bounds_what_a_device_gathers_to_decode(trunks, requests, monkeypatch) -> None:
    """XLA gathers the matrices of all layers before the loop of steps: the plan has to count more than a layer's."""
    model = init_model(dataclasses.replace(CONFIG, hidden_size=128, intermediate_size=512, num_layers=2))
    engine, sampling, taken = Engine(placed(model, (4, 2), fsdp=True), slots=8), Sampling(30), []
    original = wave.decode_block

    def watching(*given):
        taken.append(original.lower(*given).compile().memory_analysis().temp_size_in_bytes)
        raise InterruptedError

    monkeypatch.setattr(wave, "decode_block", watching)
    with pytest.raises(InterruptedError):
        engine.run(trunks, requests, sampling)
    planned = engine.plan(trunks, requests, sampling).workspace / 8
    assert 0.5 * planned < taken[0] < planned


@pytest.mark.parametrize(
    ("fields", "repeated"),
    [({}, 1), ({"vocab_size": 9602}, 4), ({"num_kv_heads": 2}, 1), ({"vocab_size": 9602, "num_kv_heads": 2}, 4)],
)
def test_logits_are_repeated_where_the_vocabulary_is_not_split(fields, repeated) -> None:
    config = dataclasses.replace(CONFIG, **({"vocab_size": 9600} | fields))
    mesh, shared = device_mesh(model=4), {"weights": 0, "trunks": 1, "trunk_length": 8, "most": 8, "max_tokens": 8}
    plan = plan_memory(config, jnp.dtype("float32"), **shared, slots=8, mesh=mesh, budget=1 << 40)
    assert plan.workspace == repeated * 8 * 6 * 4 * config.vocab_size
    assert plan.suffix == 8 * ring_width(8) * 2 * 8 * 4 * (4 if config.num_kv_heads == 4 else 4 * 2)


@pytest.mark.parametrize("shape", MESHES)
def test_responses_on_a_mesh(model, shape) -> None:
    rng = np.random.default_rng(2)
    responses = rng.integers(0, 96, (5, 9))
    responses[1, 4:] = -1
    there, prompt = placed(model, shape, fsdp=True), [5, 6, 7]
    expected = response_hidden(model, prompt, responses)
    found = response_hidden(there, prompt, responses)
    assert type(found) is np.ndarray
    np.testing.assert_allclose(found[responses >= 0], expected[responses >= 0], atol=1e-5, rtol=0)
    expected = response_log_probs(model, prompt, responses)
    np.testing.assert_allclose(response_log_probs(there, prompt, responses), expected, atol=1e-5, rtol=0)
