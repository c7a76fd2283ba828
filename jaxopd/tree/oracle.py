"""The exact oracle: finite decision processes whose success probabilities are exact.

`FiniteMDP` merges student rollouts into the tree of their prefixes and renormalises the student's probabilities over
the children met: a policy of its own, exact to float precision, on which a replicate of any estimator costs
milliseconds. `raw_value` brackets the raw policy instead: the head of its tree is enumerated by mass, the rest sampled.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxopd.rollouts.sampling import SPREAD_BITS
from jaxopd.tree.paths import PathTree

LARGEST = 1 - 1e-12  # below 1


@dataclass(frozen=True)
class FiniteMDP:
    """A tree of X prefixes in breadth-first order; the children of a node are contiguous.

    `row` is, at a leaf, the sequence that ends there (-1 inside); `cumulative` is the running sum of the children's
    probabilities plus the parent's rank, so that one sorted search draws children for many nodes at once.
    """

    token: Int[np.ndarray, " X"]
    parent: Int[np.ndarray, " X"]
    p: Float[np.ndarray, " X"]
    first_child: Int[np.ndarray, " X"]
    children: Int[np.ndarray, " X"]
    row: Int[np.ndarray, " X"]
    value: Float[np.ndarray, " X"]
    cumulative: Float[np.ndarray, " X"]
    sequences: Int[np.ndarray, "G S"]
    success: Bool[np.ndarray, " G"]

    @classmethod
    def from_rollouts(
        cls, sequences: Int[np.ndarray, "G S"], logp: Float[np.ndarray, "G S"], success: Bool[np.ndarray, " G"]
    ) -> "FiniteMDP":
        """Merges whole responses (padded with -1), with the student's log-probs of their tokens.

        No response may be a proper prefix of another. P(child) = exp(logp), renormalised over the children met;
        V(leaf) = its success, V(node) = sum_children P V.
        """
        G, S = sequences.shape
        tokens, parents, weights, rows = [np.array([-1])], [np.array([-1])], [np.ones(1)], [np.array([-1])]
        starts, at, total = [0], np.zeros(G, np.int64), 1
        alive = np.ones(G, bool)
        for t in range(S):
            alive &= sequences[:, t] >= 0
            if not alive.any():
                break
            key = np.stack([at[alive], sequences[alive, t]], 1)
            unique, first, inverse = np.unique(key, axis=0, return_index=True, return_inverse=True)
            members = np.flatnonzero(alive)
            ends = np.ones(G, bool) if t + 1 == S else sequences[:, t + 1] < 0
            representative = members[first]
            tokens.append(unique[:, 1])
            parents.append(unique[:, 0])
            weights.append(np.exp(logp[representative, t].astype(np.float64)))
            rows.append(np.where(ends[representative], representative, -1))
            starts.append(total)
            at[alive] = total + inverse.reshape(-1)
            total += len(unique)
        token, parent = np.concatenate(tokens), np.concatenate(parents)
        row, weight = np.concatenate(rows), np.concatenate(weights)
        mass = np.bincount(parent[1:], weight[1:], total)
        p = np.append(1.0, weight[1:] / mass[parent[1:]])
        children = np.bincount(parent[1:], minlength=total)
        first_child = np.append(1, 1 + np.cumsum(children)[:-1])
        value = np.where(row >= 0, np.asarray(success, float)[np.maximum(row, 0)], 0.0)
        for low, high in zip(starts[:0:-1], [total, *starts[:1:-1]]):
            level = slice(low, high)
            value[:low] += np.bincount(parent[level], p[level] * value[level], low)
        within = np.cumsum(p) - p
        before = within - within[np.where(parent >= 0, first_child[np.maximum(parent, 0)], 0)]
        cumulative = parent + np.minimum(before + p, 1.0)
        last = np.append(parent[1:] != parent[:-1], True)
        cumulative[last] = parent[last] + 1.0
        return cls(
            token, parent, p, first_child, children, row, value, cumulative, sequences, np.asarray(success, bool)
        )

    def sample(
        self, start: Int[np.ndarray, " R"], rng: np.random.Generator, spread: Float[np.ndarray, " R"] | None = None
    ) -> Int[np.ndarray, " R"]:
        """Walks from each start node to a leaf; gives the leaves' sequence rows.

        With `spread`, in [0, 1), its digits choose the first SPREAD_BITS bits of a walk, as in `draw_spread`.
        """
        at = start.copy()
        digits = np.full(len(at), -1.0) if spread is None else spread.copy()  # -1: used up
        bits = np.zeros(len(at))
        while (moving := np.flatnonzero(self.row[at] < 0)).size:
            here, fresh = at[moving], rng.random(len(moving))
            u = np.where(digits[moving] >= 0, digits[moving], fresh)
            child = np.searchsorted(self.cumulative, here + u, side="right")
            if spread is not None:
                bits[moving] -= np.log2(self.p[child])
                left = np.clip((u - (self.cumulative[child] - here)) / self.p[child] + 1, 0, LARGEST)
                digits[moving] = np.where((digits[moving] >= 0) & (bits[moving] < SPREAD_BITS), left, -1.0)
            at[moving] = child
        return self.row[at]

    def along(self, tree: PathTree) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, "N K"]]:
        """Gives the process's node at each node of a path tree, and after each of its candidates (-1: none)."""
        at = np.zeros(len(tree.owner), np.int64)
        after = np.full(tree.candidates.shape, -1, np.int64)
        for nodes in tree.levels:
            for n in nodes:
                low = self.first_child[at[n]]
                here = self.token[low : low + self.children[at[n]]]
                match = tree.candidates[n][:, None] == here[None]
                after[n] = np.where(match.any(1), low + match.argmax(1), -1)
            inner = tree.child[nodes] >= 0
            at[tree.child[nodes][inner]] = after[nodes][inner]
        return at, after


def raw_value(
    next_logp: Callable[[list[list[int]]], Float[np.ndarray, "B V"]],
    stop_ids: set[int],
    succeeds: Callable[[list[int]], bool],
    sequences: list[list[int]],
    success: Bool[np.ndarray, " G"],
    *,
    nodes: int = 3000,
    max_tokens: int = 128,
    batch: int = 64,
) -> tuple[float, float, float]:
    """Brackets the raw policy's success probability: (estimate, standard error, unresolved mass U).

    The `nodes` heaviest prefixes are expanded exactly with `next_logp`; their finished responses weigh lo. The rest,
    U, is the mean of those of the given on-policy `sequences` that leave the head: V = lo + U * mean, with standard
    error U sqrt(v (1 - v) / n).
    """
    heap: list[tuple[float, list[int]]] = [(-1.0, [])]
    finished: dict[tuple[int, ...], float] = {}
    expanded = 0
    while heap and expanded < nodes:
        taken = [heapq.heappop(heap) for _ in range(min(batch, len(heap), nodes - expanded))]
        expanded += len(taken)
        for (mass, prefix), logp in zip(taken, next_logp([prefix for _, prefix in taken])):
            p = np.exp(np.asarray(logp, np.float64)) * -mass
            for token in np.flatnonzero(p > 1e-9):
                child = [*prefix, int(token)]
                if token in stop_ids or len(child) == max_tokens:
                    finished[tuple(child)] = p[token]
                else:
                    heapq.heappush(heap, (-p[token], child))
    lo = sum(mass for response, mass in finished.items() if succeeds(list(response)))
    unresolved = max(0.0, 1.0 - sum(finished.values()))
    outside = np.array([tuple(s) not in finished for s in sequences])
    n = int(outside.sum())
    mean = float(np.asarray(success)[outside].mean()) if n else 0.5
    spread = (mean * n + 0.25) / (n + 0.5)
    return lo + unresolved * mean, unresolved * float(np.sqrt(spread * (1 - spread) / max(n, 1))), unresolved
