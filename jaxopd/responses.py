"""Responses after a prompt: the hidden states that predict their tokens, and their tokens' log-probs.

Rows are split over the axis "data" of the mesh that the model lies on, and every process gets the results of all.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxopd_kernels import head_statistics
from jaxtyping import Array, Bool, Float, Int

from jaxopd import scoring
from jaxopd.distributed import fetch, place
from jaxopd.errors import InputError
from jaxopd.models import Qwen, forward
from jaxopd.models.qwen import compiled_forward
from jaxopd.types import bucket

TOKENS_AT_ONCE = 16384  # of a forward pass on a device, padding included


def response_hidden(
    model: Qwen, prompt: Sequence[int], responses: Int[np.ndarray, "G S"]
) -> Float[np.ndarray, "G S D"]:
    """Computes the hidden states that predict each token of `responses` (-1: padding) after `prompt`.

    Rows past a response's end are finite and meaningless. Raises InputError beyond the model's context.
    """
    start, S = len(prompt) - 1, responses.shape[1]
    parts = [
        fetch(compiled_forward(model, tokens, mask))[:rows, start : start + S]
        for tokens, mask, rows in _batches(model, prompt, responses)
    ]
    return np.concatenate(parts)


def response_log_probs(
    model: Qwen, prompt: Sequence[int], responses: Int[np.ndarray, "G S"]
) -> Float[np.ndarray, "G S"]:
    """Computes the log-prob of each token of `responses` (-1: padding, 0 there) after `prompt`."""
    S, parts = responses.shape[1], []
    for tokens, mask, rows in _batches(model, prompt, responses):
        span = min(bucket(S, 8), tokens.shape[1] - 1)
        start = min(len(prompt) - 1, tokens.shape[1] - 1 - span)
        skipped = len(prompt) - 1 - start
        found = _next_log_probs(model, tokens, mask, jnp.int32(start), span, scoring.common_mesh(model.head()))
        parts.append(fetch(found)[:rows, skipped : skipped + S])
    return np.where(responses >= 0, np.concatenate(parts), 0.0).astype(np.float32)


def token_log_probs(
    model: Qwen, hidden: Float[np.ndarray, "T D"], ids: Int[np.ndarray, "T K"]
) -> Float[np.ndarray, "T K"]:
    """Gives the log-probs at `ids` from hidden states, -inf where the id is -1."""
    return np.asarray(scoring.score_tokens(model, hidden, ids).log_p)


@partial(nnx.jit, static_argnames=("span", "mesh"))
def _next_log_probs(
    model: Qwen,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    start: Int[Array, ""],
    span: int,
    mesh: Mesh | None,
) -> Float[Array, "B span"]:
    # The head is applied inside the same computation, to the response alone: hidden states of all rollouts would be
    # large to move, and logits over the prompt are the larger part of the work.
    hidden = lax.dynamic_slice_in_dim(forward(model, tokens, mask), start, span, 1)
    ids = lax.dynamic_slice_in_dim(tokens, start + 1, span, 1)
    flat = hidden.reshape(-1, hidden.shape[-1])

    def log_p(heads: tuple[Array], hidden: Array, ids: Array, axis: str | None) -> Array:
        return head_statistics(hidden, *heads, ids=ids, vocab_size=model.config.vocab_size, axis=axis).log_p

    return scoring.over_mesh(log_p, (model.head(),), (flat, ids.reshape(-1, 1)), mesh).reshape(ids.shape)


def _eighths(size: int) -> int:
    """Rounds up to an eighth of the next power of two: few shapes, and little of a batch is padding."""
    step = max(8, bucket(size) // 8)
    return -(-size // step) * step


def _batches(
    model: Qwen, prompt: Sequence[int], responses: Int[np.ndarray, "G S"]
) -> Iterator[tuple[Array, Array, int]]:
    """Yields (tokens, mask, real rows): prompt and response side by side, both axes padded to few sizes."""
    G, S = responses.shape
    context = model.config.max_positions
    if len(prompt) + S > context:
        raise InputError(f"prompt: found {len(prompt)} tokens before a response of {S}, expected {context} in all")
    if (largest := responses.max(initial=-1)) >= model.config.vocab_size:
        raise InputError(f"responses: found token {largest}, expected under {model.config.vocab_size} (the vocabulary)")
    mesh = scoring.common_mesh(model.head())
    devices = 1 if mesh is None else mesh.shape["data"]
    width = _eighths(len(prompt) + S)
    limit = devices * max(1, TOKENS_AT_ONCE // width)
    size = -(-G // -(-G // limit)) if limit < G else min(bucket(G, 8), limit)  # batches of one size
    size = -(-size // devices) * devices
    for low in range(0, G, size):
        part = responses[low : low + size]
        tokens, mask = np.zeros((size, width), np.int32), np.zeros((size, width), bool)
        tokens[:, : len(prompt)], mask[:, : len(prompt)] = np.asarray(prompt)[None], True
        here = slice(len(prompt), len(prompt) + S)
        tokens[: len(part), here], mask[: len(part), here] = np.maximum(part, 0), part >= 0
        if mesh is None:
            yield jnp.asarray(tokens), jnp.asarray(mask), len(part)
        else:
            yield *place((tokens, mask), NamedSharding(mesh, P("data"))), len(part)
