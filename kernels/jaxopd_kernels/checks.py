"""What the public ops ask of their arguments; a ValueError says what was found and what is expected."""

import jax
import jax.numpy as jnp
from jaxtyping import Array


def check_model(name: str, hidden: Array, head: Array, T: int) -> None:
    """Asks for float hidden states [T, D] and a float head [V, D]; `name` ends their names in the message."""
    suffix = f"_{name}" if name else ""
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1] or hidden.shape[0] != T:
        raise ValueError(
            f"hidden{suffix}, head{suffix}: found shapes {hidden.shape} and {head.shape}, expected [{T}, D] and [V, D]"
        )
    if not all(jax.dtypes.issubdtype(x.dtype, jnp.floating) for x in (hidden, head)):
        raise ValueError(f"hidden{suffix}, head{suffix}: found {hidden.dtype} and {head.dtype}, expected floats")


def check_ids(ids: Array, T: int) -> None:
    """Asks for integers [T, K]."""
    if ids.ndim != 2 or ids.shape[0] != T or not jax.dtypes.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"ids: found shape {ids.shape} of {ids.dtype}, expected integers [{T}, K]")


def checked_rows(head_s: Array, head_t: Array, axis: str | None) -> int:
    """Gives the number of rows that both heads have; shards hold the same ids only if they have equally many."""
    rows_s, rows_t = head_s.shape[0], head_t.shape[0]
    if axis is not None and rows_s != rows_t:
        raise ValueError(f"head_s, head_t: found {rows_s} and {rows_t} rows, expected equal shards along {axis!r}")
    return min(rows_s, rows_t)


def checked_vocabulary(vocab_size: int | None, largest: int) -> int:
    """Gives vocab_size, default `largest`, which it must not exceed."""
    vocab_size = largest if vocab_size is None else vocab_size
    if not 1 <= vocab_size <= largest:
        raise ValueError(f"vocab_size: found {vocab_size}, expected 1 to {largest}, the rows that every head has")
    return vocab_size
