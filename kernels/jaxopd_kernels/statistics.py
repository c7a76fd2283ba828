"""The two nouns of the package: what is known about a row from the logits of one model, or of two."""

from dataclasses import dataclass

import jax
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PairStatistics:
    """Student P against teacher Q at T rows, over the common vocabulary, temperature 1, nats, float32.

    logsumexp_*      [T]  log of the sum of exp(logits)
    entropy_*        [T]  -sum P log P
    reverse_kl       [T]  KL(P || Q)
    forward_kl       [T]  KL(Q || P)
    js               [T]  KL(P || M) / 2 + KL(Q || M) / 2 with M = (P + Q) / 2
    js_student       [T]  KL(P || M), twice the student's share of it
    total_variation  [T]  sum |P - Q| / 2
    l2               [T]  ||P - Q||
    cosine           [T]  P.Q / (||P|| ||Q||)
    variance         [T]  variance under P of log Q - log P
    gradient_norm    [T]  ||P (f - fbar)|| with f = log Q - log P, the reverse-KL gradient in the student's logits
    js, js_student and total_variation are NaN where pair_statistics was told to leave out the second pass.
    log_p, log_q     [T, K] at the given ids; -inf where the id is outside the common vocabulary (padding is -1)
    """

    logsumexp_student: Float[Array, "T"]
    logsumexp_teacher: Float[Array, "T"]
    entropy_student: Float[Array, "T"]
    entropy_teacher: Float[Array, "T"]
    reverse_kl: Float[Array, "T"]
    forward_kl: Float[Array, "T"]
    js: Float[Array, "T"]
    js_student: Float[Array, "T"]
    total_variation: Float[Array, "T"]
    l2: Float[Array, "T"]
    cosine: Float[Array, "T"]
    variance: Float[Array, "T"]
    gradient_norm: Float[Array, "T"]
    log_p: Float[Array, "T K"]
    log_q: Float[Array, "T K"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HeadStatistics:
    """One model at T rows, over its vocabulary, temperature 1, nats, float32.

    logsumexp, entropy  [T]
    top_ids, top_log_p  [T, k] the k most probable tokens, best first, ties by lower id
    log_p               [T, K] at the given ids; -inf where the id is outside the vocabulary (padding is -1)
    """

    logsumexp: Float[Array, "T"]
    entropy: Float[Array, "T"]
    top_ids: Int[Array, "T k"]
    top_log_p: Float[Array, "T k"]
    log_p: Float[Array, "T K"]
