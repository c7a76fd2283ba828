"""The rollout engine against a from-scratch forward pass, and its independence of where a request runs."""

import dataclasses

import jax
import numpy as np
import pytest
from scipy import stats

from jaxopd.errors import InputError
from jaxopd.models import QwenConfig, init_model, logits
from jaxopd.models.sharding import device_mesh
from jaxopd.rollouts import LENGTH, STOP, Engine, Requests, Sampling, decode, rollout
from jaxopd.rollouts.sampling import draw_scored, request_keys, warp

CONFIG = QwenConfig(97, 48, 96, 2, 4, 2, 16, max_positions=256, initializer_range=0.15, eos_token_ids=(3,))
SAMPLING = Sampling(40, stop_ids=(3, 4, 5), seed=7)


@pytest.fixture(scope="module")
def model():
    return init_model(CONFIG, seed=1)


@pytest.fixture(scope="module")
def trunks():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 97, n) for n in (30, 55, 17)]


@pytest.fixture(scope="module")
def requests(trunks):
    rng = np.random.default_rng(1)
    trunk = rng.integers(0, 3, 200)
    cut = np.array([rng.integers(1, len(trunks[t]) + 1) for t in trunk])
    forced = np.where(rng.random(200) < 0.5, rng.integers(0, 97, 200), -1)
    return Requests(trunk, cut, forced, rng.permutation(200))


@pytest.fixture(scope="module")
def answered(model, trunks, requests):
    return Engine(model, slots=64, mesh=device_mesh(1)).run(trunks, requests, SAMPLING)


def test_tokens_and_log_probs_are_those_of_a_forward_pass_from_scratch(model, trunks, requests, answered) -> None:
    R = len(requests)
    tokens, mask, start = np.zeros((R, 128), np.int32), np.zeros((R, 128), bool), np.zeros(R, int)
    for i in range(R):
        given = [
            *trunks[requests.trunk[i]][: requests.cut[i]],
            *requests.forced[i : i + 1][requests.forced[i : i + 1] >= 0],
        ]
        whole = [*given, *answered.tokens[i, : answered.length[i]]]
        tokens[i, : len(whole)], mask[i, : len(whole)], start[i] = whole, True, len(given)
    z = np.asarray(logits(model, tokens, mask))
    log_p = np.asarray(jax.nn.log_softmax(z, -1))
    steps = np.arange(40)
    redraw = jax.jit(lambda z, i: draw_scored(request_keys(np.uint32(SAMPLING.seed), steps * 0 + i, steps), z)[0])
    for i in range(R):
        steps = np.arange(answered.length[i])
        rows = start[i] + steps - 1
        drawn = redraw(z[i, start[i] - 1 : start[i] + 39], requests.id[i])
        np.testing.assert_array_equal(drawn[: len(steps)], answered.tokens[i, steps])
        expected = log_p[i, rows, answered.tokens[i, steps]]
        np.testing.assert_allclose(answered.raw_logp[i, steps], expected, atol=1e-5, rtol=0)
        np.testing.assert_allclose(answered.sampling_logp[i, steps], expected, atol=1e-5, rtol=0)


def test_finish_reasons(requests, answered) -> None:
    last = answered.tokens[np.arange(len(requests)), answered.length - 1]
    stopped = np.isin(last, SAMPLING.stop_ids)
    np.testing.assert_array_equal(answered.finish == STOP, stopped)
    assert (answered.length[answered.finish == LENGTH] == SAMPLING.max_tokens).all()
    assert {STOP, LENGTH} == set(answered.finish.tolist())
    inside = np.arange(answered.tokens.shape[1])[None] < answered.length[:, None] - 1
    assert not np.isin(answered.tokens[inside], SAMPLING.stop_ids).any()
    assert (answered.tokens[np.arange(answered.tokens.shape[1])[None] >= answered.length[:, None]] == -1).all()


@pytest.mark.parametrize(("slots", "devices"), [(1, 1), (7, 1), (64, 8)])
def test_tokens_do_not_depend_on_slots_or_devices(model, trunks, requests, answered, slots, devices) -> None:
    again = Engine(model, slots=slots, mesh=device_mesh(devices)).run(trunks, requests, SAMPLING)
    np.testing.assert_array_equal(again.tokens, answered.tokens)
    np.testing.assert_allclose(again.raw_logp, answered.raw_logp, atol=1e-5, rtol=0)


def test_a_subset_of_requests_gives_the_same_tokens(model, trunks, requests, answered) -> None:
    chosen = np.arange(0, 200, 9)
    part = Requests(
        *(getattr(requests, f.name)[chosen] for f in dataclasses.fields(requests) if f.name not in ("limit", "spread"))
    )
    again = Engine(model, slots=64, mesh=device_mesh(1)).run(trunks, part, SAMPLING)
    np.testing.assert_array_equal(again.tokens, answered.tokens[chosen][:, : again.tokens.shape[1]])


def test_other_settings_compile_nothing_new(model, trunks, requests) -> None:
    runner = Engine(model, slots=64, mesh=device_mesh(1))
    runner.run(trunks, requests, SAMPLING)
    before = decode.decode_block._cache_size()
    changed = Sampling(40, stop_ids=(9,), temperature=0.6, top_p=0.9, top_k=12, seed=3)
    runner.run(trunks, requests, changed)
    runner.run(trunks, requests, dataclasses.replace(changed, temperature=0.0))
    assert decode.decode_block._cache_size() == before


def test_greedy_draws_the_argmax(model, trunks, requests) -> None:
    out = Engine(model, slots=64, mesh=device_mesh(1)).run(trunks, requests, Sampling(40, temperature=0.0))
    assert np.abs(out.sampling_logp).max() == 0
    i = int(np.flatnonzero(requests.forced < 0)[0])
    prompt = trunks[requests.trunk[i]][: requests.cut[i]]
    assert out.tokens[i, 0] == int(np.argmax(logits(model, prompt[None])[0, -1]))


def test_limits_per_request(model, trunks, requests) -> None:
    limit = 1 + np.arange(200) % 5
    out = Engine(model, slots=64, mesh=device_mesh(1)).run(
        trunks, dataclasses.replace(requests, limit=limit), Sampling(40)
    )
    np.testing.assert_array_equal(out.length, limit)


def test_a_million_draws_pass_a_chi_square_test() -> None:
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(60, 0.3))
    row = np.log(np.maximum(p, 1e-12)).astype(np.float32)
    n, block = 1_000_000, 50_000
    counts = np.zeros(60)
    sampler = jax.jit(
        lambda ids: draw_scored(request_keys(np.uint32(5), ids, ids * 0), np.broadcast_to(row[None], (block, 60)))[0]
    )
    for low in range(0, n, block):
        counts += np.bincount(np.asarray(sampler(np.arange(low, low + block))), minlength=60)
    expected = np.exp(row.astype(np.float64))
    expected = expected / expected.sum() * n
    rare = expected < 20
    pooled = [np.append(x[~rare], x[rare].sum()) for x in (counts, expected)]
    assert stats.chisquare(*pooled).pvalue > 1e-3


def test_rollout_is_ordered_by_prompt(model, trunks) -> None:
    out = rollout(model, trunks, 4, max_tokens=12, seed=2)
    alone = rollout(model, trunks[:1], 4, max_tokens=12, seed=2)
    np.testing.assert_array_equal(out.tokens[:4, : alone.tokens.shape[1]], alone.tokens)


@pytest.mark.parametrize(
    ("change", "says"),
    [({"cut": 31}, "cut 31"), ({"cut": 0}, "cut 0"), ({"trunk": 5}, "trunk"), ({"forced": 97}, "forced token 97")],
)
def test_requests_outside_the_model_are_refused(model, trunks, change, says) -> None:
    fields = {"trunk": 0, "cut": 3, "forced": -1, "id": 0} | change
    with pytest.raises(InputError, match=says):
        Engine(model).run(trunks, Requests(**{k: np.array([v]) for k, v in fields.items()}), SAMPLING)


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"max_tokens": 0}])
def test_settings_outside_their_range_are_refused(bad) -> None:
    with pytest.raises(InputError, match=next(iter(bad))):
        Sampling(**{"max_tokens": 4} | bad)


@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.7, 0), (1.0, 5), (0.5, 6), (1e-6, 0)])
def test_truncation_against_sorting(top_p, top_k) -> None:
    rng = np.random.default_rng(3)
    z = np.round(rng.normal(size=(6, 50)) * 2, 1).astype(np.float32)  # rounding makes ties
    got = np.asarray(warp(z, np.float32(0.8), np.float32(top_p), np.int32(top_k)))
    for row, kept in zip(z.astype(np.float64) / np.float32(0.8), got, strict=True):
        order = np.sort(row)[::-1]
        floor = order[top_k - 1] if top_k else -np.inf
        p = np.where(row >= floor - 1e-6, np.exp(row - row.max()), 0)
        p /= p.sum()
        above = np.array([p[row > x + 1e-6].sum() for x in row])  # mass strictly above: kept while it is under top_p
        expected = (p > 0) & ((above < top_p) if top_p < 1 else True)
        np.testing.assert_array_equal(np.isfinite(kept), expected)
