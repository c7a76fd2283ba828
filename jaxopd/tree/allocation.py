"""Where the next rollouts teach most: Neyman's allocation over exits.

An exit is an off-path candidate of a path node, or the pooled rest of its off-path tokens (slot K). The value of a
path node is linear in the values x of the exits, V(v) = sum_k P_k V(v, k) + r x_rest, so every reported number is a
smooth function of x. One pass from the root to the leaves gives its derivative A_e by every exit; a number's variance
is sum_e A_e^2 x_e (1 - x_e) / n_e, least at a given cost if n_e ~ |A_e| sqrt(x_e (1 - x_e) / length_e).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import norm

from jaxopd.tree.paths import EXIT, Counts, PathTree
from jaxopd.tree.success import back_up, exit_values, proportion_variance

PRIOR = 2.0  # pseudo-counts of an exit at its node's value where rollouts are spent; 1 where values are reported
LEAST_POWER = 0.15  # of |g|^2, below which its noise is not subtracted
ROUNDING = 1e-9  # of probabilities that sum to one
GOLDEN = (5**0.5 - 1) / 2
ROUNDS = 4  # at least, of all tokens; each from what the ones before found
SURE_AFTER = 2  # rounds before a standard error is believed
MOST_ROUNDS = 12
LEAST_LEFT = 0.02  # of all tokens, for which no further round is run
LEAST_ROUND, MOST_GROWTH = 0.25, 4.0  # of what has been spent: early estimates of the need are rough
LOOKS = 4  # at a comparison at most, among which its 5 % are shared


@dataclass(frozen=True)
class ExitProblem:
    """A tree with the student's P, the set S of tokens that are compared, and the teachers' unit gradients on S.

    `unit` holds u = P(f - fbar) / ||.|| of each teacher on S, 0 elsewhere; without teachers only the size of the
    ideal gradient's error counts, and the rollouts serve whichever teacher comes later.
    """

    tree: PathTree
    p: Float[np.ndarray, "N K"]
    compared: Bool[np.ndarray, "N K"]
    unit: Float[np.ndarray, "M N K"]

    @classmethod
    def create(
        cls, tree: PathTree, p: Float[np.ndarray, "N K"], q: Float[np.ndarray, "M N K"], tau: float
    ) -> "ExitProblem":
        """Compares the tokens to which the student or a teacher gives more than tau."""
        compared = (tree.candidates >= 0) & (p > 0) & ((p > tau) | (q > tau).any(0))
        return cls(tree, p, compared, unit_gradients(p, q, compared))

    @cached_property
    def rest(self) -> Float[np.ndarray, " N"]:
        """The student's probability of all tokens that are no candidates; 0 where rounding alone is left."""
        rest = 1.0 - np.where(self.tree.candidates >= 0, self.p, 0.0).sum(1)
        return np.where(rest > ROUNDING, rest, 0.0)

    @cached_property
    def mass(self) -> Float[np.ndarray, "N K1"]:
        """The probability of each exit, 0 where there is none."""
        exits = (self.tree.candidates >= 0) & (self.tree.child == EXIT)
        return np.concatenate([np.where(exits, self.p, 0.0), self.rest[:, None]], 1)

    @cached_property
    def weight(self) -> Float[np.ndarray, "N K"]:
        """P renormalised on S at nodes where S has two tokens or more, else 0."""
        return on_decisions(self.p, self.compared)

    @cached_property
    def decisions(self) -> int:
        """Nodes where S has two tokens or more."""
        return int((self.weight.sum(1) > 0).sum())

    def gradient(self, exits: Float[np.ndarray, "N K1"]) -> Float[np.ndarray, "N K"]:
        """The ideal gradient P(V - Vbar) on S, from the values of the exits."""
        _, edge = back_up(self.tree, self.p, exits, self.tree.outcome)
        w = self.weight
        return w * (edge - (w * edge).sum(1, keepdims=True))

    def influence(self, g: Float[np.ndarray, "N K"]) -> tuple[Float[np.ndarray, "M N K1"], Float[np.ndarray, "N K1"]]:
        """Differentiates each teacher's global cosine by the exits, and sums the squared derivatives of the gradient.

        With N_D = sum g.u, D = sum |g|^2 and n nodes the cosine is N_D / sqrt(n D).
        """
        w, mass, n, power = self.weight, self.mass, self.decisions, max(float((g**2).sum()), 1e-12)
        through = w**2 * ((1 - w) ** 2 + (w**2).sum(1, keepdims=True) - w**2)
        by_gradient = w * (g - (w * g).sum(1, keepdims=True))
        by_teacher = w * (self.unit - (w * self.unit).sum(-1, keepdims=True))
        along = (g * self.unit).sum((1, 2)) / power
        a = (by_teacher - along[:, None, None] * by_gradient) / np.sqrt(n * power)
        M, N, _ = a.shape
        alpha, size = np.zeros((M, N)), np.zeros(N)  # of the nodes' own values
        for nodes in self.tree.levels:
            child = self.tree.child[nodes]
            row, slot = np.nonzero(child >= 0)
            at, below = nodes[row], child[row, slot]
            alpha[:, below] = a[:, at, slot] + self.p[at, slot] * alpha[:, at]
            size[below] = through[at, slot] + self.p[at, slot] ** 2 * size[at]
        exits = mass[:, :-1] > 0
        A, H = np.zeros((M, *mass.shape)), np.zeros(mass.shape)
        A[:, :, :-1] = np.where(exits, a + self.p * alpha[:, :, None], 0.0)
        H[:, :-1] = np.where(exits, through + self.p**2 * size[:, None], 0.0)
        A[:, :, -1], H[:, -1] = self.rest * alpha, self.rest**2 * size
        return A, H


def on_decisions(
    p: Float[np.ndarray, "*batch N K"], compared: Bool[np.ndarray, "N K"]
) -> Float[np.ndarray, "*batch N K"]:
    """Renormalises probabilities on S at nodes where S has two tokens or more; 0 elsewhere."""
    decision = compared & (compared.sum(1, keepdims=True) >= 2)
    inside = np.where(decision, p, 0.0).astype(np.float64)
    return inside / np.maximum(inside.sum(-1, keepdims=True), 1e-300)


def unit_gradients(
    p: Float[np.ndarray, "N K"], q: Float[np.ndarray, "M N K"], compared: Bool[np.ndarray, "N K"]
) -> Float[np.ndarray, "M N K"]:
    """Gives the unit gradient of reverse KL on S, f = log Q - log P, for each teacher."""
    P, Q = on_decisions(np.maximum(p, 1e-30), compared), on_decisions(np.maximum(q, 1e-30), compared)
    f = np.log(np.where(Q > 0, Q, 1.0)) - np.log(np.where(P > 0, P, 1.0))
    gradient = P * (f - (P * f).sum(-1, keepdims=True))
    size = np.linalg.norm(gradient, axis=-1, keepdims=True)
    return np.divide(gradient, size, out=np.zeros_like(gradient), where=size > 1e-12)


def spend(
    problem: ExitProblem,
    counts: Counts,
    lengths: Int[np.ndarray, " G"],
    launch: Callable[[Int[np.ndarray, "N K1"]], tuple[Counts, int]],
    *,
    tokens: float,
    target_se: float,
    rng: np.random.Generator,
    teacher_agnostic: bool = False,
    decide: tuple[int, int] | None = None,
) -> Counts:
    """Spends about `tokens` in rounds, or fewer once every teacher's cosine has the standard error asked for.

    With `decide` also once it is sure at 95 %, over all rounds together, which of two teachers has the larger cosine.
    `lengths` are the initial rollouts'; `launch(number)` runs rollouts at each exit and gives the counts of all so far
    and the tokens it took. A round is at most a `ROUNDS`th, 4 times what was spent before, and what the standard error
    seems to need. Rollouts go where they serve the given teachers, or, `teacher_agnostic`, any that may come later.
    """
    expected, spent, left, turn = left_after(problem.tree, lengths), float(lengths.sum()), tokens, 0
    aim = replace(problem, unit=problem.unit[:0]) if teacher_agnostic else problem
    while left > LEAST_LEFT * tokens and turn < MOST_ROUNDS and problem.decisions:
        cosine, covariance = global_cosines(problem, counts)
        se = np.sqrt(np.diag(covariance).max(initial=0.0))
        look = turn - SURE_AFTER
        decided = decide is not None and look < LOOKS and _decided(cosine, covariance, *decide)
        if look >= 0 and (se < target_se or decided):
            break
        needed = max(spent * ((se / target_se) ** 2 - 1), spent * LEAST_ROUND)
        round_tokens = min(left, needed, MOST_GROWTH * spent, tokens / ROUNDS)
        number = neyman(aim, counts, expected, round_tokens, rng)
        if not number.any():
            break
        counts, taken = launch(number)
        spent, left, turn = spent + taken, left - max(taken, 1), turn + 1
    return counts


def _decided(cosine: Float[np.ndarray, " M"], covariance: Float[np.ndarray, "M M"], a: int, b: int) -> bool:
    """Whether two cosines differ, at 5 % shared by the rounds after which one may look."""
    se = np.sqrt(max(0.0, covariance[a, a] + covariance[b, b] - 2 * covariance[a, b]))
    return bool(abs(cosine[a] - cosine[b]) > norm.isf(0.025 / LOOKS) * se)


class SpreadNumbers:
    """A number in [0, 1) for every rollout, those of an exit spread evenly: (U_e + i / golden ratio) mod 1.

    U_e is random, so each rollout is an exact draw by itself; together they are less noisy than independent ones.
    """

    def __init__(self, tree: PathTree, rng: np.random.Generator):
        N, K = tree.candidates.shape
        self.first, self.drawn = rng.random((N, K + 1)), np.zeros((N, K + 1), np.int64)

    def next(self, number: Int[np.ndarray, "N K1"]) -> Float[np.ndarray, " R"]:
        """Gives the next `number` of each exit: exits of candidates in order of (node, slot), then rests by node."""
        node, slot = np.nonzero(number[:, :-1])
        rest = np.flatnonzero(number[:, -1])
        node, slot = np.append(node, rest), np.append(slot, np.full(len(rest), number.shape[1] - 1))
        many = number[node, slot]
        within = np.arange(many.sum()) - np.repeat(np.cumsum(many) - many, many)
        turn = np.repeat(self.drawn[node, slot], many) + within
        self.drawn += number
        return (np.repeat(self.first[node, slot], many) + turn * GOLDEN) % 1.0


def left_after(tree: PathTree, lengths: Int[np.ndarray, " G"]) -> Float[np.ndarray, " N"]:
    """Tokens that a rollout launched at each node is expected to generate beside the one it is given, at least 1.

    The mean residual life, E[L - d - 1 | L > d + 1], over the lengths of the initial rollouts.
    """
    left = np.asarray(lengths, float)[None] - tree.depth[:, None] - 1
    going = left > 0
    return np.maximum(np.where(going, left, 0).sum(1) / np.maximum(going.sum(1), 1), 1.0)


def neyman(
    problem: ExitProblem,
    counts: Counts,
    length: Float[np.ndarray, " N"],
    tokens: float,
    rng: np.random.Generator,
) -> Int[np.ndarray, "N K1"]:
    """Spends `tokens` on exits; `length` is what a rollout from a node costs, tokens.

    A launch at (node, slot K) draws its first token from P restricted to the tokens that are no candidates.
    """
    visits = counts.on_policy
    x = exit_values(problem.tree, counts, problem.p, PRIOR)
    g = problem.gradient(x)
    A, H = problem.influence(g)
    power = max(float((g**2).sum()), 1e-12)
    score = np.sqrt((A**2).sum(0) + max(1, len(A)) * H / (problem.decisions * power))
    cost = np.maximum(length, 1.0)[:, None]
    wanted = np.where(problem.mass > 0, score * np.sqrt(x * (1 - x) / cost), 0.0)

    def spent(scale: float) -> np.ndarray:
        return np.maximum(scale * wanted - np.where(wanted > 0, visits, 0), 0.0)

    low, high = 0.0, 1.0
    if not wanted.any():
        return np.zeros(wanted.shape, np.int64)
    while (spent(high) * cost).sum() < tokens:
        high *= 2
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if (spent(middle) * cost).sum() < tokens else (low, middle)
    number = spent(low)
    return np.floor(number + rng.random(number.shape)).astype(np.int64)


def global_cosines(problem: ExitProblem, counts: Counts) -> tuple[Float[np.ndarray, " M"], Float[np.ndarray, "M M"]]:
    """Estimates each teacher's global cosine, noise taken out of sum |g|^2, and the covariance of the estimates.

    NaN where no node has two tokens of S.
    """
    M = len(problem.unit)
    if not problem.decisions:
        return np.full(M, np.nan), np.full((M, M), np.nan)
    visits, success = counts.on_policy, counts.on_policy_success
    x = exit_values(problem.tree, counts, problem.p)
    g = problem.gradient(x)
    A, H = problem.influence(g)
    power = float((g**2).sum())
    noise = (H * x * (1 - x) * visits / (visits + 1) ** 2).sum()
    cleaned = max(power - noise, LEAST_POWER * power, 1e-12)
    cosine = (g * problem.unit).sum((1, 2)) / np.sqrt(problem.decisions * cleaned)
    variance = np.where(problem.mass > 0, proportion_variance(visits, success), 0.0)
    # A differentiates the cosine over the uncleaned norm; the estimate is larger by the square root of their ratio.
    return cosine, np.einsum("aij,bij,ij->ab", A, A, variance) * max(power, 1e-12) / cleaned
