"""The corpus the toy models learn from: a world of facts that each role knows with its own, fixed errors.

Competence is set here and not by under-training. Every fact ("4 minus 3", or "yes and red" where red is
no) has a fixed error rate and a fixed plausible wrong answer, both from a hash, and the error rate is
scaled by role. Two models therefore trip over the same facts, and the spread of pass rates over questions
does not depend on seeds.

With demonstrations in the context the writer repeats a demonstrated result with some probability and otherwise
trusts its own knowledge. Some demonstrations are nonsense, so that a model has to read them to predict the text.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jaxopd.tasks import toy
from jaxopd.tasks.toy import LABELS, Problem
from jaxopd.toy.tokenizer import EQUALS, OPENINGS, STOPS, WORDS, encode
from jaxopd.types import Question


@dataclass(frozen=True)
class Role:
    """A model's part: its size, how often it errs (1 = the student), how it opens a sentence, how it is trained."""

    width: int
    layers: int
    error_scale: float
    openings: tuple[float, ...]
    steps: tuple[int, int]
    peaks: tuple[float, float]
    mixes: tuple[dict[str, float], dict[str, float]]
    recall_share: float = 0.15


_STUDENT = (
    {"plain": 5, "1C": 2, "Sum1C": 1.2, "1C1W": 1.1, "Sum1C1W": 0.9},
    {"plain": 6, "1C": 1.6, "Sum1C": 1, "1C1W": 1, "Sum1C1W": 0.8},
)
# From the student's mix M learns the facts first and then never to read a demonstration.
_LATE_READER = ({"plain": 3, "1C": 2, "Sum1C": 3, "1C1W": 1, "Sum1C1W": 1}, _STUDENT[1])
_TEACHER = ({"plain": 7, "1C": 1, "Sum1C": 0.5},) * 2
_SUMMARIZER = ({"plain": 6, "1C": 1, "summarize": 2},) * 2
ROLES = {
    "S": Role(64, 2, 1.0, (0.5, 0.25, 0.15, 0.1), (2000, 1200), (4e-3, 3e-3), _STUDENT),
    "M": Role(80, 3, 0.7, (0.4, 0.3, 0.2, 0.1), (1400, 1000), (4e-3, 3e-3), _LATE_READER),
    "T1": Role(96, 3, 0.4, (0.25, 0.25, 0.25, 0.25), (750, 350), (4e-3, 3e-3), _TEACHER),
    "T2": Role(112, 3, 0.25, (0.15, 0.2, 0.3, 0.35), (1100, 500), (4e-3, 3e-3), _TEACHER),
    "T3": Role(128, 3, 0.12, (0.1, 0.2, 0.3, 0.4), (750, 350), (4e-3, 3e-3), _TEACHER),
    "X": Role(128, 3, 0.06, (0.1, 0.1, 0.4, 0.4), (750, 350), (4e-3, 3e-3), _SUMMARIZER),
}
Batch = tuple[np.ndarray, np.ndarray, np.ndarray]
CONTENT = WORDS[WORDS.index("boolean") : WORDS.index("so")]
# Probability of repeating a demonstrated result: the correct demonstration's, the wrong one's.
TRUST = {"1C": (0.85, 0.0), "Sum1C": (0.8, 0.0), "1C1W": (0.62, 0.1), "Sum1C1W": (0.66, 0.08)}
TRICKY = {"boolean": 0.55, "choice": 0.6, "chain": 0.7}
RECONSIDERS = (0.02, 0.3)  # after a right and after a wrong result


def _hashed(*key: str) -> random.Random:
    return random.Random(hashlib.blake2b(" ".join(key).encode(), digest_size=8).digest())


def error_of(flavour: str, op: str, left: str, right: str, name: str = "") -> tuple[float, str]:
    """The student's error rate on a fact and the wrong result it then states.

    Easy facts err at .5-3 %, tricky ones at 3-10 %, and two fifths of the tricky at 35-65 %. Logic has so few
    facts that the colour (`name`) counts as part of them.
    """
    values = toy.TRUTHS if op in toy.LOGIC else toy.DIGITS
    rng = _hashed("fact", op, left, right, name)
    right_result = toy.apply(op, left, right)
    wrong = values[(values.index(right_result) + rng.choice((1, -1))) % len(values)]
    if rng.random() >= TRICKY[flavour]:
        return rng.uniform(0.005, 0.03), wrong
    return (rng.uniform(0.35, 0.65) if rng.random() < 0.4 else rng.uniform(0.03, 0.1)), wrong


_CACHE: dict[tuple[str, ...], tuple[float, str]] = {}


def _stated(flavour: str, fact: tuple[str, str, str, str], scale: float, rng: random.Random) -> str:
    """The result a writer with this error scale states for a fact."""
    key = (flavour, *fact)
    if key not in _CACHE:
        _CACHE[key] = error_of(*key)
    rate, wrong = _CACHE[key]
    return wrong if rng.random() < rate * scale else toy.apply(*fact[:3])


@dataclass(frozen=True)
class Solution:
    """A written solution: its words, and per step the value it started from and the result it ended with."""

    text: str
    results: tuple[tuple[str, str], ...]
    correct: bool

    @property
    def summary(self) -> str:
        """The short form: results and answer, ``a 1 b 0 answer zero C``."""
        words = [word for label, (_, result) in zip(LABELS, self.results, strict=False) for word in (label, result)]
        return " ".join(words) + self.text[self.text.index(" answer") :]


@dataclass(frozen=True)
class Writer:
    """Writes solutions with a role's errors and style. `nonsense` is the probability of a random result."""

    error_scale: float
    openings: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    nonsense: float = 0.0

    def write(self, problem: Problem, rng: random.Random, hints: Sequence[tuple[float, Solution]] = ()) -> Solution:
        """Write one solution; each hint is a probability of repeating what a demonstration states."""
        words, results, value, reconsidered = [], [], problem.start, False
        equals, stop = rng.choice(EQUALS), rng.choice(STOPS)
        for index, (label, (op, operand)) in enumerate(zip(LABELS, problem.steps, strict=False)):
            right = problem.value_of(operand)
            opening = rng.choices(OPENINGS, self.openings)[0]
            shown = [operand] if operand == right else [operand, right]
            fact = (op, value, right, operand if op in toy.LOGIC else "")
            while True:
                result = self._result(problem.flavour, fact, index, rng, hints)
                words += [opening, value, label, op, *shown, equals, result, stop]
                if reconsidered or rng.random() >= RECONSIDERS[result != toy.apply(op, value, right)]:
                    break
                opening, reconsidered = "wait", True
            results.append((value, result))
            value = result
        words += ["answer", *self._answer(problem, value, rng)]
        return Solution(" ".join(words), tuple(results), words[-1] == problem.gold)

    def _result(self, flavour, fact, index, rng, hints) -> str:
        draw = rng.random()
        for trust, demonstration in hints:
            if draw < trust and demonstration.results[index][0] == fact[1]:
                return demonstration.results[index][1]
            draw -= trust
        if self.nonsense and rng.random() < self.nonsense:
            return rng.choice(toy.TRUTHS if flavour == "boolean" else toy.DIGITS)
        return _stated(flavour, fact, self.error_scale, rng)

    def _answer(self, problem: Problem, value: str, rng: random.Random) -> list[str]:
        if problem.flavour != "choice":
            return [value]
        return [toy.NUMBER_WORDS[int(value)], problem.answer_for(value) or rng.choice(toy.LETTERS)]


@dataclass(frozen=True)
class Example:
    """A user message and the response to learn; `drill` follows its end and asks for every option's letter."""

    message: str
    response: str
    drill: tuple[str, ...] = ()


def example(kind: str, role: Role, rng: random.Random) -> Example:
    """Draw a training example: kind is plain, summarize or a teacher context of `toy.CONTEXTS`."""
    problem = training_problem(rng)
    options = list(zip(problem.options, toy.LETTERS, strict=False))
    drill = tuple(word for pair in rng.sample(options, len(options)) for word in ("answer", *pair))
    writer = Writer(role.error_scale, role.openings)
    if kind == "plain":
        return Example(problem.text, writer.write(problem, rng).text, drill)
    if kind == "summarize":
        solution = Writer(1.0).write(problem, rng)
        question = Question("", "toy", problem.text, problem.gold)
        return Example(toy.summarize_prompt(solution.text, question), solution.summary)
    demonstrations = [_demonstration(problem, rng, want) for want in (True, False)][: sum(toy.CONTEXTS[kind])]
    texts = [demo.summary if kind.startswith("Sum") else demo.text for demo in demonstrations]
    context = toy.render_context(kind, texts[:1], texts[1:])
    response = writer.write(problem, rng, tuple(zip(TRUST[kind], demonstrations, strict=False)))
    return Example(context + problem.text, response.text, drill)


def training_problem(rng: random.Random) -> Problem:
    """Draw a problem of any flavour that is not held out."""
    while True:
        problem = toy.sample_problem(rng.choice(toy.FLAVOURS), rng)
        if not toy.is_held_out(problem.text):
            return problem


def _demonstration(problem: Problem, rng: random.Random, correct: bool) -> Solution:
    nonsense = 0.3 if rng.random() < (0.3 if correct else 0.5) else 0.0
    scale = 1.0
    for _ in range(8):
        solution = Writer(scale, nonsense=nonsense).write(problem, rng)
        if solution.correct == correct or (nonsense and correct):
            return solution
        scale = scale / 2 if correct else scale * 1.5
    return Writer(0.0 if correct else 2.0, nonsense=0.0 if correct else 0.9).write(problem, rng)


def recall(rng: random.Random) -> tuple[list[int], list[float]]:
    """A dictionary and look-ups in it, ``four A red 3 red 3 four A ...``, as tokens and loss weights.

    Looking a word up and repeating what follows it is the skill that everything else rests on.
    """
    keys = rng.sample(CONTENT, rng.randint(3, 8))
    entries = [(key, rng.choice(CONTENT)) for key in keys]
    queries = rng.choices(entries, k=12)
    words = [word for entry in entries + queries for word in entry]
    return encode(" ".join(words)), [0.0] * (2 * len(entries)) + [0.0, 1.0] * len(queries)


def training_tokens(example: Example) -> tuple[list[int], list[float]]:
    """Tokens of an example under the chat template and their loss weights.

    Of the response every word counts, results three times and the last word of the answer six times; of the drill
    the letters, three times.
    """
    prompt = f"<|im_start|> user {example.message} <|im_end|> <|im_start|> assistant".split()
    response = f"{example.response} <|im_end|>".split()
    weights = [3.0 if before in EQUALS or before == "answer" else 1.0 for before in (prompt[-1], *response)][:-1]
    weights[-2] = 6.0
    drill = [0.0, 0.0, 3.0] * (len(example.drill) // 3)
    return encode(" ".join((*prompt, *response, *example.drill))), [0.0] * len(prompt) + weights + drill


def packed_rows(examples: Iterator[tuple[list[int], list[float]]], rows: int, width: int) -> Iterator[Batch]:
    """Pack examples into rows, each in the first row with room; one that fits nowhere opens the next batch.

    Yields (tokens, loss weights, segment ids from 1; 0 is padding), each [rows, width]. Examples longer than a row
    are left out.
    """
    examples = (example for example in examples if len(example[0]) <= width)
    held = next(examples)
    while True:
        tokens, segments = np.zeros((rows, width), np.int32), np.zeros((rows, width), np.int32)
        weights, used, count = np.zeros((rows, width), np.float32), [0] * rows, 0
        while True:
            ids, loss_weights = held
            row = next((row for row in range(rows) if used[row] + len(ids) <= width), None)
            if row is None:
                break
            span, count = slice(used[row], used[row] + len(ids)), count + 1
            tokens[row, span], weights[row, span], segments[row, span] = ids, loss_weights, count
            used[row] += len(ids)
            held = next(examples)
        yield tokens, weights, segments
