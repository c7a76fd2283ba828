r"""Is a stated answer equal to the gold one? Exact arithmetic where it suffices, else math-verify in a worker process.

Most answers are integers, fractions or words, and are settled here at once, without rounding: 0.3333 is not 1/3.
The rest goes to `equality_worker.py`, a process that the kernel ends when a comparison uses more than its share of
processor time: a signal handler would wait for ``9^9^9^9`` to finish, and works on the main thread only.
"""

import atexit
import json
import re
import selectors
import subprocess
import sys
import threading
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

from jaxopd.tasks.answers import plain, read_truth

LONGEST = 1000  # characters; a longer answer is wrong
STARTUP_SECONDS = 300
PATIENCE_SECONDS = 60  # of wall time, on a machine too busy to give the worker its processor time
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
    return WORKER.compare(answer, gold)


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


class Worker:
    """A process that compares expressions one at a time; a comparison that kills it is answered by False."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: Any = None  # a Popen whose pipes are always open

    def compare(self, answer: str, gold: str) -> bool:
        """Return math-verify's verdict; False where it runs out of processor time or memory.

        Raises:
            RuntimeError: math-verify cannot be loaded.
        """
        with self._lock:
            self._start()
            reply = b""
            try:
                self._process.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
                reply = self._reply(PATIENCE_SECONDS)
            except BrokenPipeError:
                pass
            finally:
                if not reply:  # killed, or interrupted: a late reply must not answer the next question
                    self._stop()
            return reply == b"1\n"

    def close(self) -> None:
        """End the process; the next comparison starts another."""
        with self._lock:
            self._stop()

    def _start(self) -> None:
        if self._process is not None:
            return
        # -P keeps this folder off the import path, where math.py would hide the standard library's
        command = [sys.executable, "-P", str(Path(__file__).with_name("equality_worker.py"))]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
        )
        greeting = self._reply(STARTUP_SECONDS)
        if greeting != b"ready\n":
            self._stop()
            raise RuntimeError(f"the grading process did not start: {greeting.decode().strip() or 'it ended'}")

    def _reply(self, seconds: float) -> bytes:
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            return self._process.stdout.readline() if selector.select(seconds) else b""

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            self._process.stdout.close()
            self._process = None


WORKER = Worker()
atexit.register(WORKER.close)
