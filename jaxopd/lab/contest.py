"""The contest: every estimator on every allocation of tokens, against exact truth, replicate after replicate.

The estimand is fixed: S holds the tokens to which the student or a teacher gives more than tau, P is renormalised on
it, and the truth uses the exact success probabilities of the same tokens. The paper's own set, tokens with N_sig pooled
visits, differs by replicate; its truth is that of the same tokens, so that only values differ. Every node with two
tokens of S counts: where all succeed alike, which only the truth knows, its cosine is 0.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from jaxopd.alignment import STATISTICS, node_alignment, summarize
from jaxopd.diagnose.config import DiagnoseConfig
from jaxopd.diagnose.session import Progress
from jaxopd.errors import InputError
from jaxopd.gradients import FORMS, Form, Position
from jaxopd.lab.allocations import ALLOCATIONS, Rollouts
from jaxopd.lab.problems import Problem
from jaxopd.tree import ESTIMATORS, Counts, SuccessEstimate, support
from jaxopd.tree.allocation import global_cosines
from jaxopd.tree.success import Z95

FIXED, OWN = "S above tau", "N_sig pooled visits"
CLEANED = "bellman, noise removed"  # global_cosines: the noise of |g| subtracted, with an interval

STREAM = 1  # of random numbers, not the one that random problems are made of

Estimator = Callable[..., SuccessEstimate]
Aggregate = Callable[..., float]


@dataclass(frozen=True)
class Entry:
    """Where tokens go, and how many: an allocation with its budgets."""

    allocation: str
    budget: str
    config: DiagnoseConfig


@dataclass(frozen=True)
class Contest:
    """What is compared: estimators of P_succ, gradient forms beside reverse KL, and a summary of alignment.

    Forms see the success, P, Q, and the counts and advantages of each replicate's free draws; `reward_to_go` is 0,
    since teachers score no whole rollouts here, so MiniLLM is not itself in the lab.
    """

    entries: Sequence[Entry]
    estimators: Mapping[str, Estimator]
    forms: Mapping[str, Form]
    aggregate: str | Aggregate = "global"
    replicates: int = 40
    seed: int = 0

    def __post_init__(self) -> None:
        if self.replicates < 2:
            raise InputError(f"replicates: found {self.replicates}, expected at least 2")
        if self.seed < 0:
            raise InputError(f"seed: found {self.seed}, expected 0 or more")
        for name, form in self.forms.items():
            shape = _shape(form)
            if shape != (3,):
                raise InputError(f"form {name}: found {shape} at a position of 3 tokens, expected f of shape (3,)")
        if isinstance(self.aggregate, str) and self.aggregate not in STATISTICS:
            raise InputError(f"aggregate: found {self.aggregate!r}, expected FILE.py:NAME or {', '.join(STATISTICS)}")

    def run(self, problems: Sequence[Problem], progress: Progress = lambda stage, done, total: None) -> "Errors":
        """Draws and measures every entry on every problem; raises InputError on none, or two of one name."""
        names = [problem.question for problem in problems]
        if len(set(names)) < len(names):
            raise InputError(f"lab: found question {max(names, key=names.count)} twice, expected different questions")
        success, aggregates = [], []
        for number, problem in enumerate(problems):
            progress("contest", number, len(problems))
            for entry in self.entries:
                drawn = self._draw(problem, entry, np.random.default_rng([STREAM, self.seed, number]))
                success += _success_errors(problem, entry, drawn)
                aggregates += self._aggregate_errors(problem, entry, drawn)
        progress("contest", len(problems), len(problems))
        if not aggregates:
            raise InputError("lab: found no problem, expected at least one")
        return Errors(*(pd.concat([pd.DataFrame(), *part], ignore_index=True) for part in (success, aggregates)))

    def _draw(self, problem: Problem, entry: Entry, rng: np.random.Generator) -> "Drawn":
        rolled = [ALLOCATIONS[entry.allocation](problem, entry.config, rng) for _ in range(self.replicates)]
        counts = [rollouts.counts for rollouts in rolled]
        estimates = {
            name: [_estimated(name, estimate, problem, counted) for counted in counts]
            for name, estimate in self.estimators.items()
        }
        return Drawn(rolled, counts, estimates)

    def _aggregate_errors(self, problem: Problem, entry: Entry, drawn: "Drawn") -> list[pd.DataFrame]:
        compared = np.broadcast_to(problem.compared(entry.config.tau), (self.replicates, *problem.p.shape))
        sets = {FIXED: compared}
        if entry.allocation == "paper":
            sets[OWN] = drawn.often_visited(entry.config.n_sig)
        true = np.broadcast_to(problem.success, compared.shape)
        found = []
        for which, judged in sets.items():
            aims = self._aggregates(problem, drawn, judged, true)
            if which == FIXED and self.aggregate == "global":
                found.append(_cleaned(problem, entry, drawn, aims["reverse_kl"]))
            for name, estimates in drawn.estimates.items():
                value = np.stack([estimate.value for estimate in estimates])
                known = judged & np.isfinite(value)
                got = self._aggregates(problem, drawn, known, value)
                for form, aim in aims.items():
                    found.append(_rows(problem, entry, drawn, name, form, which, got[form], aim))
        return found

    def _aggregates(
        self,
        problem: Problem,
        drawn: "Drawn",
        judged: Bool[np.ndarray, "R N K"],
        success: Float[np.ndarray, "R N K"],
    ) -> dict[str, Float[np.ndarray, "R M"]]:
        """Summarises each form's alignment per replicate and teacher."""
        forms = {**self.forms, "reverse_kl": FORMS["reverse_kl"]}
        R, N, _ = judged.shape
        columns = {name: [] for name in forms}
        for teacher in problem.log_q:
            positions = problem.positions(judged, success, teacher, drawn.samples)
            scores = node_alignment(positions, forms, readings=("renormalized",))
            norm, spread = (np.nan_to_num(scores[name]).reshape(R, N) for name in ("ideal_norm", "success_range"))
            for name in forms:
                cosine = np.nan_to_num(scores[f"align_{name}"]).reshape(R, N)
                columns[name].append(self._summary(cosine, norm, spread, judged.sum(-1) >= 2))
        return {name: np.stack(column, 1) for name, column in columns.items()}

    def _summary(self, cosine, norm, spread, decisions) -> Float[np.ndarray, " R"]:
        if isinstance(self.aggregate, str):
            return summarize(cosine, norm, spread, decisions)[self.aggregate]
        found = [self.aggregate(*row) for row in zip(cosine, norm, spread, decisions, strict=True)]
        if wrong := [x for x in found if x is None or isinstance(x, str) or np.ndim(x)]:
            raise InputError(f"aggregate: found {wrong[0]!r}, expected a number")
        return np.array(found, float)


def _shape(form: Form) -> object:
    """The shape of what a form makes of three tokens, or the error it raises."""
    try:
        return np.shape(form(Position.create(np.zeros(3, np.float32))))
    except (TypeError, ValueError) as error:
        return error


@dataclass(frozen=True)
class Drawn:
    """R replicates of an entry on a problem."""

    rolled: list[Rollouts]
    counts: list[Counts]
    estimates: dict[str, list[SuccessEstimate]]

    @cached_property
    def tokens(self) -> Float[np.ndarray, " R"]:
        """Tokens spent."""
        return np.array([rollouts.tokens for rollouts in self.rolled], float)

    def often_visited(self, n_sig: int) -> Bool[np.ndarray, "R N K"]:
        """The paper's S_u of each replicate."""
        pooled = [ESTIMATORS["pooled"](r.problem.tree, c, r.problem.p) for r, c in zip(self.rolled, self.counts)]
        return np.stack([support(self.rolled[0].problem.tree, estimate, n_sig) for estimate in pooled])

    @cached_property
    def samples(self) -> dict[str, Float[np.ndarray, "R N K"]]:
        """What forms of sampled tokens see: counts of free draws and their mean advantage."""
        free = np.stack([c.free for c in self.counts]).astype(float)
        success = np.stack([c.free_success for c in self.counts]).astype(float)
        start = [r.launch == 0 for r in self.rolled]
        rate = np.array([r.problem.process.success[r.rows[s]].mean() for r, s in zip(self.rolled, start)])
        rate = rate[:, None, None]
        mean = np.divide(success, free, out=np.zeros_like(free), where=free > 0)
        total, spread = free.sum(-1), np.sqrt(rate * (1 - rate))[:, :, 0]
        return {
            "counts": free[..., :-1],
            "advantage": np.where(free > 0, mean - rate, 0.0)[..., :-1],
            "n_samples": total,
            "advantage_std": np.broadcast_to(spread, total.shape),
        }


def _estimated(name: str, estimate: Estimator, problem: Problem, counts: Counts) -> SuccessEstimate:
    found = estimate(problem.tree, counts, problem.p)
    if not isinstance(found, SuccessEstimate):
        raise InputError(f"estimator {name}: found a {type(found).__name__}, expected a SuccessEstimate")
    return found


def _success_errors(problem: Problem, entry: Entry, drawn: Drawn) -> list[pd.DataFrame]:
    """Errors of P_succ over the replicates, a row a token compared and estimator."""
    compared = problem.compared(entry.config.tau)
    truth, facts = problem.success[compared], _facts(problem, entry)
    tables = []
    for name, estimates in drawn.estimates.items():
        value, low, high = (
            np.stack([getattr(estimate, part) for estimate in estimates])[:, compared]
            for part in ("value", "low", "high")
        )
        known = np.isfinite(value)
        error = np.ma.masked_array(value - truth, ~known)
        inside = np.ma.masked_array((low <= truth + 1e-9) & (truth <= high + 1e-9), ~known)
        columns = {"bias": error.mean(0), "square": (error**2).mean(0), "coverage": inside.mean(0)}
        table = pd.DataFrame({k: np.ma.filled(v.astype(float), np.nan) for k, v in columns.items()})
        tables.append(table.assign(**facts, estimator=name, tokens=drawn.tokens.mean(), known=known.mean(0)))
    return tables


def _cleaned(problem: Problem, entry: Entry, drawn: Drawn, aim: Float[np.ndarray, "R M"]) -> pd.DataFrame:
    """The global cosine that `diagnose --allocation exits` records in cosines.parquet, with its interval."""
    exits = problem.exits(entry.config.tau)
    measured = [global_cosines(exits, counts) for counts in drawn.counts]
    got, covariance = (np.stack(x) for x in zip(*measured, strict=True))
    return _rows(problem, entry, drawn, CLEANED, "reverse_kl", FIXED, got, aim, covariance)


def _facts(problem: Problem, entry: Entry) -> dict[str, str]:
    return {"question": problem.question, "allocation": entry.allocation, "budget": entry.budget}


def _rows(problem, entry, drawn, estimator, form, which, got, aim, covariance=None) -> pd.DataFrame:
    """One row a replicate and teacher, and one a replicate and pair of teachers."""
    names, R = list(problem.log_q), len(got)
    pairs = list(combinations(range(len(names)), 2))
    labels = names + [f"{names[i]} - {names[j]}" for i, j in pairs]
    left, right = (np.array([pair[side] for pair in pairs], int) for side in (0, 1))
    value = np.concatenate([got, got[:, left] - got[:, right]], 1)
    truth = np.concatenate([aim, aim[:, left] - aim[:, right]], 1)
    half = np.full(value.shape, np.nan)
    if covariance is not None:
        own = np.diagonal(covariance, axis1=1, axis2=2)
        between = own[:, left] + own[:, right] - 2 * covariance[:, left, right]
        half = Z95 * np.sqrt(np.maximum(np.concatenate([own, between], 1), 0))
    columns = {"value": value, "truth": truth, "half": half}
    table = pd.DataFrame({name: x.reshape(-1) for name, x in columns.items()})
    table["teacher"], table["replicate"] = np.tile(labels, R), np.repeat(np.arange(R), len(labels))
    table["difference"] = np.tile(np.arange(len(labels)) >= len(names), R)
    table["tokens"] = np.repeat(drawn.tokens, len(labels))
    return table.assign(**_facts(problem, entry), estimator=estimator, form=form, set=which)


@dataclass(frozen=True)
class Errors:
    """What a contest measured: a row a token; a row a replicate and teacher (or pair of teachers)."""

    success: pd.DataFrame
    aggregates: pd.DataFrame
