"""Responses in a file: a teacher's rollouts, filtered, for an off-policy cold start (paper B, 5.1 and App. C.1)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxopd.errors import InputError
from jaxopd.models import chat_tokens, check_vocabulary, load_model, load_tokenizer, stop_token_ids
from jaxopd.rollouts import LENGTH, Engine, Requests, Sampling
from jaxopd.tasks import find_task
from jaxopd.tasks.records import check_file, decode
from jaxopd.train.health import REPEATED, repetition
from jaxopd.types import Question


@dataclass(frozen=True)
class CorpusConfig:
    """How a teacher's responses are drawn; the defaults are paper B's."""

    teacher: str = ""
    """Hugging Face folder or hub id of the model that answers."""
    task: str = "math"
    """boolq, mmlu, math or toy."""
    questions: str = ""
    """File of questions."""
    samples: int = 1
    """Responses a question."""
    temperature: float = 0.7
    top_p: float = 0.95
    max_tokens: int = 12288
    """Longest response, tokens; truncated ones are left out."""
    correct_only: bool = False
    """Leave out what is not graded correct."""
    dtype: str = "float32"
    """Parameters and activations: float32 or bfloat16."""
    thinking: bool | None = None
    """enable_thinking of the chat template; None leaves its default."""
    slots: int = 256
    """Sequences decoded at once."""
    seed: int = 0
    """Seed of every draw."""


@dataclass(frozen=True)
class Line:
    """A response to question number `question`, its stop token included."""

    question: int
    tokens: tuple[int, ...]


def write_corpus(config: CorpusConfig, path: str | Path) -> dict[str, int]:
    """Draw a teacher's responses, leave truncated and repetitive ones out, and write the rest as JSONL.

    Gives how many were drawn, kept and left out for each reason.
    """
    if config.samples < 1:
        raise InputError(f"samples: found {config.samples}, expected at least 1")
    task, tokenizer = find_task(config.task), load_tokenizer(config.teacher)
    model = load_model(config.teacher, dtype=config.dtype)
    check_vocabulary(tokenizer, model.config, config.teacher)
    questions = task.load(config.questions)
    prompts = [chat_tokens(tokenizer, q.text, thinking=config.thinking) for q in questions]
    options = {"temperature": config.temperature, "top_p": config.top_p, "seed": config.seed}
    sampling = Sampling(config.max_tokens, stop_token_ids(tokenizer, model.config), **options)
    rolled = Engine(model, slots=config.slots).run(prompts, Requests.continuations(prompts, config.samples), sampling)
    counts = dict.fromkeys(("drawn", "kept", "truncated", "repetitive", "incorrect"), 0)
    lines = []
    for row, (tokens, length, finish) in enumerate(zip(rolled.tokens, rolled.length, rolled.finish, strict=True)):
        question = questions[row // config.samples]
        text = tokenizer.decode(tokens[:length], skip_special_tokens=True)
        fault = ""
        if finish == LENGTH:
            fault = "truncated"
        elif repetition(tokens[:length]) > REPEATED:
            fault = "repetitive"
        elif config.correct_only and task.grade(text, question.gold) is not True:
            fault = "incorrect"
        counts["drawn"] += 1
        counts[fault or "kept"] += 1
        if not fault:
            lines.append({"question": question.id, "response": text, "tokens": tokens[:length].tolist()})
    if not lines:
        raise InputError(f"{path}: found no response to keep ({counts}), expected at least one")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    unfinished.replace(path)
    return counts


def load_corpus(path: str | Path, questions: Sequence[Question]) -> list[Line]:
    """Read the responses to `questions` from a file of `write_corpus`; lines of other questions are passed over.

    Raises InputError, naming the line, on what is no such file, and where no line is of these questions.
    """
    number = {question.id: index for index, question in enumerate(questions)}
    found = []
    # not splitlines(): a response may hold U+2028, which only str.splitlines takes for a line end
    lines = decode(check_file(Path(path), "a corpus in JSONL")).split("\n")
    for index, line in enumerate(lines if lines[-1] else lines[:-1], 1):
        try:
            row = json.loads(line)
            question, tokens = row["question"], tuple(int(token) for token in row["tokens"])
        except (ValueError, KeyError, TypeError):
            raise InputError(f'{path}: line {index}: found {line[:60]!r}, expected {{"question", "tokens"}}') from None
        if question in number and tokens and min(tokens) >= 0:
            found.append(Line(number[question], tokens))
    if not found:
        raise InputError(f"{path}: found no response to the training questions, expected at least one")
    return found
