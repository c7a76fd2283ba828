"""Measures the toy models and asserts their ordering: teachers above students, plain < correct+wrong < correct."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from jaxopd.models import Qwen, chat_tokens, load_model, load_tokenizer, stop_token_ids
from jaxopd.rollouts import Engine, Requests, Sampling
from jaxopd.tasks import toy
from jaxopd.tasks.toy import Toy
from jaxopd.toy import MODELS
from jaxopd.toy.corpus import ROLES, Writer
from jaxopd.types import Question

STUDENTS = ("S", "M")
ORDERS = (("plain", "1C1W", "1C"), ("plain", "Sum1C1W", "Sum1C"))
# Where the shipped models can break the order, as (lower, higher, flavour) -> measured accuracies.
EXCEPTIONS = {
    ("M plain*", "M Sum1C1W", "choice"): ".820 < .884 at seed 1, .803 > .800 at seed 2, .766 < .804 at seed 3",
}
MAX_TOKENS = 80
TASK = Toy()


@dataclass
class Sampler:
    """A model with its tokenizer: user messages in, texts out."""

    model: Qwen
    tokenizer: object

    @classmethod
    def load(cls, folder: Path) -> "Sampler":
        return cls(load_model(folder), load_tokenizer(folder))

    def texts(self, messages: Sequence[str], n: int, *, seed: int, temperature: float = 1.0) -> list[list[str]]:
        """Sample n responses to each message."""
        trunks = [np.array(chat_tokens(self.tokenizer, message), np.int32) for message in messages]
        sampling = Sampling(
            MAX_TOKENS, stop_token_ids(self.tokenizer, self.model.config), temperature=temperature, seed=seed
        )
        rollouts = Engine(self.model).run(trunks, Requests.continuations(trunks, n), sampling)
        flat = [
            self.tokenizer.decode(row[:length], skip_special_tokens=True)
            for row, length in zip(rollouts.tokens, rollouts.length, strict=True)
        ]
        return [flat[start : start + n] for start in range(0, len(flat), n)]


def check(
    models_dir: str | Path = MODELS,
    *,
    n_questions: int = 40,
    samples: int = 16,
    seed: int = 1,
    report: Callable[[str], None] = print,
) -> tuple[pd.DataFrame, bool]:
    """Measure every role at temperature 1 on held-out questions and compare with the expected order.

    Returns:
        A table (role, flavour, context, accuracy, questions, p10, p50, p90: deciles of pass rates over questions)
        and whether every pair is in order except for the `EXCEPTIONS`. The students' rows with a context, and
        their plain row named "plain*", are over questions for which the student gave both a correct and a wrong
        demonstration.
    """
    folder, rows = Path(models_dir), []
    questions = TASK.load(f"all:{n_questions}:{seed}")
    writer = Sampler.load(folder / "X")
    report(f"X writes {exact_summaries(writer, questions, seed):.0%} of the summaries word for word as expected")
    for role in ROLES:
        sampler = Sampler.load(folder / role)
        rows += _measure(sampler, role, "plain", questions, [q.text for q in questions], samples, seed)
        if role in STUDENTS:
            rows += _measure_contexts(sampler, writer, role, questions, samples, seed)
    table = pd.DataFrame(rows)
    report(table.to_string(index=False, float_format="{:.3f}".format))
    return table, _in_order(table, report)


def exact_summaries(writer: Sampler, questions: list[Question], seed: int) -> float:
    """Share of a student's solutions, one a question, whose greedy summary is the expected one."""
    rng = random.Random(seed)
    solutions = [Writer(ROLES["S"].error_scale).write(toy.parse(q.text), rng) for q in questions]
    requests = [toy.summarize_prompt(solution.text, q) for solution, q in zip(solutions, questions, strict=True)]
    written = writer.texts(requests, 1, seed=seed, temperature=0.0)
    return float(np.mean([text == solution.summary for (text,), solution in zip(written, solutions, strict=True)]))


def _measure(
    sampler: Sampler, role: str, context: str, questions: list[Question], messages: list[str], samples: int, seed: int
) -> list[dict]:
    texts = sampler.texts(messages, samples, seed=seed)
    rates = np.array(
        [np.mean([TASK.grade(text, q.gold) is True for text in group]) for q, group in zip(questions, texts)]
    )
    rows = []
    for flavour in toy.FLAVOURS:
        chosen = rates[[q.meta["flavour"] == flavour for q in questions]]
        deciles = dict(zip(("p10", "p50", "p90"), np.percentile(chosen, (10, 50, 90)))) if len(chosen) else {}
        accuracy = chosen.mean() if len(chosen) else np.nan
        rows.append(
            {"role": role, "flavour": flavour, "context": context, "accuracy": accuracy, "questions": len(chosen)}
            | deciles
        )
    return rows


def _measure_contexts(
    sampler: Sampler, writer: Sampler, role: str, questions: list[Question], samples: int, seed: int
) -> list[dict]:
    """Measure self-distillation contexts made of the student's own solutions, summaries written by X."""
    drawn = sampler.texts([q.text for q in questions], 2 * samples, seed=seed + 1)
    kept, pairs = [], []
    for question, texts in zip(questions, drawn, strict=True):
        correct = [text for text in texts if TASK.grade(text, question.gold) is True]
        wrong = [text for text in texts if TASK.grade(text, question.gold) is False]
        if correct and wrong:
            kept.append(question)
            pairs.append((correct[0], wrong[0]))
    requests = [toy.summarize_prompt(text, q) for q, pair in zip(kept, pairs, strict=True) for text in pair]
    summaries = [group[0] for group in writer.texts(requests, 1, seed=seed, temperature=0.0)]
    summary_pairs = list(zip(summaries[::2], summaries[1::2], strict=True))
    rows = _measure(sampler, role, "plain*", kept, [q.text for q in kept], samples, seed + 2)
    for kind, (_, n_wrong) in toy.CONTEXTS.items():
        demonstrations = summary_pairs if kind.startswith("Sum") else pairs
        messages = [
            toy.render_context(kind, [right], [wrong] if n_wrong else []) + q.text
            for q, (right, wrong) in zip(kept, demonstrations, strict=True)
        ]
        rows += _measure(sampler, role, kind, kept, messages, samples, seed + 2)
    return rows


def _in_order(table: pd.DataFrame, report: Callable[[str], None]) -> bool:
    accuracy = table.set_index(["role", "context", "flavour"])["accuracy"]
    ok = True
    for flavour in toy.FLAVOURS:
        teachers = [role for role in ROLES if role not in STUDENTS]
        pairs = [("S plain", "M plain"), *(("M plain", f"{teacher} plain") for teacher in teachers)]
        for student in STUDENTS:
            for order in ORDERS:
                names = [f"{student} {'plain*' if context == 'plain' else context}" for context in order]
                pairs += list(pairwise(names))
        for lower, higher in pairs:
            low, high = (accuracy[(*name.split(), flavour)] for name in (lower, higher))
            if not low < high:
                named = EXCEPTIONS.get((lower, higher, flavour))
                ok = ok and named is not None
                report(
                    f"{flavour}: {lower} {low:.3f} is not below {higher} {high:.3f}"
                    + (f" (a named exception: {named})" if named else "")
                )
    report("ordering: " + ("as expected" if ok else "broken"))
    return ok
