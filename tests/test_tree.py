"""Path statistics, targets and estimators against counting by hand and an enumerable process."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxopd.errors import InputError
from jaxopd.tree import (
    ESTIMATORS,
    EXIT,
    LEAF,
    build_tree,
    count,
    depth_window,
    exit_targets,
    paper_targets,
    success_estimates,
    support,
    tally,
    walk,
)
from jaxopd.tree.oracle import FiniteMDP, raw_value

V, T = 4, 7


def policy(prefix: list[int]) -> np.ndarray:
    """A fixed random policy over V tokens; token 0 ends a response."""
    seed = int.from_bytes(hashlib.md5(bytes(prefix)).digest()[:4], "big")
    return np.random.default_rng(seed).dirichlet(np.full(V, 0.7))


def succeeds(response: list[int]) -> bool:
    return hashlib.md5(bytes(response) + b"!").digest()[0] < 110


def ended(prefix: list[int]) -> bool:
    return bool(prefix) and (prefix[-1] == 0 or len(prefix) == T)


def exact_value(prefix: list[int]) -> float:
    """The success probability by enumeration of the whole tree."""
    if ended(prefix):
        return float(succeeds(prefix))
    return sum(p * exact_value([*prefix, k]) for k, p in enumerate(policy(prefix)))


def roll(rng: np.random.Generator, prefix: list[int] = ()) -> list[int]:
    response = list(prefix)
    while not ended(response):
        response.append(int(rng.choice(V, p=policy(response))))
    return response


def padded(responses: list[list[int]]) -> np.ndarray:
    out = np.full((len(responses), T), -1)
    for i, response in enumerate(responses):
        out[i, : len(response)] = response
    return out


@pytest.fixture(scope="module")
def world():
    """Paths, their tree over all tokens, the true values of its edges."""
    rng = np.random.default_rng(0)
    found: dict[tuple[int, ...], bool] = {}
    while sum(found.values()) < 2 or sum(not ok for ok in found.values()) < 2:
        response = roll(rng)
        if len(response) >= 5 and sum(ok == succeeds(response) for ok in found.values()) < 2:
            found[tuple(response)] = succeeds(response)
    paths, correct = [np.array(p) for p in found], list(found.values())
    nodes = len(build_tree(paths, correct).owner)
    tree = build_tree(paths, correct, np.tile(np.arange(V), (nodes, 1)))
    prefix = [tree.tokens[a, :t].tolist() for a, t in zip(tree.owner, tree.depth, strict=True)]
    p = np.array([[policy(u)[k] for k in row] for u, row in zip(prefix, tree.candidates, strict=True)])
    truth = np.array([[exact_value([*u, k]) for k in row] for u, row in zip(prefix, tree.candidates, strict=True)])
    return tree, p, truth, prefix


def test_tree_structure(world) -> None:
    tree, p, _, prefix = world
    assert len({tuple(u) for u in prefix}) == len(prefix)  # a node is a unique prefix
    for a, n in enumerate(tree.length):
        for t in range(n):
            assert prefix[tree.node_of[a, t]] == tree.tokens[a, :t].tolist()
            slot = tree.candidates[tree.node_of[a, t]].tolist().index(tree.tokens[a, t])
            child = tree.child[tree.node_of[a, t], slot]
            assert child == (tree.node_of[a, t + 1] if t + 1 < n else LEAF)
    assert (tree.child == LEAF).sum() == len(tree.length)
    np.testing.assert_array_equal(
        tree.outcome[tree.child == LEAF], tree.correct[tree.owner[(tree.child == LEAF).any(1)]]
    )
    np.testing.assert_allclose(p.sum(1), 1)


def by_hand(tree, responses, launch, since) -> np.ndarray:
    total = np.zeros((len(tree.owner), tree.candidates.shape[1] + 1))
    for response, given_tokens in zip(responses, launch, strict=True):
        for n in range(len(tree.owner)):
            d = int(tree.depth[n])
            above = tree.tokens[tree.owner[n], :d].tolist()
            if d < len(response) and response[:d] == above and since(given_tokens, d):
                own = np.flatnonzero(tree.candidates[n] == response[d])
                total[n, own[0] if len(own) else -1] += 1
    return total


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), watched=st.integers(0, V))
def test_counts_against_counting_by_hand(world, seed, watched) -> None:
    tree, *_ = world
    rng = np.random.default_rng(seed)
    paths, nodes = [tree.tokens[a, :n] for a, n in enumerate(tree.length)], len(tree.owner)
    tree = build_tree(paths, list(tree.correct), np.tile(np.arange(watched), (nodes, 1)) if watched else None)
    responses, launch = [], []
    for _ in range(40):
        a = rng.integers(len(paths))
        given_tokens = int(rng.integers(0, tree.length[a]))
        start = tree.tokens[a, :given_tokens].tolist()
        if given_tokens and rng.random() < 0.5:
            start[-1] = int(rng.integers(1, V))
        responses.append(roll(rng, start))
        launch.append(given_tokens)
    walks = walk(tree, padded(responses), block=7)
    counts = count(tree, walks, np.array([succeeds(r) for r in responses]), np.array(launch))
    rules = {"pooled": lambda g, d: True, "on_policy": lambda g, d: g <= d + 1, "free": lambda g, d: g <= d}
    good = [succeeds(r) for r in responses]
    for name, since in rules.items():
        np.testing.assert_array_equal(getattr(counts, name), by_hand(tree, responses, launch, since))
        kept = (
            [r for r, ok in zip(responses, good, strict=True) if ok],
            [g for g, ok in zip(launch, good, strict=True) if ok],
        )
        np.testing.assert_array_equal(getattr(counts, f"{name}_success"), by_hand(tree, *kept, since))


def test_tally_of_weights_by_depth(world) -> None:
    tree, *_ = world
    rng = np.random.default_rng(4)
    responses = [roll(rng) for _ in range(50)]
    walks, weight = walk(tree, padded(responses)), rng.normal(size=(50, T + 1))
    got = tally(tree, walks, weight, np.zeros(50, int))
    expected = np.zeros_like(got)
    for response, w in zip(responses, weight, strict=True):
        for n, d in enumerate(tree.depth):
            if d < len(response) and response[:d] == tree.tokens[tree.owner[n], :d].tolist():
                expected[n, tree.candidates[n].tolist().index(response[d])] += w[d]
    np.testing.assert_allclose(got, expected)


@pytest.fixture(scope="module")
def replicates(world):
    """Estimates of 300 replicates: 250 initial rollouts, then targets chosen by a teacher that is wrong on purpose."""
    tree, p, _truth, _prefix = world
    rng = np.random.default_rng(1)
    process = FiniteMDP.from_rollouts(*everything())
    _at, after = process.along(tree)
    walks = walk(tree, process.sequences)
    q = np.roll(p, 1, 1)
    estimates: dict[str, list] = {name: [] for name in ESTIMATORS}
    for _ in range(300):
        rows = process.sample(np.zeros(250, int), rng)
        launch = np.zeros(250, int)
        visits = count(tree, walks[rows], process.success[rows], launch).pooled[:, :-1]
        targets = paper_targets(tree, p, {"t": (q, q - p)}, visits, n_min=60, by_gradient=40, by_difference=20)
        node = tree.node_of[targets.path, targets.depth]
        slot = (tree.candidates[node] == targets.token[:, None]).argmax(1)
        rows = np.concatenate([rows, process.sample(np.repeat(after[node, slot], targets.number), rng)])
        launch = np.concatenate([launch, np.repeat(targets.depth + 1, targets.number)])
        counts = count(tree, walks[rows], process.success[rows], launch)
        for name in ESTIMATORS:
            estimates[name].append(success_estimates(tree, counts, p, name))
    return estimates


def everything() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All responses of the policy, with the log-probs of their tokens: renormalising changes nothing."""
    responses, open_ = [], [[]]
    while open_:
        prefix = open_.pop()
        if ended(prefix):
            responses.append(prefix)
        else:
            open_ += [[*prefix, k] for k in range(V)]
    tokens = padded(responses)
    logp = np.zeros(tokens.shape)
    for i, response in enumerate(responses):
        for t in range(len(response)):
            logp[i, t] = np.log(policy(response[:t])[response[t]])
    return tokens, logp, np.array([succeeds(r) for r in responses])


def test_finite_process_is_exact(world) -> None:
    tree, p, truth, _ = world
    process = FiniteMDP.from_rollouts(*everything())
    at, after = process.along(tree)
    assert abs(process.value[0] - exact_value([])) < 1e-12
    np.testing.assert_allclose(process.value[after], truth, atol=1e-12)
    np.testing.assert_allclose(process.p[after], p, atol=1e-12)
    np.testing.assert_allclose(
        process.value[at],
        [exact_value(tree.tokens[a, :t].tolist()) for a, t in zip(tree.owner, tree.depth, strict=True)],
        atol=1e-12,
    )
    rows = process.sample(np.full(20_000, after[0, 1]), np.random.default_rng(0))
    assert (process.sequences[rows, 0] == tree.candidates[0, 1]).all()
    assert abs(process.success[rows].mean() - truth[0, 1]) < 4 * 0.5 / np.sqrt(20_000)


def test_estimators_against_the_truth(world, replicates) -> None:
    tree, _, truth, _ = world
    inner = tree.child >= 0  # the ancestors of launches
    error = {
        name: np.array([np.where(inner, e.value - truth, np.nan)[inner] for e in found])
        for name, found in replicates.items()
    }
    seen = {name: np.isfinite(e).sum(0) > 100 for name, e in error.items()}
    bias = {name: np.nanmean(e[:, seen[name]], 0) for name, e in error.items()}
    noise = {n: np.nanstd(e[:, seen[n]], 0) / np.sqrt(np.isfinite(e[:, seen[n]]).sum(0)) for n, e in error.items()}
    rmse = {name: np.sqrt(np.nanmean(e**2)) for name, e in error.items()}
    assert np.abs(bias["pooled"]).mean() > 0.05
    # on_policy is unbiased: its biases are within four standard errors of zero.
    assert (np.abs(bias["on_policy"]) <= 4 * noise["on_policy"] + 1e-12).all()
    assert np.abs(bias["bellman"]).mean() < 0.01
    assert rmse["bellman"] < 0.7 * rmse["on_policy"] < rmse["pooled"]


@pytest.mark.parametrize("name", ["on_policy", "bellman"])
def test_intervals_cover(world, replicates, name) -> None:
    tree, _, truth, _ = world
    for edges in (tree.child >= 0, tree.child == EXIT):
        kept = [np.isfinite(e.value) & (e.visits >= 20) & edges for e in replicates[name]]
        inside = [((e.low <= truth + 1e-9) & (truth <= e.high + 1e-9)) for e in replicates[name]]
        covered = np.concatenate([i[k] for i, k in zip(inside, kept, strict=True)])
        assert 0.90 < covered.mean() < 0.985


def test_a_path_that_nothing_left_is_not_certain() -> None:
    """30 steps of P = .97 along one path, and no rollout but those that follow it to the end."""
    path = np.arange(30)
    tree = build_tree([path], [True])
    p = np.full(tree.candidates.shape, 0.97)
    rollouts = np.tile(path, (200, 1))
    counts = count(tree, walk(tree, rollouts), np.ones(200, bool), np.zeros(200, int))
    found = success_estimates(tree, counts, p, "bellman")
    assert (found.low[:-1] < 0.99).all()
    assert (found.se[:-1] > 0.005).all()


@pytest.mark.parametrize("paths", [([1, 2, 3], [1, 2]), ([1, 2], [1, 2, 3]), ([1, 2], [])])
def test_a_path_inside_another_is_refused(paths) -> None:
    with pytest.raises(InputError, match="prefix"):
        build_tree([np.array(path, int) for path in paths], [True, False])


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimates_are_probabilities_inside_their_intervals(replicates, name) -> None:
    for e in replicates[name][:20]:
        known = np.isfinite(e.value)
        assert ((e.value[known] >= 0) & (e.value[known] <= 1)).all()
        assert ((e.low[known] <= e.value[known] + 1e-12) & (e.value[known] <= e.high[known] + 1e-12)).all()


def test_without_targets_pooled_and_on_policy_agree(world) -> None:
    tree, p, _, _ = world
    rng = np.random.default_rng(3)
    responses = [roll(rng) for _ in range(300)]
    counts = count(tree, walk(tree, padded(responses)), np.array([succeeds(r) for r in responses]), np.zeros(300, int))
    a, b = (success_estimates(tree, counts, p, name) for name in ("pooled", "on_policy"))
    np.testing.assert_array_equal(a.value, b.value)
    assert support(tree, a, 20).sum() == ((counts.pooled[:, :-1] >= 20) & (tree.candidates >= 0)).sum()


def test_unknown_estimator(world) -> None:
    tree, p, _, _ = world
    counts = count(tree, walk(tree, tree.tokens), tree.correct, np.zeros(len(tree.correct), int))
    with pytest.raises(InputError, match="method"):
        success_estimates(tree, counts, p, "best")


def test_depth_windows() -> None:
    assert depth_window(np.array([0, 49, 50, 149, 150, 349, 350])).tolist() == [0, 0, 1, 1, 2, 2, 3]


def test_paper_targets_rank_within_windows_and_unite_teachers(world) -> None:
    tree, p, _, _ = world
    rng = np.random.default_rng(5)
    teachers = {name: (rng.dirichlet(np.ones(V), len(p)), rng.normal(size=p.shape)) for name in "ab"}
    got = paper_targets(tree, p, teachers, np.full(p.shape, 30), by_gradient=3, by_difference=0, n_min=100, window=3)
    chosen = set()
    for q, gradient in teachers.values():
        for a, n in enumerate(tree.length):
            for w in range(3):
                inside = [int(tree.node_of[a, t]) for t in range(n) if depth_window(np.array([t]), 3)[0] == w]
                ranked = sorted(
                    ((u, k) for u in inside for k in range(V) if p[u, k] > 0.02 or q[u, k] > 0.02),
                    key=lambda e: -abs(gradient[e]),
                )
                chosen |= set(ranked[:3])
    prefix = [tree.tokens[a, :d].tolist() for a, d in zip(tree.owner, tree.depth, strict=True)]
    given = [prefix[tree.node_of[a, d]] + [int(k)] for a, d, k in zip(got.path, got.depth, got.token, strict=True)]
    # A launch counts at every token it was given; each chosen token gets its 70, none more than it needs.
    for u, k in chosen:
        edge = [*prefix[u], int(tree.candidates[u, k])]
        own = sum(n for n, tokens in zip(got.number, given, strict=True) if tokens == edge)
        deeper = sum(n for n, t in zip(got.number, given, strict=True) if t[: len(edge)] == edge and t != edge)
        assert own == max(0, 70 - deeper)
    assert {tuple(tokens) for tokens in given} <= {(*prefix[u], int(tree.candidates[u, k])) for u, k in chosen}
    assert 0 < len(given) < len(chosen)  # some chosen token on a path was reached by deeper launches


def test_exit_targets_launch_off_the_paths_only(world) -> None:
    tree, p, _, _ = world
    got = exit_targets(tree, p, at_least=5, per_node=100)
    node = tree.node_of[got.path, got.depth]
    slot = (tree.candidates[node] == got.token[:, None]).argmax(1)
    assert (tree.child[node, slot] == EXIT).all()
    np.testing.assert_array_equal(got.number, np.maximum(5, np.ceil(100 * p[node, slot])))


def test_raw_value_brackets_the_enumerated_truth() -> None:
    rng = np.random.default_rng(2)
    responses = [roll(rng) for _ in range(4000)]
    found = raw_value(
        lambda prefixes: np.log(np.array([policy(u) for u in prefixes])),
        {0},
        succeeds,
        responses,
        np.array([succeeds(r) for r in responses]),
        nodes=60,
        max_tokens=T,
    )
    assert 0 < found[2] < 1
    assert abs(found[0] - exact_value([])) < 4 * found[1]
    whole = raw_value(
        lambda prefixes: np.log(np.array([policy(u) for u in prefixes])),
        {0},
        succeeds,
        [],
        np.zeros(0, bool),
        nodes=10**6,
        max_tokens=T,
    )
    assert abs(whole[0] - exact_value([])) < 1e-6
