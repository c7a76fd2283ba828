"""Accuracy of a model on a task: avg@n, pass@k, and how much of the way to a teacher a student went."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy.special import comb

from jaxopd.errors import InputError
from jaxopd.models import Qwen, chat_tokens, stop_token_ids
from jaxopd.rollouts import LENGTH, Engine, Requests, Sampling
from jaxopd.tasks import find_task
from jaxopd.types import Question


@dataclass(frozen=True)
class EvalConfig:
    """How accuracy is measured; the defaults are paper B's."""

    task: str = "math"
    """boolq, mmlu, math or toy."""
    questions: str = ""
    """File of questions."""
    samples: int = 16
    """Responses a question: the n of avg@n."""
    temperature: float = 0.7
    top_p: float = 0.95
    max_tokens: int = 31744
    """Longest response, tokens; shortened to what the context leaves."""
    thinking: bool | None = None
    """enable_thinking of the chat template; None leaves its default."""
    slots: int = 256
    """Sequences decoded at once."""
    seed: int = 0
    """Seed of every draw."""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise InputError(f"samples: found {self.samples}, expected at least 1")


def evaluate(
    model: Qwen, tokenizer: Any, config: EvalConfig, questions: Sequence[Question] | None = None
) -> pd.DataFrame:
    """Sample and grade: one row a question with samples, correct, answered, truncated and mean length."""
    task = find_task(config.task)
    if questions is None and not config.questions:
        raise InputError("--questions: found none, expected a file of questions")
    questions = task.load(config.questions) if questions is None else list(questions)
    if not questions:
        raise InputError(f"{config.questions}: found no question, expected at least one")
    prompts = [chat_tokens(tokenizer, q.text, thinking=config.thinking) for q in questions]
    room = model.config.max_positions - max(map(len, prompts))
    if room < 1:
        raise InputError(f"{config.questions}: found a prompt that fills the context of {model.config.max_positions}")
    options = {"temperature": config.temperature, "top_p": config.top_p, "seed": config.seed}
    sampling = Sampling(min(config.max_tokens, room), stop_token_ids(tokenizer, model.config), **options)
    engine = Engine(model, slots=config.slots)
    rolled = engine.run(prompts, Requests.continuations(prompts, config.samples), sampling)
    texts = [tokenizer.decode(row[:n], skip_special_tokens=True) for row, n in zip(rolled.tokens, rolled.length)]
    owner = np.repeat(np.arange(len(questions)), config.samples)
    graded = [task.grade(text, questions[q].gold) for text, q in zip(texts, owner, strict=True)]
    rows = pd.DataFrame(
        {
            "question": [questions[q].id for q in owner],
            "correct": [grade is True for grade in graded],
            "answered": [grade is not None for grade in graded],
            "truncated": rolled.finish == LENGTH,
            "length": rolled.length,
        }
    )
    by_question = rows.groupby("question", sort=False)
    return by_question.agg(
        samples=("correct", "size"),
        correct=("correct", "sum"),
        answered=("answered", "sum"),
        truncated=("truncated", "sum"),
        length=("length", "mean"),
    ).reset_index()


def pass_at(samples: Int[np.ndarray, "Q"], correct: Int[np.ndarray, "Q"], k: int) -> Float[np.ndarray, "Q"]:
    """Estimate, without bias, the chance that one of k responses is right: 1 - C(n - c, k) / C(n, k).

    Raises InputError where fewer than k responses were drawn.
    """
    samples, correct = np.asarray(samples), np.asarray(correct)
    if not 1 <= k <= samples.min():
        raise InputError(f"pass@k: found k {k}, expected 1 to {samples.min()}, the responses drawn")
    return 1.0 - comb(samples - correct, k) / comb(samples, k)


def summary(table: pd.DataFrame) -> dict[str, float]:
    """Summarise an evaluation: avg@n, its standard error over questions, pass@k for powers of two up to n."""
    rate = table["correct"] / table["samples"]
    n = int(table["samples"].min())
    error = float(rate.std(ddof=1) / np.sqrt(len(rate))) if len(rate) > 1 else float("nan")
    found = {"avg": float(rate.mean()), "avg_error": error}
    ks = [1 << power for power in range(n.bit_length()) if 1 << power <= n]
    found |= {f"pass@{k}": float(pass_at(table["samples"], table["correct"], k).mean()) for k in ks}
    drawn = table["samples"].sum()
    return found | {
        "answered": float(table["answered"].sum() / drawn),
        "truncated": float(table["truncated"].sum() / drawn),
        "length": float(table["length"].mean()),
    }


def gap_recovery(before: float, after: float, teacher: float) -> float:
    """Compute (after - before) / (teacher - before), paper B's share of the gap that was closed; NaN without a gap."""
    return (after - before) / (teacher - before) if teacher != before else float("nan")
