"""The public ops around a kernel that streams the vocabulary once: what it leaves out is done here, in bounded memory.

Log-probabilities at given ids are gathered dot products. The top k come from maxima of groups of columns: the k largest
logits lie in the k groups with the largest maxima, and only those groups' logits are computed again. JS and total
variation need both log-sum-exps before the first column, so they take a second launch.

Where the heads are split over devices (`axis`, see shards.py), each streams its own columns; sums are merged as those
of streams within a kernel are, and the second launch is given the log-sum-exps of the whole row.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxopd_kernels import shards, streaming, xla
from jaxopd_kernels.rows import top_k
from jaxopd_kernels.statistics import HeadStatistics, PairStatistics
from jaxopd_kernels.streaming import DISTANCE, HEAD, PAIR, Pass

GROUP = 8  # columns per maximum
SPARE_GROUPS = 8  # beyond the k largest, since their maxima and the logits computed again are rounded differently
MAXIMA_BYTES = 128 << 20  # of group maxima at a time: 1,024 rows of 151,936 columns
GATHER_BYTES = 256 << 20  # of gathered head rows at a time


class Streamed(NamedTuple):
    """What one launch returns: sums over the whole vocabulary, [T] each, and the maxima of its groups of columns.

    columns: the ids of each group, ascending, -1 for what does not count. Groups ascend, too.
    """

    sums: Any
    maxima: Float[Array, "G T"] | None = None
    columns: Int[Array, "G g"] | None = None


class Launch(Protocol):
    """A kernel: streams the first vocab_size rows of the heads past every row of the hidden states."""

    def __call__(
        self,
        work: Pass,
        hidden: tuple[Float[Array, "T _"], ...],
        heads: tuple[Float[Array, "V _"], ...],
        vocab_size: int,
        given: tuple[Float[Array, "T"], ...] = (),
        maxima: bool = False,
    ) -> Streamed: ...


def pair_statistics(
    launch: Launch,
    hidden_s: Float[Array, "T Ds"],
    head_s: Float[Array, "Vs Ds"],
    hidden_t: Float[Array, "T Dt"],
    head_t: Float[Array, "Vt Dt"],
    ids: Int[Array, "T K"],
    vocab_size: int,
    second_pass: bool,
    axis: str | None = None,
) -> PairStatistics:
    """Computes the statistics of two models with a kernel, in two launches where the second pass is wanted."""
    hidden, heads, T = (hidden_s, hidden_t), (head_s, head_t), hidden_s.shape[0]

    def streamed(work: Pass, given: tuple[Array, ...] = ()) -> Any:
        def own(columns: int) -> Any:
            return launch(work, hidden, heads, columns, given).sums if columns else work.nothing(T)

        sums = shards.by_columns(own, head_s.shape[0], vocab_size, axis)
        return shards.merged_sums(sums, work.merged, axis)

    sums = streamed(PAIR)
    fields = streaming.divergences(sums)
    if second_pass:
        given = streaming.logsumexp2(sums.m_s, sums.S_s), streaming.logsumexp2(sums.m_t, sums.S_t)
        fields |= streaming.distances(streamed(DISTANCE, given))
    else:
        fields |= dict.fromkeys(("js", "js_student", "total_variation"), jnp.full(T, jnp.nan))
    return PairStatistics(
        **fields,
        log_p=logits_at(hidden_s, head_s, ids, vocab_size, axis) - fields["logsumexp_student"][:, None],
        log_q=logits_at(hidden_t, head_t, ids, vocab_size, axis) - fields["logsumexp_teacher"][:, None],
    )


def head_statistics(
    launch: Launch,
    hidden: Float[Array, "T D"],
    head: Float[Array, "V D"],
    ids: Int[Array, "T K"],
    k: int,
    vocab_size: int,
    axis: str | None = None,
) -> HeadStatistics:
    """Computes the statistics of one model with a kernel, rows in chunks if their group maxima are many."""
    most_columns = min(vocab_size, head.shape[0])
    own_k = min(k, most_columns)

    def chunk(hidden: Array, ids: Array) -> HeadStatistics:
        def own(columns: int) -> tuple[streaming.HeadSums, Array, Array]:
            T = hidden.shape[0]
            if columns == 0:
                return HEAD.nothing(T), jnp.full((T, own_k), -jnp.inf), jnp.zeros((T, own_k), jnp.int32)
            streamed = launch(HEAD, (hidden,), (head,), columns, maxima=k > 0)
            return streamed.sums, *_top_k(hidden, head, streamed, own_k)

        sums, best, where = shards.by_columns(own, head.shape[0], vocab_size, axis)
        sums = shards.merged_sums(sums, HEAD.merged, axis)
        top_z, top_ids = shards.merged_top_k(best, where + shards.first_id(head.shape[0], axis), k, axis)
        log_total = streaming.logsumexp(sums.m, sums.S)
        return HeadStatistics(
            logsumexp=log_total,
            entropy=streaming.entropy(sums.S, sums.E),
            top_ids=top_ids,
            top_log_p=top_z - log_total[:, None],
            log_p=logits_at(hidden, head, ids, vocab_size, axis) - log_total[:, None],
        )

    rows = xla.rows_per_chunk(4 * -(-most_columns // GROUP), MAXIMA_BYTES) if k else hidden.shape[0]
    return xla.in_chunks(chunk, (hidden, ids), rows)


def _top_k(
    hidden: Float[Array, "T D"], head: Float[Array, "V D"], streamed: Streamed, k: int
) -> tuple[Float[Array, "T k"], Int[Array, "T k"]]:
    """Recomputes the logits of the k groups with the largest maxima and sorts them; ties by lower id."""
    T = hidden.shape[0]
    if k == 0:
        return jnp.zeros((T, 0)), jnp.zeros((T, 0), jnp.int32)
    _, groups = top_k(streamed.maxima.T, min(k + SPARE_GROUPS, streamed.maxima.shape[0]))
    # in the order of their ids, so that ties go to the lower one
    candidates = streamed.columns[jnp.sort(groups, axis=-1)].reshape(T, -1)
    z, where = jax.lax.top_k(logits_at(hidden, head, candidates, head.shape[0]), k)
    return z, jnp.take_along_axis(candidates, where, axis=1)


def logits_at(
    hidden: Float[Array, "T D"],
    head: Float[Array, "V D"],
    ids: Int[Array, "T K"],
    vocab_size: int,
    axis: str | None = None,
) -> Float[Array, "T K"]:
    """Multiplies each row of hidden states by its own rows of the head, in float32; -inf where an id is no column."""

    def chunk(hidden: Array, ids: Array) -> Array:
        rows = head[jnp.maximum(ids, 0)].astype(jnp.float32)
        return jnp.where(ids >= 0, jnp.sum(rows * hidden.astype(jnp.float32)[:, None], axis=-1), -jnp.inf)

    local = shards.local_ids(jnp.where(ids < vocab_size, ids, -1), head.shape[0], axis)
    bytes_per_row = max(1, ids.shape[1]) * head.shape[1] * 4
    found = xla.in_chunks(chunk, (hidden, local), xla.rows_per_chunk(bytes_per_row, GATHER_BYTES))
    return shards.largest(found, axis)


def ops(launch: Launch) -> tuple[Callable[..., PairStatistics], Callable[..., HeadStatistics]]:
    """The two public ops of a kernel, in the order of Implementation's fields."""
    return partial(pair_statistics, launch), partial(head_statistics, launch)
