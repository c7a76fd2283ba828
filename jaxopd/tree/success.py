"""Estimators of the success probability after each (node, token) of a path tree.

pooled     successes / visits of every rollout that passes, as the paper counts. Biased: a targeted rollout was forced
           through the edges above its launch point, at tokens chosen because the teacher disagrees there.
on_policy  only rollouts launched at or above the edge. Unbiased, noisy at the ancestors of launches.
bellman    V(u) = sum_k P(k|u) V(u, k), backward along the tree: exits by their own rollouts, on-path children by the
           recursion, tokens with few visits by on-policy transitions, the end of a path by its known outcome.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxopd.errors import InputError
from jaxopd.tree.paths import EXIT, LEAF, Counts, PathTree

Z95 = 1.959963984540054
WELL_VISITED = 4  # visits from which a token is an exit of its own in `bellman`


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
    """V(u) = sum_k P(k|u) V(u, k), deepest nodes first.

    Unknown mass r takes the mean of the on-policy transitions into it; without any it takes V(u) itself, that is,
    the known tokens are renormalised. Exits are independent given their visits, so variances add with the squares
    of the same weights.
    """
    exits = _proportions(counts.on_policy[:, :-1], counts.on_policy_success[:, :-1])
    visits = counts.on_policy[:, :-1]
    value = np.where(tree.child == LEAF, tree.outcome, exits.value)
    variance = np.where(tree.child == LEAF, 0.0, _variance(visits, counts.on_policy_success[:, :-1]))
    known = (tree.candidates >= 0) & ((tree.child != EXIT) | (visits >= WELL_VISITED))
    rest_visits = counts.free[:, -1] + np.where(known, 0, counts.free[:, :-1]).sum(1)
    rest_success = counts.free_success[:, -1] + np.where(known, 0, counts.free_success[:, :-1]).sum(1)
    rest = np.divide(rest_success, rest_visits, out=np.zeros(len(rest_visits)), where=rest_visits > 0)
    rest_variance = _variance(rest_visits, rest_success)
    weight = np.where(known, p, 0.0)
    unknown = np.maximum(1.0 - weight.sum(1), 0.0)
    parent, slot = tree.parent_edge
    for nodes in tree.levels[::-1]:
        w, r, sampled = weight[nodes], unknown[nodes], rest_visits[nodes] > 0
        total = w.sum(1)
        inner = (w * np.where(w > 0, value[nodes], 0.0)).sum(1)
        spread = (w**2 * np.where(w > 0, variance[nodes], 0.0)).sum(1)
        scale = np.where(sampled, 1.0, np.maximum(total, 1e-300))
        v = (inner + np.where(sampled, r * rest[nodes], 0.0)) / scale
        # Unsampled mass is worth anything between 0 and 1 around V(u): the spread of a single draw.
        hidden = np.where(sampled, rest_variance[nodes], v * (1 - v))
        v_variance = spread / scale**2 + r**2 * hidden
        edges = (parent[nodes], slot[nodes])
        if nodes[0] != 0:  # the root has no edge above it
            value[edges], variance[edges] = v, v_variance
    se = np.sqrt(variance)
    low, high = _wilson(
        value, np.divide(value * (1 - value), variance, out=np.full(p.shape, np.inf), where=variance > 0)
    )
    on_tree = tree.child >= 0
    extreme = on_tree & ((value <= 0) | (value >= 1))
    low = np.where(extreme, np.maximum(value - Z95 * se, 0), low)
    high = np.where(extreme, np.minimum(value + Z95 * se, 1), high)
    low, high = np.where(tree.child == EXIT, exits.low, low), np.where(tree.child == EXIT, exits.high, high)
    return SuccessEstimate(value, np.where(tree.child == EXIT, exits.se, se), low, high, counts.pooled[:, :-1])


ESTIMATORS: Mapping = MappingProxyType({"pooled": pooled, "on_policy": on_policy, "bellman": bellman})


def support(tree: PathTree, estimate: SuccessEstimate, n_sig: int = 20) -> Bool[np.ndarray, "N K"]:
    """S_u: candidates with at least `n_sig` visits and a known P_succ (paper A, section 2.1).

    The visits are pooled, as the paper's; those of `on_policy` are the ones it averages.
    """
    return (tree.candidates >= 0) & (estimate.visits >= n_sig) & np.isfinite(estimate.value)


def _variance(visits: np.ndarray, successes: np.ndarray) -> np.ndarray:
    """z (1 - z) / n at the smoothed z = (s + 1/2) / (n + 1), which never claims certainty; inf unvisited."""
    z = (successes + 0.5) / (visits + 1)
    return np.divide(z * (1 - z), visits, out=np.full(visits.shape, np.inf), where=visits > 0)


def _proportions(visits: np.ndarray, successes: np.ndarray) -> SuccessEstimate:
    value = np.divide(successes, visits, out=np.full(visits.shape, np.nan), where=visits > 0)
    low, high = _wilson(value, visits.astype(float))
    se = np.where(visits > 0, np.sqrt(_variance(visits, successes)), np.nan)
    return SuccessEstimate(value, se, low, high, visits)


def _wilson(value: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's 95 % score interval of a proportion `value` from n draws (n may be effective, or infinite)."""
    shrink = Z95**2 / np.maximum(n, 1e-12)
    centre = (value + shrink / 2) / (1 + shrink)
    half = np.sqrt(np.maximum(value * (1 - value) * shrink + shrink**2 / 4, 0)) / (1 + shrink)
    return np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)
