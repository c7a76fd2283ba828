"""Statistics of logits that are in memory: a few rows at a time, whole vocabulary, accurate in float32.

Divergences are summed in forms whose every summand is >= 0, from x = log P - log Q taken as
(z_s - z_t) - log(Z_s / Z_t). Nothing cancels: they cannot come out negative, an error in log(Z_s / Z_t) enters only
at second order, and a KL of 1e-8 keeps its digits (the textbook sum P log(P / Q) loses them below 1e-5).

Where the columns are split over devices (`axis`, see shards.py), maxima, normalisers and means are those of the whole
row before anything is taken against them, so the summands are the same and only the order of the sums differs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxopd_kernels import shards
from jaxopd_kernels.statistics import HeadStatistics, PairStatistics

SERIES_RADIUS = 0.25  # where |x| is smaller, the summands come from their Taylor series
GROUP = 64  # columns per group in top_k; near sqrt(V / k) for V = 151,936 and k = 32


class _Softmax(NamedTuple):
    largest: Float[Array, "T 1"]
    weights: Float[Array, "T V"]  # exp(z - largest)
    total: Float[Array, "T 1"]  # their sum
    entropy: Float[Array, "T"]

    @property
    def logsumexp(self) -> Float[Array, "T"]:
        return (self.largest + jnp.log(self.total))[:, 0]

    def log_probability(self, z: Float[Array, "T K"]) -> Float[Array, "T K"]:
        return (z - self.largest) - jnp.log(self.total)


def _softmax(z: Float[Array, "T V"], axis: str | None) -> _Softmax:
    largest = shards.largest(jnp.max(z, axis=-1, keepdims=True), axis)
    weights = jnp.exp(z - largest)
    sums = jnp.sum(weights, axis=-1, keepdims=True)
    sums_below = jnp.sum(jnp.where(weights > 0, weights * (z - largest), 0.0), axis=-1, keepdims=True)
    total, below = shards.total((sums, sums_below), axis)
    return _Softmax(largest, weights, total, (jnp.log(total) - below / total)[:, 0])


def _kl_summand(p: Array, q: Array, x: Array) -> Array:
    """q - p + p x with x = log(p / q): >= 0, and its sum over the vocabulary is KL(P || Q)."""
    series = x * x * (1 / 2 - x * (1 / 6 - x * (1 / 24 - x * (1 / 120 - x * (1 / 720 - x / 5040)))))
    return jnp.where(jnp.abs(x) < SERIES_RADIUS, p * series, jnp.maximum(q - p + p * x, 0.0))


def _js_summand(p: Array, q: Array, x: Array) -> Array:
    """m (log 2 - H(sigmoid x)), m = (p + q) / 2, H the binary entropy: >= 0, and its sum is the JS divergence."""
    half = jnp.minimum(jnp.abs(x) / 2, 40.0)
    small = jnp.exp(-2 * half)
    exact = jnp.log(2.0) - jnp.log1p(small) - 2 * half * small / (1 + small)
    h2 = half * half
    series = h2 * (1 / 2 - h2 * (1 / 4 - h2 * (1 / 9 - h2 * (17 / 360))))
    return (p + q) / 2 * jnp.where(half < SERIES_RADIUS, series, exact)


def at_ids(values: Float[Array, "T V"], ids: Int[Array, "T K"], axis: str | None = None) -> Float[Array, "T K"]:
    """Takes values at the ids, and -inf where an id is no column of any shard."""
    local = shards.local_ids(ids, values.shape[-1], axis)
    found = jnp.where(local >= 0, jnp.take_along_axis(values, jnp.maximum(local, 0), axis=-1), -jnp.inf)
    return shards.largest(found, axis)


def pair_rows(
    z_s: Float[Array, "T V"],
    z_t: Float[Array, "T V"],
    ids: Int[Array, "T K"],
    second_pass: bool = True,
    axis: str | None = None,
) -> PairStatistics:
    """Computes the statistics of student and teacher logits; -inf marks a token that both models exclude."""
    student, teacher = _softmax(z_s, axis), _softmax(z_t, axis)
    e_s, e_t = student.weights, teacher.weights
    gap = jnp.where((e_s > 0) | (e_t > 0), (z_s - z_t) - (student.largest - teacher.largest), 0.0)
    mean_gap = shards.total(jnp.sum(e_s * gap, axis=-1, keepdims=True), axis) / student.total

    p, q = e_s / student.total, e_t / teacher.total
    x = gap - jnp.log(student.total / teacher.total)
    centred = gap - mean_gap  # fbar - f
    summands = {
        "reverse_kl": _kl_summand(p, q, x),
        "forward_kl": _kl_summand(q, p, -x),
        "squared_l2": (p - q) ** 2,
        "p_squared": p * p,
        "q_squared": q * q,
        "p_q": p * q,
        "variance": p * centred**2,
        "squared_gradient": (p * centred) ** 2,
    }
    distances = {
        "js": _js_summand(p, q, x),
        "js_student": _kl_summand(p, (p + q) / 2, jnp.log(2.0) - jax.nn.softplus(-x)),
        "total_variation": jnp.abs(p - q) / 2,
    }
    summands |= distances if second_pass else {}
    sums = shards.total({name: jnp.sum(summand, axis=-1) for name, summand in summands.items()}, axis)
    norms = jnp.sqrt(sums["p_squared"]) * jnp.sqrt(sums["q_squared"])
    return PairStatistics(
        logsumexp_student=student.logsumexp,
        logsumexp_teacher=teacher.logsumexp,
        entropy_student=student.entropy,
        entropy_teacher=teacher.entropy,
        reverse_kl=sums["reverse_kl"],
        forward_kl=sums["forward_kl"],
        l2=jnp.sqrt(sums["squared_l2"]),
        cosine=jnp.minimum(sums["p_q"] / norms, 1.0),
        variance=sums["variance"],
        gradient_norm=jnp.sqrt(sums["squared_gradient"]),
        log_p=student.log_probability(at_ids(z_s, ids, axis)),
        log_q=teacher.log_probability(at_ids(z_t, ids, axis)),
        **{name: sums.get(name, jnp.full(len(x), jnp.nan)) for name in distances},
    )


def head_rows(z: Float[Array, "T V"], ids: Int[Array, "T K"], k: int = 0, axis: str | None = None) -> HeadStatistics:
    """Computes the statistics of one model's logits; -inf marks an excluded token."""
    softmax, columns = _softmax(z, axis), z.shape[-1]
    best, where = top_k(z, min(k, columns))
    top_z, top_ids = shards.merged_top_k(best, where + shards.first_id(columns, axis), k, axis)
    return HeadStatistics(
        logsumexp=softmax.logsumexp,
        entropy=softmax.entropy,
        top_ids=top_ids,
        top_log_p=softmax.log_probability(top_z),
        log_p=softmax.log_probability(at_ids(z, ids, axis)),
    )


def top_k(z: Float[Array, "T V"], k: int) -> tuple[Float[Array, "T k"], Int[Array, "T k"]]:
    """Finds the k largest entries of each row, best first, ties by lower id, and their ids; exact.

    The k largest lie in the k groups of GROUP columns with the largest maxima (again ties by lower index), so only
    V / GROUP maxima and k GROUP candidates are ever sorted.
    """
    rows, columns = z.shape
    groups = -(-columns // GROUP)
    if groups <= 2 * k or k == 0:
        return jax.lax.top_k(z, k)
    grouped = jnp.pad(z, ((0, 0), (0, groups * GROUP - columns)), constant_values=-jnp.inf).reshape(rows, groups, GROUP)
    _, best = jax.lax.top_k(jnp.max(grouped, axis=-1), k)
    best = jnp.sort(best, axis=-1)  # candidates in the order of their ids, so that ties still go to the lower one
    candidates = jnp.take_along_axis(grouped, best[:, :, None], axis=1).reshape(rows, k * GROUP)
    values, where = jax.lax.top_k(candidates, k)
    return values, jnp.take_along_axis(best, where // GROUP, axis=1) * GROUP + where % GROUP
