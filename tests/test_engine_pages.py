"""Rollouts longer than the ring: pages, their growth and return, against a forward pass from scratch."""

import numpy as np
import pytest

from jaxopd.models import QwenConfig, init_model
from jaxopd.models.sharding import device_mesh
from jaxopd.responses import response_log_probs
from jaxopd.rollouts import Engine, Requests, Sampling, suffix
from jaxopd.rollouts.suffix import FREE, PAGE, RING, pages_needed, places
from jaxopd.rollouts.wave import Wave

CONFIG = QwenConfig(97, 48, 96, 2, 4, 2, 16, max_positions=512, initializer_range=0.15)
MAX_TOKENS = 3 * RING
SAMPLING = Sampling(MAX_TOKENS, seed=7)


@pytest.fixture(scope="module")
def model():
    return init_model(CONFIG, seed=1)


@pytest.fixture(scope="module")
def trunks():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 97, n) for n in (30, 55)]


@pytest.fixture(scope="module")
def requests():
    rng = np.random.default_rng(1)
    limit = np.where(rng.random(20) < 0.5, rng.integers(1, RING, 20), rng.integers(RING, MAX_TOKENS + 1, 20))
    return Requests(np.arange(20) % 2, np.full(20, 30), np.full(20, -1), np.arange(20), limit)


@pytest.fixture(scope="module")
def answered(model, trunks, requests):
    return Engine(model, slots=4, mesh=device_mesh(1)).run(trunks, requests, SAMPLING)


def test_long_rollouts_have_the_log_probs_of_a_forward_pass(model, trunks, requests, answered) -> None:
    np.testing.assert_array_equal(answered.length, requests.limit)
    assert answered.length.max() > RING + 4 * PAGE
    for index in range(2):
        mine = np.flatnonzero(requests.trunk == index)
        again = response_log_probs(model, list(trunks[index][:30]), answered.tokens[mine])
        for row, i in enumerate(mine):
            n = answered.length[i]
            np.testing.assert_allclose(answered.raw_logp[i, :n], again[row, :n], atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(("slots", "devices"), [(16, 8)])
def test_pages_do_not_depend_on_slots_or_devices(model, trunks, requests, answered, slots, devices) -> None:
    again = Engine(model, slots=slots, mesh=device_mesh(devices)).run(trunks, requests, SAMPLING)
    np.testing.assert_array_equal(again.tokens, answered.tokens)
    np.testing.assert_allclose(again.raw_logp, answered.raw_logp, atol=1e-5, rtol=0)


@pytest.mark.parametrize("seed", range(8))
def test_the_allocator_never_loses_a_page(seed) -> None:
    """Steps of random lives: every token a slot still owns is in the ring or in exactly one page of its own."""
    rng = np.random.default_rng(seed)
    C, b, width = 2, 3, 2 * PAGE
    step = np.zeros((C, b), np.int32)
    owner, block = np.zeros((C, 2 * b), np.int32), np.full((C, 2 * b), FREE, np.int32)
    for now in range(PAGE, 20 * PAGE, PAGE):
        restarted = rng.random((C, b)) < 0.2
        step = np.where(restarted, rng.integers(0, PAGE, (C, b)), step + PAGE).astype(np.int32)
        pages = suffix.Pages([], [], owner, block)
        size = max(1, int(2 ** np.ceil(np.log2(max(1, pages_needed(pages, step.reshape(-1), width, now))))))
        owner, block, _, _ = (np.asarray(x) for x in places(owner, block, step, np.int32(now), width=width, size=size))
        for c in range(C):
            for slot in range(b):
                # The first block this request fed, to the last block that is no longer safe in the ring.
                expected = set(range((now - step[c, slot]) // PAGE, (now - width) // PAGE + 1))
                held = block[c][(owner[c] == slot) & (block[c] != FREE)]
                assert len(held) == len(set(held.tolist()))
                assert set(held.tolist()) == expected


def test_short_rollouts_never_meet_a_page(model, trunks, requests, monkeypatch) -> None:
    made = []
    original = Wave._pages
    monkeypatch.setattr(Wave, "_pages", lambda wave, size: made.append(size) or original(wave, size))
    short = Requests(requests.trunk, requests.cut, requests.forced, requests.id)
    out = Engine(model, slots=4, mesh=device_mesh(1)).run(trunks, short, Sampling(RING, seed=7))
    assert (out.length == RING).all()
    assert set(made) == {0}
