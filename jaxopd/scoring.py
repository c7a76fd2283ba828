"""Student and teacher at positions, over the whole vocabulary, from hidden states and LM heads.

Hidden states may be arrays of this process, of another one or of a file (a memory map is read block by block). Each
call runs in blocks of at most BLOCK rows, padded to a power of two, as are the tokens per row: however many positions
there are, only a handful of shapes is compiled, and at most two blocks of hidden states are on the device.

Where a head lies on a mesh ("data", "model"), a device holds its share of the vocabulary and scores BLOCK rows of its
own: rows are spread over "data", both heads over "model", and the statistics of the shares are merged exactly.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxopd_kernels import MAX_TOP_K, HeadStatistics, PairStatistics, head_statistics, pair_statistics
from jaxtyping import Array, Float, Int

from jaxopd.distributed import fetch, place
from jaxopd.errors import InputError
from jaxopd.models.sharding import mesh_of
from jaxopd.types import bucket

BLOCK = 4096  # rows of a device
SMALLEST_BLOCK = 16

Scores = TypeVar("Scores")


class HasHead(Protocol):
    """Anything with an LM head, such as jaxopd.models.Qwen."""

    def head(self) -> Float[Array, "V D"]: ...


class AnalyticForm(NamedTuple):
    """A form f of log P and log Q alone, token by token, whose mean under P is known from the statistics.

    f: (log_p [T, K], log_q [T, K]) -> [T, K]. mean: statistics -> fbar [T], the sum of P f over the vocabulary.
    """

    f: Callable[[Array, Array], Array]
    mean: Callable[[PairStatistics], np.ndarray]


@dataclass(frozen=True)
class PairScores:
    """`statistics` in numpy (see PairStatistics), and by form f at the ids (0 at padding) and its mean under P.

    `known` is what jaxopd.gradients.gradient and jaxopd.alignment.node_alignment take for the restricted reading.
    """

    statistics: PairStatistics
    known: Mapping[str, tuple[Float[np.ndarray, "T K"], Float[np.ndarray, "T"]]]


def topk(
    model: HasHead, hidden: Float[np.ndarray, "T D"], k: int, *, vocab_size: int | None = None
) -> tuple[Int[np.ndarray, "T k"], Float[np.ndarray, "T k"]]:
    """Finds the k <= 64 most probable tokens at each position: their ids, ties by lower id, and log P in nats."""
    scores = score_tokens(model, hidden, k=k, vocab_size=vocab_size)
    return np.asarray(scores.top_ids), np.asarray(scores.top_log_p)


def score_tokens(
    model: HasHead,
    hidden: Float[np.ndarray, "T D"],
    ids: Int[np.ndarray, "T K"] | None = None,
    *,
    k: int = 0,
    vocab_size: int | None = None,
    implementation: str | None = None,
) -> HeadStatistics:
    """Describes one model at each position, in numpy: log-sum-exp, entropy, top k, log P at ids (-1 is padding).

    P is the softmax over the first vocab_size tokens, by default every row of the head.
    Raises InputError on shapes that do not fit, ids outside the vocabulary and k outside 0 to 64.
    """
    head = model.head()
    vocab_size = _vocabulary(vocab_size, head)
    ids = _checked_ids(ids, len(hidden), vocab_size)
    _check_hidden("hidden", hidden, head, len(hidden))
    if not 0 <= k <= min(MAX_TOP_K, vocab_size):
        raise InputError(f"k: found {k}, expected 0 to {min(MAX_TOP_K, vocab_size)}")
    mesh = common_mesh(head)
    op = partial(_head, head, k=k, vocab_size=vocab_size, implementation=implementation, mesh=mesh)
    scores = _in_blocks(op, (hidden,), ids, mesh)
    return replace(scores, log_p=scores.log_p[:, : ids.shape[1]])


def score_pair(
    student: HasHead,
    teacher: HasHead,
    hidden_s: Float[np.ndarray, "T Ds"],
    hidden_t: Float[np.ndarray, "T Dt"],
    ids: Int[np.ndarray, "T K"] | None = None,
    forms: Mapping[str, AnalyticForm] = MappingProxyType({}),
    *,
    vocab_size: int | None = None,
    second_pass: bool = True,
    implementation: str | None = None,
) -> PairScores:
    """Compares student and teacher at each position: every statistic of PairStatistics, and forms at the ids.

    Both are taken over the first vocab_size tokens (default: as many as both heads have) and renormalised there.
    ids may hold -1 as padding. forms by name; pass the same function objects again, new ones compile again.
    second_pass: False leaves JS and total variation NaN, and a kernel is done in one launch.
    Raises InputError on shapes that do not fit and ids outside the vocabulary.
    """
    head_s, head_t = student.head(), teacher.head()
    vocab_size = _vocabulary(vocab_size, head_s, head_t)
    ids = _checked_ids(ids, len(hidden_s), vocab_size)
    _check_hidden("hidden_s", hidden_s, head_s, len(hidden_s))
    _check_hidden("hidden_t", hidden_t, head_t, len(hidden_s))
    mesh = common_mesh(head_s, head_t)
    settings = {"vocab_size": vocab_size, "second_pass": second_pass, "implementation": implementation, "mesh": mesh}
    op = partial(_pair, head_s, head_t, forms=tuple(form.f for form in forms.values()), **settings)
    statistics, f = _in_blocks(op, (hidden_s, hidden_t), ids, mesh)
    K = ids.shape[1]
    statistics = replace(statistics, log_p=statistics.log_p[:, :K], log_q=statistics.log_q[:, :K])
    return PairScores(statistics, {name: (x[:, :K], forms[name].mean(statistics)) for name, x in zip(forms, f)})


def common_mesh(*heads: Array) -> Mesh | None:
    """Gives the mesh that the heads lie on, the one that splits the vocabulary most; None on a single device."""
    meshes = [mesh for head in heads if (mesh := mesh_of(head)) is not None and mesh.size > 1]
    return max(meshes, key=lambda mesh: mesh.shape["model"], default=None)


@partial(jax.jit, static_argnames=("k", "vocab_size", "implementation", "mesh"))
def _head(head: Array, hidden: Array, ids: Array, mesh: Mesh | None, **settings: Any) -> HeadStatistics:
    def op(heads: tuple[Array], hidden: Array, ids: Array, axis: str | None) -> HeadStatistics:
        return head_statistics(hidden, *heads, ids=ids, axis=axis, **settings)

    return over_mesh(op, (head,), (hidden, ids), mesh)


@partial(jax.jit, static_argnames=("forms", "vocab_size", "second_pass", "implementation", "mesh"))
def _pair(
    head_s: Array,
    head_t: Array,
    hidden_s: Array,
    hidden_t: Array,
    ids: Array,
    forms: tuple[Callable, ...],
    mesh: Mesh | None,
    **settings: Any,
) -> tuple[PairStatistics, list[Array]]:
    def op(heads: tuple[Array, Array], hidden_s: Array, hidden_t: Array, ids: Array, axis: str | None):
        return pair_statistics(hidden_s, heads[0], hidden_t, heads[1], ids, axis=axis, **settings)

    statistics = over_mesh(op, (head_s, head_t), (hidden_s, hidden_t, ids), mesh)
    return statistics, [jnp.where(ids >= 0, form(statistics.log_p, statistics.log_q), 0.0) for form in forms]


def over_mesh(
    op: Callable[..., Scores], heads: tuple[Array, ...], rows: tuple[Array, ...], mesh: Mesh | None
) -> Scores:
    """Calls op(heads, *rows, axis=) on each device's share of the vocabulary and of the rows."""
    if mesh is None:
        return op(heads, *rows, axis=None)
    shards = mesh.shape["model"]
    V = -(-min(head.shape[0] for head in heads) // shards) * shards
    # A head that is as long as the other, and that the shards divide, stays where it is.
    heads = tuple(jnp.pad(head[:V], ((0, max(0, V - head.shape[0])), (0, 0))) for head in heads)
    own = partial(op, axis="model" if shards > 1 else None)
    specs = (P("model"), *(P("data") for _ in rows))
    return jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=False)(heads, *rows)


def _in_blocks(op: Callable[..., Scores], hidden: tuple[Any, ...], ids: np.ndarray, mesh: Mesh | None) -> Scores:
    """Runs an op block by block and joins the rows that are no padding, in numpy; the ids stay padded."""
    T, K = ids.shape
    width = bucket(K) if K or mesh else 0  # jax 0.11 crashes on empty arrays that are split
    ids = np.pad(ids, ((0, 0), (0, width - K)), constant_values=-1)
    step = BLOCK * (mesh.shape["data"] if mesh else 1)
    parts: list[Any] = []
    for start in range(0, max(T, 1), step):
        rows = slice(start, start + step)
        parts.append(op(*(_placed(x[rows], 0, mesh) for x in hidden), _placed(ids[rows], -1, mesh)))
        parts[-2:-1] = fetch(parts[-2:-1])  # one block late: the device stays busy, and holds two at most

    return jax.tree.map(lambda *blocks: np.concatenate(blocks)[:T], *fetch(parts))


def _placed(rows: Any, value: int, mesh: Mesh | None) -> Any:
    """Appends rows up to the next bucket of each device, and spreads them over the mesh's "data"."""
    devices = mesh.shape["data"] if mesh else 1
    missing = bucket(-(-len(rows) // devices), SMALLEST_BLOCK) * devices - len(rows)
    if mesh is None:
        pad = jnp.pad if isinstance(rows, jax.Array) else np.pad
        return pad(rows, ((0, missing), (0, 0)), constant_values=value) if missing else rows
    if missing or not isinstance(rows, jax.Array):
        rows = np.pad(np.asarray(fetch(rows)), ((0, missing), (0, 0)), constant_values=value)
    return place(rows, NamedSharding(mesh, P("data")))


def _vocabulary(vocab_size: int | None, *heads: Array) -> int:
    largest = min(head.shape[0] for head in heads)
    vocab_size = largest if vocab_size is None else vocab_size
    if not 1 <= vocab_size <= largest:
        raise InputError(f"vocab_size: found {vocab_size}, expected 1 to {largest}, the size of the LM head")
    return vocab_size


def _checked_ids(ids: Any, T: int, vocab_size: int) -> np.ndarray:
    if ids is None:
        return np.zeros((T, 0), np.int32)
    ids = np.asarray(ids)
    if ids.ndim != 2 or len(ids) != T or not np.issubdtype(ids.dtype, np.integer):
        raise InputError(f"ids: found shape {ids.shape} of {ids.dtype}, expected integers [{T}, K]")
    if wrong := ids[(ids < -1) | (ids >= vocab_size)].tolist():
        raise InputError(f"ids: found {wrong[0]}, expected 0 to {vocab_size - 1}, or -1 as padding")
    return ids.astype(np.int32)


def _check_hidden(name: str, hidden: Any, head: Array, T: int) -> None:
    D = head.shape[1]
    if hidden.shape != (T, D):
        raise InputError(f"{name}: found shape {hidden.shape}, expected [{T}, {D}], {D} being the width of the LM head")
