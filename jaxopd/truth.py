"""Replicates of the whole procedure against the exact oracle: how wrong is each estimator, and each aggregate?

The questions of a finished run become finite decision processes: the tree of all its rollouts, the student's
probabilities renormalised over the children met. There every success probability is exact, and, given the paths of the
run, initial rollouts, targeting, enrichment and estimation are replayed with fresh draws as often as wanted. S_u is the
paper's (pooled visits) for every estimator; the truth of an aggregate uses each replicate's own S_u, so that
differences are the estimator's and not the selection's.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from jaxopd.alignment import STATISTICS, node_alignment, summarize
from jaxopd.diagnose.config import DiagnoseConfig
from jaxopd.diagnose.nodes import included
from jaxopd.diagnose.session import Progress, Session
from jaxopd.distributed import fetch
from jaxopd.errors import InputError
from jaxopd.gradients import reverse_kl
from jaxopd.lab.allocations import disagreements, initial, launched
from jaxopd.lab.problems import Problem, recorded_problem
from jaxopd.lab.summary import ranking
from jaxopd.models import logits
from jaxopd.tree import ESTIMATORS, PathTree, success_estimates, support
from jaxopd.tree.oracle import raw_value
from jaxopd.types import bucket

RAW_BATCH = 64  # prefixes a forward pass of the raw policy's enumeration


@dataclass(frozen=True)
class TruthTables:
    """What `truth` measured: P_succ per estimator, aggregates per estimator and statistic.

    `policies` sets each question's success probability under the finite process beside the raw policy's.
    """

    success: pd.DataFrame
    aggregates: pd.DataFrame
    policies: pd.DataFrame
    questions: int
    replicates: int
    rollouts: float  # targeted rollouts a question and replicate


@dataclass(frozen=True)
class Replicates:
    """R replicates of the procedure on one question: support S_u and, per estimator, P_succ with its interval."""

    support: Bool[np.ndarray, "R N K"]
    above: Bool[np.ndarray, "R N K"]  # edges with a launch below them: there the estimators differ
    measured: Bool[np.ndarray, "R N K"]  # tokens with N_sig visits that were not forced through them
    value: dict[str, Float[np.ndarray, "R N K"]]
    covered: dict[str, Bool[np.ndarray, "R N K"]]
    launched: float


def replicate(problem: Problem, config: DiagnoseConfig, replicates: int, rng: np.random.Generator) -> Replicates:
    """Replays initial rollouts, targeting, enrichment and estimation `replicates` times."""
    tree, truth = problem.tree, problem.success
    supports, above, measured, many = [], [], [], 0
    values: dict[str, list] = {name: [] for name in ESTIMATORS}
    covered: dict[str, list] = {name: [] for name in ESTIMATORS}
    for _ in range(replicates):
        rolled = initial(problem, config.rollouts, rng)
        targets = disagreements(rolled, config)
        rolled = launched(rolled, targets, rng)
        many += int(targets.number.sum())
        above.append(_above_launches(tree, tree.node_of[targets.path, targets.depth]))
        counts = rolled.counts
        estimates = {name: success_estimates(tree, counts, problem.p, name) for name in ESTIMATORS}
        supports.append(support(tree, estimates["pooled"], config.n_sig))
        measured.append(support(tree, estimates["on_policy"], config.n_sig))
        for name, estimate in estimates.items():
            values[name].append(estimate.value)
            covered[name].append((estimate.low <= truth + 1e-9) & (truth <= estimate.high + 1e-9))
    stacked = {name: np.stack(v) for name, v in values.items()}
    inside = {name: np.stack(c) for name, c in covered.items()}
    sets = (np.stack(which) for which in (supports, above, measured))
    return Replicates(*sets, stacked, inside, many / replicates)


def _above_launches(tree: PathTree, launched: Int[np.ndarray, " E"]) -> Bool[np.ndarray, "N K"]:
    """Marks the edges that lead to a node at or above a launch."""
    leads = np.zeros(len(tree.owner), bool)
    leads[launched] = True
    parent, _ = tree.parent_edge
    for nodes in tree.levels[:0:-1]:
        leads[parent[nodes[leads[nodes]]]] = True
    return (tree.child >= 0) & leads[tree.child]


def _scores(
    problem: Problem, support_RNK: Bool[np.ndarray, "R N K"], success_RNK: Float[np.ndarray, "R N K"], teacher: str
) -> tuple[Float[np.ndarray, "R N"], Float[np.ndarray, "R N"], Float[np.ndarray, "R N"]]:
    """Gives reverse KL's alignment, the norm of the ideal gradient and the success range at the nodes."""
    positions = problem.positions(support_RNK, success_RNK, teacher)
    scores = node_alignment(positions, {"reverse_kl": reverse_kl}, ("renormalized",))
    cosine, norm, spread = (
        scores[name].reshape(support_RNK.shape[:2]) for name in ("align_reverse_kl", "ideal_norm", "success_range")
    )
    return cosine, norm, np.nan_to_num(spread)


def truth(session: Session, progress: Progress, replicates: int = 60, seed: int = 0) -> TruthTables:
    """Measures bias, RMSE, interval coverage, sign and ranking agreement on the questions of a finished run.

    Raises InputError on fewer than two replicates and on a run all of whose questions are excluded.
    """
    if replicates < 2:
        raise InputError(f"replicates: found {replicates}, expected at least 2")
    edges: dict[tuple[str, str], list] = {}
    rows, policies, chosen, launched = [], [], included(session), 0.0
    if not chosen:
        raise InputError(f"{session.run.path}: found no question with paths of both outcomes, expected at least one")
    for done, index in enumerate(chosen):
        progress("truth", done, len(chosen))
        problem = recorded_problem(session, index)
        found = replicate(problem, session.config, replicates, np.random.default_rng([seed, index]))
        launched += found.launched / len(chosen)
        for name, where, errors, inside in _edge_errors(problem, found):
            edges.setdefault((name, where), []).append((errors, inside))
        rows += list(_aggregate_errors(problem, found))
        policies.append(_raw_policy(session, index) | {"process": problem.process.value[0]})
    progress("truth", len(chosen), len(chosen))
    success = pd.DataFrame(
        [{"estimator": name, "edges": where} | _edge_summary(parts) for (name, where), parts in edges.items()]
    )
    aggregates = _aggregate_summary(pd.DataFrame(rows))
    return TruthTables(success, aggregates, pd.DataFrame(policies), len(chosen), replicates, launched)


def _raw_policy(session: Session, index: int) -> dict[str, str | float]:
    """Brackets the raw student's success at a question: the heaviest prefixes exactly, the rest by its rollouts."""
    prompt, question = session.prompts[index], session.questions[index]

    def next_logp(prefixes: list[list[int]]) -> np.ndarray:
        last = [len(prompt) + len(prefix) - 1 for prefix in prefixes]
        tokens = np.zeros((bucket(len(prefixes), RAW_BATCH), bucket(max(last) + 1)), np.int32)
        for row, prefix in enumerate(prefixes):
            tokens[row, : last[row] + 1] = prompt + prefix
        # Padding follows the tokens and attention is causal, so a row may be read before its end.
        z = fetch(logits(session.student, tokens))[np.arange(len(prefixes)), last].astype(np.float64)
        return z - np.logaddexp.reduce(z, 1, keepdims=True)

    rolled, _ = session.run.load(f"rollouts/{index:05d}")
    sequences = [row[row >= 0].tolist() for row in rolled["tokens"]]
    found = raw_value(
        next_logp,
        set(session.stop_ids),
        lambda response: session.task.grade(session.text(response), question.gold) is True,
        sequences,
        rolled["grade"] == 1,
        max_tokens=session.config.max_tokens,
        batch=RAW_BATCH,
    )
    return {"question": question.id} | dict(zip(("raw", "raw_se", "sampled_mass"), found, strict=True))


def _edge_errors(problem: Problem, found: Replicates) -> Iterator[tuple[str, str, np.ndarray, np.ndarray]]:
    """Yields, per estimator and set of edges, errors [R, E] (NaN off S_u) and coverage [R, E]."""
    decision = found.support & (found.support.sum(-1, keepdims=True) >= 2)
    for name in ESTIMATORS:
        known = decision & np.isfinite(found.value[name])  # on_policy knows nothing of some tokens of S_u
        error = np.where(known, found.value[name] - problem.success[None], np.nan)
        inside = np.where(known, found.covered[name], np.nan)
        sets = {
            "above launches": found.above,
            "above, N_sig on-policy visits": found.above & found.measured,
            "all of S_u": np.ones_like(found.above),
        }
        for where, kept in sets.items():
            parts = (np.where(kept, x, np.nan).reshape(len(x), -1) for x in (error, inside))
            yield name, where, *parts


def _edge_summary(parts: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    errors, inside = (np.concatenate(arrays, 1) for arrays in zip(*parts, strict=True))
    seen = np.isfinite(errors).sum(0)
    errors, inside, seen = errors[:, seen > 1], inside[:, seen > 1], seen[seen > 1]
    bias, variance = np.nanmean(errors, 0), np.nanvar(errors, 0, ddof=1)
    # The mean |bias| over few replicates holds the noise of the mean; what noise alone gives stands beside it.
    noise = np.sqrt(2 / np.pi) * np.sqrt(variance / seen)
    return {
        "bias": float(bias.mean()),
        "abs_bias": float(np.abs(bias).mean()),
        "abs_bias_of_noise": float(noise.mean()),
        "rmse": float(np.sqrt(np.nanmean(errors**2))),
        "coverage": float(np.nanmean(inside)),
        "tokens": errors.shape[1],
    }


def _aggregate_errors(problem: Problem, found: Replicates) -> Iterator[dict]:
    true = np.broadcast_to(problem.success, found.support.shape)
    for teacher in problem.log_q:
        for name in ESTIMATORS:
            known = found.support & np.isfinite(found.value[name])
            true_scores = _scores(problem, known, true, teacher)
            scores = _scores(problem, known, found.value[name], teacher)
            # The truth is summarised over the nodes that the estimate has, so that only its values can differ.
            both = (scores[2] > 0) & (true_scores[2] > 0)
            got, aim = summarize(*scores, both), summarize(*true_scores, both)
            agree = np.sign(scores[0]) == np.sign(true_scores[0])
            sign = float(agree[both].mean()) if both.any() else np.nan
            for statistic in STATISTICS:
                for r in range(len(true)):
                    yield {
                        "question": problem.question,
                        "replicate": r,
                        "teacher": teacher,
                        "estimator": name,
                        "statistic": statistic,
                        "value": got[statistic][r],
                        "truth": aim[statistic][r],
                        "sign": sign,
                    }


def _aggregate_summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Averages errors over questions, teachers and replicates; ranking looks at pairs of teachers in a replicate."""
    rows = rows.assign(error=rows["value"] - rows["truth"])
    table = []
    for (name, statistic), group in rows.groupby(["estimator", "statistic"], sort=False):
        per_question = group.groupby(["question", "teacher"])["error"].mean()
        wide = [group.pivot(index=["question", "replicate"], columns="teacher", values=v) for v in ("value", "truth")]
        value, true = (w.to_numpy(float) for w in wide)
        i, j = np.triu_indices(value.shape[1], 1)
        table.append(
            {
                "estimator": name,
                "statistic": statistic,
                "truth": float(group["truth"].mean()),
                "bias": float(per_question.mean()),
                "abs_bias": float(per_question.abs().mean()),
                "rmse": float(np.sqrt((group["error"] ** 2).mean())),
                "sign_agreement": float(group["sign"].mean()),
                "ranking_agreement": ranking(value[:, i] - value[:, j], true[:, i] - true[:, j]),
            }
        )
    return pd.DataFrame(table)
