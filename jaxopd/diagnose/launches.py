"""Rollouts of a diagnosis: the initial ones, the targeted ones that enrich the tree, and the oracle's."""

import dataclasses

import numpy as np
from jaxtyping import Float

from jaxopd.diagnose.nodes import path_tree, representative_paths, student_log_probs, teacher_scores
from jaxopd.diagnose.session import Session
from jaxopd.distributed import decided
from jaxopd.gradients import logit_gradient
from jaxopd.rollouts import Requests
from jaxopd.rollouts.engine import widened
from jaxopd.tree import (
    Branches,
    Counts,
    PathTree,
    Responses,
    SuccessEstimate,
    Targets,
    count,
    exit_targets,
    paper_targets,
    success_estimates,
    walk,
)

CELLS = 1 << 22  # tokens of whole responses graded at a time
BATCH = 20  # initial rollouts drawn at a time while paths of both outcomes are looked for
TRUTH_FLOOR = 1e-4  # probability from which the oracle launches a token by itself


def roll_out(session: Session) -> None:
    """Samples the initial rollouts of each question and grades them: G, or with exits until the paths are there."""
    config = session.config
    batch = min(BATCH, config.rollouts) if config.allocation == "exits" else config.rollouts
    for index, piece in session.pieces("rollouts"):
        parts: list[dict[str, np.ndarray]] = []
        for low in range(0, config.rollouts, batch):
            parts.append(_initial(session, index, low, min(batch, config.rollouts - low)))
            correct = np.concatenate([part["grade"] for part in parts]) == 1
            if min(correct.sum(), (~correct).sum()) >= config.paths:
                break
        session.run.save(piece, joined(parts))


def _initial(session: Session, index: int, low: int, n: int) -> dict[str, np.ndarray]:
    """Draws rollouts low to low + n of a question: the same ones, however they are batched."""
    prompt = session.prompts[index]
    requests = Requests.continuations([prompt], n)
    requests = dataclasses.replace(requests, id=requests.id + low)
    rolled = session.engine(session.config.student).run([prompt], requests, session.sampling("rollouts", index))
    arrays = {name: getattr(rolled, name) for name in ("tokens", "raw_logp", "sampling_logp", "finish")}
    return arrays | {"grade": session.grades(rolled.tokens, session.questions[index].gold)}


def joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Puts batches of rollouts after each other."""
    width = max(part["tokens"].shape[1] for part in parts)
    return {
        name: np.concatenate([part[name] if part[name].ndim == 1 else widened(part[name], width) for part in parts])
        for name in parts[0]
    }


def enrich(session: Session, chosen: list[int]) -> None:
    """Launches targeted rollouts where the teachers disagree most with the student."""
    for index, piece in session.pieces("enrichment", chosen):
        tree = path_tree(session, index)
        visits = rollout_counts(tree, session.run.load(f"rollouts/{index:05d}")[0]).pooled[:, :-1]
        teachers, p = {}, np.zeros(tree.candidates.shape)
        for name in session.teachers:
            scores = teacher_scores(session, name, index)
            f, fbar = scores.known["reverse_kl"]
            p = np.exp(scores.log_p)
            teachers[name] = np.exp(scores.log_q), np.asarray(logit_gradient(scores.log_p, f, fbar))
        targets = paper_targets(tree, p, teachers, visits, **session.config.targeting)
        session.run.save(piece, launch(session, index, tree, targets, "enrichment"))


def launch(
    session: Session,
    index: int,
    tree: PathTree,
    targets: Targets,
    stage: str,
    spread: Float[np.ndarray, " R"] | None = None,
) -> dict[str, np.ndarray]:
    """Runs targeted rollouts and grades them; gives path, launch (tokens given), grade, and tokens from the last given.

    `spread` numbers choose the rollouts' first tokens, in the order of the targets.
    """
    prompt = session.prompts[index]
    limit = min(session.config.max_tokens, session.student.config.max_positions - len(prompt))
    # Tokens and numbers may rest on probabilities that another process's devices round otherwise.
    chosen = decided(lambda: [x.tolist() for x in (targets.path, targets.depth, targets.token, targets.number)])
    *columns, number = (np.array(column, np.int64) for column in chosen)
    path, depth, token = (np.repeat(column, number) for column in columns)
    tokens = token[:, None].astype(np.int32)
    # After a forced stop token, or one at the limit, there is nothing to sample.
    alive = np.flatnonzero(~np.isin(token, session.stop_ids) & (depth + 1 < limit))
    if len(alive):
        trunks = [np.concatenate([prompt, tree.tokens[a, :n]]) for a, n in enumerate(tree.length)]
        cut, left = len(prompt) + depth[alive], limit - depth[alive] - 1
        spread = None if spread is None else spread[alive].astype(np.float32) % 1.0  # a float32 may round up to 1
        requests = Requests(path[alive], cut, token[alive], alive, left, spread)
        rolled = session.engine(session.config.student).run(trunks, requests, session.sampling(stage, index))
        drawn = np.full((len(path), rolled.tokens.shape[1]), -1, np.int32)
        drawn[alive] = rolled.tokens
        tokens = np.concatenate([tokens, drawn], 1)
    launched = {"path": path, "launch": depth.astype(np.int64) + 1, "tokens": tokens}
    return launched | {"grade": _grades(session, index, tree, _responses(launched))}


def _grades(session: Session, index: int, tree: PathTree, launched: Branches) -> np.ndarray:
    """Grades whole responses, few enough at a time that a thousand of 30,000 tokens are never held at once."""
    at_once = max(1, CELLS // session.config.max_tokens)
    parts = [launched[low : low + at_once].whole(tree) for low in range(0, len(launched), at_once)]
    graded = [session.grades(part, session.questions[index].gold) for part in parts]
    return np.concatenate(graded) if graded else np.zeros(0, np.int8)


def _responses(part: dict[str, np.ndarray]) -> Responses:
    """Reads initial rollouts, which are whole, or targeted ones, which follow a path first."""
    if "path" not in part:
        return part["tokens"]
    return Branches(part["tokens"], part["path"], part["launch"] - 1)


def rollout_counts(tree: PathTree, *parts: dict[str, np.ndarray]) -> Counts:
    """Counts visits and successes over initial (launch 0) and targeted rollouts together."""
    success = np.concatenate([part["grade"] == 1 for part in parts])
    launched = [part.get("launch", np.zeros(len(part["grade"]), np.int64)) for part in parts]
    return count(tree, walk(tree, [_responses(part) for part in parts]), success, np.concatenate(launched))


def find_truth(session: Session, chosen: list[int]) -> None:
    """Launches the oracle's own rollouts at every exit, by the student's probability; many at tokens that count."""
    for index, piece in session.pieces("truth", chosen):
        tree = path_tree(session, index, TRUTH_FLOOR)
        p = np.exp(student_log_probs(session, index, tree))
        coarse = path_tree(session, index)
        counted = (tree.candidates[:, :, None] == coarse.candidates[:, None, :]).any(-1)
        least = np.where(counted, session.config.truth_rollouts, 1)
        targets = exit_targets(tree, p, at_least=least, per_node=session.config.truth_rollouts)
        session.run.save(piece, launch(session, index, tree, targets, "truth"))


def true_success(session: Session, index: int, tree: PathTree, counts: Counts) -> SuccessEstimate:
    """Estimates success at the candidates of `tree` from the oracle's rollouts alone, on its finer tree.

    `counts` are the run's own: S_u is the same for the truth as for the estimates that are held against it.
    """
    fine = path_tree(session, index, TRUTH_FLOOR)
    oracle, _ = session.run.load(f"truth/{index:05d}")
    p = np.exp(student_log_probs(session, index, fine))
    estimate = success_estimates(fine, rollout_counts(fine, oracle), p, "bellman")
    slot = (tree.candidates[:, :, None] == fine.candidates[:, None, :]).argmax(-1)
    value, se, low, high = (
        np.take_along_axis(x, slot, 1) for x in (estimate.value, estimate.se, estimate.low, estimate.high)
    )
    return SuccessEstimate(value, se, low, high, counts.pooled[:, :-1])


def response_parts(session: Session, index: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Gives the (responses, grades) of every rollout of a question: initial, targeted, and the oracle's if any."""
    stages = [stage for stage in ("rollouts", "enrichment", "truth") if session.run.done(f"{stage}/{index:05d}")]
    tree, arrays = representative_paths(session, index).tree, [session.run.load(f"{s}/{index:05d}")[0] for s in stages]
    assert tree is not None
    responses = [_responses(found) for found in arrays]
    whole = [found if isinstance(found, np.ndarray) else found.whole(tree) for found in responses]
    return list(zip(whole, (found["grade"] for found in arrays), strict=True))
