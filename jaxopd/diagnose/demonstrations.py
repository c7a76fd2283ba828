"""Demonstrations of a run: sampled from the student and the larger model, graded, condensed, chosen."""

import dataclasses

from jaxopd.diagnose.session import Session
from jaxopd.rollouts import Requests
from jaxopd.tasks.contexts import TeacherSpec, demonstrations_for, summary_message, teacher_message
from jaxopd.tasks.demonstrations import SOURCES, Demonstration

TRIED_AT_ONCE = 10


def demonstrate(session: Session) -> None:
    """Samples demonstrations from the student and the larger model until there are enough of each outcome."""
    if session.given is not None:
        return
    for source, path in zip(SOURCES, (session.config.student, session.config.large), strict=True):
        specs = [spec for spec in session.teachers.values() if spec.source == source and spec.correct]
        if specs and path is not None:
            enough = max(spec.correct for spec in specs), max(spec.wrong for spec in specs)
            for index, piece in session.pieces(f"demonstrations-{source}"):
                session.run.save(piece, {}, {"tried": _try(session, path, source, index, enough)})


def _try(session: Session, path: str, source: str, index: int, enough: tuple[int, int]) -> list[dict]:
    tried: list[dict] = []
    trials, prompt = session.config.demonstration_trials, session.prompts[index]
    options = session.sampling(f"demonstrations-{source}", index, temperature=session.config.demonstration_temperature)
    for low in range(0, trials, TRIED_AT_ONCE):
        requests = Requests.continuations([prompt], min(TRIED_AT_ONCE, trials - low))
        rolled = session.engine(path).run([prompt], dataclasses.replace(requests, id=requests.id + low), options)
        grades = session.grades(rolled.tokens, session.questions[index].gold)
        for tokens, grade in zip(rolled.tokens, grades, strict=True):
            tried.append({"text": session.text(tokens), "correct": bool(grade == 1), "answered": bool(grade >= 0)})
        correct = sum(t["correct"] for t in tried)
        wrong = sum(t["answered"] and not t["correct"] for t in tried)
        if correct >= enough[0] and wrong >= enough[1]:
            break
    return tried


def summarize(session: Session) -> None:
    """Has the larger model condense, greedily, the demonstrations that summarised contexts will show."""
    specs = [spec for spec in session.teachers.values() if spec.summarized]
    large = session.config.large
    if not specs or large is None or session.given is not None:
        return
    for index, piece in session.pieces("summaries"):
        question, summaries, too_long = session.questions[index], {}, False
        for spec in specs:
            plain = dataclasses.replace(spec, summarized=False)
            chosen = demonstrations_for(plain, question.id, sampled(session, index), seed=session.config.seed)
            for shown in chosen or ():
                if shown.text not in summaries:
                    prompt = session.prompt(summary_message(question, shown.text))
                    if len(prompt) >= session.contexts[large]:
                        too_long = True
                        continue
                    options = session.sampling("summaries", index, temperature=0.0)
                    rolled = session.engine(large).run([prompt], Requests.continuations([prompt], 1), options)
                    summaries[shown.text] = session.text(rolled.tokens[0])
        session.run.save(piece, {}, {"summaries": summaries, "too_long": too_long})


def summary_too_long(session: Session, index: int) -> bool:
    """Tells whether a solution of a question did not fit in the larger model's context, so has no summary."""
    piece = f"summaries/{index:05d}"
    return session.run.done(piece) and session.run.load(piece)[1]["too_long"]


def sampled(session: Session, index: int) -> list[Demonstration]:
    """Gives the answered demonstrations of a question that were sampled so far, with their summaries."""
    run, summaries, found = session.run, {}, []
    if run.done(f"summaries/{index:05d}"):
        summaries = run.load(f"summaries/{index:05d}")[1]["summaries"]
    for source in SOURCES:
        piece = f"demonstrations-{source}/{index:05d}"
        for tried in run.load(piece)[1]["tried"] if run.done(piece) else ():
            if tried["answered"]:
                text, question = tried["text"], session.questions[index].id
                found.append(Demonstration(question, text, tried["correct"], source, summaries.get(text)))
    return found


def shown_to(session: Session, spec: TeacherSpec, index: int) -> tuple[Demonstration, ...] | None:
    """Chooses what a teacher is shown for a question; None where there are too few demonstrations."""
    if not spec.correct + spec.wrong:
        return ()
    pool = sampled(session, index) if session.given is None else session.given
    return demonstrations_for(spec, session.questions[index].id, pool, seed=session.config.seed)


def teacher_prompt(session: Session, spec: TeacherSpec, index: int) -> list[int]:
    """Gives the tokens a teacher reads before the student's response."""
    shown = shown_to(session, spec, index)
    assert shown is not None, "a question without demonstrations is excluded before its teachers are prompted"
    return session.prompt(teacher_message(spec, session.questions[index], shown))
