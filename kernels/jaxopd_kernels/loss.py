"""Distillation losses over the whole vocabulary, differentiable in the student's hidden states and head.

Rows go through in waves whose float32 logits fit a budget; [T, V] never exists. The gradient in a row's logits is
-g P (f - fbar) with f = -dL/dP (see loss_forms) and g the row's weight or cotangent; two more matrix products turn a
wave of them into gradients of hidden states and head, the latter summed over waves in float32. Teachers get none.

Floating-point operations, per row and vocabulary entry, for hidden sizes Ds and Dt:
    forward                                       2 Ds + 2 Dt
    divergence_loss with its gradient             8 Ds + 4 Dt   (the logits are computed again)
    weighted_divergence_loss with its gradient    6 Ds + 2 Dt   (gradients are made while the logits are at hand)

Where rows are spread over devices, call these inside jax.shard_map with check_vma=False: each device then goes through
its own rows, and the head's gradients are summed over devices.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxopd_kernels.checks import check_model, checked_vocabulary
from jaxopd_kernels.loss_forms import ENTROPY, Divergence, Elementwise, Kind, divergence
from jaxopd_kernels.products import product

# Float32 logits of one wave, all models together. Each wave reads and writes the float32 gradient of the head once: at
# V = 151,936 an accelerator needs the 824 rows of two models that this gives to hide that behind the matrix products. A
# CPU multiplies slowly enough to hide it behind 216, and holds four times the logits in intermediate arrays.
WAVE_BYTES = 1 << 30
WAVE_BYTES_CPU = 1 << 28

Arrays = tuple[Array, ...]


def divergence_loss(
    hidden_s: Float[Array, "T Ds"],
    head_s: Float[Array, "Vs Ds"],
    hidden_t: Float[Array, "T Dt"],
    head_t: Float[Array, "Vt Dt"],
    kind: Kind | Elementwise = "reverse_kl",
    *,
    beta: float = 0.5,
    vocab_size: int | None = None,
    wave_bytes: int | None = None,
) -> Float[Array, "T"]:
    """Computes L(P, Q) of every row, P = softmax(hidden_s head_s^T) the student and Q the teacher, in nats.

    Differentiable in hidden_s and head_s. For a weighted sum of rows, `weighted_divergence_loss` is cheaper.

    kind: "reverse_kl" KL(P || Q), "forward_kl" KL(Q || P), "jsd" beta KL(Q || M) + (1 - beta) KL(P || M) with M =
    beta Q + (1 - beta) P, or a function of (log_p, log_q), elementwise, whose sum over the vocabulary is the loss
    (keep the function object, jit compiles again for a new one). vocab_size: how many leading rows of the heads count
    (default: as many as both have); both models are renormalised over them. wave_bytes: how much of the float32
    logits exists at a time, all models together (default WAVE_BYTES, or WAVE_BYTES_CPU).
    Matrix products and sums are float32; with bfloat16 inputs the logit gradients are rounded to bfloat16 before they
    are multiplied. Raises ValueError on shapes that do not fit, an unknown kind and a beta outside 0 to 1.
    """
    hidden, heads = _checked((hidden_s, hidden_t), (head_s, head_t), vocab_size)
    return _rows(divergence(kind, beta), wave_bytes, hidden, heads)


def weighted_divergence_loss(
    hidden_s: Float[Array, "T Ds"],
    head_s: Float[Array, "Vs Ds"],
    hidden_t: Float[Array, "T Dt"],
    head_t: Float[Array, "Vt Dt"],
    weights: Float[Array, "T"],
    kind: Kind | Elementwise = "reverse_kl",
    *,
    beta: float = 0.5,
    vocab_size: int | None = None,
    wave_bytes: int | None = None,
) -> tuple[Float[Array, ""], Float[Array, "T"]]:
    """Computes sum_t weights_t L(P_t, Q_t), and the rows L [T], through which no gradient flows.

    For training: differentiated in hidden_s, head_s and weights, it makes the gradients in the forward pass, so each
    logit is computed once. They are kept (float32, the size of hidden_s and head_s) until the backward pass scales
    them. The other arguments are those of `divergence_loss`; weight 0 leaves a row out.
    """
    hidden, heads = _checked((hidden_s, hidden_t), (head_s, head_t), vocab_size)
    if weights.shape != hidden_s.shape[:1]:
        raise ValueError(f"weights: found shape {weights.shape}, expected {hidden_s.shape[:1]}")
    total, rows = _weighted_sum(divergence(kind, beta), wave_bytes, weights, hidden, heads)
    return total, jax.lax.stop_gradient(rows)


def entropy_loss(
    hidden: Float[Array, "T D"],
    head: Float[Array, "V D"],
    *,
    vocab_size: int | None = None,
    wave_bytes: int | None = None,
) -> Float[Array, "T"]:
    """Computes -sum P log P of every row, P = softmax(hidden head^T), in nats; differentiable in both.

    vocab_size, wave_bytes and errors as in `divergence_loss`.
    """
    hidden_states, heads = _checked((hidden,), (head,), vocab_size)
    return _rows(ENTROPY, wave_bytes, hidden_states, heads)


def _checked(hidden: Arrays, heads: Arrays, vocab_size: int | None) -> tuple[Arrays, Arrays]:
    """Checks every model's shapes and cuts the heads to the vocabulary that counts."""
    for name, x, head in zip(("s", "t") if len(heads) > 1 else ("",), hidden, heads, strict=True):
        check_model(name, x, head, hidden[0].shape[0])
    vocab_size = checked_vocabulary(vocab_size, min(head.shape[0] for head in heads))
    return hidden, tuple(head[:vocab_size] for head in heads)


def wave_shape(T: int, row_bytes: int, wave_bytes: int | None = None) -> tuple[int, int]:
    """Gives the number of waves and their rows: as few as the budget allows, then as even as multiples of 8 allow."""
    if wave_bytes is None:
        wave_bytes = WAVE_BYTES_CPU if jax.default_backend() == "cpu" else WAVE_BYTES
    most = max(1, wave_bytes // row_bytes)
    most -= most % 8 if most > 8 else 0
    waves = max(1, -(-T // most))
    rows = -(-T // waves)
    return waves, rows if waves == 1 else min(most, -(-rows // 8) * 8)


def _in_waves(arrays: Any, heads: Arrays, wave_bytes: int | None) -> Any:
    """Reshapes each [T, ...] of a pytree to [waves, rows, ...], zeros in the place of missing rows."""
    T = jax.tree.leaves(arrays)[0].shape[0]
    waves, rows = wave_shape(T, 4 * sum(head.shape[0] for head in heads), wave_bytes)

    def split(x: Array) -> Array:
        padding = ((0, waves * rows - T),) + ((0, 0),) * (x.ndim - 1)
        return jnp.pad(x, padding).reshape(waves, rows, *x.shape[1:])

    return jax.tree.map(split, arrays)


def _flat(x: Float[Array, "waves rows *rest"], T: int) -> Float[Array, "T *rest"]:
    return x.reshape(-1, *x.shape[2:])[:T]


def _log_probabilities(hidden: Arrays, heads: Arrays, normalizers: Arrays = ()) -> tuple[Arrays, Arrays]:
    """Gives log P [rows, V] of every model and their log-sum-exps [rows], computed unless they are given."""
    logits = [product("td,vd->tv", x, head) for x, head in zip(hidden, heads, strict=True)]
    normalizers = normalizers or tuple(jax.nn.logsumexp(z, axis=-1) for z in logits)
    return tuple(z - normalizer[:, None] for z, normalizer in zip(logits, normalizers, strict=True)), normalizers


def _losses(form: Divergence, wave_bytes: int | None, hidden: Arrays, heads: Arrays) -> tuple[Array, Arrays]:
    """Computes the rows L [T], and the log-sum-exps [T] of every model, all that the backward pass wants kept."""

    def wave(hidden: Arrays) -> tuple[Array, Arrays]:
        log_p, normalizers = _log_probabilities(hidden, heads)
        return jnp.sum(form.density(*log_p), axis=-1), normalizers

    waves = jax.lax.map(wave, _in_waves(hidden, heads, wave_bytes))
    return jax.tree.map(lambda x: _flat(x, hidden[0].shape[0]), waves)


def _gradients(
    form: Divergence, wave_bytes: int | None, weights: Array, hidden: Arrays, heads: Arrays, normalizers: Arrays = ()
) -> tuple[Array, Array, Array]:
    """Computes the gradients of sum_t weights_t L_t in the student's hidden states and head, and the rows L [T].

    normalizers: the log-sum-exps where they are known.
    """
    T, dtype = weights.shape[0], jnp.promote_types(hidden[0].dtype, heads[0].dtype)

    def wave(d_head: Array, rows: tuple[Array, Arrays, Arrays]) -> tuple[Array, Arrays]:
        weights, hidden, normalizers = rows
        log_p, _ = _log_probabilities(hidden, heads, normalizers)
        p, weighted_f = jnp.exp(log_p[0]), form.weighted_f(*log_p)
        # P sums to 1 only up to rounding; divided by its sum, a constant in f cancels exactly (20 times less error)
        fbar = jnp.sum(weighted_f, axis=-1, keepdims=True) / jnp.sum(p, axis=-1, keepdims=True)
        d_logits = (weights[:, None] * (p * fbar - weighted_f)).astype(dtype)
        d_head = d_head + product("tv,td->vd", d_logits, hidden[0])
        return d_head, (product("tv,vd->td", d_logits, heads[0]), jnp.sum(form.density(*log_p), axis=-1))

    rows = _in_waves((weights.astype(jnp.float32), hidden, normalizers), heads, wave_bytes)
    d_head, (d_hidden, losses) = jax.lax.scan(wave, jnp.zeros(heads[0].shape, jnp.float32), rows)
    return _flat(d_hidden, T), d_head, _flat(losses, T)


def _cotangents(hidden: Arrays, heads: Arrays, d_hidden: Array, d_head: Array) -> tuple[Arrays, Arrays]:
    """Arranges the student's gradients as those of all models; None is zero."""
    others = (None,) * (len(heads) - 1)
    return (d_hidden.astype(hidden[0].dtype), *others), (d_head.astype(heads[0].dtype), *others)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rows(form: Divergence, wave_bytes: int | None, hidden: Arrays, heads: Arrays) -> Array:
    return _losses(form, wave_bytes, hidden, heads)[0]


def _rows_forward(form: Divergence, wave_bytes: int | None, hidden: Arrays, heads: Arrays):
    losses, normalizers = _losses(form, wave_bytes, hidden, heads)
    return losses, (hidden, heads, normalizers)


def _rows_backward(form: Divergence, wave_bytes: int | None, kept: tuple[Arrays, Arrays, Arrays], cotangent: Array):
    hidden, heads, normalizers = kept
    d_hidden, d_head, _ = _gradients(form, wave_bytes, cotangent, hidden, heads, normalizers)
    return _cotangents(hidden, heads, d_hidden, d_head)


_rows.defvjp(_rows_forward, _rows_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _weighted_sum(form: Divergence, wave_bytes: int | None, weights: Array, hidden: Arrays, heads: Arrays):
    losses, _ = _losses(form, wave_bytes, hidden, heads)
    return jnp.sum(weights * losses), losses


def _weighted_sum_forward(form: Divergence, wave_bytes: int | None, weights: Array, hidden: Arrays, heads: Arrays):
    d_hidden, d_head, losses = _gradients(form, wave_bytes, weights, hidden, heads)
    return (jnp.sum(weights * losses), losses), (weights, hidden, heads, d_hidden, d_head, losses)


def _weighted_sum_backward(form: Divergence, wave_bytes: int | None, kept: tuple, cotangents: tuple[Array, Array]):
    weights, hidden, heads, d_hidden, d_head, losses = kept
    scale, _ = cotangents
    d_weights = (scale * losses).astype(weights.dtype)
    return d_weights, *_cotangents(hidden, heads, scale * d_hidden, scale * d_head)


_weighted_sum.defvjp(_weighted_sum_forward, _weighted_sum_backward)
