"""The public ops: arguments checked, defaults filled, an implementation chosen from an explicit table."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxopd_kernels import choice, hopper, one_pass, shards, tpu, xla
from jaxopd_kernels.checks import check_ids, check_model, checked_rows, checked_vocabulary
from jaxopd_kernels.statistics import HeadStatistics, PairStatistics

MAX_TOP_K = 64
KERNELS = ("hopper", "tpu")


class Implementation(NamedTuple):
    """A row of the table; both take the public op's arguments in order, none left out."""

    pair_statistics: Callable[..., PairStatistics]
    head_statistics: Callable[..., HeadStatistics]


IMPLEMENTATIONS: Mapping[str, Implementation] = MappingProxyType(
    {
        "xla": Implementation(xla.pair_statistics, xla.head_statistics),
        "xla_materialized": Implementation(xla.pair_statistics_materialized, xla.head_statistics_materialized),
        "hopper": Implementation(*one_pass.ops(hopper.launch)),
        "tpu": Implementation(*one_pass.ops(tpu.launch)),
    }
)


def _implementation(
    name: str | None, models: tuple[tuple[Array, Array], ...], vocab_size: int, launches: int, k: int = 0
) -> Implementation:
    """Looks up a row; None asks `choice`, whose answer is "xla" wherever no kernel is meant to win."""
    arrays, widths = [x for model in models for x in model], tuple(hidden.shape[1] for hidden, _ in models)
    if name is None:
        dtypes = tuple(x.dtype for x in arrays)
        T, columns = arrays[0].shape[0], min(vocab_size, *(head.shape[0] for _, head in models))  # on this device
        name = choice.choose(choice.local_kind(), T, columns, widths, dtypes, launches, k)
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: found {name!r}, expected one of {', '.join(IMPLEMENTATIONS)}")
    if name in KERNELS:
        _check_kernel_fits(name, widths, arrays)
    return IMPLEMENTATIONS[name]


def _check_kernel_fits(name: str, widths: tuple[int, ...], arrays: list[Array]) -> None:
    multiple = choice.kernel_widths(name)
    if any(width % multiple for width in widths):
        raise ValueError(f"hidden sizes: found {widths}, expected multiples of {multiple} for implementation {name!r}")
    if any(x.dtype != jnp.bfloat16 for x in arrays):
        raise ValueError(f"hidden, head: found {arrays[0].dtype}, expected bfloat16 for implementation {name!r}")


def pair_statistics(
    hidden_s: Float[Array, "T Ds"],
    head_s: Float[Array, "Vs Ds"],
    hidden_t: Float[Array, "T Dt"],
    head_t: Float[Array, "Vt Dt"],
    ids: Int[Array, "T K"],
    *,
    vocab_size: int | None = None,
    implementation: str | None = None,
    second_pass: bool = True,
    axis: str | None = None,
) -> PairStatistics:
    """Compares student P and teacher Q row by row over the whole common vocabulary.

    P = softmax(hidden_s head_s^T) and Q = softmax(hidden_t head_t^T), both over the first vocab_size tokens (default
    the smaller of Vs and Vt): rows of a head past it, padding or a longer vocabulary, have no probability, and both
    models are renormalised over what is left. Matrix products and sums are float32 whatever the inputs' dtype.

    ids: tokens to report, -1 as padding. second_pass: JS and total variation need both log-sum-exps before the first
    column; False leaves them NaN, for training never reads them.

    implementation: a row of IMPLEMENTATIONS; None picks a kernel where choice.choose expects it to win. A kernel makes
    its second pass with a second launch, 2 T V (Ds + Dt) FLOP, where that costs less than moving the float32 logits of
    row chunks, 32 T V bytes; otherwise the chunks compute everything.

    axis: inside jax.shard_map (check_vma=False), the axis of the mesh over which the rows of both heads are split, in
    equal parts in the order of the ids. vocab_size and ids mean the whole vocabulary; the devices of the axis hold the
    same hidden states, and each gets the statistics over all columns.
    Raises ValueError on shapes that do not fit, on an unknown implementation and on one that cannot serve the inputs.
    """
    check_model("s", hidden_s, head_s, hidden_s.shape[0])
    check_model("t", hidden_t, head_t, hidden_s.shape[0])
    check_ids(ids, hidden_s.shape[0])
    vocab_size = checked_vocabulary(vocab_size, checked_rows(head_s, head_t, axis) * shards.count(axis))
    models = ((hidden_s, head_s), (hidden_t, head_t))
    op = _implementation(implementation, models, vocab_size, 1 + second_pass).pair_statistics
    return op(hidden_s, head_s, hidden_t, head_t, ids, vocab_size, second_pass, axis)


def head_statistics(
    hidden: Float[Array, "T D"],
    head: Float[Array, "V D"],
    *,
    ids: Int[Array, "T K"] | None = None,
    k: int = 0,
    vocab_size: int | None = None,
    implementation: str | None = None,
    axis: str | None = None,
) -> HeadStatistics:
    """Describes P = softmax(hidden head^T) row by row: log-sum-exp, entropy, exact top k, log P at ids.

    Only the first vocab_size rows of the head count (default all). k <= 64; ties go to the lower id. ids may hold -1
    as padding; None is K = 0. Matrix products and sums are float32 whatever the inputs' dtype. axis: as in
    `pair_statistics`.
    Raises ValueError on shapes that do not fit, on k out of range, on an unknown implementation and on one that cannot
    serve the inputs.
    """
    T = hidden.shape[0]
    ids = jnp.zeros((T, 0), jnp.int32) if ids is None else ids
    check_model("", hidden, head, T)
    check_ids(ids, T)
    vocab_size = checked_vocabulary(vocab_size, head.shape[0] * shards.count(axis))
    if not 0 <= k <= min(MAX_TOP_K, vocab_size):
        raise ValueError(f"k: found {k}, expected 0 to {min(MAX_TOP_K, vocab_size)}")
    op = _implementation(implementation, ((hidden, head),), vocab_size, 1, k).head_statistics
    return op(hidden, head, ids, k, vocab_size, axis)
