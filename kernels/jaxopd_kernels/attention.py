"""Masked grouped-query attention in plain JAX, with the log-sum-exp by which parts over disjoint keys merge.

Caches are head-major, [B, K, S, h]: each head's keys lie together, so that a matrix product reads them in order. With
the sequence before the heads XLA transposes the whole cache at every decoding step (8 times slower on a CPU).
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxopd_kernels.products import product

NO_KEYS = -1e30  # log-sum-exp of an empty set of keys, finite so that merging two of them gives no NaN
Part = tuple[Float[Array, "B T H h"], Float[Array, "B T H"]]  # attention over some keys, and its log-sum-exp


def cache_attention(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B K S h"],
    v: Float[Array, "B K S h"],
    mask: Bool[Array, "B T S"],
) -> Part:
    """Attends q to the keys where `mask` is True: softmax(q k / sqrt(h)) v, and the log-sum-exp of the scores.

    H is a multiple of K (grouped queries). Scores and output are float32. A row without keys gives zeros and
    the log-sum-exp `NO_KEYS`.
    """
    B, T, H, h = q.shape
    K, S = k.shape[1:3]
    G = H // K
    # The queries of a group are rows of one matrix product against their head's keys.
    q_BKRh = q.reshape(B, T, K, G, h).transpose(0, 2, 1, 3, 4).reshape(B, K, T * G, h)
    keep = jnp.broadcast_to(mask[:, None, :, None], (B, 1, T, G, S)).reshape(B, 1, T * G, S)
    scores = jnp.where(keep, product("BKRh,BKSh->BKRS", q_BKRh, k) * h**-0.5, NO_KEYS)
    peak = jnp.maximum(scores.max(-1), NO_KEYS / 2)  # so that a row without keys has weights of zero, too
    weights = jnp.exp(scores - peak[..., None])
    total = weights.sum(-1)
    out = product("BKRS,BKSh->BKRh", weights.astype(v.dtype), v) / jnp.maximum(total, 1e-30)[..., None]
    lse = jnp.where(total > 0, peak + jnp.log(jnp.maximum(total, 1e-30)), NO_KEYS)
    out = out.reshape(B, K, T, G, h).transpose(0, 2, 1, 3, 4).reshape(B, T, H, h)
    return out, lse.reshape(B, K, T, G).transpose(0, 2, 1, 3).reshape(B, T, H)
