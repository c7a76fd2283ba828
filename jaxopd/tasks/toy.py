"""The toy task: questions a two-layer model can reason about, in three flavours.

boolean  a passage of facts and a chain of logical operations; the answer is yes or no (BoolQ's role).
choice   arithmetic modulo 7 with four options; the answer is a letter (MMLU's role).
chain    three to six steps modulo 7 with named operands; the answer is a digit (AIME's role).

A question is a line of words, ``chain x 3 y 5 start 4 a minus x b plus 6 c times 2``: facts, a starting value
and labelled instructions. A solution echoes every instruction and states its result, then the answer:
``so 4 a minus x 3 gives 1 ; so 1 b plus 6 gives 0 ; ... answer 0``.
"""

import json
import random
import re
import reprlib
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxopd.errors import InputError
from jaxopd.tasks.records import SURROGATE, decode
from jaxopd.types import Question

FLAVOURS = ("boolean", "choice", "chain")
DIGITS = tuple("0123456")
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six")
TRUTHS = ("no", "yes")
LETTERS = tuple("ABCD")
LABELS = tuple("abcdef")
COLOURS = ("red", "blue", "green", "gold", "pink", "gray")
VARIABLES = tuple("wxyz")
LOGIC = {
    "and": lambda left, right: left & right,
    "or": lambda left, right: left | right,
    "xor": lambda left, right: left ^ right,
    "nor": lambda left, right: 1 - (left | right),
    "implies": lambda left, right: (1 - left) | right,
}
ARITHMETIC = {
    "plus": lambda left, right: (left + right) % 7,
    "minus": lambda left, right: (left - right) % 7,
    "times": lambda left, right: (left * right) % 7,
}
SPECIFIED = re.compile(rf"({'|'.join(FLAVOURS)}|all):([0-9]{{1,4}}):([0-9]{{1,9}})")
STEPS = {"boolean": (2, 5), "choice": (2, 4), "chain": (3, 6)}
CONTEXTS = {"1C": (1, 0), "1C1W": (1, 1), "Sum1C": (1, 0), "Sum1C1W": (1, 1)}  # what the toy models learn to read
SHOWN = CONTEXTS | {"3C": (3, 0)}  # three solutions are longer than any context of the training corpus


def apply(op: str, left: str, right: str) -> str:
    """Result of one operation on the words for two values: ``apply("minus", "4", "6") == "5"``."""
    values, table = (TRUTHS, LOGIC) if op in LOGIC else (DIGITS, ARITHMETIC)
    return values[table[op](values.index(left), values.index(right))]


@dataclass(frozen=True)
class Problem:
    """A question taken apart: named facts, the starting value, (operation, operand) steps, option words."""

    flavour: str
    facts: tuple[tuple[str, str], ...]
    start: str
    steps: tuple[tuple[str, str], ...]
    options: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        words = [self.flavour, *(word for fact in self.facts for word in fact), "start", self.start]
        for label, (op, operand) in zip(LABELS, self.steps, strict=False):
            words += [label, op, operand]
        if self.options:
            words += ["options", *(word for pair in zip(self.options, LETTERS, strict=True) for word in pair)]
        return " ".join(words)

    @property
    def gold(self) -> str:
        value = self.start
        for op, operand in self.steps:
            value = apply(op, value, self.value_of(operand))
        return self.answer_for(value)

    def value_of(self, operand: str) -> str:
        """The value an operand stands for: a fact's, or the operand itself."""
        return dict(self.facts).get(operand, operand)

    def answer_for(self, value: str) -> str:
        """The answer a final value leads to: its letter for choice ("" where no option holds it), else itself."""
        if self.flavour != "choice":
            return value
        word = NUMBER_WORDS[int(value)]
        return LETTERS[self.options.index(word)] if word in self.options else ""


def parse(text: str) -> Problem:
    """Take a question's words apart; ValueError where they do not form a question."""
    words = text.split()
    flavour, start = words[0], words.index("start")
    end = words.index("options") if flavour == "choice" else len(words)
    chain = words[start + 2 : end]
    problem = Problem(
        flavour,
        tuple(zip(words[1:start:2], words[2:start:2], strict=True)),
        words[start + 1],
        tuple(zip(chain[1::3], chain[2::3], strict=True)),
        tuple(words[end + 1 :: 2]),
    )
    if flavour not in FLAVOURS or problem.text != " ".join(words) or not problem.gold:
        raise ValueError(text)
    return problem


def is_held_out(text: str) -> bool:
    """True for the eighth of all questions that training corpora leave out and generated test sets consist of."""
    return zlib.crc32(text.encode()) % 8 == 0


def sample_problem(flavour: str, rng: random.Random) -> Problem:
    """Draw one problem of a flavour."""
    count = rng.randint(*STEPS[flavour])
    if flavour == "boolean":
        names = rng.sample(COLOURS, min(count + 1, len(COLOURS)))
        facts = tuple((name, rng.choice(TRUTHS)) for name in names)
        steps = tuple((rng.choice(list(LOGIC)), rng.choice(names)) for _ in range(count))
        return Problem(flavour, facts, rng.choice(TRUTHS), steps)
    names = rng.sample(VARIABLES, 2) if flavour == "chain" else []
    facts = tuple((name, rng.choice(DIGITS)) for name in names)
    operands = [rng.choice(names if names and rng.random() < 0.4 else DIGITS) for _ in range(count)]
    problem = Problem(
        flavour, facts, rng.choice(DIGITS), tuple((rng.choice(list(ARITHMETIC)), operand) for operand in operands)
    )
    if flavour == "chain":
        return problem
    value = NUMBER_WORDS[int(Problem("chain", facts, problem.start, problem.steps).gold)]
    options = [value, *rng.sample([word for word in NUMBER_WORDS if word != value], 3)]
    rng.shuffle(options)
    return Problem(flavour, facts, problem.start, problem.steps, tuple(options))


def generate(flavour: str, n: int, seed: int) -> list[Question]:
    """Generate n distinct held-out questions of a flavour; the same arguments give the same questions."""
    rng, seen, questions = random.Random(f"{flavour} {seed}"), set(), []
    while len(questions) < n:
        problem = sample_problem(flavour, rng)
        if is_held_out(problem.text) and problem.text not in seen:
            seen.add(problem.text)
            questions.append(_question(f"{flavour}-{seed}-{len(questions)}", problem))
    return questions


def _question(identity: str, problem: Problem) -> Question:
    return Question(identity, "toy", problem.text, problem.gold, {"flavour": problem.flavour})


class Toy:
    """The toy task; one object serves the three flavours."""

    name = "toy"

    def load(self, path: str | Path) -> list[Question]:
        """Read questions from a JSONL file, or generate them from ``flavour:n:seed``.

        A line holds "question" and "answer" and may hold "id". ``all:30:1`` gives 30 questions of each flavour.

        Raises:
            InputError: neither a file nor a specification, or a line that is not a toy question.
        """
        if Path(path).is_file():
            return _read_jsonl(Path(path))
        specified = SPECIFIED.fullmatch(str(path))
        if specified is None:
            raise InputError(f"{path}: found no such file, expected a JSONL file or flavour:n:seed, e.g. choice:40:1")
        flavour, n, seed = specified.groups()
        flavours = FLAVOURS if flavour == "all" else (flavour,)
        return [question for each in flavours for question in generate(each, int(n), int(seed))]

    def prompt(self, question: Question) -> str:
        """Return the user message of a question."""
        return question.text

    def grade(self, text: str, gold: str) -> bool | None:
        """Compare the last stated answer with the gold one; None where no answer is stated."""
        words = text.split()
        if "answer" not in words:
            return None
        stated = words[len(words) - words[::-1].index("answer") :]
        if gold in LETTERS and stated and stated[0] in NUMBER_WORDS:
            stated = stated[1:]
        domain = next((domain for domain in (TRUTHS, LETTERS, DIGITS) if gold in domain), None)
        if domain is None:
            raise InputError(f"gold: found {gold!r}, expected yes or no, a letter A to D, or a digit 0 to 6")
        return stated[0] == gold if stated and stated[0] in domain else None


def _read_jsonl(path: Path) -> list[Question]:
    questions, seen = [], Counter()
    for number, line in enumerate(decode(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            problem = parse(row["question"])
            stated, identity = row["answer"], row.get("id", f"{path.stem}-{number}")
            if not isinstance(identity, str | int) or SURROGATE.search(f"{identity}{problem.text}"):
                raise ValueError(identity)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            raise InputError(
                f'{path}: line {number}: found {line[:60]!r}, expected {{"question": a toy question, "answer": ...}}'
            ) from None
        if stated != problem.gold:
            found = reprlib.repr(stated)
            raise InputError(f"{path}: line {number}: found answer {found}, expected {problem.gold!r}")
        name = str(identity)
        seen[name] += 1  # run records are keyed by name
        questions.append(_question(name if seen[name] == 1 else f"{name}#{seen[name]}", problem))
    return questions


def render_context(kind: str, correct: Sequence[str], wrong: Sequence[str]) -> str:
    """Return the demonstrations as words to put before the question's text.

    ``correct <solution> wrong <solution> question``; for Sum1C and Sum1C1W the solutions are summaries.

    Raises:
        InputError: an unknown kind, or a number of demonstrations that is not the kind's.
    """
    if kind not in SHOWN:
        raise InputError(f"teacher context: found {kind!r}, expected one of {', '.join(SHOWN)}")
    found = (len(correct), len(wrong))
    if found != SHOWN[kind]:
        raise InputError(f"teacher context {kind}: found {found} (correct, wrong) solutions, expected {SHOWN[kind]}")
    marked = [f"correct {text}" for text in correct] + [f"wrong {text}" for text in wrong]
    return " ".join([*marked, "question", ""])


def summarize_prompt(solution: str, question: Question) -> str:
    """Return the user message that asks for a solution's results and answer: ``a 1 b 0 answer zero C``."""
    return f"summarize {question.text} solution {solution}"
