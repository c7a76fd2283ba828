"""Low-discrepancy draws: each is exact by itself, what is left of its number is as good as new."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxopd.rollouts.sampling import draw_spread, request_keys

DRAWS = 100_000


@pytest.fixture(scope="module", params=[7, 300])
def drawn(request):
    """Draws at uniform numbers from one distribution, its vocabulary larger than a tile or not."""
    V, rng = request.param, np.random.default_rng(request.param)
    logits = (2 * rng.normal(size=V)).astype(np.float32)
    logits[V // 2] = -np.inf
    u = rng.random(DRAWS).astype(np.float32)
    keys = request_keys(jnp.uint32(1), jnp.arange(DRAWS), jnp.zeros(DRAWS, jnp.int32))
    found = jax.jit(draw_spread)(u, keys, jnp.broadcast_to(logits[None], (DRAWS, V)))
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
