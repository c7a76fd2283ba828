"""MMLU: four-way multiple choice, CSV without header: question, four options, the letter."""

import csv
import io
import re
from pathlib import Path

from jaxopd.errors import InputError
from jaxopd.tasks.answers import STATED_WIDTH, last_answer, plain, visible
from jaxopd.tasks.prompts import render
from jaxopd.tasks.records import check_file, decode, nonempty
from jaxopd.types import Question

LETTERS = "ABCD"
SPLIT = re.compile(r"_(test|val|dev)$")


class MMLU:
    """Four-way multiple choice; the gold answer is a letter from A to D."""

    name = "mmlu"

    def load(self, path: str | Path) -> list[Question]:
        """Read one CSV file, or every ``*_test.csv`` of a folder (or of its ``test`` subfolder) in name order.

        Raises:
            InputError: names the file and the line on which the faulty row starts.
        """
        return [question for file in _files(Path(path)) for question in self._load_subject(file)]

    def _load_subject(self, path: Path) -> list[Question]:
        subject = SPLIT.sub("", path.stem)
        topic = subject.replace("_", " ")
        questions = []
        for number, (line, (question, *options, letter)) in enumerate(_rows(path)):
            choices = list(zip(LETTERS, options, strict=True))
            prompt = render("mmlu", subject=topic, question=question, choices=choices)
            meta = {"line": line, "subject": subject}
            questions.append(Question(f"{path.stem}-{number}", self.name, prompt, letter, meta))
        return nonempty(questions, path)

    def grade(self, text: str, gold: str) -> bool | None:
        """Compare the last stated letter with the gold one; None where none is stated.

        Raises:
            InputError: the gold answer is not a letter from A to D.
        """
        expected = str(gold).strip().upper()
        if expected not in tuple(LETTERS):
            raise InputError(f"mmlu: gold answer: found {gold!r}, expected A, B, C or D")
        answer = last_answer(text, box=read_letter, stated=read_letter, line=_read_line) or _read_option(text)
        return None if answer is None else answer == expected


def read_letter(content: str) -> str | None:
    """Read an option letter at the start of a stated answer; None for articles, other letters and hedges.

    "not A, it is B" is B. A lower-case letter counts only when it stands alone.
    """
    content = plain(content[:STATED_WIDTH])
    if denied := re.match(r"not\b.*?\b(?:it is|it's|but|rather)\s", content, re.IGNORECASE):
        content = content[denied.end() :]
    match = re.match(r"(?:(?:option|choice|letter)\s)?[\s(\[]*([A-Da-d])(?![\w'’])(.*)", content, re.IGNORECASE)
    if match is None:
        return None
    letter, rest = match.groups()
    hedged = re.match(r"\W*(?:\b(?:or|and)\s|[/&,])\s?(?:option\s)?\W*[A-D]\b", rest)
    alone = re.fullmatch(r"\W*", rest)
    article = letter == "A" and re.match(r"\s(?!(?:because|since|as|is|for|with|and)\b)[a-z]", rest)
    if hedged or article or (letter.islower() and not alone):
        return None
    return letter.upper()


def _read_line(line: str) -> str | None:
    match = re.fullmatch(r"\W{0,9}([A-D])\W{0,9}", line)
    return match[1] if match else None


def _read_option(text: str) -> str | None:
    """Read a one-line response that is an option written out, such as "(B) Paris"."""
    shown = (visible(text) or "").strip()
    match = re.match(r"\W{0,9}([A-D])[).:]\s", shown)
    return match[1] if match and not re.search(r"\n|\b[A-D][).:]\s", shown[match.end() :]) else None


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [check_file(path, "a CSV file or a folder of *_test.csv")]
    files = sorted(path.glob("*_test.csv")) or sorted(path.glob("test/*_test.csv"))
    if not files:
        raise InputError(f"{path}: found no *_test.csv in the folder, expected one for each subject")
    return files


def _rows(path: Path):
    """Yield (line where the row starts, its six cells)."""
    reader = csv.reader(io.StringIO(decode(path), newline=""), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise InputError(f"{path}: line {line}: found a malformed CSV row ({error})") from None
        if cells is None:
            return
        if not cells:
            continue
        if len(cells) != 6:
            raise InputError(
                f"{path}: line {line}: found {len(cells)} cells, expected 6: question, four options, letter"
            )
        cells = [cell.strip() for cell in cells]
        if cells[5] not in tuple(LETTERS):
            raise InputError(f"{path}: line {line}: answer: found {cells[5][:40]!r}, expected A, B, C or D")
        if not cells[0]:
            raise InputError(f"{path}: line {line}: question: found an empty cell, expected text")
        yield line, cells
