"""Node records: what is known about every position of a question's paths, per teacher and estimator.

Tables (parquet under RUN/records/, one row each):

questions  question, task, prompt, gold, pass_rate, difficulty, counts of rollouts and paths, excluded (why, or "")
paths      question, path, correct, length, finish, text
nodes      question, path, t, teacher, estimator: probabilities, P_succ with interval, V(u), success range, |g_ideal|,
           teacher advantage (Eq. 2.1), full-vocabulary divergences, align_<form> and align_<form>_restricted (Eq. 2.12)
tokens     question, path, t, token: P, Q of each teacher, visits, P_succ and its standard error per estimator
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from jaxopd.alignment import node_alignment
from jaxopd.gradients import FORMS, Position
from jaxopd.tree import Counts, PathTree, SuccessEstimate, Walks, support, tally

DIVERGENCES = ("reverse_kl", "forward_kl", "js", "l2", "cosine")


@dataclass(frozen=True)
class TeacherScores:
    """A teacher at the N nodes of a tree, over the full vocabulary."""

    log_p: Float[np.ndarray, "N K"]
    log_q: Float[np.ndarray, "N K"]
    entropy_student: Float[np.ndarray, " N"]
    entropy_teacher: Float[np.ndarray, " N"]
    divergences: dict[str, Float[np.ndarray, " N"]]
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


def positions(
    tree: PathTree,
    teacher: TeacherScores,
    estimate: SuccessEstimate,
    support_NK: Bool[np.ndarray, "N K"],
    initial: InitialRollouts,
    reward_to_go: Float[np.ndarray, "G S"] | None,
) -> Position:
    """Builds the N positions of a tree for one teacher and one estimator of P_succ."""
    walks, G = initial.walks, len(initial.success)
    since = np.zeros(G, np.int64)
    visits = tally(tree, walks, np.ones(G), since)
    counts = visits[:, :-1]
    centred = initial.success - initial.success.mean()

    def mean_per_token(weight: np.ndarray) -> np.ndarray:
        return np.divide(tally(tree, walks, weight, since)[:, :-1], counts, out=np.zeros(counts.shape), where=counts > 0)

    T = tree.tokens.shape[1]
    if reward_to_go is None:
        to_go = np.zeros(counts.shape)
    else:
        padded = np.zeros((G, T + 1))
        width = min(T + 1, reward_to_go.shape[1])
        padded[:, :width] = reward_to_go[:, :width]
        to_go = mean_per_token(padded)
    known = np.isfinite(estimate.value)
    fields = {
        "support": support_NK,
        "success": np.where(known, estimate.value, 0.0),
        "counts": counts,
        "reward_to_go": to_go,
        "advantage": mean_per_token(centred),
        "advantage_std": np.full(len(tree.owner), initial.success.std(ddof=1) if G > 1 else 0.0),
        "n_samples": visits.sum(1),
    }
    fields = {name: value.astype(np.float32) if value.dtype != bool else value for name, value in fields.items()}
    return Position.create(teacher.log_p.astype(np.float32), teacher.log_q.astype(np.float32), **fields)


def node_table(
    question: str,
    tree: PathTree,
    counts: Counts,
    estimates: Mapping[str, SuccessEstimate],
    teachers: Mapping[str, TeacherScores],
    initial: InitialRollouts,
    rewards_to_go: Mapping[str, Float[np.ndarray, "G S"]],
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
            "entropy_student": teacher.entropy_student[node],
            "entropy_teacher": teacher.entropy_teacher[node],
            **{key: values[node] for key, values in teacher.divergences.items()},
        }
        for estimator, estimate in estimates.items():
            S = support(tree, counts, estimate, n_sig)
            at = positions(tree, teacher, estimate, S, initial, rewards_to_go.get(name))
            scores = node_alignment(_padded(at), known={k: _padded_known(v) for k, v in teacher.known.items()})
            if name not in rewards_to_go:
                scores |= {key: np.full(len(S), np.nan) for key in scores if key.startswith("align_minillm")}
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
    }
    for estimator, estimate in estimates.items():
        columns[f"p_succ_{estimator}"] = estimate.value[node, slot].astype(np.float32)
        columns[f"se_{estimator}"] = estimate.se[node, slot].astype(np.float32)
    for name, teacher in teachers.items():
        columns[f"q_{name}"] = np.exp(teacher.log_q[node, slot])
    return pd.DataFrame(columns)


def empty_nodes() -> pd.DataFrame:
    """Gives the node table of a run in which every question was excluded."""
    names = {"question": str, "path": int, "path_correct": bool, "t": int, "depth": float, "token": int, "text": str}
    names |= {"teacher": str, "visits": int, "p": float, "q": float, "entropy_student": float, "entropy_teacher": float}
    names |= dict.fromkeys(DIVERGENCES, float) | {"estimator": str, "decision": bool, "support": int}
    names |= dict.fromkeys(("p_succ", "p_succ_low", "p_succ_high", "advantage", "success_range", "value"), float)
    for suffix in ("", "_restricted"):
        names |= {f"ideal_norm{suffix}": float}
        names |= {f"align_{form}{suffix}": float for form in FORMS if form != "ideal"}
    return pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in names.items()})


def _bucketed(array: np.ndarray, fill: float) -> np.ndarray:
    # K differs from question to question; a multiple of 8 keeps the number of compilations small.
    missing = -array.shape[1] % 8
    return np.pad(array, [(0, 0), (0, missing)], constant_values=fill)


def _padded(at: Position) -> Position:
    wide = {"log_p": -np.inf, "log_q": -np.inf, "support": False}
    fields = {}
    for name in at.__dataclass_fields__:
        value = np.asarray(getattr(at, name))
        fields[name] = value if value.ndim == 1 else _bucketed(value, wide.get(name, 0.0))
    return Position(**fields)


def _padded_known(known: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    f, fbar = known
    return _bucketed(np.asarray(f, np.float32), 0.0), np.asarray(fbar, np.float32)


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
