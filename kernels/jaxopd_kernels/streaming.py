"""Statistics that a stream of logit tiles can carry: what is kept per row, how it moves, merges and becomes nats.

A kernel sees the vocabulary tile by tile and keeps, for each row, sums over the columns seen so far. Exponentials are
taken in base 2 against the largest logit so far: x = z log2(e) - m, e = 2^x. When m rises the sums are moved to the new
reference; two streams over different columns are merged by moving both to the larger one. Both are exact up to
rounding, so the split of the vocabulary is free to choose, and one that is fixed gives the same bits every time.

The gap d = x_s - x_t is small where the models agree, whatever the size of the logits, so that sums of e d lose
nothing that a difference of two sums of e x would.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)
EXCLUDED = -1e30  # the logit of a column that does not count: finite, so that differences of two stay finite
NOTHING_YET = -1e18  # a reference below every logit; its square is finite in float32, as are those of moves from it
TINY = 1e-30  # a divisor in place of a sum of weights that is nothing
ONE_PASS_NOISE = 2e-6  # nats: below it, a KL from one-pass sums is rounding error


class Columns(NamedTuple):
    """How a backend reduces a tile over its columns and spreads row values over them."""

    total: Callable[[Array], Array]
    largest: Callable[[Array], Array]
    spread: Callable[[Array], Array]


class HeadSums(NamedTuple):
    """One model's running sums, each one number a row: m, S = sum e, E = sum e x."""

    m: Any
    S: Any
    E: Any


class PairSums(NamedTuple):
    """Two models' running sums, each one number a row; d = x_s - x_t, its mean is taken under the student."""

    m_s: Any
    m_t: Any
    S_s: Any  # sum e_s
    S_t: Any
    E_s: Any  # sum e_s x_s
    E_t: Any
    B: Any  # sum e_t d
    Q_s: Any  # sum e_s^2
    Q_t: Any
    Q_x: Any  # sum e_s e_t
    U: Any  # sum (e_s - e_t)^2
    mean: Any  # sum e_s d / S_s
    V: Any  # sum e_s (d - mean)^2
    G: Any  # sum e_s^2 (d - mean)
    G2: Any  # sum e_s^2 (d - mean)^2


class DistanceSums(NamedTuple):
    """Sums of distances between P and Q, each one number a row, for a pass that is given both log-sum-exps."""

    J_s: Any  # sum p log2(p / m) with m = (p + q) / 2
    J_t: Any  # sum q log2(q / m)
    L1: Any  # sum |p - q|


def moved_head(old: HeadSums, m: Array) -> HeadSums:
    """Restates sums against a reference m at or above their own."""
    rise = m - old.m
    a = jnp.exp2(-rise)
    return HeadSums(m, a * old.S, a * (old.E - rise * old.S))


def moved_pair(old: PairSums, m_s: Array, m_t: Array) -> PairSums:
    """Restates sums against references at or above their own: e_s becomes a e_s, e_t becomes b e_t, d becomes d + c."""
    rise_s, rise_t = m_s - old.m_s, m_t - old.m_t
    a, b, c = jnp.exp2(-rise_s), jnp.exp2(-rise_t), rise_t - rise_s
    return PairSums(
        m_s=m_s,
        m_t=m_t,
        S_s=a * old.S_s,
        S_t=b * old.S_t,
        E_s=a * (old.E_s - rise_s * old.S_s),
        E_t=b * (old.E_t - rise_t * old.S_t),
        B=b * (old.B + c * old.S_t),
        Q_s=a * a * old.Q_s,
        Q_t=b * b * old.Q_t,
        Q_x=a * b * old.Q_x,
        # a e_s - b e_t = a (e_s - e_t) + (a - b) e_t, whose second part vanishes where the models agree
        U=a * a * old.U + (a - b) * (2 * a * (old.Q_x - old.Q_t) + (a - b) * old.Q_t),
        mean=old.mean + c,
        V=a * old.V,
        G=a * a * old.G,
        G2=a * a * old.G2,
    )


def _recentred(sums: PairSums, mean: Array) -> PairSums:
    """Restates the moments of d around another mean; the sums of several streams then add up."""
    shift = sums.mean - mean
    return sums._replace(
        mean=mean,
        V=sums.V + shift * shift * sums.S_s,
        G=sums.G + shift * sums.Q_s,
        G2=sums.G2 + shift * (2 * sums.G + shift * sums.Q_s),
    )


def _added(one: PairSums, other: PairSums) -> PairSums:
    """Adds sums over different columns that have the same references."""
    total = jnp.maximum(one.S_s + other.S_s, TINY)
    # Not one.mean + (other.mean - one.mean) w: a far mean of next to no weight would take the other's digits.
    mean = one.mean * (one.S_s / total) + other.mean * (other.S_s / total)
    one, other = _recentred(one, mean), _recentred(other, mean)
    both = PairSums(*[x + y for x, y in zip(one, other)])
    return both._replace(m_s=one.m_s, m_t=one.m_t, mean=mean)


def head_tile(old: HeadSums, z: Array, columns: Columns) -> HeadSums:
    """Adds a tile of logits."""
    m = jnp.maximum(old.m, columns.largest(z) * LOG2E)
    x = z * LOG2E - columns.spread(m)
    e = jnp.exp2(x)
    moved = moved_head(old, m)
    return HeadSums(m, moved.S + columns.total(e), moved.E + columns.total(e * x))


def pair_tile(old: PairSums, z_s: Array, z_t: Array, columns: Columns) -> PairSums:
    """Adds a tile of both models' logits, the same columns of the vocabulary."""
    m_s = jnp.maximum(old.m_s, columns.largest(z_s) * LOG2E)
    m_t = jnp.maximum(old.m_t, columns.largest(z_t) * LOG2E)
    x_s, x_t = z_s * LOG2E - columns.spread(m_s), z_t * LOG2E - columns.spread(m_t)
    e_s, e_t = jnp.exp2(x_s), jnp.exp2(x_t)
    d, total = x_s - x_t, columns.total
    S_s, u = total(e_s), e_s - e_t
    mean = total(e_s * d) / jnp.maximum(S_s, TINY)
    # Centred before squaring: where one token has nearly all of P, its own d would drown the others'.
    centred = d - columns.spread(mean)
    e_s_centred = e_s * centred
    tile = PairSums(
        m_s=m_s,
        m_t=m_t,
        S_s=S_s,
        S_t=total(e_t),
        E_s=total(e_s * x_s),
        E_t=total(e_t * x_t),
        B=total(e_t * d),
        Q_s=total(e_s * e_s),
        Q_t=total(e_t * e_t),
        Q_x=total(e_s * e_t),
        U=total(u * u),
        mean=mean,
        V=total(e_s_centred * centred),
        G=total(e_s_centred * e_s),
        G2=total(e_s_centred * e_s_centred),
    )
    return _added(moved_pair(old, m_s, m_t), tile)


def distance_tile(
    old: DistanceSums, z_s: Array, z_t: Array, lse_s: Array, lse_t: Array, columns: Columns
) -> DistanceSums:
    """Adds a tile of both models' logits, given their whole rows' log-sum-exps in base 2."""
    x_s, x_t = z_s * LOG2E - columns.spread(lse_s), z_t * LOG2E - columns.spread(lse_t)
    p, q = jnp.exp2(x_s), jnp.exp2(x_t)
    m = jnp.maximum(p + q, TINY) / 2

    # From p and q alone: were the logits kept for log2 p, a kernel would run out of registers.
    def share(part: Array) -> Array:
        return columns.total(part * jnp.log(jnp.maximum(part / m, TINY))) * LOG2E

    return DistanceSums(old.J_s + share(p), old.J_t + share(q), old.L1 + columns.total(jnp.abs(p - q)))


def merged_head(streams: HeadSums) -> HeadSums:
    """Merges streams over different columns, [streams, T] each, into one, [T]."""
    moved = moved_head(streams, jnp.max(streams.m, axis=0, keepdims=True))
    return HeadSums(moved.m[0], moved.S.sum(0), moved.E.sum(0))


def merged_pair(streams: PairSums) -> PairSums:
    """Merges streams over different columns, [streams, T] each, into one, [T]."""
    m_s, m_t = (jnp.max(m, axis=0, keepdims=True) for m in (streams.m_s, streams.m_t))
    moved = moved_pair(streams, m_s, m_t)
    mean = jnp.sum(moved.S_s * moved.mean, axis=0, keepdims=True) / jnp.sum(moved.S_s, axis=0, keepdims=True)
    total = PairSums(*[x.sum(0) for x in _recentred(moved, mean)])
    return total._replace(m_s=m_s[0], m_t=m_t[0], mean=mean[0])


class Pass(NamedTuple):
    """What a kernel does with a stream of tiles: `start` is the sums over no column, the others as above.

    update(sums, *logits, *given, columns) takes one tile of each model and the row values the pass was given.
    """

    models: int
    start: Any
    update: Callable[..., Any]
    merged: Callable[..., Any]

    def nothing(self, T: int) -> Any:
        """The sums over no column, [T] each."""
        return type(self.start)(*(jnp.full(T, value, jnp.float32) for value in self.start))


HEAD = Pass(1, HeadSums(NOTHING_YET, 0.0, 0.0), head_tile, merged_head)
PAIR = Pass(2, PairSums(NOTHING_YET, NOTHING_YET, *[0.0] * 13), pair_tile, merged_pair)
DISTANCE = Pass(
    2, DistanceSums(0.0, 0.0, 0.0), distance_tile, lambda streams: DistanceSums(*(x.sum(0) for x in streams))
)


def logsumexp(m: Float[Array, "T"], S: Float[Array, "T"]) -> Float[Array, "T"]:
    """log of the sum of exp(logits), nats."""
    return LN2 * m + jnp.log(S)


def logsumexp2(m: Float[Array, "T"], S: Float[Array, "T"]) -> Float[Array, "T"]:
    """log2 of the sum of exp(logits), as distance_tile takes it."""
    return m + jnp.log2(S)


def entropy(S: Float[Array, "T"], E: Float[Array, "T"]) -> Float[Array, "T"]:
    """-sum P log P, nats."""
    return jnp.log(S) - LN2 * (E / S)


def divergences(sums: PairSums) -> dict[str, Float[Array, "T"]]:
    """Turns sums over the whole vocabulary into the fields of PairStatistics that one pass can give.

    KL(P || Q) is the mean of d, in nats, less log(S_s / S_t): the references cancel; S_s and S_t are close where the
    models are. What falls below ONE_PASS_NOISE is replaced by its second-order term, half the variance of
    log Q - log P under P, which is a sum of squares and keeps its digits.
    """
    variance = LN2**2 * (sums.V / sums.S_s)
    log_ratio = jnp.log(sums.S_s / sums.S_t)

    def settled(kl: Array) -> Array:
        return jnp.where(kl < ONE_PASS_NOISE, jnp.minimum(variance / 2, ONE_PASS_NOISE), kl)

    return {
        "logsumexp_student": logsumexp(sums.m_s, sums.S_s),
        "logsumexp_teacher": logsumexp(sums.m_t, sums.S_t),
        "entropy_student": entropy(sums.S_s, sums.E_s),
        "entropy_teacher": entropy(sums.S_t, sums.E_t),
        "reverse_kl": settled(LN2 * sums.mean - log_ratio),
        "forward_kl": settled(log_ratio - LN2 * (sums.B / sums.S_t)),
        "l2": _distance(sums),
        "cosine": jnp.minimum(sums.Q_x / (jnp.sqrt(sums.Q_s) * jnp.sqrt(sums.Q_t)), 1.0),
        "variance": variance,
        "gradient_norm": LN2 * jnp.sqrt(jnp.maximum(sums.G2, 0.0)) / sums.S_s,
    }


def _distance(sums: PairSums) -> Float[Array, "T"]:
    """||P - Q||. Near each other from sum (e_s - e_t)^2, which does not cancel; far apart from the three products."""
    k = 1.0 - sums.S_s / sums.S_t  # S_s (p - q) = (e_s - e_t) + k e_t
    near = (sums.U + k * (2 * (sums.Q_x - sums.Q_t) + k * sums.Q_t)) / sums.S_s**2
    far = sums.Q_s / sums.S_s**2 + sums.Q_t / sums.S_t**2 - 2 * (sums.Q_x / sums.S_s) / sums.S_t
    return jnp.sqrt(jnp.maximum(jnp.where(jnp.abs(k) < 0.1, near, far), 0.0))


def distances(sums: DistanceSums) -> dict[str, Float[Array, "T"]]:
    """Turns the second pass's sums into fields of PairStatistics."""
    return {
        "js": LN2 / 2 * jnp.maximum(sums.J_s + sums.J_t, 0.0),
        "js_student": LN2 * jnp.maximum(sums.J_s, 0.0),
        "total_variation": sums.L1 / 2,
    }
