r"""Mathematics: AIME, AMC, DAPO, DeepMath and the like, as JSON, JSONL or parquet.

A record's question is its first field among question, problem and prompt (text, or a list of chat messages); its
gold answer is its field answer, else reward_model.ground_truth.
"""

import re
import reprlib
from pathlib import Path

from jaxopd.errors import InputError
from jaxopd.tasks.answers import STATED_WIDTH, last_answer, plain, read_truth
from jaxopd.tasks.equality import NUMBER, same_answer
from jaxopd.tasks.prompts import render
from jaxopd.tasks.records import Row, read_rows
from jaxopd.types import Question

TEXT_FIELDS = ("question", "problem", "prompt")
INSTRUCTED = re.compile(r"\\boxed|\bAnswer:")
DELIMITED = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]")
COMMAND = re.compile(r"\\[A-Za-z]+(?:\{[A-Za-z ]*\})?")
# an ordinary word: not a LaTeX command, a function's name or a short product of symbols
PROSE = re.compile(
    r"(?<![A-Za-z])(?!(?:sin|cos|tan|log|exp|sqrt|min|max|gcd|lcm|mod)\b)"
    r"(?:[A-Za-z]{3,}|(?:as|is|of|in|at|if|or|so|by|to|we|it|on|be|an)\b)"
)
LINE_END_WIDTH = 60  # characters of a last line without box or "Answer:" that may hold the answer
# JSON escapes that a careless writer made of LaTeX commands: "\frac" read back as a form feed and "rac"
LOST_COMMANDS = [
    (re.compile(r"\x0c(?=[a-z])"), r"\\f"),
    (re.compile(r"\x08(?=[a-z])"), r"\\b"),
    (re.compile(r"\t(?=(?:riangle|ext|extbf|imes|heta|frac|an|au|ilde|o)\b)"), r"\\t"),
    (re.compile(r"\r(?=(?:ight|angle|ho|floor|ceil|m)\b)"), r"\\r"),
]


class Math:
    """Problems with an integer, a LaTeX expression or a word as the gold answer."""

    name = "math"

    def load(self, path: str | Path) -> list[Question]:
        """Read a file of problems; a prompt that already says how to give the answer is kept as it is.

        Raises:
            InputError: names the file, the line and the field.
        """
        return [self._question(row) for row in read_rows(path)]

    def _question(self, row: Row) -> Question:
        problem = _mend(_problem(row))
        text = problem if INSTRUCTED.search(problem) else render("math", problem=problem)
        return Question(row.name, self.name, text, _mend(_gold(row)), {"line": row.line})

    def grade(self, text: str, gold: str) -> bool | None:
        """Compare the last stated answer with the gold one; None where none is stated.

        Raises:
            InputError: the gold answer is blank.
        """
        if not str(gold).strip():
            raise InputError(f"math: gold answer: found {gold!r}, expected an answer")
        answer = last_answer(text, box=lambda content: content, stated=_read_stated, line=_read_line)
        return None if answer is None else same_answer(answer, str(gold))


def _problem(row: Row) -> str:
    field = next((name for name in TEXT_FIELDS if row.values.get(name) is not None), None)
    if field is None:
        raise row.fail("question", "nothing", f"one of the fields {', '.join(TEXT_FIELDS)}")
    messages = row.values[field]
    if not isinstance(messages, list):
        return row.text(field)
    expected = 'text or chat messages {"role": "user" or "system", "content": text}'
    for message in messages:
        fields = message if isinstance(message, dict) else {}
        if fields.get("role") not in ("user", "system") or not isinstance(fields.get("content"), str):
            raise row.fail(field, f"message {reprlib.repr(message)}", expected)
        row.encodable(field, fields["content"])
    if not any(message["content"].strip() for message in messages):
        raise row.fail(field, "no message", expected)
    return "\n\n".join(message["content"] for message in messages)


def _gold(row: Row) -> str:
    field, answer = "answer", row.values.get("answer")
    if answer is None:
        reward_model = row.typed("reward_model", dict, "a field answer or reward_model", default={})
        field, answer = "answer or reward_model.ground_truth", reward_model.get("ground_truth")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
        raise row.fail(field, "nothing" if answer is None else reprlib.repr(answer), "text or a number")
    return row.encodable(field, str(answer)).strip()


def _mend(text: str) -> str:
    """Restore LaTeX commands whose backslash and first letter were read as a control character."""
    for lost, command in LOST_COMMANDS:
        text = lost.sub(command, text)
    return text


def _read_stated(content: str) -> str | None:
    """Read the expression that follows "Answer:": between dollars, or up to the first ordinary word."""
    content = _trim(content[:STATED_WIDTH])
    if delimited := DELIMITED.match(content):
        return next(group for group in delimited.groups() if group)
    if content.startswith(("$", r"\(", r"\[")):
        return None
    word = PROSE.search(COMMAND.sub(lambda command: "#" * len(command[0]), content))
    if word is None:
        return content if re.search(r"[\w\\+]", content) else None
    expression = _trim(content[: word.start()]).rstrip(",;:(")
    return expression if re.search(r"[\d\\]", expression) else read_truth(content)


def _read_line(line: str) -> str | None:
    """Read a last line that is, or ends in, an expression: "204", "so $x = 5$.", "x = 5"."""
    if "boxed" in line or "fbox" in line:
        return None
    content = _trim(line)
    delimited = list(DELIMITED.finditer(content[-STATED_WIDTH:]))
    if delimited and delimited[-1].end() == len(content[-STATED_WIDTH:]):
        return next(group for group in delimited[-1].groups() if group)
    if len(content) > LINE_END_WIDTH:
        return None
    if re.fullmatch(NUMBER, content) or (read_truth(plain(content)) and " " not in content):
        return content
    ending = re.search(rf"(?:=|\b(?:is|get|gives|equals))\s?({NUMBER})$", content)
    return ending[1] if ending else None


def _trim(text: str) -> str:
    return text.strip("*_ \t\r").rstrip(".* ")
