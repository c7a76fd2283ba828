"""Path statistics at scale: parts of any width, type and place against a brute-force trie, and bounded memory."""

import tracemalloc
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxopd.tree import Branches, PathTree, build_tree, count, paths, tally, walk

ALPHABET = 3


def distinct_paths(rng: np.random.Generator, number: int, longest: int) -> list[np.ndarray]:
    """Paths that branch off one another at all depths; the last token, which no other place has, ends them."""
    found = [rng.integers(0, ALPHABET, int(rng.integers(0, longest)))]
    while len(found) < number:
        twin = found[rng.integers(len(found))]
        shared = int(rng.integers(0, len(twin) + 1))
        found.append(np.concatenate([twin[:shared], rng.integers(0, ALPHABET, int(rng.integers(0, longest - shared)))]))
    unique = {tuple(path.tolist()) for path in found}
    return [np.array([*path, ALPHABET]) for path in sorted(unique)]


def random_rollouts(rng: np.random.Generator, tree: PathTree, number: int) -> list[list[int]]:
    """Responses that follow a path for a while, to its end and beyond it too, and then wander."""
    rollouts = []
    for _ in range(number):
        a = rng.integers(len(tree.length))
        kept = tree.tokens[a, : rng.integers(0, tree.length[a] + 1)]
        rollouts.append([*kept.tolist(), *rng.integers(0, ALPHABET + 2, rng.integers(0, 6)).tolist()])
    return rollouts


def in_parts(rng: np.random.Generator, rollouts: list[list[int]]) -> list[np.ndarray]:
    """Splits the rollouts into padded arrays, each as wide as its longest or wider, of different types."""
    cuts = np.sort(rng.integers(0, len(rollouts) + 1, 2)).tolist()
    parts = []
    for low, high in zip([0, *cuts], [*cuts, len(rollouts)], strict=True):
        width = max(map(len, rollouts[low:high]), default=0) + int(rng.integers(0, 3))
        part = np.full((high - low, width), -1, rng.choice([np.int16, np.int32, np.int64]))
        for row, rollout in zip(part, rollouts[low:high], strict=True):
            row[: len(rollout)] = rollout
        parts.append(part)
    return parts


def brute_force(tree: PathTree, rollouts: list[list[int]], weight: np.ndarray, since: np.ndarray) -> np.ndarray:
    """Sums weight[g, depth] in a trie of all prefixes of all rollouts, then looks the tree's nodes up in it."""
    trie: dict[tuple, Counter] = defaultdict(Counter)
    for g, rollout in enumerate(rollouts):
        for depth in range(since[g], len(rollout)):
            trie[tuple(rollout[:depth])][rollout[depth]] += weight[g, depth]
    N, K = tree.candidates.shape
    total = np.zeros((N, K + 1))
    for n in range(N):
        for token, value in trie[tuple(tree.tokens[tree.owner[n], : tree.depth[n]].tolist())].items():
            slot = np.flatnonzero(tree.candidates[n] == token)
            total[n, slot[0] if len(slot) else K] += value
    return total


def random_case(seed: int) -> tuple[PathTree, list[list[int]], list[np.ndarray], np.random.Generator]:
    rng = np.random.default_rng(seed)
    found = distinct_paths(rng, 4, 12)
    nodes, correct = len(build_tree(found, [True] * len(found)).owner), rng.random(len(found)) < 0.5
    watched = np.where(rng.random((nodes, ALPHABET)) < 0.5, np.arange(ALPHABET), -1)
    tree = build_tree(found, correct.tolist(), watched)
    rollouts = random_rollouts(rng, tree, 30)
    return tree, rollouts, in_parts(rng, rollouts), rng


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes windows and blocks so small that every case crosses their edges."""
    monkeypatch.setattr(paths, "WINDOW", 3)
    monkeypatch.setattr(paths, "CELLS", 20)


# The fixture holds for all examples alike, so hypothesis need not reset it between them.
@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("block", [1, 7, 4096])
def test_statistics_against_a_brute_force_trie(block: int) -> None:
    @settings(max_examples=40, deadline=None)
    @given(st.integers(0, 2**32 - 1))
    def check(seed: int) -> None:
        tree, rollouts, parts, rng = random_case(seed)
        walks = walk(tree, parts, block=block)
        for a, length in enumerate(tree.length):
            for g, rollout in enumerate(rollouts):
                same = [x == y for x, y in zip(rollout, tree.tokens[a, :length].tolist())]
                assert walks.common[g, a] == (same.index(False) if False in same else len(same))
        G, longest = len(rollouts), int(tree.length.max()) + 6
        success, launch = rng.random(G) < 0.5, np.array([rng.integers(0, len(r) + 1) for r in rollouts])
        counts = count(tree, walks, success, launch)
        ones = np.ones((G, longest))
        for name, since in (
            ("pooled", np.zeros(G, int)),
            ("on_policy", np.maximum(launch - 1, 0)),
            ("free", launch),
        ):
            np.testing.assert_array_equal(getattr(counts, name), brute_force(tree, rollouts, ones, since))
            np.testing.assert_array_equal(
                getattr(counts, f"{name}_success"), brute_force(tree, rollouts, ones * success[:, None], since)
            )
        weight = rng.normal(size=(G, longest))
        expected = brute_force(tree, rollouts, weight, launch)
        np.testing.assert_allclose(tally(tree, walks, weight, launch), expected, atol=1e-12)
        constant = np.broadcast_to(weight[:, :1], weight.shape)
        expected = brute_force(tree, rollouts, constant, launch)
        np.testing.assert_allclose(tally(tree, walks, weight[:, 0], launch), expected, atol=1e-12)

    check()


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("block", [1, 7, 4096])
def test_a_branch_is_walked_like_the_whole_response(block: int) -> None:
    @settings(max_examples=40, deadline=None)
    @given(st.integers(0, 2**32 - 1))
    def check(seed: int) -> None:
        tree, rollouts, parts, rng = random_case(seed)
        path, start, own = [], [], []
        for rollout in rollouts:
            common = [len(np.flatnonzero(np.cumprod([x == y for x, y in zip(rollout, one)]))) for one in tree.tokens]
            path.append(int(rng.choice(np.flatnonzero(np.array(common) > 0))) if max(common) else 0)
            start.append(int(rng.integers(0, common[path[-1]] + 1)))
            own.append(rollout[start[-1] :])
        tokens = np.full((len(own), max(map(len, own)) + 1), -1, np.int32)
        for row, rest in zip(tokens, own, strict=True):
            row[: len(rest)] = rest
        branches = Branches(tokens, np.array(path), np.array(start))
        for row, rollout in zip(branches.whole(tree), rollouts, strict=True):
            assert row[row >= 0].tolist() == rollout
        expected, found = walk(tree, parts, block=block), walk(tree, [branches, branches], block=block)
        for half in (slice(None, 30), slice(30, None)):
            np.testing.assert_array_equal(found.common[half], expected.common)
            np.testing.assert_array_equal(found.slot[half], expected.slot)

    check()


def test_a_part_may_be_mapped_from_disk_and_cut_short(tmp_path) -> None:
    rng = np.random.default_rng(0)
    long_paths = [np.append(rng.integers(0, ALPHABET, n), ALPHABET) for n in (400, 300)]
    tree = build_tree(long_paths, [True, False])
    rollouts = random_rollouts(rng, tree, 50)
    whole = np.full((50, 410), -1, np.int32)
    for row, rollout in zip(whole, rollouts, strict=True):
        row[: len(rollout)] = rollout
    whole.tofile(tmp_path / "tokens")
    mapped = np.memmap(tmp_path / "tokens", np.int32, "r", shape=whole.shape)
    walks = walk(tree, mapped)
    total = brute_force(tree, rollouts, np.ones(whole.shape), np.zeros(50, int))
    np.testing.assert_array_equal(tally(tree, walks, np.ones(50), np.zeros(50, int)), total)
    # At a width that ends inside the paths, what follows is unknown: no slot is taken there.
    short = walk(tree, mapped[:, :256])
    np.testing.assert_array_equal(short.common, np.minimum(walks.common, 256))
    np.testing.assert_array_equal(short.slot, np.where(walks.common < 256, walks.slot, -1))


def test_nothing_to_walk() -> None:
    tree = build_tree([np.array([1, 2])], [True])
    for nothing in ([], np.zeros((0, 5), np.int32)):
        walks = walk(tree, nothing)
        assert walks.common.shape == walks.slot.shape == (0, 1)
        assert tally(tree, walks, np.zeros(0), np.zeros(0, int)).sum() == 0
    assert walk(tree, np.zeros((3, 0), np.int32)).slot.tolist() == [[-1]] * 3


def peak_bytes(run) -> int:
    tracemalloc.start()
    run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_is_linear_in_rollouts_and_bounded_by_the_blocks() -> None:
    rng = np.random.default_rng(1)
    T, M, small = 600, 4, 10_000
    tree = build_tree([rng.integers(0, 1000, T) for _ in range(M)], [True, True, False, False])
    # Every rollout follows a path to its last token: nothing is spared.
    rows = np.repeat(tree.tokens.astype(np.int32), 2 * small // M, axis=0)
    rows[:, -1] = 1000
    walk_peak, tally_peak = [], []
    for G in (small, 2 * small):
        walks, weight = walk(tree, rows[:G]), np.ones((G, T), np.float32)
        walk_peak.append(peak_bytes(lambda G=G: walk(tree, rows[:G])))
        since = np.zeros(G, int)
        tally_peak.append(peak_bytes(lambda w=walks, x=weight, s=since: tally(tree, w, x, s)))
    per_rollout = 2 * M * 8
    assert walk_peak[1] - walk_peak[0] < 1.1 * per_rollout * small
    assert walk_peak[0] < per_rollout * small + 4096 * (2 * paths.WINDOW + 64) * 4
    assert tally_peak[1] - tally_peak[0] < 50 * small
    assert tally_peak[0] < 50 * small + 24 * paths.CELLS
