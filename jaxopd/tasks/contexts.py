"""Teachers and what they are shown: the demonstrations a self-distillation teacher reads before the question.

Paper A, section 4 and appendix E.9. A teacher is written ``NAME=VALUE`` on the command line:

    T2=path/to/model          an external model, shown the question alone
    Self-1C=self:1c           the student, shown one correct demonstration
    Self-1C-32B=self:1c@large the same, the demonstration written by the larger model
    Self-1C1W=self:1c1w       one correct and one wrong demonstration
    Self-Sum-1C=self:sum1c    one correct demonstration, summarized by the larger model; also sum1c1w, 3c
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jaxopd.errors import InputError
from jaxopd.tasks import toy
from jaxopd.tasks.demonstrations import SOURCES, Demonstration, fingerprint, rank
from jaxopd.tasks.prompts import render
from jaxopd.types import Question

# kind: (correct demonstrations, wrong ones, are they summarized)
KINDS = {
    "1C": (1, 0, False),
    "3C": (3, 0, False),
    "1C1W": (1, 1, False),
    "Sum1C": (1, 0, True),
    "Sum1C1W": (1, 1, True),
}
NO_CONTEXT = "none"


@dataclass(frozen=True)
class TeacherSpec:
    """A teacher: a model of its own (kind "none", `model` is its folder) or the student with a context.

    Attributes:
        name: how tables and plots call it.
        kind: a key of `KINDS`, or "none".
        correct, wrong: demonstrations of each sort in the context.
        summarized: whether the context holds their summaries.
        source: "student" or "large", the model that wrote the demonstrations.
        model: folder of an external teacher, None where the teacher is the student.
    """

    name: str
    kind: str = NO_CONTEXT
    correct: int = 0
    wrong: int = 0
    summarized: bool = False
    source: str = "student"
    model: str | None = None


def parse_teacher(argument: str) -> TeacherSpec:
    """Read a teacher written as NAME=path/to/model or NAME=self:KIND[@SOURCE].

    Raises:
        InputError: no name, no value, or an unknown kind or source; lists the known ones.
    """
    name, equals, value = (part.strip() for part in argument.partition("="))
    if not (name and equals and value):
        raise InputError(f"--teacher: found {argument!r}, expected NAME=path/to/model or NAME=self:KIND")
    if not value.lower().startswith("self:"):
        return TeacherSpec(name, model=value)
    written, at, source = value[len("self:") :].partition("@")
    kind = next((kind for kind in KINDS if kind.lower() == written.lower()), None)
    if kind is None:
        known = ", ".join(f"self:{kind.lower()}" for kind in KINDS)
        raise InputError(f"--teacher {name}: found context {written!r}, expected one of {known}, or a model folder")
    if at and source not in SOURCES:
        raise InputError(f"--teacher {name}: found source {source!r}, expected one of {', '.join(SOURCES)}")
    correct, wrong, summarized = KINDS[kind]
    return TeacherSpec(name, kind, correct, wrong, summarized, source or "student")


def parse_teachers(arguments: Sequence[str]) -> list[TeacherSpec]:
    """Read several teachers; InputError where two share a name."""
    specs = [parse_teacher(argument) for argument in arguments]
    names = [spec.name for spec in specs]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise InputError(f"--teacher {repeated}: found the name twice, expected one teacher for each name")
    return specs


def demonstrations_for(
    spec: TeacherSpec, question_id: str, demonstrations: Iterable[Demonstration], *, seed: int
) -> tuple[Demonstration, ...] | None:
    """Choose a question's demonstrations for a teacher, correct ones first; None where there are too few.

    The choice depends on the seed, the question and the texts only, not on the order of the file. Teachers with the
    same source share it: what 1C shows is among what 3C and 1C1W show, so that contexts differ and not their content.
    """
    ranked = sorted(
        {
            demonstration.text: demonstration
            for demonstration in demonstrations
            if demonstration.question == question_id
            and demonstration.source == spec.source
            and not (spec.summarized and demonstration.summary is None)
        }.values(),
        key=lambda demonstration: rank(seed, demonstration),
    )
    correct = [demonstration for demonstration in ranked if demonstration.correct][: spec.correct]
    wrong = [demonstration for demonstration in ranked if not demonstration.correct][: spec.wrong]
    if (len(correct), len(wrong)) != (spec.correct, spec.wrong):
        return None
    return tuple(correct + wrong)


def choice_record(spec: TeacherSpec, question_id: str, chosen: Iterable[Demonstration] | None, *, seed: int) -> dict:
    """Describe a choice for the run's records: plain values that JSON and parquet hold."""
    return {
        "question": question_id,
        "teacher": spec.name,
        "kind": spec.kind,
        "source": spec.source,
        "seed": seed,
        "available": chosen is not None,
        "demonstrations": [
            {"id": fingerprint(demonstration), "correct": demonstration.correct} for demonstration in chosen or ()
        ],
    }


def teacher_message(spec: TeacherSpec, question: Question, demonstrations: Sequence[Demonstration] = ()) -> str:
    """Return the teacher's user message: the context, then the question's own text.

    Args:
        spec: the teacher; a model of its own is shown the question alone.
        question: the question.
        demonstrations: those that `demonstrations_for` chose, correct and wrong in any order.

    Raises:
        InputError: their number is not the context's, or a summary is missing.
    """
    if spec.kind == NO_CONTEXT:
        return question.text
    shown = {True: [], False: []}
    for demonstration in demonstrations:
        text = demonstration.summary if spec.summarized else demonstration.text
        if text is None:
            raise InputError(f"teacher {spec.name}, question {question.id}: found no summary, expected one")
        shown[demonstration.correct].append(text.strip())
    found, expected = (len(shown[True]), len(shown[False])), (spec.correct, spec.wrong)
    if found != expected:
        raise InputError(
            f"teacher {spec.name}, question {question.id}: found {found} (correct, wrong) demonstrations, "
            f"expected {expected}"
        )
    return _wording(question).render_context(spec.kind, shown[True], shown[False]) + question.text


def summary_message(question: Question, solution: str) -> str:
    """Return the user message that asks the larger model to condense a solution of a question."""
    return _wording(question).summarize_prompt(solution, question)


class Wording:
    """The wording of contexts in words, from templates/context.jinja and templates/summarize.jinja."""

    @staticmethod
    def render_context(kind: str, correct: Sequence[str], wrong: Sequence[str]) -> str:
        """Return the demonstrations, marked correct or wrong, to put before the question."""
        context = render("context", correct=correct, wrong=wrong, summarized=KINDS[kind][2])
        return context.rstrip() + "\n\n"

    @staticmethod
    def summarize_prompt(solution: str, question: Question) -> str:
        """Return the request for a summary of one solution."""
        return render("summarize", problem=question.text, solution=solution.strip())


OWN_WORDING = {"toy": toy}  # tasks whose vocabulary the templates do not fit


def _wording(question: Question):
    return OWN_WORDING.get(question.task, Wording)
