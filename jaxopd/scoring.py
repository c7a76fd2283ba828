"""Scores positions over the whole vocabulary: student alone, or student against teacher.

Hidden states come in, statistics go out; where the hidden states were computed (this process, another one, a disk) is
not its business. The number of positions is padded to a power of two, so that few shapes are compiled.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxopd_kernels import PairStatistics, head_statistics, pair_statistics
from jaxtyping import Array, Float, Int

from jaxopd.errors import InputError
from jaxopd.models import Qwen, hidden_states
from jaxopd.models.qwen import forward

TOKENS_AT_ONCE = 16384  # of a forward pass, padding included


class TopK(NamedTuple):
    """The k likeliest tokens of each position, likeliest first, ties by the lower id."""

    ids: Int[np.ndarray, "T k"]
    log_probs: Float[np.ndarray, "T k"]


def response_hidden(
    model: Qwen, prompt: Sequence[int], responses: Int[np.ndarray, "G S"]
) -> Float[np.ndarray, "G S D"]:
    """Computes the hidden states that predict each token of `responses` (-1: padding) after `prompt`.

    Rows past a response's end are finite and meaningless. Raises InputError beyond the model's context.
    """
    start = len(prompt) - 1
    parts = [
        np.asarray(hidden_states(model, tokens, mask))[:rows, start : start + responses.shape[1]]
        for tokens, mask, rows in _batches(model, prompt, responses)
    ]
    return np.concatenate(parts)


def response_log_probs(
    model: Qwen, prompt: Sequence[int], responses: Int[np.ndarray, "G S"]
) -> Float[np.ndarray, "G S"]:
    """Computes the log-prob of each token of `responses` (-1: padding, 0 there) after `prompt`."""
    start, S = len(prompt) - 1, responses.shape[1]
    parts = [
        np.asarray(_next_log_probs(model, tokens, mask))[:rows, start : start + S]
        for tokens, mask, rows in _batches(model, prompt, responses)
    ]
    return np.where(responses >= 0, np.concatenate(parts), 0.0).astype(np.float32)


def topk(model: Qwen, hidden: Float[np.ndarray, "T D"], k: int) -> TopK:
    """Finds the k likeliest tokens of each position."""
    none = np.full((len(hidden), 1), -1, np.int32)
    found = _head(*_padded(hidden, none), model.head(), k)
    return TopK(*(np.asarray(x)[: len(hidden)] for x in (found.top_ids, found.top_log_p)))


def log_probs(model: Qwen, hidden: Float[np.ndarray, "T D"], ids: Int[np.ndarray, "T K"]) -> Float[np.ndarray, "T K"]:
    """Gives the log-probs at `ids`, -inf where the id is -1."""
    return np.asarray(_head(*_padded(hidden, ids), model.head(), 0).log_p)[: len(hidden), : ids.shape[1]]


def score_pair(
    student: Qwen,
    teacher: Qwen,
    hidden_s: Float[np.ndarray, "T Ds"],
    hidden_t: Float[np.ndarray, "T Dt"],
    ids: Int[np.ndarray, "T K"],
    forms: tuple[Callable, ...] = (),
) -> PairStatistics:
    """Compares student and teacher at T positions: `PairStatistics` as numpy arrays.

    `forms` are functions (log P [V], log Q [V]) -> f [V]; pass the same objects again to reuse what was compiled.
    """
    hidden_s, padded_ids = _padded(hidden_s, ids)
    hidden_t, _ = _padded(hidden_t, ids)
    found = _pair(hidden_s, student.head(), hidden_t, teacher.head(), padded_ids, forms)
    T, K = ids.shape
    return jax.tree.map(lambda x: np.asarray(x)[:T, :K] if x.ndim == 2 else np.asarray(x)[:T], found)


@partial(jax.jit, static_argnames="k")
def _head(hidden: Array, ids: Array, head: Array, k: int):
    return head_statistics(hidden, head, ids, k=k)


@partial(jax.jit, static_argnames="forms")
def _pair(hidden_s: Array, head_s: Array, hidden_t: Array, head_t: Array, ids: Array, forms: tuple) -> PairStatistics:
    return pair_statistics(hidden_s, head_s, hidden_t, head_t, ids, forms=forms)


@nnx.jit
def _next_log_probs(model: Qwen, tokens: Int[Array, "B T"], mask: Array) -> Float[Array, "B T1"]:
    hidden = forward(model, tokens, mask)[:, :-1]
    flat = hidden.reshape(-1, hidden.shape[-1])
    return head_statistics(flat, model.head(), tokens[:, 1:].reshape(-1, 1)).log_p.reshape(hidden.shape[:2])


def _padded(hidden: np.ndarray, ids: np.ndarray) -> tuple[Array, Array]:
    rows = _bucket(len(hidden)) - len(hidden)
    columns = -ids.shape[1] % 8
    hidden = np.pad(hidden, ((0, rows), (0, 0)))
    ids = np.pad(ids, ((0, rows), (0, columns)), constant_values=-1).astype(np.int32)
    return jnp.asarray(hidden), jnp.asarray(ids)


def _batches(model: Qwen, prompt: Sequence[int], responses: np.ndarray):
    """Yields (tokens, mask, real rows): prompt and response side by side, both axes padded to few sizes."""
    G, S = responses.shape
    context = model.config.max_positions
    if len(prompt) + S > context:
        raise InputError(f"prompt: found {len(prompt)} tokens before a response of {S}, expected {context} in all")
    width = _bucket(len(prompt) + S)
    size = max(1, min(_bucket(G), TOKENS_AT_ONCE // width))
    for low in range(0, G, size):
        part = responses[low : low + size]
        tokens, mask = np.zeros((size, width), np.int32), np.zeros((size, width), bool)
        tokens[:, : len(prompt)], mask[:, : len(prompt)] = np.asarray(prompt), True
        here = slice(len(prompt), len(prompt) + S)
        tokens[: len(part), here], mask[: len(part), here] = np.maximum(part, 0), part >= 0
        yield tokens, mask, len(part)


def _bucket(n: int) -> int:
    """Rounds up to a power of two, or beyond 4096 to a multiple of it."""
    return 1 << (max(n, 32) - 1).bit_length() if n <= 4096 else -(-n // 4096) * 4096
