"""The exits allocation: derivatives against finite differences, spend, and error against the finite process."""

from dataclasses import replace

import numpy as np
import pytest

from jaxopd.tree import EXIT, back_up, build_tree, count, walk
from jaxopd.tree.allocation import ExitProblem, global_cosines, left_after, neyman
from jaxopd.tree.allocation import spend as spend_rounds
from jaxopd.tree.oracle import FiniteMDP

V, T = 4, 6


@pytest.fixture(scope="module")
def world():
    """A random process with its whole tree enumerated, four paths, candidates 0 to 2, token 3 the rest."""
    rng = np.random.default_rng(4)
    sequences, logp = [], []

    def grow(prefix: list[int], logs: list[float]) -> None:
        if len(prefix) == T:
            sequences.append(prefix)
            logp.append(logs)
            return
        for k, p in enumerate(rng.dirichlet(np.ones(V))):
            grow([*prefix, k], [*logs, float(np.log(p))])

    grow([], [])
    success = rng.random(len(sequences)) < 0.45
    process = FiniteMDP.from_rollouts(np.array(sequences), np.array(logp), success)
    rows = np.concatenate([np.flatnonzero(success)[[3, 400]], np.flatnonzero(~success)[[50, 700]]])
    paths = [process.sequences[row] for row in rows]
    nodes = len(build_tree(paths, [True, True, False, False]).owner)
    tree = build_tree(paths, [True, True, False, False], np.tile(np.arange(3), (nodes, 1)))
    at, after = process.along(tree)
    p = np.where(after >= 0, process.p[after], 0.0)
    compared = (tree.candidates >= 0) & (p > 0.05)
    unit = np.where(compared, rng.normal(size=(2, *p.shape)), 0.0)
    unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
    problem = ExitProblem(tree, p, compared, np.where(compared.sum(1, keepdims=True) >= 2, unit, 0.0))
    exits = np.zeros((nodes, p.shape[1] + 1))
    exits[:, :-1] = np.where(after >= 0, process.value[after], 0.0)
    for u, node in enumerate(at):
        children = process.first_child[node] + np.arange(process.children[node])
        others = children[~np.isin(process.token[children], tree.candidates[u])]
        if len(others):
            exits[u, -1] = np.average(process.value[others], weights=process.p[others])
    return problem, process, at, after, exits


def cosines(problem: ExitProblem, exits: np.ndarray) -> np.ndarray:
    """The definition: sum <g, u> / sqrt(n sum |g|^2)."""
    g = problem.gradient(exits)
    decisions = (problem.compared.sum(1) >= 2).sum()
    return (g * problem.unit).sum((1, 2)) / np.sqrt(decisions * (g**2).sum())


def test_values_and_ideal_gradient_are_those_of_the_process(world) -> None:
    problem, process, at, after, exits = world
    node, edge = back_up(problem.tree, problem.p, exits, problem.tree.outcome)
    np.testing.assert_allclose(node, process.value[at], atol=1e-12)
    known = after >= 0
    np.testing.assert_allclose(edge[known], process.value[after][known], atol=1e-12)
    for u in np.flatnonzero(problem.compared.sum(1) >= 2):
        p = np.where(problem.compared[u], problem.p[u], 0.0)
        p /= p.sum()
        np.testing.assert_allclose(problem.gradient(exits)[u], p * (edge[u] - p @ edge[u]), atol=1e-12)


def test_influence_is_the_derivative(world) -> None:
    problem, _, _, _, exits = world
    A, H = problem.influence(problem.gradient(exits))
    step = 1e-6
    for u, k in np.argwhere(problem.mass > 0):
        moved = exits.copy()
        moved[u, k] += step
        slope = (cosines(problem, moved) - cosines(problem, exits)) / step
        np.testing.assert_allclose(A[:, u, k], slope, atol=2e-5)
        slope = (problem.gradient(moved) - problem.gradient(exits)) / step
        np.testing.assert_allclose(H[u, k], (slope**2).sum(), rtol=1e-4, atol=1e-12)
    assert (A[:, problem.mass == 0] == 0).all()


def spend(world, tokens: float, rng: np.random.Generator, rounds: int = 3):
    """Initial rollouts and rounds of the allocation on the process; gives the counts and the tokens spent."""
    problem, process, at, after, _ = world
    tree = problem.tree
    walks = walk(tree, process.sequences)
    rows = process.sample(np.zeros(30, np.int64), rng)
    launch, length = np.zeros(30, np.int64), (T - tree.depth - 1).astype(float)
    left = tokens
    for r in range(rounds):
        counts = count(tree, walks[rows], process.success[rows], launch)
        number = neyman(problem, counts, length, left / (rounds - r), rng)
        node, slot = (np.repeat(x, number[np.nonzero(number)]) for x in np.nonzero(number))
        starts = np.empty(len(node), np.int64)
        for i, (u, k) in enumerate(zip(node, slot, strict=True)):
            children = process.first_child[at[u]] + np.arange(process.children[at[u]])
            others = children[~np.isin(process.token[children], tree.candidates[u])]
            p = process.p[others]
            starts[i] = after[u, k] if k < tree.candidates.shape[1] else rng.choice(others, p=p / p.sum())
        rows = np.concatenate([rows, process.sample(starts, rng)])
        launch = np.concatenate([launch, tree.depth[node] + 1])
        left -= np.maximum(length[node], 1).sum()
    return count(tree, walks[rows], process.success[rows], launch), tokens - left


def test_spends_what_it_was_given_on_exits(world) -> None:
    problem = world[0]
    rng = np.random.default_rng(0)
    counts, spent = spend(world, 0.0, rng, rounds=1)
    number = neyman(problem, counts, np.full(len(problem.p), 3.0), 3000.0, rng)
    assert abs(3 * number.sum() - 3000) < 3 * np.sqrt(number.size)
    assert (number[problem.mass == 0] == 0).all()
    assert (number[:, :-1][problem.tree.child != EXIT] == 0).all()
    assert spent == 0


def test_error_falls_and_intervals_cover(world) -> None:
    problem, _, _, _, exits = world
    truth, rng = cosines(problem, exits), np.random.default_rng(1)
    error = {}
    for tokens in (400.0, 6400.0):
        found = [global_cosines(problem, spend(world, tokens, rng)[0]) for _ in range(60)]
        estimate = np.stack([cosine for cosine, _ in found])
        se = np.sqrt(np.stack([np.diag(covariance) for _, covariance in found]))
        error[tokens] = np.sqrt(((estimate - truth) ** 2).mean())
        assert 0.88 < (np.abs(estimate - truth) < 1.96 * se).mean() < 0.995
    assert error[6400.0] < error[400.0] / 2.5


def test_without_a_decision_nothing_is_claimed(world) -> None:
    problem, process, *_ = world
    nothing = replace(problem, compared=np.zeros_like(problem.compared), unit=np.zeros_like(problem.unit))
    tree = problem.tree
    rows = process.sample(np.zeros(30, np.int64), np.random.default_rng(0))
    counts = count(tree, walk(tree, process.sequences)[rows], process.success[rows], np.zeros(30, np.int64))
    cosine, covariance = global_cosines(nothing, counts)
    assert np.isnan(cosine).all()
    assert np.isnan(covariance).all()

    def launch(number):
        raise AssertionError("there is nothing to spend on")

    options = {"tokens": 1000.0, "target_se": 0.04, "rng": np.random.default_rng(0)}
    assert spend_rounds(nothing, counts, np.full(30, T), launch, **options) is counts


def test_left_after_is_the_mean_residual_life(world) -> None:
    tree = world[0].tree
    lengths = np.array([2, 3, 3, 9])
    left = left_after(tree, lengths)
    for node, depth in enumerate(tree.depth):
        longer = lengths[lengths > depth + 1]
        assert left[node] == max(1.0, (longer - depth - 1).mean() if len(longer) else 0)


def test_uneven_influence_beats_an_even_spend(world) -> None:
    problem, *_, exits = world
    rng = np.random.default_rng(2)
    counts, _ = spend(world, 0.0, rng, rounds=1)
    number = neyman(problem, counts, np.ones(len(problem.p)), 20_000.0, rng) + counts.on_policy
    A, _ = problem.influence(problem.gradient(exits))
    variance = exits * (1 - exits) * (A**2).sum(0)
    even = number.sum() / (problem.mass > 0).sum()
    chosen = problem.mass > 0
    assert (variance[chosen] / np.maximum(number[chosen], 1)).sum() < 0.8 * (variance[chosen] / even).sum()
