"""What the operations return."""

from typing import NamedTuple

from jaxtyping import Array, Float, Int


class HeadStatistics(NamedTuple):
    """One model at T positions, float32, in nats."""

    lse: Float[Array, " T"]  # log-sum-exp of the logits
    entropy: Float[Array, " T"]
    top_ids: Int[Array, "T k"]  # likeliest first, ties by the lower id
    top_log_p: Float[Array, "T k"]
    log_p: Float[Array, "T K"]  # at the given ids, -inf where the id is -1


class PairStatistics(NamedTuple):
    """Student P and teacher Q at T positions, float32, in nats."""

    lse_s: Float[Array, " T"]
    lse_t: Float[Array, " T"]
    entropy_s: Float[Array, " T"]
    entropy_t: Float[Array, " T"]
    reverse_kl: Float[Array, " T"]  # KL(P || Q)
    forward_kl: Float[Array, " T"]  # KL(Q || P)
    js: Float[Array, " T"]  # Jensen-Shannon divergence
    total_variation: Float[Array, " T"]
    l2: Float[Array, " T"]  # ||P - Q||
    cosine: Float[Array, " T"]  # P.Q / (||P|| ||Q||)
    log_ratio_variance: Float[Array, " T"]  # Var_P(log Q - log P)
    gradient_norm: Float[Array, " T"]  # ||P (f - fbar)|| of the reverse KL
    log_p: Float[Array, "T K"]  # at the given ids, -inf where the id is -1
    log_q: Float[Array, "T K"]
    form_f: tuple[Float[Array, "T K"], ...]  # per form, f at the given ids, 0 where the id is -1
    form_fbar: tuple[Float[Array, " T"], ...]  # per form, sum_k P_k f_k over the vocabulary
