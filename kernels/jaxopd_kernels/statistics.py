"""The public operations and the table of their implementations."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from jaxtyping import Array, Float, Int

from jaxopd_kernels import xla
from jaxopd_kernels.results import HeadStatistics, PairStatistics

# log P [V], log Q [V] -> f [V]
VocabularyForm = Callable[[Array, Array], Array]

# Operation -> implementation name -> function. The first of each is the default.
IMPLEMENTATIONS: Mapping[str, Mapping[str, Callable]] = MappingProxyType(
    {
        "head_statistics": {"xla": xla.head_statistics, "xla_materialized": xla.head_statistics_materialized},
        "pair_statistics": {"xla": xla.pair_statistics, "xla_materialized": xla.pair_statistics_materialized},
    }
)


def head_statistics(
    hidden: Float[Array, "T D"],
    head: Float[Array, "V D"],
    ids: Int[Array, "T K"],
    *,
    k: int = 0,
    vocab_size: int | None = None,
    implementation: str | None = None,
) -> HeadStatistics:
    """Computes log-sum-exp, entropy, the k likeliest tokens and log-probs at `ids` of softmax(hidden head^T).

    Logits are float32 and never [T, V] in memory under the default implementation. Rows of the head from
    `vocab_size` on are padding. Raises ValueError on an unknown implementation.
    """
    return _find("head_statistics", implementation)(hidden, head, ids, k, vocab_size or head.shape[0])


def pair_statistics(
    hidden_s: Float[Array, "T Ds"],
    head_s: Float[Array, "Vs Ds"],
    hidden_t: Float[Array, "T Dt"],
    head_t: Float[Array, "Vt Dt"],
    ids: Int[Array, "T K"],
    *,
    forms: Sequence[VocabularyForm] = (),
    vocab_size: int | None = None,
    implementation: str | None = None,
) -> PairStatistics:
    """Compares student and teacher over the vocabulary in one pass over both heads.

    Both distributions live on the first `vocab_size` tokens, by default those that both heads have, and are
    normalised there. Logits are float32 and never [T, V] in memory under the default implementation. Raises
    ValueError on an unknown implementation.
    """
    V = vocab_size or min(head_s.shape[0], head_t.shape[0])
    return _find("pair_statistics", implementation)(hidden_s, head_s, hidden_t, head_t, ids, tuple(forms), V)


def _find(operation: str, implementation: str | None) -> Callable:
    table = IMPLEMENTATIONS[operation]
    name = implementation or next(iter(table))
    if name not in table:
        raise ValueError(f"implementation: found {name!r}, expected one of {', '.join(table)}")
    return table[name]
