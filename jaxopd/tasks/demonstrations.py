"""Demonstrations: sampled solutions of questions, kept as JSONL, for teachers to be shown.

A line: {"question": id, "text": solution, "correct": true, "source": "student" or "large", "summary": text or null}.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from jaxopd.tasks.records import read_rows

SOURCES = ("student", "large")


@dataclass(frozen=True)
class Demonstration:
    """A graded solution of a question, with the model that wrote it and, once made, its summary."""

    question: str
    text: str
    correct: bool
    source: str = "student"
    summary: str | None = None


def load_demonstrations(path: str | Path) -> list[Demonstration]:
    """Read a JSONL file of demonstrations.

    Raises:
        InputError: names the file, the line and the field.
    """
    demonstrations = []
    for row in read_rows(path):
        source = row.text("source", default="student")
        if source not in SOURCES:
            raise row.fail("source", repr(source), " or ".join(SOURCES))
        demonstrations.append(
            Demonstration(
                question=row.text("question"),
                text=row.text("text"),
                correct=row.typed("correct", bool, "true or false"),
                source=source,
                summary=row.typed("summary", str, "text or null", default=None),
            )
        )
    return demonstrations


def save_demonstrations(path: str | Path, demonstrations: Iterable[Demonstration]) -> None:
    """Write demonstrations as the JSONL that `load_demonstrations` reads."""
    lines = [json.dumps(asdict(demonstration), ensure_ascii=False) + "\n" for demonstration in demonstrations]
    Path(path).write_text("".join(lines), encoding="utf-8")


def fingerprint(demonstration: Demonstration) -> str:
    """Return a short identifier of a demonstration: a hash of its question and text."""
    return _digest(demonstration.question, demonstration.text)[:12]


def rank(seed: int, demonstration: Demonstration) -> str:
    """Return a key whose order is a random order of demonstrations, the same in every process."""
    return _digest(str(seed), demonstration.question, demonstration.text)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\x1f".join(parts).encode("utf-8", "surrogatepass")).hexdigest()
