"""Nodes of a question: its representative paths, what each model watches on them, and the teachers' scores there."""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

from jaxopd import scoring
from jaxopd.diagnose.config import WATCHED
from jaxopd.diagnose.demonstrations import shown_to, summary_too_long, teacher_prompt
from jaxopd.diagnose.records import PER_NODE, TeacherScores, watched_ids
from jaxopd.diagnose.session import Session, per_question
from jaxopd.gradients import FORMS, Position
from jaxopd.models import Qwen
from jaxopd.responses import response_hidden, response_log_probs, token_log_probs
from jaxopd.tasks.contexts import TeacherSpec, choice_record
from jaxopd.tree import PathTree, build_tree

STUDENT = "student"
AT_CANDIDATES = ("log_p", "log_q")


def _of_log_probs(name: str) -> Callable:
    return lambda log_p, log_q: FORMS[name](Position.create(log_p, log_q))


ANALYTIC = {  # forms that need no samples, and fbar over the vocabulary from what scoring knows of P, Q and M
    "reverse_kl": scoring.AnalyticForm(_of_log_probs("reverse_kl"), lambda known: -known.reverse_kl),
    "forward_kl": scoring.AnalyticForm(_of_log_probs("forward_kl"), lambda known: np.ones_like(known.forward_kl)),
    "jsd": scoring.AnalyticForm(_of_log_probs("jsd"), lambda known: -known.js_student / 2),
}


@dataclasses.dataclass(frozen=True)
class Paths:
    """The representative paths of a question, merged; or the reason why there are none."""

    tree: PathTree | None
    excluded: str
    finish: Int[np.ndarray, " M"]


@per_question
def representative_paths(session: Session, index: int) -> Paths:
    """Picks the first distinct correct and incorrect rollouts; they are exchangeable, so any order is fair."""
    arrays, _ = session.run.load(f"rollouts/{index:05d}")
    tokens, success = arrays["tokens"], arrays["grade"] == 1
    excluded = _exclusion(session, index, success, tokens.shape[1])
    if excluded:
        return Paths(None, excluded, arrays["finish"][:0])
    distinct = np.sort(np.unique(tokens, axis=0, return_index=True)[1])
    rows = [distinct[success[distinct] == outcome][: session.config.paths] for outcome in (True, False)]
    chosen = np.concatenate(rows)
    tree = build_tree([tokens[row][tokens[row] >= 0] for row in chosen], list(success[chosen]))
    return Paths(tree, "", arrays["finish"][chosen])


def _exclusion(session: Session, index: int, success: np.ndarray, response: int) -> str:
    if not success.any():
        return "none correct"
    if success.all():
        return "none incorrect"
    for spec in session.teachers.values():
        if shown_to(session, spec, index) is None:
            too_long = spec.summarized and summary_too_long(session, index)
            return "prompt too long" if too_long else "no demonstration"
        # The context is known from the config: loading the teacher here would load every teacher for every question.
        context = session.contexts[spec.model or session.config.student]
        if len(teacher_prompt(session, spec, index)) + response > context:
            return "prompt too long"
    return ""


def included(session: Session) -> list[int]:
    """The questions that have paths of both outcomes and a demonstration for every teacher that needs one."""
    return [i for i in range(len(session.questions)) if representative_paths(session, i).tree is not None]


def teacher_model(session: Session, spec: TeacherSpec) -> Qwen:
    """Gives the model of a teacher: its own, or the student."""
    return session.model(spec.model) if spec.model else session.student


def _hidden(model: Qwen, prompt: list[int], tree: PathTree) -> Float[np.ndarray, "N D"]:
    return response_hidden(model, prompt, tree.tokens)[tree.owner, tree.depth]


def watch(session: Session) -> None:
    """Finds, for the student and each teacher, the likeliest tokens at every node."""
    chosen = included(session)
    for name, spec in [(STUDENT, None), *session.teachers.items()]:
        for index, piece in session.pieces(f"watched-{name}", chosen):
            model, prompt, facts = session.student, session.prompts[index], {}
            if spec is not None:
                model, prompt = teacher_model(session, spec), teacher_prompt(session, spec, index)
                question, shown = session.questions[index].id, shown_to(session, spec, index)
                facts = choice_record(spec, question, shown, seed=session.config.seed)
            tree = representative_paths(session, index).tree
            assert tree is not None
            ids, logp = scoring.topk(model, _hidden(model, prompt, tree), min(WATCHED, model.config.vocab_size))
            session.run.save(piece, {"ids": ids, "logp": logp}, facts)


@per_question
def path_tree(session: Session, index: int, floor: float | None = None) -> PathTree:
    """Gives a question's path tree with the tokens that any model gives more than tau.

    `floor` adds those that the student gives more than `floor`.
    """
    plain = representative_paths(session, index).tree
    assert plain is not None
    watched = [session.run.load(f"watched-{name}/{index:05d}")[0] for name in (STUDENT, *session.teachers)]
    ids, logp = [w["ids"] for w in watched], [w["logp"] for w in watched]
    candidates = watched_ids(ids, logp, session.config.tau)
    if floor is not None:
        candidates = np.concatenate([candidates, watched_ids(ids[:1], logp[:1], floor)], 1)
    paths = [plain.tokens[a, :n] for a, n in enumerate(plain.length)]
    return build_tree(paths, list(plain.correct), candidates)


def student_hidden(session: Session, index: int, tree: PathTree) -> Float[np.ndarray, "N D"]:
    """Computes the student's hidden states that predict the token at each node."""
    return _hidden(session.student, session.prompts[index], tree)


def student_log_probs(session: Session, index: int, tree: PathTree) -> Float[np.ndarray, "N K"]:
    """Gives the student's log-probs of a tree's candidates, -inf where there is none."""
    return token_log_probs(session.student, student_hidden(session, index, tree), tree.candidates)


def score(session: Session, chosen: list[int]) -> None:
    """Scores student and each teacher at every node: probabilities of the candidates, divergences, f and fbar."""
    for name, spec in session.teachers.items():
        for index, piece in session.pieces(f"scores-{name}", chosen):
            tree, teacher = path_tree(session, index), teacher_model(session, spec)
            hidden_s = _hidden(session.student, session.prompts[index], tree)
            hidden_t = _hidden(teacher, teacher_prompt(session, spec, index), tree)
            found = scoring.score_pair(session.student, teacher, hidden_s, hidden_t, tree.candidates, ANALYTIC)
            arrays = {field: np.asarray(getattr(found.statistics, field)) for field in (*AT_CANDIDATES, *PER_NODE)}
            for form, (f, fbar) in found.known.items():
                arrays |= {f"f_{form}": np.asarray(f), f"fbar_{form}": np.asarray(fbar)}
            session.run.save(piece, arrays)


def teacher_scores(session: Session, name: str, index: int) -> TeacherScores:
    """Reads what `score` found for a teacher and a question."""
    found, _ = session.run.load(f"scores-{name}/{index:05d}")
    known = {form: (found[f"f_{form}"], found[f"fbar_{form}"]) for form in ANALYTIC}
    return TeacherScores(*(found[name] for name in AT_CANDIDATES), {key: found[key] for key in PER_NODE}, known)


def reward(session: Session, chosen: list[int]) -> None:
    """Finds each teacher's log q - log p at every token of the initial rollouts: the reward of MiniLLM."""
    for name, spec in session.teachers.items():
        for index, piece in session.pieces(f"rewards-{name}", chosen):
            rolled, _ = session.run.load(f"rollouts/{index:05d}")
            teacher, prompt = teacher_model(session, spec), teacher_prompt(session, spec, index)
            real = rolled["tokens"] >= 0
            log_q = response_log_probs(teacher, prompt, rolled["tokens"])
            rewards = np.where(real, log_q - rolled["raw_logp"], 0.0).astype(np.float32)
            session.run.save(piece, {"reward": rewards})
