"""Estimators of the success probability after each (node, token) of a path tree.

pooled     successes / visits of every rollout that passes, as the paper counts. Biased: a targeted rollout was forced
           through the edges above its launch point, at tokens chosen because the teacher disagrees there.
on_policy  only rollouts launched at or above the edge. Unbiased, noisy at the ancestors of launches.
bellman    V(u) = sum_k P(k|u) V(u, k), backward along the tree: exits by their own rollouts and one pseudo-count at
           their node's value, on-path children by the recursion, the end of a path by its known outcome.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxopd.errors import InputError
from jaxopd.tree.paths import EXIT, LEAF, Counts, PathTree

Z95 = 1.959963984540054
SWEEPS = 3  # of the recursion, until the exits' prior is that of their node
NODE_RANGE = 0.02, 0.98  # of an exit's prior, so that no exit is ever taken for certain


@dataclass(frozen=True)
class SuccessEstimate:
    """P_succ of each (node, candidate) with its standard error and 95 % interval; NaN where nothing is known."""

    value: Float[np.ndarray, "N K"]
    se: Float[np.ndarray, "N K"]
    low: Float[np.ndarray, "N K"]
    high: Float[np.ndarray, "N K"]
    visits: Int[np.ndarray, "N K"]  # on which `support` judges it


def success_estimates(
    tree: PathTree, counts: Counts, p: Float[np.ndarray, "N K"], method: str = "bellman"
) -> SuccessEstimate:
    """Estimates the success probability after each candidate token; `p` is the student's probability of it.

    `method` is one of `ESTIMATORS`. Raises InputError on another.
    """
    if method not in ESTIMATORS:
        raise InputError(f"method: found {method!r}, expected one of {', '.join(ESTIMATORS)}")
    return ESTIMATORS[method](tree, counts, p)


def pooled(tree: PathTree, counts: Counts, p: Float[np.ndarray, "N K"]) -> SuccessEstimate:
    """successes / visits over all rollouts through the edge (paper A, section 2.1)."""
    return _proportions(counts.pooled[:, :-1], counts.pooled_success[:, :-1])


def on_policy(tree: PathTree, counts: Counts, p: Float[np.ndarray, "N K"]) -> SuccessEstimate:
    """successes / visits over the rollouts launched at or above the edge."""
    return _proportions(counts.on_policy[:, :-1], counts.on_policy_success[:, :-1])


def bellman(tree: PathTree, counts: Counts, p: Float[np.ndarray, "N K"]) -> SuccessEstimate:
    """V(u) = sum_k P(k|u) V(u, k), deepest nodes first; exits from the rollouts that took them.

    Exits are independent given their visits, so variances add up with the squares of the same weights. An exit's own
    interval is that of its rollouts; further up it is 1.96 standard errors, inside what the known leaves leave open.
    """
    exits = _proportions(counts.on_policy, counts.on_policy_success)
    x = exit_values(tree, counts, p)
    _, value = back_up(tree, p, x, tree.outcome)
    noise = proportion_variance(counts.on_policy, counts.on_policy_success)
    _, variance = back_up(tree, p, noise, np.zeros(p.shape), squared=True)
    # Leaves are known: were all exits failures, or successes, the value would still be at least, or at most, this.
    least, most = (back_up(tree, p, np.full(x.shape, end), tree.outcome)[1] for end in (0.0, 1.0))
    half = Z95 * np.sqrt(variance)
    low, high = np.maximum(value - half, least), np.minimum(value + half, most)
    own = (tree.child == EXIT) & (exits.visits[:, :-1] > 0)
    low, high = np.where(own, exits.low[:, :-1], low), np.where(own, exits.high[:, :-1], high)
    return SuccessEstimate(value, np.sqrt(variance), low, high, counts.pooled[:, :-1])


def exit_values(
    tree: PathTree, counts: Counts, p: Float[np.ndarray, "N K"], prior: float = 1.0
) -> Float[np.ndarray, "N K1"]:
    """Gives x = (s + prior V(u)) / (n + prior) at every exit and (slot K) the rest of each node's tokens.

    V(u) comes from x itself, by sweeps from the overall success rate on: an exit that was never taken is worth what
    its node is.
    """
    visits, success = counts.on_policy, counts.on_policy_success
    mean = np.full(len(p), success.sum() / max(1, visits.sum()))
    for _ in range(SWEEPS):
        x = (success + prior * np.clip(mean, *NODE_RANGE)[:, None]) / (visits + prior)
        mean, _ = back_up(tree, p, x, tree.outcome)
    return x


def back_up(
    tree: PathTree,
    p: Float[np.ndarray, "N K"],
    exits: Float[np.ndarray, "N K1"],
    leaves: Float[np.ndarray, "N K"],
    *,
    squared: bool = False,
) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, "N K"]]:
    """Carries values at exits and leaves up the tree, v(u) = sum_k P_k v(u, k) + r v(u, rest).

    `squared` weighs with the squares of P: variances of independent exits. Gives v of each node and of each candidate.
    """
    p = np.where(tree.candidates >= 0, p, 0.0)
    rest = np.maximum(1.0 - p.sum(1), 0.0)
    weight, rest = (p**2, rest**2) if squared else (p, rest)
    node, edge = np.zeros(len(p)), np.where(tree.child == LEAF, leaves, exits[:, :-1])
    for nodes in tree.levels[::-1]:
        child = tree.child[nodes]
        edge[nodes] = np.where(child >= 0, node[child], edge[nodes])
        node[nodes] = (weight[nodes] * edge[nodes]).sum(1) + rest[nodes] * exits[nodes, -1]
    return node, edge


ESTIMATORS: Mapping = MappingProxyType({"pooled": pooled, "on_policy": on_policy, "bellman": bellman})


def support(tree: PathTree, estimate: SuccessEstimate, n_sig: int = 20) -> Bool[np.ndarray, "N K"]:
    """S_u: candidates with at least `n_sig` visits and a known P_succ (paper A, section 2.1).

    The visits are pooled, as the paper's; those of `on_policy` are the ones it averages.
    """
    return (tree.candidates >= 0) & (estimate.visits >= n_sig) & np.isfinite(estimate.value)


def proportion_variance(visits: np.ndarray, successes: np.ndarray) -> np.ndarray:
    """z (1 - z) / n at z = (s + 1/4) / (n + 1/2), which never claims certainty; without visits that of one draw."""
    z = (successes + 0.25) / (visits + 0.5)
    return z * (1 - z) / np.maximum(visits, 1)


def _proportions(visits: np.ndarray, successes: np.ndarray) -> SuccessEstimate:
    value = np.divide(successes, visits, out=np.full(visits.shape, np.nan), where=visits > 0)
    low, high = _wilson(value, visits.astype(float))
    se = np.where(visits > 0, np.sqrt(proportion_variance(visits, successes)), np.nan)
    return SuccessEstimate(value, se, low, high, visits)


def _wilson(value: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's 95 % score interval of a proportion `value` from n draws (n may be effective, or infinite)."""
    shrink = Z95**2 / np.maximum(n, 1e-12)
    centre = (value + shrink / 2) / (1 + shrink)
    half = np.sqrt(np.maximum(value * (1 - value) * shrink + shrink**2 / 4, 0)) / (1 + shrink)
    return np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)
