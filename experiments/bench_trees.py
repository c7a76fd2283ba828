"""How the cost of path statistics grows: time and peak memory against the number of rollouts and their length.

    python experiments/bench_trees.py            # 1 minute on 2 cores, 4 GB of memory; experiments/results/
    python experiments/bench_trees.py --smoke    # seconds

A tree of 4 paths, one branching off another at 1/4 and 1/2 of its length; each rollout follows a path to a depth drawn
uniformly, so half of all tokens must be read (real initial rollouts leave earlier). Then the estimators and the
targeting on the tree of the longest paths. Memory is what a call allocates at its peak, beside the rollouts.
Expected: 200,000 rollouts of 512 tokens and 45,000 of 8,192 in seconds, all exponents near 1 or below.
"""

import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
from benchmarking import (
    MachineFloor,
    Measurement,
    Result,
    arguments,
    exponent,
    interleaved,
    machine_floor,
    progress,
    with_floor,
    write,
)

from jaxopd.tree import (
    ESTIMATORS,
    PathTree,
    build_tree,
    count,
    exit_targets,
    paper_targets,
    success_estimates,
    tally,
    walk,
)

VOCABULARY, PATHS, WATCHED = 151_936, 4, 20
MORE_ROLLOUTS = [(rollouts, 512) for rollouts in (12_500, 25_000, 50_000, 100_000, 200_000)]
LONGER = [(45_000, tokens) for tokens in (512, 1_024, 2_048, 4_096, 8_192)]
PASS = "one pass over the tokens"


@dataclass(frozen=True)
class World:
    tree: PathTree
    tokens: np.ndarray  # [G, T]
    weight: np.ndarray  # [G, T], as rewards-to-go
    success: np.ndarray
    launch: np.ndarray


def make_tree(rng: np.random.Generator, T: int) -> PathTree:
    """Draws the paths and WATCHED candidates at each node."""
    paths = rng.integers(0, VOCABULARY, (PATHS, T))
    paths[2, : T // 4], paths[3, : T // 2] = paths[0, : T // 4], paths[0, : T // 2]
    correct = [True, False] * (PATHS // 2)
    nodes = len(build_tree(list(paths), correct).owner)
    return build_tree(list(paths), correct, rng.integers(0, VOCABULARY, (nodes, WATCHED)))


def make_world(G: int, T: int) -> World:
    """Draws rollouts that follow a path to a uniform depth; a fifth are initial, the rest were launched there."""
    rng = np.random.default_rng(0)
    tree = make_tree(rng, T)
    path, depth = rng.integers(0, PATHS, G), rng.integers(0, T, G)
    tokens, weight = np.empty((G, T), np.int32), np.empty((G, T), np.float32)
    for low in range(0, G, 1024):
        rows = slice(low, low + 1024)
        drawn = rng.integers(0, VOCABULARY, tokens[rows].shape, dtype=np.int32)
        tokens[rows] = np.where(np.arange(T)[None] < depth[rows, None], tree.tokens[path[rows]], drawn)
        weight[rows] = rng.random(weight[rows].shape, np.float32)
    return World(tree, tokens, weight, rng.random(G) < 0.5, np.where(rng.random(G) < 0.2, 0, depth + 1))


def peak_megabytes(run: Callable[[], object]) -> float:
    """Measures what the call allocates at its peak; numpy reports its buffers to tracemalloc."""
    tracemalloc.start()
    run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 1e6


def measure(G: int, T: int, floor: MachineFloor, repeats: int) -> list[Measurement]:
    """Times the statistics on one world, beside a plain pass over its tokens."""
    world = make_world(G, T)
    tree, walks = world.tree, walk(world.tree, world.tokens)
    nowhere = np.zeros(G, np.int64)
    contestants: Mapping[str, Callable[[], object]] = {
        PASS: world.tokens.max,
        "walk": lambda: walk(tree, world.tokens),
        "count": lambda: count(tree, walks, world.success, world.launch),
        "tally, weights by depth": lambda: tally(tree, walks, world.weight, nowhere),
    }
    # What no program can avoid: the tokens up to where a rollout leaves its path; where each leaves; the same weights.
    followed = float(walks.common.max(1).sum() + G)
    read = {
        PASS: world.tokens.nbytes,
        "walk": 4 * followed,
        "count": walks.common.nbytes + walks.slot.nbytes,
        "tally, weights by depth": 4 * followed,
    }
    timed = interleaved(contestants, case=f"{G:,} rollouts of {T:,} tokens", repeats=repeats, work=G, unit="rollouts")
    rows = []
    for row in timed:
        measured = {"rollouts": G, "tokens": T, "peak MB": peak_megabytes(contestants[row.name])}
        rows.append(with_floor(row, floor.at_least(read=read[row.name]), **measured))
    return rows


def measure_estimators(T: int, repeats: int) -> list[Measurement]:
    """Times estimators and targeting, whose cost does not depend on the number of rollouts."""
    world = make_world(1_000, T)
    tree, counts = world.tree, count(world.tree, walk(world.tree, world.tokens), world.success, world.launch)
    N, K = tree.candidates.shape
    rng = np.random.default_rng(1)
    p = rng.dirichlet(np.ones(K), N)
    teachers = {name: (rng.dirichlet(np.ones(K), N), rng.normal(size=(N, K))) for name in "abcd"}
    contestants: dict[str, Callable[[], object]] = {
        name: (lambda name=name: success_estimates(tree, counts, p, name)) for name in ESTIMATORS
    }
    contestants["paper_targets, 4 teachers"] = lambda: paper_targets(tree, p, teachers, counts.pooled[:, :-1])
    contestants["exit_targets"] = lambda: exit_targets(tree, p, at_least=5, per_node=100)
    case = f"{N:,} nodes of {K} candidates"
    rows = interleaved(contestants, case=case, repeats=repeats, reference="bellman", work=N, unit="nodes")
    return [replace(row, extra={"peak MB": peak_megabytes(contestants[row.name])}) for row in rows]


def series(rows: list[Measurement], name: str, shapes: list[tuple[int, int]], along: str) -> dict[str, list[float]]:
    """Picks one contestant's size, time and memory over a sweep."""
    by_shape = {(row.extra["rollouts"], row.extra["tokens"]): row for row in rows if row.name == name}
    picked = [by_shape[shape] for shape in shapes]
    return {
        along: [row.extra[along] for row in picked],
        "seconds": [row.seconds for row in picked],
        "peak MB": [row.extra["peak MB"] for row in picked],
    }


def fitted(rows: list[Measurement], sweeps: Mapping[str, list[tuple[int, int]]]) -> dict[str, float]:
    """Fits cost = c size^a over each sweep, for time and memory."""
    found = {}
    for along, shapes in sweeps.items():
        for name in dict.fromkeys(row.name for row in rows):
            line = series(rows, name, shapes, along)
            for cost in ("seconds", "peak MB"):
                if name != PASS or cost == "seconds":
                    found[f"{name}: {cost} against {along}"] = round(exponent(line[along], line[cost]), 2)
    return found


def plot(rows: list[Measurement], sweeps: Mapping[str, list[tuple[int, int]]], path: Path) -> None:
    """Draws time and memory over both sweeps, with the fitted exponents, where matplotlib is installed."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        progress("matplotlib is not installed: no plot")
        return
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(row.name for row in rows))}
    figure, axes = plt.subplots(2, len(sweeps), figsize=(11, 8), squeeze=False)
    for column, (along, shapes) in zip(axes.T, sweeps.items(), strict=True):
        for ax, cost in zip(column, ("seconds", "peak MB"), strict=True):
            for name, colour in colours.items():
                line = series(rows, name, shapes, along)
                if name == PASS and cost != "seconds":
                    continue
                label = f"{name}: {along}^{exponent(line[along], line[cost]):.2f}"
                ax.loglog(line[along], line[cost], "o-", color=colour, label=label)
            ax.set_xticks(line[along], [f"{size:,}" for size in line[along]])
            ax.minorticks_off()
            ax.set(xlabel=along, ylabel=cost)
            ax.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    progress(f"wrote {path}")


def main() -> None:
    args = arguments(__doc__).parse_args()
    more, longer, repeats = MORE_ROLLOUTS, LONGER, 5
    if args.smoke:
        more, longer, repeats = [(200, 64), (400, 64)], [(100, 64), (100, 128)], 2
    sweeps = {"rollouts": more, "tokens": longer}
    floor = machine_floor(smoke=args.smoke)
    rows = [row for shape in dict.fromkeys([*more, *longer]) for row in measure(*shape, floor, repeats)]
    exponents = fitted(rows, sweeps)
    rows += measure_estimators(longer[-1][1], repeats)
    settings = {"smoke": args.smoke, "paths": PATHS, "watched": WATCHED, "repeats": repeats, "exponents": exponents}
    written = write(Result("bench_trees", floor, rows, settings), args.folder)
    for name, value in exponents.items():
        print(f"{name}^{value}")
    plot([row for row in rows if "rollouts" in row.extra], sweeps, written.with_suffix(".png"))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # the statistics run on the host, so its bandwidth is the floor
    main()
