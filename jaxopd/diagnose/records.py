"""Node records: what is known about every position of a question's paths, per teacher and estimator.

Tables (parquet under RUN/records/, one row each):

    questions  question, task, prompt, gold, pass_rate, difficulty, counts of rollouts and paths, excluded (why, or "")
    paths      question, path, correct, length, finish, text
    nodes      question, path, t, teacher, estimator: probabilities, P_succ with interval, V(u), success range,
               |g_ideal|, teacher advantage (Eq. 2.1), full-vocabulary divergences, align_FORM and align_FORM_restricted
               (Eq. 2.12)
    tokens     question, path, t, token: P, Q of each teacher, visits (all, and those that count for on_policy),
               launches of targeted rollouts there; P_succ with its standard error and interval per estimator; how many
               initial rollouts took it, their mean R - Rbar, and the mean sum of log q - log p from there on per
               teacher
    cosines    question, teacher: global cosine of reverse KL over all tokens compared, noise taken out of its norm,
               with the 95 % interval that its rollouts give (tree/allocation.py)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
import pandas as pd
from jaxtyping import Array, Bool, Float, Int

from jaxopd.alignment import node_alignment
from jaxopd.gradients import FORMS, Form, Position
from jaxopd.tree import Counts, PathTree, SuccessEstimate, Walks, support, tally

PER_NODE = ("reverse_kl", "forward_kl", "js", "l2", "cosine", "entropy_student", "entropy_teacher")


@dataclass(frozen=True)
class TeacherScores:
    """A teacher at the N nodes of a tree, over the full vocabulary."""

    log_p: Float[np.ndarray, "N K"]
    log_q: Float[np.ndarray, "N K"]
    per_node: dict[str, Float[np.ndarray, " N"]]  # divergences and entropies
    known: dict[str, tuple[Float[np.ndarray, "N K"], Float[np.ndarray, " N"]]]  # form -> (f, full-vocabulary fbar)


@dataclass(frozen=True)
class InitialRollouts:
    """The G on-policy rollouts that the sampled forms average over."""

    walks: Walks
    success: Bool[np.ndarray, " G"]


def difficulty(pass_rate: float) -> str:
    """Bins a pass rate (paper A, appendix E.9): easy >= .8, medium .25 to .8, hard 0 to .25, extremely hard 0."""
    if pass_rate >= 0.8:
        return "easy"
    if pass_rate >= 0.25:
        return "medium"
    return "hard" if pass_rate > 0 else "extremely hard"


@dataclass(frozen=True)
class Samples:
    """What the initial rollouts say at each node, for one teacher: the inputs of the sampled forms."""

    visits: Float[np.ndarray, "N K1"]
    weights: dict[str, Float[np.ndarray, "N K1"]]  # form -> sum of its per-sample weights w at each (node, slot)
    success_std: float

    @classmethod
    def gather(cls, tree: PathTree, initial: InitialRollouts, reward: Float[np.ndarray, "G S"]) -> "Samples":
        """Sums visits and weights; `reward` is log q - log p at each token of each rollout, 0 past its end."""
        G, T = len(initial.success), tree.tokens.shape[1]
        # Sums to the end in float64: over 30,000 tokens they outgrow what a float32 holds of one token.
        to_go = np.cumsum(reward[:, ::-1], 1, dtype=np.float64)[:, ::-1]
        own, rest = np.zeros((2, G, T + 1))
        width = min(T + 1, reward.shape[1])
        own[:, :width], rest[:, :width] = reward[:, :width], to_go[:, :width]
        std = float(initial.success.std(ddof=1)) if G > 1 else 0.0
        centred = initial.success - initial.success.mean()

        def total(weight: np.ndarray) -> np.ndarray:
            return tally(tree, initial.walks, weight, np.zeros(G, np.int64))

        weights = {
            "single_sample": total(own - 1.0),
            "minillm": total(rest - 1.0),
            "dr_grpo": total(centred),
            "dr_grpo_std": total(centred / std if std > 0 else np.zeros(G)),
        }
        return cls(total(np.ones(G)), weights, std)

    def fields(self) -> dict[str, np.ndarray]:
        """Gives the position's fields: counts, means per token, numbers of samples."""
        counts = self.visits[:, :-1]

        def mean(form: str) -> np.ndarray:
            return np.divide(self.weights[form][:, :-1], counts, out=np.zeros(counts.shape), where=counts > 0)

        return {
            "counts": counts,
            "reward_to_go": mean("minillm") + 1.0,
            "advantage": mean("dr_grpo"),
            "advantage_std": np.full(len(counts), self.success_std),
            "n_samples": self.visits.sum(1),
        }

    def known(self, at: Position) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Gives (f, fbar) of the sampled forms, fbar over all samples, those of unwatched tokens included."""
        n = np.maximum(self.visits.sum(1), 1.0)
        return {form: (_values(at, form), weight.sum(1) / n) for form, weight in self.weights.items()}


def positions(
    teacher: TeacherScores,
    estimate: SuccessEstimate,
    support_NK: Bool[np.ndarray, "N K"],
    samples: Samples,
) -> Position:
    """Builds the N positions of a tree for one teacher and one estimator of P_succ."""
    success = np.where(np.isfinite(estimate.value), estimate.value, 0.0)
    fields = {"success": success, **samples.fields()}
    fields = {name: _bucketed(value.astype(np.float32), 0.0) for name, value in fields.items()}
    log_p, log_q = (_bucketed(x.astype(np.float32), -np.inf) for x in (teacher.log_p, teacher.log_q))
    return Position.create(log_p, log_q, support=_bucketed(support_NK, False), **fields)


def node_table(
    question: str,
    tree: PathTree,
    counts: Counts,
    estimates: Mapping[str, SuccessEstimate],
    teachers: Mapping[str, TeacherScores],
    samples: Mapping[str, Samples],
    text_of: Callable[[int], str],
    n_sig: int,
) -> pd.DataFrame:
    """Gives the rows (question, path, t, teacher, estimator) of one question; nodes shared by paths repeat."""
    path, t = np.nonzero(tree.node_of >= 0)
    node = tree.node_of[path, t]
    token = tree.tokens[path, t]
    slot = np.argmax(tree.candidates[node] == token[:, None], 1)
    frames = []
    texts = [text_of(int(k)) for k in token]
    for name, teacher in teachers.items():
        base = {
            "question": question,
            "path": path,
            "path_correct": tree.correct[path],
            "t": t,
            "depth": (t / tree.length[path]).astype(np.float32),
            "token": token,
            "text": texts,
            "teacher": name,
            "visits": counts.pooled.sum(1)[node],
            "p": np.exp(teacher.log_p[node, slot]),
            "q": np.exp(teacher.log_q[node, slot]),
            **{key: values[node] for key, values in teacher.per_node.items()},
        }
        for estimator, estimate in estimates.items():
            S = support(tree, estimate, n_sig)
            at = positions(teacher, estimate, S, samples[name])
            analytic = {form: (_bucketed(f, 0.0), fbar) for form, (f, fbar) in teacher.known.items()}
            scores = node_alignment(at, known=analytic | samples[name].known(at))
            measured = {key: np.asarray(values, np.float32)[node] for key, values in scores.items()}
            size = S.sum(1)[node]
            spread = np.nan_to_num(measured["success_range"])
            frames.append(
                pd.DataFrame(
                    base
                    | {
                        "estimator": estimator,
                        "decision": (size >= 2) & (spread > 0),
                        "support": size,
                        "p_succ": estimate.value[node, slot].astype(np.float32),
                        "p_succ_low": estimate.low[node, slot].astype(np.float32),
                        "p_succ_high": estimate.high[node, slot].astype(np.float32),
                    }
                    | measured
                )
            )
    return pd.concat(frames, ignore_index=True) if frames else empty_nodes()


def token_table(
    question: str,
    tree: PathTree,
    counts: Counts,
    estimates: Mapping[str, SuccessEstimate],
    teachers: Mapping[str, TeacherScores],
    samples: Mapping[str, Samples],
    text_of: Callable[[int], str],
) -> pd.DataFrame:
    """Gives the rows (question, path, t, candidate token) of one question."""
    path, t = np.nonzero(tree.node_of >= 0)
    row, slot = np.nonzero(tree.candidates[tree.node_of[path, t]] >= 0)
    node = tree.node_of[path, t][row]
    token = tree.candidates[node, slot]
    first = next(iter(teachers.values()))
    columns = {
        "question": question,
        "path": path[row],
        "t": t[row],
        "token": token,
        "text": [text_of(int(k)) for k in token],
        "p": np.exp(first.log_p[node, slot]),
        "visits": counts.pooled[node, slot],
        "visits_on_policy": counts.on_policy[node, slot],
        "launches": counts.on_policy[node, slot] - counts.free[node, slot],
    }
    for estimator, estimate in estimates.items():
        columns[f"p_succ_{estimator}"] = estimate.value[node, slot].astype(np.float32)
        columns[f"se_{estimator}"] = estimate.se[node, slot].astype(np.float32)
        columns[f"low_{estimator}"] = estimate.low[node, slot].astype(np.float32)
        columns[f"high_{estimator}"] = estimate.high[node, slot].astype(np.float32)
    for name, teacher in teachers.items():
        columns[f"q_{name}"] = np.exp(teacher.log_q[node, slot])
        fields = samples[name].fields()
        columns[f"reward_to_go_{name}"] = fields["reward_to_go"][node, slot].astype(np.float32)
        columns |= {"samples": fields["counts"][node, slot].astype(int)}
        columns |= {"sample_advantage": fields["advantage"][node, slot].astype(np.float32)}
    return pd.DataFrame(columns)


def empty_nodes() -> pd.DataFrame:
    """Gives the node table of a run in which every question was excluded."""
    names = {"question": str, "path": int, "path_correct": bool, "t": int, "depth": float, "token": int, "text": str}
    names |= {"teacher": str, "visits": int, "p": float, "q": float}
    names |= dict.fromkeys(PER_NODE, float) | {"estimator": str, "decision": bool, "support": int}
    names |= dict.fromkeys(("p_succ", "p_succ_low", "p_succ_high", "advantage", "success_range", "value"), float)
    for suffix in ("", "_restricted"):
        names |= {f"ideal_norm{suffix}": float}
        names |= {f"align_{form}{suffix}": float for form in FORMS if form != "ideal"}
    return pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in names.items()})


def _bucketed(array: np.ndarray, fill: float) -> np.ndarray:
    """Pads the token axis: K differs from question to question, a multiple of 8 keeps compilations few."""
    if array.ndim == 1:
        return array
    return np.pad(array, [(0, 0), (0, -array.shape[1] % 8)], constant_values=fill)


def _values(at: Position, form: str) -> np.ndarray:
    return np.asarray(_vmapped(at, FORMS[form]))


@partial(jax.jit, static_argnames="form")
def _vmapped(at: Position, form: Form) -> Float[Array, "N K"]:
    return jax.vmap(form)(at)


def watched_ids(
    top_ids: list[Int[np.ndarray, "N k"]], top_logp: list[Float[np.ndarray, "N k"]], floor: float
) -> Int[np.ndarray, "N K"]:
    """Joins, per node, the tokens to which any model gives more than `floor`; -1 pads."""
    ids = np.concatenate(top_ids, 1)
    ids = np.where(np.concatenate(top_logp, 1) > np.log(floor), ids, -1)
    ids = np.sort(ids, 1)[:, ::-1]
    ids = np.where(np.pad(ids[:, 1:] == ids[:, :-1], ((0, 0), (1, 0))), -1, ids)
    ids = np.sort(ids, 1)[:, ::-1]
    return ids[:, : max(1, int((ids >= 0).sum(1).max(initial=0)))]
