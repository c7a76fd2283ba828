"""The memory plan against what is held, running out of memory, prefill in blocks, and the compile budget."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxopd.errors import InputError
from jaxopd.models import QwenConfig, init_model
from jaxopd.models.sharding import device_mesh
from jaxopd.rollouts import Engine, Requests, Sampling, decode, plan, wave
from jaxopd.rollouts.plan import device_budget
from jaxopd.rollouts.suffix import PAGE, RING

CONFIG = QwenConfig(97, 48, 96, 2, 4, 2, 16, max_positions=512, initializer_range=0.15)
SAMPLING = Sampling(40, seed=3)


@pytest.fixture(scope="module")
def model():
    return init_model(CONFIG, seed=1)


@pytest.fixture(scope="module")
def trunks():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 97, n) for n in (90, 70, 50)]


@pytest.fixture(scope="module")
def requests(trunks):
    return Requests.continuations(trunks, 12)


@pytest.fixture(scope="module")
def answered(model, trunks, requests):
    return Engine(model, slots=16, mesh=device_mesh(1)).run(trunks, requests, SAMPLING)


def nbytes(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_the_plan_counts_what_is_held(model, trunks, requests, monkeypatch) -> None:
    held = []
    original = wave.decode_block

    def watching(graph, state, trunk_cache, pages, queue, ring, *rest):
        held.append((nbytes(state), nbytes(trunk_cache), nbytes(ring)))
        return original(graph, state, trunk_cache, pages, queue, ring, *rest)

    monkeypatch.setattr(wave, "decode_block", watching)
    engine = Engine(model, slots=16, mesh=device_mesh(1))
    plan = engine.plan(trunks, requests, SAMPLING)
    engine.run(trunks, requests, SAMPLING)
    assert plan.weights == held[0][0]
    assert plan.trunks == 2 * held[0][1]  # three trunks, one at a time: the next is computed beside the last
    assert plan.suffix == held[0][2]
    assert str(plan).startswith("1 x 16 slots")


def test_slots_follow_the_budget(model, trunks, requests) -> None:
    plans = [
        Engine(model, slots=16, mesh=device_mesh(1), budget=budget).plan(trunks, requests, SAMPLING)
        for budget in (1 << 34, 1 << 20, 1 << 10)
    ]
    assert [plan.slots for plan in plans] == [16, 8, 1]
    assert all(plan.total <= plan.budget for plan in plans[:2])


def test_out_of_memory_is_answered_with_fewer_slots(model, trunks, requests, answered, monkeypatch) -> None:
    original, seen = wave.decode_block, []

    def short_of_memory(*arguments):
        slots = arguments[6].request.size
        seen.append(slots)
        if slots > 4 and len(seen) > 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
        return original(*arguments)

    monkeypatch.setattr(wave, "decode_block", short_of_memory)
    again = Engine(model, slots=16, mesh=device_mesh(1)).run(trunks, requests, SAMPLING)
    assert set(seen) == {16, 8, 4}
    np.testing.assert_array_equal(again.tokens, answered.tokens)
    np.testing.assert_allclose(again.raw_logp, answered.raw_logp, atol=1e-5, rtol=0)
    np.testing.assert_array_equal(again.finish, answered.finish)


def test_a_smaller_plan_leaves_nothing_of_the_one_before(model, trunks, monkeypatch) -> None:
    """It halves the slots that were used, not those that were asked for; a first block went on where it stopped."""
    requests, sampling = Requests.continuations(trunks[:1], 8), Sampling(40, stop_ids=tuple(range(20)), seed=3)
    expected = Engine(model, slots=4, mesh=device_mesh(1)).run(trunks[:1], requests, sampling)
    original, seen = wave.decode_block, []

    def short_of_memory(*arguments):
        seen.append(arguments[6].request.size)
        if len(seen) == 1:
            *settings, stop = arguments[8]
            return original(*arguments[:8], (*settings, np.full_like(stop, -1)), arguments[9])
        if seen[-1] > 4:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
        return original(*arguments)

    monkeypatch.setattr(wave, "decode_block", short_of_memory)
    again = Engine(model, slots=256, mesh=device_mesh(1)).run(trunks[:1], requests, sampling)
    assert (seen[:3], set(seen[2:])) == ([8, 8, 4], {4})
    for name in ("tokens", "length", "raw_logp", "sampling_logp", "finish"):
        np.testing.assert_array_equal(getattr(again, name), getattr(expected, name), err_msg=name)


def test_an_engine_without_slots_is_refused(model) -> None:
    with pytest.raises(InputError, match="slots: found 0, expected at least 1"):
        Engine(model, slots=0)


def test_other_errors_are_not_taken_for_a_lack_of_memory(model, trunks, requests, monkeypatch) -> None:
    def broken(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(wave, "decode_block", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        Engine(model, slots=16, mesh=device_mesh(1)).run(trunks, requests, SAMPLING)


def test_prefill_in_blocks_is_prefill_at_once(model, trunks, monkeypatch) -> None:
    engine = Engine(model, mesh=device_mesh(1))
    tokens = np.stack([np.resize(trunk, 96) for trunk in trunks])
    whole = decode.prefill(engine.graph, engine.state, tokens)
    decode.prefill.clear_cache()
    monkeypatch.setattr(decode, "PREFILL_BYTES", decode.prefill_bytes(CONFIG, 3, 12))
    assert decode.prefill_block(CONFIG, 3, 96) == 12
    parts = decode.prefill(engine.graph, engine.state, tokens)
    decode.prefill.clear_cache()
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=0)


@pytest.fixture
def compiled():
    """The names of the functions compiled since the test began."""
    names = []

    def listen(event: str, _: float, fun_name: str = "", **__) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(fun_name)

    decode.decode_block.clear_cache()
    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def test_the_compile_budget(model, trunks, compiled) -> None:
    """Short rollouts: one program for all trunks of a bucket. Long ones: one more for each doubling of the pages."""
    engine = Engine(model, slots=8, mesh=device_mesh(1))
    for trunk, n, seed in ((trunks[0], 20, 0), (trunks[0][:83], 9, 1), (trunks[0][:81], 31, 2)):
        engine.run([trunk], Requests.continuations([trunk], n), Sampling(RING, seed=seed))
    assert sum("decode_block" in name for name in compiled) == 1
    engine.run(trunks[:1], Requests.continuations(trunks[:1], 8), Sampling(2 * RING, seed=0))
    pages = 2 * RING // PAGE - RING // PAGE + 1  # a slot's most: the blocks the ring no longer holds
    assert 3 <= sum("decode_block" in name for name in compiled) <= 3 + int(np.ceil(np.log2(pages)))


class Accelerator:
    """A device that tells what it has and holds."""

    def __init__(self, limit: int, held: int):
        self.stats = {"bytes_limit": limit, "bytes_in_use": held}

    def memory_stats(self) -> dict[str, int]:
        return self.stats


def test_the_budget_of_a_cpu_is_what_is_free_and_what_the_plan_counts(monkeypatch) -> None:
    monkeypatch.setattr(plan, "free_memory", lambda: 100)
    assert [device_budget(device_mesh(), counted) for counted in (0, 50)] == [90, 135]


@pytest.mark.parametrize(("counted", "left"), [(0, 0.9 * 300 - 70), (50, 0.9 * 300 - 20), (90, 0.9 * 300)])
def test_the_budget_leaves_out_what_others_hold(counted, left) -> None:
    mesh = SimpleNamespace(local_devices=[Accelerator(200, 30), Accelerator(100, 40)])
    assert device_budget(mesh, counted) == left
