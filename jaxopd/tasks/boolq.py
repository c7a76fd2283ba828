"""BoolQ: a passage and a yes/no question, one JSON object a line."""

import re
from pathlib import Path

from jaxopd.errors import InputError
from jaxopd.tasks.answers import TRUTH, last_answer, plain, read_truth, visible, whole
from jaxopd.tasks.prompts import render
from jaxopd.tasks.records import read_rows
from jaxopd.types import Question

ASSERTION = re.compile(r"\b(?:is|are)\s+(not\s+)?(true|false)\b", re.IGNORECASE)
OPENING = re.compile(rf"\W*{TRUTH}\s*[.,;:—]", re.IGNORECASE)


class BoolQ:
    """Yes/no questions about a passage; the gold answer is "True" or "False"."""

    name = "boolq"

    def load(self, path: str | Path) -> list[Question]:
        """Read a JSONL file with fields question, passage, answer (a JSON boolean) and, if known, title.

        Raises:
            InputError: names the file, the line and the field.
        """
        questions = []
        for row in read_rows(path):
            question, passage = row.text("question"), row.text("passage")
            prompt = render(
                "boolq",
                title=row.text("title", default=""),
                passage=passage,
                question=question.rstrip("?") + "?",
            )
            gold = str(row.typed("answer", bool, "true or false"))
            questions.append(Question(row.name, self.name, prompt, gold, {"line": row.line}))
        return questions

    def grade(self, text: str, gold: str) -> bool | None:
        """Compare the last stated truth value with the gold one; None where none is stated.

        Raises:
            InputError: the gold answer is not a truth value.
        """
        expected = read_truth(str(gold))
        if expected is None:
            raise InputError(f"boolq: gold answer: found {gold!r}, expected True or False")
        answer = last_answer(text, box=read_truth, stated=read_truth, line=whole(read_truth)) or _from_prose(text)
        return None if answer is None else answer == expected


def _from_prose(text: str) -> str | None:
    """Read the last sentence that asserts "is (not) true/false", else an opening "Yes," or "No."."""
    shown = plain(visible(text) or "")
    for sentence in reversed(re.split(r"(?<=[.!?])\s", shown)):
        asserted = list(ASSERTION.finditer(sentence))
        if asserted and not re.search(r"\?|\b(?:whether|if)\b", sentence):
            negated, value = asserted[-1].groups()
            return str((value.lower() == "true") != bool(negated))
    opening = OPENING.match(shown)
    return read_truth(opening[1]) if opening else None
