"""Screening: what each context does to the student's own pass rate, before any gradient (paper A, appendix E.9).

The student answers every question bare and with each context before it, G times each, at temperature 1. Tables under
RUN/records/, one row each:

screening       question, context: was it available (or why not), pass rate, answered, truncated, mean length, the
                demonstrations shown in order, the seed; difficulty and exclusion of the question
demonstrations  question, source, trial: every sampled solution, its grade, text, summary and identifier
"""

from dataclasses import replace

import numpy as np
import pandas as pd

from jaxopd.analysis.screening import BASELINE
from jaxopd.diagnose.config import DiagnoseConfig
from jaxopd.diagnose.demonstrations import demonstrate, sampled, shown_to, summarize, summary_too_long, teacher_prompt
from jaxopd.diagnose.records import difficulty
from jaxopd.diagnose.session import Progress, Session
from jaxopd.errors import InputError
from jaxopd.rollouts import LENGTH, Requests
from jaxopd.runs import RunFolder
from jaxopd.tasks.contexts import choice_record, parse_teachers
from jaxopd.tasks.demonstrations import SOURCES, Demonstration, fingerprint

CONTEXTS = (
    "Self-1C=self:1c",
    "Self-1C1W=self:1c1w",
    "Self-3C=self:3c",
    "Self-Sum-1C=self:sum1c",
    "Self-Sum-1C1W=self:sum1c1w",
    "Self-1C-large=self:1c@large",
)
STAGE = "screen"
ROLLOUTS = 32  # of each context, a question


def screen(config: DiagnoseConfig, out: str, progress: Progress = lambda stage, done, total: None) -> RunFolder:
    """Runs, or resumes, a screening into the folder `out` and gives that folder.

    `config.teacher` holds the contexts and `config.rollouts` their rollouts; budgets of targeting are not used.
    Raises InputError, before anything is written, on input that cannot work and on a teacher with a model of its own.
    """
    for spec in parse_teachers(config.teacher):
        if spec.model or spec.name == BASELINE:
            raise InputError(
                f"--context {spec.name}: found {spec.model or 'the name of the bare question'}, expected "
                "NAME=self:KIND under another name"
            )
    session = Session(config, out, progress)
    demonstrate(session)
    summarize(session)
    for index, piece in session.pieces(STAGE):
        session.run.save(piece, *_sample(session, index))
    _record(session)
    return session.run


def _prompts(session: Session, index: int) -> tuple[dict[str, list[int]], dict[str, dict]]:
    """Gives a question's prompts, bare and with each context it has, and per context what is shown or missing."""
    prompts, choices = {BASELINE: session.prompts[index]}, {}
    for name, spec in session.teachers.items():
        shown = shown_to(session, spec, index)
        missing = "no demonstration"
        if shown is not None:
            prompts[name] = teacher_prompt(session, spec, index)
            missing = "" if len(prompts[name]) + 1 < session.student.config.max_positions else "prompt too long"
        elif spec.summarized and summary_too_long(session, index):
            missing = "prompt too long"
        if missing:
            prompts.pop(name, None)
        choice = choice_record(spec, session.questions[index].id, shown, seed=session.config.seed)
        choices[name] = choice | {"missing": missing}
    return prompts, choices


def _sample(session: Session, index: int) -> tuple[dict[str, np.ndarray], dict]:
    """Samples a question under every context it has: grades, lengths and finishes [C G], and what was shown."""
    prompts, choices = _prompts(session, index)
    G = session.config.rollouts
    trunks = list(prompts.values())
    # A context's draws depend on its place in the configuration, not on which others the question has.
    place = {name: number for number, name in enumerate((BASELINE, *session.teachers))}
    ids = (np.array([place[name] for name in prompts])[:, None] * G + np.arange(G)[None]).ravel()
    requests = replace(Requests.continuations(trunks, G), id=ids)
    options = session.sampling(STAGE, index)
    rolled = session.engine(session.config.student).run(trunks, requests, options)
    grade = session.grades(rolled.tokens, session.questions[index].gold)
    arrays = {"grade": grade, "length": rolled.length, "finish": rolled.finish}
    lengths = {name: len(prompt) for name, prompt in prompts.items()}
    facts = {"choices": choices, "prompt_tokens": lengths, "seed": int(options.seed)}
    return {name: values.reshape(len(trunks), G) for name, values in arrays.items()}, facts


def _record(session: Session) -> None:
    """Writes the two tables of a screening."""
    rows, demonstrations = [], []
    for index in range(len(session.questions)):
        mine = _demonstrations(session, index)
        demonstrations += mine
        rows += _rows(session, index, mine)
    session.run.write_table("records/screening.parquet", pd.DataFrame(rows))
    columns = ["question", "source", "trial", "id", "correct", "answered", "text", "summary"]
    session.run.write_table("records/demonstrations.parquet", pd.DataFrame(demonstrations, columns=columns))


def _rows(session: Session, index: int, demonstrations: list[dict]) -> list[dict]:
    arrays, facts = session.run.load(f"{STAGE}/{index:05d}")
    question, sampled_under = session.questions[index], list(facts["prompt_tokens"])
    baseline = float((arrays["grade"][sampled_under.index(BASELINE)] == 1).mean())
    excluded = _exclusion(session, baseline, demonstrations)
    of_question = {"question": question.id, "index": index, "task": question.task, "difficulty": difficulty(baseline)}
    of_question |= {"excluded": excluded, "kept": not excluded, "seed": facts["seed"]}
    rows = []
    for name in (BASELINE, *session.teachers):
        choice, available = facts["choices"].get(name, {}), name in sampled_under
        shown = choice.get("demonstrations", [])
        row = {"context": name, "kind": choice.get("kind", "none"), "source": choice.get("source", "")}
        row |= {"available": available, "missing": choice.get("missing", "")}
        row |= {"shown": " ".join(d["id"] for d in shown), "choice_seed": session.config.seed}
        row["shown_correct"] = " ".join("correct" if d["correct"] else "wrong" for d in shown)
        row |= {"prompt_tokens": facts["prompt_tokens"].get(name, -1), "n": session.config.rollouts if available else 0}
        rates = dict.fromkeys(("pass_rate", "answered", "truncated", "mean_length"), np.nan)
        if available:
            grade, length, finish = (arrays[part][sampled_under.index(name)] for part in ("grade", "length", "finish"))
            rates |= {"pass_rate": float((grade == 1).mean()), "answered": float((grade >= 0).mean())}
            rates |= {"truncated": float((finish == LENGTH).mean()), "mean_length": float(length.mean())}
        rows.append(of_question | row | rates)
    return rows


def _exclusion(session: Session, baseline: float, demonstrations: list[dict]) -> str:
    """Says why a question stays out: no source may lack a correct demonstration, and the baseline must succeed."""
    for source in dict.fromkeys(spec.source for spec in session.teachers.values() if spec.correct):
        if not any(d["correct"] for d in demonstrations if d["source"] == source):
            return f"no correct demonstration from {source}"
    return "extremely hard" if baseline == 0 else ""


def _demonstrations(session: Session, index: int) -> list[dict]:
    """Lists a question's demonstrations in the order they were sampled, or those of the given file."""
    question, run = session.questions[index].id, session.run
    if session.given is not None:
        pool = [d for d in session.given if d.question == question]
        return [_row(trial, d.source, d.text, d.correct, True, d.summary, question) for trial, d in enumerate(pool)]
    summaries = {d.text: d.summary for d in sampled(session, index)}
    found = []
    for source in SOURCES:
        piece = f"demonstrations-{source}/{index:05d}"
        tried = run.load(piece)[1]["tried"] if run.done(piece) else []
        for trial, t in enumerate(tried):
            summary = summaries.get(t["text"])
            found.append(_row(trial, source, t["text"], t["correct"], t["answered"], summary, question))
    return found


def _row(
    trial: int, source: str, text: str, correct: bool, answered: bool, summary: str | None, question: str
) -> dict[str, object]:
    demonstration = Demonstration(question, text, correct, source, summary)
    return {
        "question": question,
        "source": source,
        "trial": trial,
        "id": fingerprint(demonstration),
        "correct": correct,
        "answered": answered,
        "text": text,
        "summary": summary,
    }
