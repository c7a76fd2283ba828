"""Path statistics without a trie.

Every prefix whose tokens matter is a prefix of a few representative paths. For a rollout, l is the length of the
longest common prefix with a path: it takes the path's token at nodes 0..l-1 and its own token at node l. Visits and
successes of every (node, token) are one comparison and a few cumulative sums, O(G T).

The paths are merged as a prefix tree of flat arrays: a node is a unique prefix, owned by the first path that has it.
An off-path child of a node is an exit; values of nodes are linear in the values of exits (tree/success.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxopd.errors import InputError

WINDOW = 256  # depths compared at a time: few enough that most rollouts are read little beyond where they leave
CELLS = 1 << 20  # weights [G, T] summed at a time

PAST_END = -2  # no response has this token
EXIT, LEAF = -1, -2  # children that are no node: off the paths; the end of a path, whose outcome is known


@dataclass(frozen=True)
class PathTree:
    """M paths merged into N nodes with K candidate tokens each; unused candidates are -1."""

    tokens: Int[np.ndarray, "M T"]
    length: Int[np.ndarray, " M"]
    correct: Bool[np.ndarray, " M"]
    node_of: Int[np.ndarray, "M T"]  # node at which token t of a path is chosen, -1 past its end
    owner: Int[np.ndarray, " N"]
    depth: Int[np.ndarray, " N"]
    candidates: Int[np.ndarray, "N K"]
    child: Int[np.ndarray, "N K"]  # node, EXIT or LEAF
    outcome: Float[np.ndarray, "N K"]  # of the path that ends there, at LEAF; else NaN

    @cached_property
    def parent_edge(self) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
        """The (node, slot) whose child each node is; -1 for the root."""
        node, slot = np.nonzero(self.child >= 0)
        parent, place = np.full(len(self.owner), -1), np.full(len(self.owner), -1)
        parent[self.child[node, slot]], place[self.child[node, slot]] = node, slot
        return parent, place

    @cached_property
    def levels(self) -> list[Int[np.ndarray, " n"]]:
        """The nodes of each depth, shallowest first."""
        order = np.argsort(self.depth, kind="stable")
        return np.split(order, np.flatnonzero(np.diff(self.depth[order])) + 1)

    @cached_property
    def slot_of(self) -> Int[np.ndarray, " N"]:
        """The candidate slot of the owner's own token."""
        token = self.tokens[self.owner, self.depth]
        return np.argmax(self.candidates == token[:, None], 1)

    @cached_property
    def shared(self) -> Int[np.ndarray, "M M"]:
        """Tokens that two paths begin with alike."""
        return np.array([[_common(a, b) for b in self.tokens] for a in self.tokens])

    @cached_property
    def first_owned(self) -> Int[np.ndarray, " M"]:
        """Per path, the depth from which its nodes are its own."""
        owned = np.bincount(self.owner, minlength=len(self.length))
        return self.length - owned


def build_tree(
    paths: Sequence[np.ndarray], correct: Sequence[bool], candidates: Int[np.ndarray, "N K0"] | None = None
) -> PathTree:
    """Merges distinct paths (response tokens) into a tree; no path may be a prefix of another.

    The paths' own tokens are candidates; `candidates` (-1: none) adds tokens to watch at each node. Nodes do not
    depend on it: a first call without it tells which nodes there are.
    """
    M, T = len(paths), max(map(len, paths))
    tokens = np.full((M, T), -1, np.int64)
    for a, path in enumerate(paths):
        tokens[a, : len(path)] = path
    length = np.array([len(path) for path in paths])
    node_of = np.full((M, T), -1, np.int64)
    owner: list[int] = []
    depth: list[int] = []
    for a in range(M):
        shared = [_common(tokens[a], tokens[b]) for b in range(a)]
        twin, first = (int(np.argmax(shared)), max(shared) + 1) if shared else (0, 0)
        if first > min(length[a], length[twin]) or not length[a]:
            raise InputError(f"paths: found path {a} empty or a prefix of path {twin} or the reverse, expected neither")
        node_of[a, :first] = node_of[twin, :first]
        node_of[a, first : length[a]] = len(owner) + np.arange(length[a] - first)
        owner += [a] * (length[a] - first)
        depth += range(first, length[a])
    edges: list[dict[int, tuple[int, float]]] = [{} for _ in owner]
    for a in range(M):
        for t in range(length[a]):
            last = t + 1 == length[a]
            leads = (LEAF, float(correct[a])) if last else (int(node_of[a, t + 1]), np.nan)
            edges[node_of[a, t]][int(tokens[a, t])] = leads
    extra = [[]] * len(owner) if candidates is None else [row[row >= 0].tolist() for row in candidates]
    watched = [list(dict.fromkeys([*edge, *more])) for edge, more in zip(edges, extra, strict=True)]
    N, K = len(owner), max(map(len, watched))
    ids = np.full((N, K), -1, np.int64)
    child, outcome = np.full((N, K), EXIT, np.int64), np.full((N, K), np.nan)
    for n, row in enumerate(watched):
        ids[n, : len(row)] = row
        for k, token in enumerate(row):
            child[n, k], outcome[n, k] = edges[n].get(token, (EXIT, np.nan))
    return PathTree(
        tokens, length, np.asarray(correct, bool), node_of, np.array(owner), np.array(depth), ids, child, outcome
    )


def _common(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.cumprod((a == b) & (a >= 0)).sum())


@dataclass(frozen=True)
class Walks:
    """Where G sequences leave each path: the common prefix, and the candidate slot of their own token there."""

    common: Int[np.ndarray, "G M"]
    slot: Int[np.ndarray, "G M"]  # K: a token that is no candidate; -1: the sequence never leaves the path

    def __getitem__(self, index: np.ndarray) -> "Walks":
        return Walks(self.common[index], self.slot[index])


@dataclass(frozen=True)
class Branches:
    """Responses that follow a path up to depth `start` and then have tokens of their own."""

    tokens: Int[np.ndarray, "G S"]  # from depth `start` on, padded with -1
    path: Int[np.ndarray, " G"]
    start: Int[np.ndarray, " G"]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice) -> "Branches":
        return Branches(self.tokens[rows], self.path[rows], self.start[rows])

    def whole(self, tree: PathTree) -> Int[np.ndarray, "G T"]:
        """The responses from their first token on, padded with -1."""
        G, width = len(self), int((self.start + (self.tokens >= 0).sum(1)).max(initial=1))
        responses = np.full((G, width), -1, np.int32)
        shared = min(width, tree.tokens.shape[1])
        given = np.arange(shared)[None] < self.start[:, None]
        responses[:, :shared][given] = tree.tokens[self.path, :shared][given]
        row, step = np.nonzero(self.tokens >= 0)
        responses[row, self.start[row] + step] = self.tokens[row, step]
        return responses


Responses = Int[np.ndarray, "G S"] | Branches


def walk(tree: PathTree, responses: Responses | Sequence[Responses], *, block: int = 4096) -> Walks:
    """Compares responses (whole ones, padded with -1, from the first response token; or branches) with every path.

    `responses` may be a list of parts of any widths, in memory or mapped from disk. One is read no further than it
    follows a path, WINDOW depths at a time: beside the result, memory is `block` (WINDOW + K) tokens.
    """
    parts = [responses] if isinstance(responses, (np.ndarray, Branches)) else responses
    G, M = sum(map(len, parts)), len(tree.length)
    common, slot = np.empty((G, M), np.int64), np.empty((G, M), np.int64)
    row = 0
    for part in parts:
        for low in range(0, len(part), block):
            rows = part[low : low + block]
            here = slice(row, row + len(rows))
            for a in range(M):
                common[here, a], slot[here, a] = _left(tree, a, rows)
            row += len(rows)
    return Walks(common, slot)


def _left(tree: PathTree, a: int, rows: Responses) -> tuple[Int[np.ndarray, " B"], Int[np.ndarray, " B"]]:
    """Finds the depth at which each row leaves path a, and the slot of its own token there."""
    tokens, start = (rows, 0) if isinstance(rows, np.ndarray) else (rows.tokens, rows.start)
    followed = _followed(tokens, start, tree.tokens[a, : tree.length[a]])
    common, own = start + followed, np.full(len(rows), -1)
    inside = np.flatnonzero(followed < tokens.shape[1])
    own[inside] = tokens[inside, followed[inside]]
    if isinstance(rows, Branches):
        shared = tree.shared[rows.path, a]
        earlier = start > shared  # the path they follow has left path a before they have tokens of their own
        common = np.where(earlier, shared, common)
        own = np.where(earlier, tree.tokens[rows.path, np.minimum(shared, tree.tokens.shape[1] - 1)], own)
    slot = np.full(len(rows), -1, np.int64)
    leaves = np.flatnonzero((own >= 0) & (common < tree.length[a]))
    match = tree.candidates[tree.node_of[a, common[leaves]]] == own[leaves, None]
    slot[leaves] = np.where(match.any(1), match.argmax(1), tree.candidates.shape[1])
    return common, slot


def _followed(
    tokens: Int[np.ndarray, "B S"], start: int | Int[np.ndarray, " B"], path: Int[np.ndarray, " T"]
) -> Int[np.ndarray, " B"]:
    """Counts the tokens of each row that the path has from depth `start` on.

    It looks at WINDOW depths of the rows that are still on the path at a time.
    """
    followed, on_path = np.full(len(tokens), tokens.shape[1]), np.arange(len(tokens))
    padded = np.append(path, np.full(WINDOW, PAST_END)).astype(np.int32)
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)
    first = np.minimum(start, len(path))
    for low in range(0, tokens.shape[1], WINDOW):
        if not len(on_path):
            break
        ahead = windows[low + (first[on_path] if np.ndim(first) else first), : tokens.shape[1] - low]
        differs = tokens[on_path, low : low + WINDOW].astype(np.int32, copy=False) != ahead
        leaves = differs.any(1)
        followed[on_path[leaves]] = low + differs[leaves].argmax(1)
        on_path = on_path[~leaves]
    return followed


@dataclass(frozen=True)
class Counts:
    """Visits and successes of each (node, slot); slot K gathers the tokens that are no candidates.

    A rollout was given its first `launch` tokens. `pooled` counts it at every node it passes. `on_policy` counts it
    from the edge of its last given token on: what follows that edge was sampled. `free` counts it from the first
    token it sampled on: there the token itself is a draw of the student.
    """

    pooled: Int[np.ndarray, "N K1"]
    pooled_success: Int[np.ndarray, "N K1"]
    on_policy: Int[np.ndarray, "N K1"]
    on_policy_success: Int[np.ndarray, "N K1"]
    free: Int[np.ndarray, "N K1"]
    free_success: Int[np.ndarray, "N K1"]


def count(tree: PathTree, walks: Walks, success: Bool[np.ndarray, " G"], launch: Int[np.ndarray, " G"]) -> Counts:
    """Counts visits and successes under the three readings of `Counts`."""
    success = np.asarray(success, np.float64)
    first_edge = {"pooled": np.zeros_like(launch), "on_policy": np.maximum(launch - 1, 0), "free": launch}
    counted = {}
    for name, since in first_edge.items():
        counted[name] = tally(tree, walks, np.ones(len(launch)), since).round().astype(np.int64)
        counted[f"{name}_success"] = tally(tree, walks, success, since).round().astype(np.int64)
    return Counts(**counted)


def tally(
    tree: PathTree,
    walks: Walks,
    weight: Float[np.ndarray, " G"] | Float[np.ndarray, "G T"],
    since: Int[np.ndarray, " G"],
) -> Float[np.ndarray, "N K1"]:
    """Sums the rollouts' weights at every (node, slot) they pass at depth `since` or deeper.

    A weight [G, T] differs by depth (reward-to-go).
    """
    N, K = tree.candidates.shape
    total = np.zeros((N, K + 1))
    slot_of = tree.slot_of
    for a, first in enumerate(tree.first_owned):
        end = tree.length[a]
        if first >= end:
            continue
        along = walks.common[:, a]
        nodes = tree.node_of[a, first:end]
        total[nodes, slot_of[nodes]] += _along(weight, np.maximum(since, first), along, first, end)
        leaves = np.flatnonzero((walks.slot[:, a] >= 0) & (along >= np.maximum(since, first)))
        at = along[leaves]
        own = weight[leaves] if weight.ndim == 1 else weight[leaves, at]
        edge = tree.node_of[a, at] * (K + 1) + walks.slot[leaves, a]
        np.add.at(total.reshape(-1), edge, own)
    return total


def _along(weight: np.ndarray, low: np.ndarray, high: np.ndarray, first: int, end: int) -> np.ndarray:
    """Sums weights over the depths low <= t < high of each rollout, for t in [first, end)."""
    kept = np.flatnonzero(low < high)
    if weight.ndim == 2:
        return _along_depths(weight, kept, low, high, first, end)
    size = end - first + 1
    opened = np.bincount(np.minimum(low[kept], end) - first, weight[kept], size)
    closed = np.bincount(np.minimum(high[kept], end) - first, weight[kept], size)
    return np.cumsum(opened - closed)[:-1]


def _along_depths(
    weight: np.ndarray, kept: np.ndarray, low: np.ndarray, high: np.ndarray, first: int, end: int
) -> np.ndarray:
    """`_along` for weights that differ by depth, reading no cell that does not count but a few."""
    total = np.zeros(end - first)
    kept = kept[np.argsort(high[kept])]  # rows of a block then reach about equally deep
    block = max(1, CELLS // (end - first))
    for at in range(0, len(kept), block):
        rows = kept[at : at + block]
        depth = np.arange(first, min(end, high[rows[-1]]))[None]
        inside = (depth >= low[rows, None]) & (depth < high[rows, None])
        total[: depth.size] += np.where(inside, weight[rows, first : first + depth.size], 0.0).sum(0)
    return total
