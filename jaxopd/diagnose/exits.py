"""Enrichment by exits: rollouts go where they lower the error of the teachers' global cosines most.

Rounds of Neyman's allocation (tree/allocation.py) until every teacher's cosine has the standard error asked for, or
the tokens are spent. Nothing is launched on a path: the values of its nodes follow from their exits.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from jaxopd.diagnose.launches import joined, launch, rollout_counts
from jaxopd.diagnose.nodes import path_tree, student_hidden, teacher_scores
from jaxopd.diagnose.session import Session
from jaxopd.distributed import fetch
from jaxopd.tree import Counts, PathTree, Targets
from jaxopd.tree.allocation import ExitProblem, SpreadNumbers, global_cosines, spend
from jaxopd.tree.success import Z95

NO_LAUNCHES = {
    "path": np.zeros(0, np.int64),
    "launch": np.zeros(0, np.int64),
    "tokens": np.zeros((0, 1), np.int32),
    "grade": np.zeros(0, np.int8),
}
NODES_AT_ONCE = 64  # rows of logits when the rest of a node's tokens is drawn from


def enrich_exits(session: Session, chosen: list[int]) -> None:
    """Spends at most `exit_tokens` a question on exits, in rounds, and stops at `target_se`."""
    for index, piece in session.pieces("enrichment", chosen):
        rounds = _spent(session, index)
        session.run.save(piece, joined(rounds) if rounds else NO_LAUNCHES)


def _spent(session: Session, index: int) -> list[dict[str, np.ndarray]]:
    """Runs the rounds of one question; gives the launches of each."""
    tree, config = path_tree(session, index), session.config
    rolled, _ = session.run.load(f"rollouts/{index:05d}")
    rng = np.random.default_rng(session.seed("enrichment", index))
    rounds: list[dict[str, np.ndarray]] = []
    numbers = SpreadNumbers(tree, rng) if config.low_discrepancy else None

    def launch_round(number: Int[np.ndarray, "N K1"]) -> tuple[Counts, int]:
        targets, spread = _targets(session, index, tree, number, rng), numbers and numbers.next(number)
        rounds.append(launch(session, index, tree, targets, f"enrichment-{len(rounds)}", spread))
        taken = (rounds[-1]["tokens"][:, 1:] >= 0).sum()  # the first one was given
        return rollout_counts(tree, rolled, *rounds), int(taken)

    lengths = (rolled["tokens"] >= 0).sum(1)
    spend(
        exit_problem(session, index),
        rollout_counts(tree, rolled),
        lengths,
        launch_round,
        tokens=config.exit_budget(float(lengths.mean())),
        target_se=config.target_se,
        teacher_agnostic=config.teacher_agnostic,
        decide=session.rivals,
        rng=rng,
    )
    return rounds


def exit_problem(session: Session, index: int) -> ExitProblem:
    """Compares, at every node, the tokens to which the student or a teacher gives more than tau."""
    tree = path_tree(session, index)
    scores = [teacher_scores(session, name, index) for name in session.teachers]
    p, q = np.exp(scores[0].log_p, dtype=np.float64), np.exp([found.log_q for found in scores], dtype=np.float64)
    return ExitProblem.create(tree, p, q, session.config.tau)


def cosine_table(question: str, problem: ExitProblem, counts: Counts, teachers: list[str]) -> pd.DataFrame:
    """Gives each teacher's global cosine at the tokens compared, noise taken out of its norm, with its interval."""
    cosine, covariance = global_cosines(problem, counts)
    se = np.sqrt(np.diag(covariance))
    columns = {"global_cosine": cosine, "se": se, "low": cosine - Z95 * se, "high": cosine + Z95 * se}
    return pd.DataFrame({"question": question, "teacher": teachers} | columns)


def _targets(
    session: Session, index: int, tree: PathTree, number: Int[np.ndarray, "N K1"], rng: np.random.Generator
) -> Targets:
    node, slot = np.nonzero(number[:, :-1])
    rest = np.repeat(np.arange(len(number)), number[:, -1])
    at = np.concatenate([node, rest])
    token = np.concatenate([tree.candidates[node, slot], _rest_tokens(session, index, tree, rest, rng)])
    count = np.concatenate([number[node, slot], np.ones(len(rest), np.int64)])
    return Targets(tree.owner[at], tree.depth[at], token, count)


def _rest_tokens(
    session: Session, index: int, tree: PathTree, nodes: Int[np.ndarray, " R"], rng: np.random.Generator
) -> Int[np.ndarray, " R"]:
    """Draws one token at each of `nodes` from the student's P restricted to what is no candidate there."""
    hidden, head, drawn = student_hidden(session, index, tree), session.student.head(), []
    for low in range(0, len(nodes), NODES_AT_ONCE):
        part = nodes[low : low + NODES_AT_ONCE]
        padded = np.resize(part, NODES_AT_ONCE)
        key = jax.random.key(int(rng.integers(2**31)))
        drawn.append(fetch(_draw_outside(key, hidden[padded], head, tree.candidates[padded]))[: len(part)])
    return np.concatenate(drawn) if drawn else np.zeros(0, np.int64)


@jax.jit
def _draw_outside(
    key: jax.Array, hidden: Float[jax.Array, "R D"], head: Float[jax.Array, "V D"], candidates: Int[jax.Array, "R K"]
) -> Int[jax.Array, " R"]:
    logits = jnp.einsum("rd,vd->rv", hidden, head, preferred_element_type=jnp.float32)
    columns = jnp.where(candidates >= 0, candidates, logits.shape[1])  # out of range, hence dropped
    outside = logits.at[jnp.arange(len(logits))[:, None], columns].set(-jnp.inf, mode="drop")
    return jax.random.categorical(key, outside, mode="high")
