r"""Is a stated answer equal to the gold one? Exact arithmetic where it suffices, else math-verify, confined.

Most answers are integers, fractions or words, and are settled here at once, without rounding: 0.3333 is not 1/3.
"""

import re
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

from jaxopd.confined import Confined
from jaxopd.tasks.answers import plain, read_truth

LONGEST = 1000  # characters; a longer answer is wrong
INTEGER = r"(?:\d{1,3}(?:,\d{3})+|\d{1,300})"
NUMBER = rf"[+-]?\s?(?:{INTEGER}(?:\.\d{{0,300}})?|\.\d{{1,300}})(?:e[+-]?\d{{1,3}})?(?:\s?/\s?{INTEGER})?"
FRACTION = re.compile(rf"([+-]?)\s?\\[dt]?frac(?:\{{({INTEGER})\}}\{{({INTEGER})\}}|(\d)(\d))")
CHOICE = re.compile(rf"\(([A-H])\)\s?({NUMBER})|\(?([A-H])\)?")
LAYOUT = re.compile(
    r"(?<!\\)\\(?:(?:left|right|displaystyle)(?![A-Za-z])|[,!;: ])|\{,\}|\^\{?\\circ\}?|\\degree(?![A-Za-z])|°|[$\n]"
)


def same_answer(answer: str, gold: str) -> bool:
    """Decide whether an answer equals the gold one; one that cannot be compared in time and memory does not."""
    if len(answer) > LONGEST or len(gold) > LONGEST:
        return False
    return _same(_clean(answer), _clean(gold))


@lru_cache(maxsize=1 << 16)
def _same(answer: str, gold: str) -> bool:
    if answer == gold:
        return True
    numbers = _number(answer), _number(gold)
    if None not in numbers:
        return numbers[0] == numbers[1]
    truths = read_truth(answer), read_truth(gold)
    if None not in truths:
        return truths[0] == truths[1]
    if (choice := _same_choice(answer, gold)) is not None:
        return choice
    return WORKER.ask([gold, answer]) is True


def _clean(text: str) -> str:
    text = LAYOUT.sub(lambda token: "," if token[0] == "{,}" else "" if token[0] != "\n" else " ", text)
    return text.strip().rstrip(".").strip()


def _number(text: str) -> Fraction | None:
    r"""Read an integer, a decimal, a/b or \frac{a}{b} exactly."""
    if parts := FRACTION.fullmatch(text):
        sign, *digits = (part for part in parts.groups() if part is not None)
        text = f"{sign}{digits[0]}/{digits[1]}"
    if not re.fullmatch(NUMBER, text, re.IGNORECASE):
        return None
    numerator, _, denominator = re.sub(r"[\s,]", "", text).partition("/")
    divisor = Fraction(denominator or 1)
    return Fraction(numerator) / divisor if divisor else None


def _same_choice(answer: str, gold: str) -> bool | None:
    """Compare option letters, or the value beside the letter that only one side names: ``(B) 12`` and 12."""
    sides = [CHOICE.fullmatch(plain(text)) if re.search(r"[A-H]", text[:20]) else None for text in (answer, gold)]
    letters = [(side[1] or side[3]) if side else None for side in sides]
    if None not in letters:
        return letters[0] == letters[1]
    for side, other in zip(sides, (gold, answer), strict=True):
        if side and side[2] and _number(other) is not None:
            return _number(side[2]) == _number(other)
    return None


WORKER = Confined(Path(__file__).with_name("equality_worker.py"))
