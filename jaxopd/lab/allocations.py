"""Where tokens may be spent on an exact problem: the instrument's own allocations, replayed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
from jaxtyping import Float, Int

from jaxopd.diagnose.config import DiagnoseConfig
from jaxopd.diagnose.launches import BATCH
from jaxopd.gradients import logit_gradient
from jaxopd.lab.problems import Problem
from jaxopd.tree import Counts, Targets, count, paper_targets
from jaxopd.tree.allocation import SpreadNumbers, left_after, spend


@dataclass(frozen=True)
class Rollouts:
    """Rollouts of a problem: rows of its process's sequences, and how many tokens each was given."""

    problem: Problem
    rows: Int[np.ndarray, " G"]
    launch: Int[np.ndarray, " G"]

    @property
    def tokens(self) -> int:
        """Tokens generated after the launch points."""
        return int((self.problem.lengths[self.rows] - self.launch).sum())

    @property
    def counts(self) -> Counts:
        """Visits and successes along the problem's paths."""
        success = self.problem.process.success[self.rows]
        return count(self.problem.tree, self.problem.walks[self.rows], success, self.launch)

    def and_from(
        self,
        start: Int[np.ndarray, " R"],
        launch: Int[np.ndarray, " R"],
        rng: np.random.Generator,
        spread: Float[np.ndarray, " R"] | None = None,
    ) -> "Rollouts":
        """Adds a rollout from each node `start` of the process, which was given `launch` tokens."""
        more = self.problem.process.sample(start, rng, spread)
        return Rollouts(self.problem, np.concatenate([self.rows, more]), np.concatenate([self.launch, launch]))


Allocation = Callable[[Problem, DiagnoseConfig, np.random.Generator], Rollouts]


def initial(problem: Problem, number: int, rng: np.random.Generator) -> Rollouts:
    """Draws rollouts from the prompt."""
    nothing = Rollouts(problem, np.zeros(0, np.int64), np.zeros(0, np.int64))
    return nothing.and_from(np.zeros(number, np.int64), np.zeros(number, np.int64), rng)


def until_paths(problem: Problem, config: DiagnoseConfig, rng: np.random.Generator) -> Rollouts:
    """Draws rollouts from the prompt in batches until there are paths of both outcomes, or G of them."""
    rolled = initial(problem, min(BATCH, config.rollouts), rng)
    while len(rolled.rows) < config.rollouts:
        correct = problem.process.success[rolled.rows]
        if min(correct.sum(), (~correct).sum()) >= config.paths:
            break
        more = np.zeros(min(BATCH, config.rollouts - len(rolled.rows)), np.int64)
        rolled = rolled.and_from(more, more, rng)
    return rolled


def paper(problem: Problem, config: DiagnoseConfig, rng: np.random.Generator) -> Rollouts:
    """Paper A: G initial rollouts, then the tokens on which a teacher disagrees most are raised to N_min visits."""
    rolled = initial(problem, config.rollouts, rng)
    return launched(rolled, disagreements(rolled, config), rng)


def disagreements(rolled: Rollouts, config: DiagnoseConfig) -> Targets:
    """Gives the paper's targets after the initial rollouts."""
    problem, teachers = rolled.problem, {}
    for name, log_q in problem.log_q.items():
        ratio = np.where(problem.p > 0, log_q - np.log(np.maximum(problem.p, 1e-30)), 0.0)
        teachers[name] = np.exp(log_q), np.asarray(logit_gradient(problem.log_p, ratio))
    return paper_targets(problem.tree, problem.p, teachers, rolled.counts.pooled[:, :-1], **config.targeting)


def launched(rolled: Rollouts, targets: Targets, rng: np.random.Generator) -> Rollouts:
    """Adds the rollouts of targets."""
    tree = rolled.problem.tree
    node = tree.node_of[targets.path, targets.depth]
    slot = (tree.candidates[node] == targets.token[:, None]).argmax(1)
    start = np.repeat(rolled.problem.after[node, slot], targets.number)
    return rolled.and_from(start, np.repeat(targets.depth + 1, targets.number), rng)


def exits(problem: Problem, config: DiagnoseConfig, rng: np.random.Generator) -> Rollouts:
    """Neyman's allocation over exits (tree/allocation.py), the rounds that `diagnose --allocation exits` runs."""
    rolled = until_paths(problem, config, rng)
    lengths = problem.lengths[rolled.rows]
    sequences = SpreadNumbers(problem.tree, rng) if config.low_discrepancy else None

    def launch(number: np.ndarray) -> tuple[Counts, int]:
        nonlocal rolled
        before, spread = rolled.tokens, sequences.next(number) if sequences else None
        rolled = rolled.and_from(*_exit_starts(problem, number, rng), rng, spread)
        return rolled.counts, rolled.tokens - before

    names = list(problem.log_q)
    spend(
        problem.exits(config.tau),
        rolled.counts,
        lengths,
        launch,
        tokens=config.exit_budget(float(lengths.mean())),
        target_se=config.target_se,
        rng=rng,
        teacher_agnostic=config.teacher_agnostic,
        decide=config.decide and (names.index(config.decide[0]), names.index(config.decide[1])),
    )
    return rolled


def uniform(problem: Problem, config: DiagnoseConfig, rng: np.random.Generator) -> Rollouts:
    """The same tokens spread evenly over the exits."""
    rolled = until_paths(problem, config, rng)
    lengths = problem.lengths[rolled.rows]
    exists = problem.exits(config.tau).mass > 0
    cost = (exists * left_after(problem.tree, lengths)[:, None]).sum()
    each = config.exit_budget(float(lengths.mean())) / max(1.0, float(cost))
    number = np.where(exists, np.floor(each + rng.random(exists.shape)), 0).astype(np.int64)
    return rolled.and_from(*_exit_starts(problem, number, rng), rng)


def low_discrepancy(problem: Problem, config: DiagnoseConfig, rng: np.random.Generator) -> Rollouts:
    """Exits with low-discrepancy rollouts."""
    return exits(problem, replace(config, low_discrepancy=True), rng)


def _exit_starts(problem: Problem, number: Int[np.ndarray, "N K1"], rng: np.random.Generator):
    """Draws where launches at exits begin, as (nodes of the process, tokens given)."""
    node, slot = np.nonzero(number[:, :-1])
    many = number[node, slot]
    start, depth = [np.repeat(problem.after[node, slot], many)], [np.repeat(problem.tree.depth[node], many)]
    for n in np.flatnonzero(number[:, -1]):
        p = problem.process.p[problem.others[n]]
        start.append(rng.choice(problem.others[n], number[n, -1], p=p / p.sum()))
        depth.append(np.full(number[n, -1], problem.tree.depth[n]))
    return np.concatenate(start), np.concatenate(depth) + 1


ALLOCATIONS: Mapping[str, Allocation] = MappingProxyType(
    {"paper": paper, "exits": exits, "low discrepancy": low_discrepancy, "uniform": uniform}
)
