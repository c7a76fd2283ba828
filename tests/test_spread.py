"""Low-discrepancy draws: each is exact by itself, what is left of its number is as good as new."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxopd.models import QwenConfig, init_model, logits
from jaxopd.models.sharding import device_mesh
from jaxopd.rollouts import Engine, Requests, Sampling
from jaxopd.rollouts.sampling import draw_spread, request_keys, tile_width, warp

DRAWS = 100_000


@pytest.fixture(scope="module", params=[7, 300])
def drawn(request):
    """Draws at uniform numbers from one distribution, its vocabulary larger than a tile or not."""
    V, rng = request.param, np.random.default_rng(request.param)
    logits = (2 * rng.normal(size=V)).astype(np.float32)
    logits[V // 2] = -np.inf
    u = rng.random(DRAWS).astype(np.float32)
    keys = request_keys(jnp.uint32(1), jnp.arange(DRAWS), jnp.zeros(DRAWS, jnp.int32))
    found = jax.jit(draw_spread)(u, jnp.zeros(DRAWS), keys, jnp.broadcast_to(logits[None], (DRAWS, V)))
    p = np.exp(logits.astype(np.float64) - np.logaddexp.reduce(logits.astype(np.float64)))
    return p, u, *map(np.asarray, found)


def test_tokens_have_their_probabilities(drawn) -> None:
    p, _, token, log_prob, _ = drawn
    seen = np.bincount(token, minlength=len(p))
    assert seen[p == 0].sum() == 0
    often = p * DRAWS > 20
    observed, expected = np.append(seen[often], seen[~often].sum()), DRAWS * np.append(p[often], p[~often].sum())
    kept = expected > 0
    assert stats.chisquare(observed[kept], expected[kept]).pvalue > 1e-3
    np.testing.assert_allclose(log_prob, np.log(p[token]), atol=2e-6)


def test_sums_that_rounding_moves_choose_no_impossible_token() -> None:
    """At the sums of tiles themselves, of a vocabulary with 50 tokens left: XLA's cumulative sums rise anywhere."""
    V, B = 151_936, 64
    rng = np.random.default_rng(0)
    logits = jax.jit(warp)(jnp.asarray(3 * rng.normal(size=(B, V)), jnp.float32), 1.0, 1.0, 50)
    tiles = np.asarray(logits).reshape(B, -1, tile_width(V))
    upper = np.asarray(jnp.cumsum(jax.nn.softmax(jax.nn.logsumexp(tiles, -1), -1), -1))
    keys = request_keys(jnp.uint32(1), jnp.arange(B), jnp.zeros(B, jnp.int32))
    draws = jax.jit(draw_spread)
    for tile in rng.integers(0, upper.shape[1], 12):
        u = np.minimum(upper[:, tile] / upper[:, -1], np.float32(1 - 2.0**-24))
        _, log_prob, left = draws(u, jnp.zeros(B), keys, logits)
        assert np.isfinite(np.stack([log_prob, left])).all()


def test_the_token_is_the_one_at_the_number(drawn) -> None:
    """Against float64: the distribution inverted tile by tile is the distribution inverted."""
    p, u, token, _, _ = drawn
    upper = np.cumsum(p)
    expected = np.minimum(np.searchsorted(upper, u, side="right"), len(p) - 1)
    assert (token == expected).mean() > 1 - 1e-4  # but where rounding decides


def test_what_is_left_is_uniform_whatever_was_drawn(drawn) -> None:
    p, _, token, _, left = drawn
    assert ((left >= 0) & (left < 1)).all()
    for k in np.argsort(-p)[:3]:
        assert stats.kstest(left[token == k], "uniform").pvalue > 1e-4


def test_bits_that_are_used_up_are_made_anew() -> None:
    """After a token of probability 2^-9 a float's 24 bits are 15; what is left is fine-grained and uniform again."""
    p = np.array([1 - 2.0**-9, 2.0**-9])
    logits = jnp.broadcast_to(jnp.log(p)[None].astype(jnp.float32), (DRAWS, 2))
    u = (p[0] + 2.0**-9 * np.random.default_rng(0).random(DRAWS)).astype(np.float32)
    keys = request_keys(jnp.uint32(1), jnp.arange(DRAWS), jnp.zeros(DRAWS, jnp.int32))
    token, log_prob, left = draw_spread(u, jnp.zeros(DRAWS), keys, logits)
    assert len(np.unique(left)) <= 2**16
    second = jnp.zeros((DRAWS, 2))  # two tokens of one half
    keys = request_keys(jnp.uint32(1), jnp.arange(DRAWS), jnp.ones(DRAWS, jnp.int32))
    taken = np.asarray(token) == 1
    _, _, left = draw_spread(left, -log_prob / jnp.log(2.0), keys, second)
    found = np.asarray(left)[taken]
    assert taken.mean() > 0.99
    assert len(np.unique(found)) > 0.9 * len(found)
    assert stats.kstest(found, "uniform").pvalue > 1e-4


def test_the_engine_draws_what_the_numbers_say() -> None:
    """Each first token is the one at its number in a forward pass's distribution; others draw as without numbers."""
    model = init_model(QwenConfig(97, 48, 96, 2, 4, 2, 16, max_positions=64, initializer_range=0.3), seed=1)
    trunk = np.random.default_rng(0).integers(0, 97, 9)
    spread = np.random.default_rng(1).random(48).astype(np.float32)
    plain = Requests.continuations([trunk], 48)
    rolled = Engine(model, slots=16).run([trunk], dataclasses.replace(plain, spread=spread), Sampling(12, seed=3))
    p = np.asarray(jax.nn.softmax(logits(model, trunk[None])[0, -1]), np.float64)
    expected = np.searchsorted(np.cumsum(p), spread, side="right")
    assert (rolled.tokens[:, 0] == expected).mean() > 0.97  # but where rounding decides
    again = Engine(model, slots=7, mesh=device_mesh(1)).run(
        [trunk], dataclasses.replace(plain, spread=spread), Sampling(12, seed=3)
    )
    np.testing.assert_array_equal(again.tokens, rolled.tokens)
    freely = Engine(model, slots=16).run([trunk], plain, Sampling(12, seed=3))
    assert (freely.tokens != rolled.tokens).any()


def test_continuations_by_even_numbers_are_exact_and_less_noisy() -> None:
    """The mean of a function of three tokens, over many random shifts, against every sequence; and its variance."""
    model = init_model(QwenConfig(5, 16, 32, 1, 2, 1, 8, max_positions=32, initializer_range=0.7), seed=2)
    trunk, n, shifts = np.array([1, 2, 3]), 16, 60
    every = np.stack(np.unravel_index(np.arange(125), (5, 5, 5)), 1)
    log_p = np.asarray(jax.nn.log_softmax(logits(model, np.concatenate([np.tile(trunk, (125, 1)), every], 1))[:, 2:5]))
    mass = np.exp(np.take_along_axis(log_p, every[:, :, None], 2)[..., 0].sum(1, dtype=np.float64))
    value = np.random.default_rng(0).normal(size=(5, 5, 5))
    truth = (mass * value[tuple(every.T)]).sum()
    rng, plain = np.random.default_rng(4), Requests.continuations([trunk], n * shifts)
    even = ((rng.random((shifts, 1)) + np.arange(n)[None] * 0.6180339887498949) % 1).ravel().astype(np.float32)
    engine, means = Engine(model, slots=64, mesh=device_mesh(1)), {}
    for name, spread in (("even", even), ("independent", None)):
        rolled = engine.run([trunk], dataclasses.replace(plain, spread=spread), Sampling(3, seed=6))
        means[name] = value[tuple(rolled.tokens.T)].reshape(shifts, n).mean(1)
    assert abs(means["even"].mean() - truth) < 4 * means["even"].std() / np.sqrt(shifts)
    assert means["even"].var() < 0.6 * means["independent"].var()
