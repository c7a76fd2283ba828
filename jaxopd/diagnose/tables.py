"""Writes the record tables of a run: one piece a question, then all of them merged."""

import numpy as np
import pandas as pd

from jaxopd.diagnose.exits import cosine_table, exit_problem
from jaxopd.diagnose.launches import rollout_counts, true_success
from jaxopd.diagnose.nodes import Paths, path_tree, representative_paths, teacher_scores
from jaxopd.diagnose.records import InitialRollouts, Samples, difficulty, empty_nodes, node_table, token_table
from jaxopd.diagnose.session import Session
from jaxopd.rollouts import LENGTH
from jaxopd.tree import ESTIMATORS, success_estimates, walk

TABLES = ("questions", "paths", "nodes", "tokens", "cosines")
PATH_COLUMNS = ("question", "path", "correct", "length", "finish", "text")


def record(session: Session) -> None:
    """Estimates success, scores every node and writes the tables."""
    run, total = session.run, len(session.questions)
    for index, piece in session.pieces("records"):
        for name, table in _tables(session, index).items():
            run.write_table(f"pieces/{piece}/{name}.parquet", table)
        run.save(piece, {})
    for name in TABLES:
        parts = [run.read_table(f"pieces/records/{index:05d}/{name}.parquet") for index in range(total)]
        filled = [part for part in parts if len(part)] or parts[:1]
        run.write_table(f"records/{name}.parquet", pd.concat(filled, ignore_index=True))


def _tables(session: Session, index: int) -> dict[str, pd.DataFrame]:
    question, paths = session.questions[index], representative_paths(session, index)
    rolled, _ = session.run.load(f"rollouts/{index:05d}")
    if paths.tree is None:
        summary = _summary(session, index, rolled, paths, 0)
        nothing = pd.DataFrame({name: pd.Series(dtype=object) for name in PATH_COLUMNS})
        few = nothing[["question", "path"]]
        return {"questions": summary, "paths": nothing, "nodes": empty_nodes(), "tokens": few, "cosines": few}
    tree = path_tree(session, index)
    targeted, _ = session.run.load(f"enrichment/{index:05d}")
    initial = InitialRollouts(walk(tree, rolled["tokens"]), rolled["grade"] == 1)
    teachers = {name: teacher_scores(session, name, index) for name in session.teachers}
    counts = rollout_counts(tree, rolled, targeted)
    p = np.exp(next(iter(teachers.values())).log_p)
    estimates = {name: success_estimates(tree, counts, p, name) for name in ESTIMATORS}
    if session.config.truth_rollouts:
        estimates["truth"] = true_success(session, index, tree, counts)
    rewards = {name: session.run.load(f"rewards-{name}/{index:05d}")[0]["reward"] for name in teachers}
    samples = {name: Samples.gather(tree, initial, reward) for name, reward in rewards.items()}
    text_of = session.token_text
    # With exits every compared token is judged: what has no visit is worth what its node is.
    n_sig = 0 if session.config.allocation == "exits" else session.config.n_sig
    nodes = node_table(question.id, tree, counts, estimates, teachers, samples, text_of, n_sig)
    return {
        "questions": _summary(session, index, rolled, paths, len(targeted["grade"])),
        "paths": _paths(session, question.id, paths),
        "nodes": nodes,
        "cosines": cosine_table(question.id, exit_problem(session, index), counts, list(teachers)),
        "tokens": token_table(question.id, tree, counts, estimates, teachers, samples, text_of),
    }


def _summary(session: Session, index: int, rolled: dict, paths: Paths, targeted: int) -> pd.DataFrame:
    question, grade = session.questions[index], rolled["grade"]
    pass_rate = float((grade == 1).mean())
    correct = np.zeros(0, bool) if paths.tree is None else paths.tree.correct
    row = {
        "question": question.id,
        "index": index,
        "task": question.task,
        "prompt": question.text,
        "gold": question.gold,
        "pass_rate": pass_rate,
        "difficulty": difficulty(pass_rate),
        "answered": float((grade >= 0).mean()),
        "truncated": float((rolled["finish"] == LENGTH).mean()),
        "n_initial": len(grade),
        "n_targeted": targeted,
        "n_paths_correct": int(correct.sum()),
        "n_paths_incorrect": int((~correct).sum()),
        "excluded": paths.excluded,
    }
    return pd.DataFrame([row])


def _paths(session: Session, question: str, paths: Paths) -> pd.DataFrame:
    tree = paths.tree
    assert tree is not None
    rows = [
        (question, a, bool(tree.correct[a]), int(n), "length" if paths.finish[a] == LENGTH else "stop", text)
        for a, n in enumerate(tree.length)
        for text in [session.text(tree.tokens[a])]
    ]
    return pd.DataFrame(rows, columns=list(PATH_COLUMNS))
