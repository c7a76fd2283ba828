"""Where to launch targeted rollouts: the paper's allocation (section 2.5, appendix D)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from jaxopd.tree.paths import PathTree


@dataclass(frozen=True)
class Targets:
    """Launches: force `token` after `depth` tokens of path `path`, `number` times."""

    path: Int[np.ndarray, " E"]
    depth: Int[np.ndarray, " E"]
    token: Int[np.ndarray, " E"]
    number: Int[np.ndarray, " E"]


def depth_window(depth: Int[np.ndarray, " N"], width: int = 50) -> Int[np.ndarray, " N"]:
    """Gives the window of each depth; window i is width 2^i long: 0-49, 50-149, 150-349, ..."""
    return np.floor(np.log2(np.asarray(depth) / width + 1)).astype(np.int64)


def paper_targets(
    tree: PathTree,
    p: Float[np.ndarray, "N K"],
    teachers: Mapping[str, tuple[Float[np.ndarray, "N K"], Float[np.ndarray, "N K"]]],
    visits: Int[np.ndarray, "N K"],
    *,
    tau: float = 0.02,
    by_gradient: int = 20,
    by_difference: int = 20,
    n_min: int = 100,
    window: int = 50,
) -> Targets:
    """Raises the tokens on which a teacher disagrees most to `n_min` visits.

    A teacher is (q [N, K], reverse-KL gradient P(l - lbar) [N, K]) over the full vocabulary. Candidates have P or Q
    above `tau`. In each depth window of each path, every teacher picks the `by_gradient` largest |P(l - lbar)| and
    the `by_difference` largest |Q - P|; the union over paths and teachers is enriched. A rollout counts at every node
    it was forced through (section 2.5), so deep tokens go first and what passes above them is not launched again.
    """
    chosen = np.zeros(tree.candidates.shape, bool)
    for q, gradient in teachers.values():
        eligible = (tree.candidates >= 0) & ((p > tau) | (q > tau))
        for score, budget in ((np.abs(gradient), by_gradient), (np.abs(q - p), by_difference)):
            ranked = np.where(eligible, score, -np.inf)
            for nodes in _windows(tree, window):
                best = np.argsort(-ranked[nodes], axis=None, kind="stable")[:budget]
                row, slot = np.unravel_index(best, ranked[nodes].shape)
                chosen[nodes[row], slot] |= np.isfinite(ranked[nodes[row], slot])
    number = np.zeros(tree.candidates.shape, np.int64)
    passing = np.zeros(len(tree.owner), np.int64)  # launches at a node or below it
    for nodes in tree.levels[::-1]:
        through = np.where(tree.child[nodes] >= 0, passing[tree.child[nodes]], 0)
        number[nodes] = np.where(chosen[nodes], np.maximum(n_min - visits[nodes] - through, 0), 0)
        passing[nodes] = (number[nodes] + through).sum(1)
    return _launches(tree, number)


def _windows(tree: PathTree, width: int) -> Iterator[Int[np.ndarray, " n"]]:
    """Yields the nodes of each depth window of each path; paths share the nodes of their common prefix."""
    for nodes, length in zip(tree.node_of, tree.length, strict=True):
        window = depth_window(np.arange(length), width)
        yield from np.split(nodes[:length], np.flatnonzero(np.diff(window)) + 1)


def exit_targets(
    tree: PathTree, p: Float[np.ndarray, "N K"], *, at_least: int | Int[np.ndarray, "N K"], per_node: int
) -> Targets:
    """Launches max(at_least, per_node P) rollouts at every exit: values of on-path nodes follow by recursion."""
    exits = (tree.candidates >= 0) & (tree.child == -1)
    return _launches(tree, np.where(exits, np.maximum(at_least, np.ceil(per_node * p)), 0).astype(np.int64))


def _launches(tree: PathTree, number: Int[np.ndarray, "N K"]) -> Targets:
    node, slot = np.nonzero(number)
    return Targets(tree.owner[node], tree.depth[node], tree.candidates[node, slot], number[node, slot])
