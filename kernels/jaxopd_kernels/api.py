"""The public ops: arguments checked, defaults filled, an implementation chosen from an explicit table."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxopd_kernels import choice, hopper, one_pass, tpu, xla
from jaxopd_kernels.rows import VocabularyForm
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
        name = choice.choose(choice.local_kind(), arrays[0].shape[0], vocab_size, widths, dtypes, launches, k)
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
    forms: tuple[VocabularyForm, ...] = (),
    second_pass: bool = True,
) -> PairStatistics:
    """Compares student P and teacher Q row by row over the whole common vocabulary.

    P = softmax(hidden_s head_s^T) and Q = softmax(hidden_t head_t^T), both over the first vocab_size tokens (default
    the smaller of Vs and Vt): rows of a head past it, padding or a longer vocabulary, have no probability, and both
    models are renormalised over what is left. Matrix products and sums are float32 whatever the inputs' dtype.

    ids: tokens to report, -1 as padding. forms: functions (log_p [V], log_q [V]) -> f [V] whose values at the ids and
    means under P are wanted; keep the function objects, jit compiles again for new ones. second_pass: JS, total
    variation and forms need both log-sum-exps before the first column; False leaves JS and total variation NaN, which
    training never reads.

    implementation: a row of IMPLEMENTATIONS; None picks a kernel where choice.choose expects it to win. A kernel makes
    its second pass with a second launch, 2 T V (Ds + Dt) FLOP, where that costs less than moving the float32 logits of
    row chunks, 32 T V bytes; otherwise, and for forms, the chunks compute everything.
    Raises ValueError on shapes that do not fit, on an unknown implementation and on one that cannot serve the inputs.
    """
    _check_model("s", hidden_s, head_s, hidden_s.shape[0])
    _check_model("t", hidden_t, head_t, hidden_s.shape[0])
    _check_ids(ids, hidden_s.shape[0])
    vocab_size = _checked_vocabulary(vocab_size, min(head_s.shape[0], head_t.shape[0]))
    if forms and not second_pass:
        raise ValueError("forms: found some with second_pass=False, expected none, since they are part of that pass")
    models, launches = ((hidden_s, head_s), (hidden_t, head_t)), 0 if forms else 1 + second_pass
    op = _implementation(implementation, models, vocab_size, launches).pair_statistics
    return op(hidden_s, head_s, hidden_t, head_t, ids, vocab_size, tuple(forms), second_pass)


def head_statistics(
    hidden: Float[Array, "T D"],
    head: Float[Array, "V D"],
    *,
    ids: Int[Array, "T K"] | None = None,
    k: int = 0,
    vocab_size: int | None = None,
    implementation: str | None = None,
) -> HeadStatistics:
    """Describes P = softmax(hidden head^T) row by row: log-sum-exp, entropy, exact top k, log P at ids.

    Only the first vocab_size rows of the head count (default all). k <= 64; ties go to the lower id. ids may hold -1
    as padding; None is K = 0. Matrix products and sums are float32 whatever the inputs' dtype.
    Raises ValueError on shapes that do not fit, on k out of range, on an unknown implementation and on one that cannot
    serve the inputs.
    """
    T = hidden.shape[0]
    ids = jnp.zeros((T, 0), jnp.int32) if ids is None else ids
    _check_model("", hidden, head, T)
    _check_ids(ids, T)
    vocab_size = _checked_vocabulary(vocab_size, head.shape[0])
    if not 0 <= k <= min(MAX_TOP_K, vocab_size):
        raise ValueError(f"k: found {k}, expected 0 to {min(MAX_TOP_K, vocab_size)}")
    op = _implementation(implementation, ((hidden, head),), vocab_size, 1, k).head_statistics
    return op(hidden, head, ids, k, vocab_size)


def _check_model(name: str, hidden: Array, head: Array, T: int) -> None:
    suffix = f"_{name}" if name else ""
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1] or hidden.shape[0] != T:
        raise ValueError(
            f"hidden{suffix}, head{suffix}: found shapes {hidden.shape} and {head.shape}, expected [{T}, D] and [V, D]"
        )
    if not all(jax.dtypes.issubdtype(x.dtype, jnp.floating) for x in (hidden, head)):
        raise ValueError(f"hidden{suffix}, head{suffix}: found {hidden.dtype} and {head.dtype}, expected floats")


def _check_ids(ids: Array, T: int) -> None:
    if ids.ndim != 2 or ids.shape[0] != T or not jax.dtypes.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"ids: found shape {ids.shape} of {ids.dtype}, expected integers [{T}, K]")


def _checked_vocabulary(vocab_size: int | None, largest: int) -> int:
    vocab_size = largest if vocab_size is None else vocab_size
    if not 1 <= vocab_size <= largest:
        raise ValueError(f"vocab_size: found {vocab_size}, expected 1 to {largest}, the rows both heads have")
    return vocab_size
