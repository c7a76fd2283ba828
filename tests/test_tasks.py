"""Graders: what counts as the answer, what equals the gold one, and hostile responses."""

import json
import shutil
import threading
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxopd import confined
from jaxopd.errors import InputError
from jaxopd.tasks import equality, grade
from jaxopd.tasks.answers import visible

GOLDEN = json.loads((Path(__file__).parent / "goldens" / "grading.json").read_text())


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: f"{row['task']}-{row['text'][:25]}-{row['gold'][:8]}")
def test_golden_verdicts(row):
    assert grade(row["task"], row["text"], row["gold"]) is row["expected"]


NUMBERS = st.fractions(max_denominator=40, min_value=-99, max_value=99)


@settings(max_examples=60, deadline=None)
@given(NUMBERS, NUMBERS)
def test_exact_arithmetic_agrees_with_math_verify(left, right):
    answer, gold = str(left), rf"\frac{{{right.numerator}}}{{{right.denominator}}}"
    assert equality.same_answer(answer, gold) == (left == right)
    assert equality.WORKER.ask([gold, answer]) is (left == right)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=6, min_value=-(10**9), max_value=10**9))
def test_decimals_are_read_exactly(value):
    assert equality.same_answer(f"{value:,}", str(value))
    assert not equality.same_answer(str(Fraction(value) + Fraction(1, 10**9)), str(value))


ANSWERS = {"boolq": ["True", "False"], "mmlu": list("ABCD"), "math": ["17", "-3", r"\frac{2}{3}"]}
PROSE = st.text(st.sampled_from("lorem ipsum,\n"), max_size=60)


@pytest.mark.parametrize("task", ANSWERS)
@given(data=st.data())
def test_last_answer_wins_and_thinking_does_not_count(task, data):
    first, last, hidden = (data.draw(st.sampled_from(ANSWERS[task])) for _ in range(3))
    opening, ending = data.draw(PROSE), data.draw(PROSE)
    state = data.draw(st.sampled_from([r"\boxed{%s}", "Answer: $%s$", "The answer is $%s$."]))
    answer = f"<think>{opening} \\boxed{{{hidden}}}</think>{opening}\nAnswer: ${first}$\n{state % last}\n{ending}"
    for gold in ANSWERS[task]:
        assert grade(task, answer, gold) is (gold == last)
        assert grade(task, f"{answer}<think>{ending}", gold) is None


@settings(deadline=None)
@given(
    st.text(st.characters(), max_size=200)
    | st.text(st.sampled_from(r"\boxed{}<think>/Answer: not1(,)$^_ "), max_size=99)
)
def test_any_text_gets_a_verdict(text):
    for task, gold in (("boolq", "True"), ("mmlu", "B"), ("math", r"\sqrt{7}"), ("math", "5")):
        assert grade(task, text, gold) in (True, False, None)


@given(st.lists(st.sampled_from(["<think>", "</think>", "a", "b"])))
def test_visible_text_matches_a_character_walk(pieces):
    shown, inside = "", False
    for piece in pieces:
        if piece == "<think>":
            inside = True
        elif piece == "</think>":
            shown, inside = shown if inside else "", False
        else:
            shown += "" if inside else piece
    assert visible("".join(pieces)) == (None if inside else shown)


HOSTILE = [
    r"\boxed{9^9^9^9}",
    r"\boxed{9^{9^{9^9}}}",
    r"\boxed{\sum_{n=1}^{10^{12}} n^n}",
    rf"\boxed{{{'9' * 900}}}",
    rf"\boxed{{{'9' * 100_000}}}",
    rf"\boxed{{{'(' * 300}1{')' * 300}}}",
    r"\boxed{" * 50_000,
    "<think>" * 50_000,
    "</think>" * 50_000,
    "Answer: " * 50_000,
    "Answer: " + "9" * 500_000,
    "answer" + " " * 500_000,
    "$" * 200_000,
    "\\" * 200_000,
    "\n" * 200_000,
    "is not true? " * 50_000,
    "\\boxed{\x00\ud800}",
    r"\boxed{1/0}",
    r"\boxed{1e999}",
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:24].encode("ascii", "replace").decode())
def test_hostile_answers_are_refused(text):
    for task, gold in (("math", r"\sqrt{2}"), ("boolq", "True"), ("mmlu", "B")):
        assert grade(task, text, gold) in (False, None)


def test_grading_goes_on_after_a_killed_comparison_and_off_the_main_thread():
    verdicts = []

    def work():
        verdicts.append(grade("math", r"\boxed{8^{9^{9^9}}}", r"x + 1"))
        verdicts.append(grade("math", r"\boxed{1 + x}", r"x + 1"))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert verdicts == [False, True]


def test_repeated_and_plain_answers_do_not_reach_the_worker(monkeypatch):
    asked = []
    monkeypatch.setattr(equality.WORKER, "ask", asked.append)
    for number in range(500):
        grade("math", rf"\boxed{{{number}}}", "7")
        grade("math", r"\boxed{\pi + 98765}", r"\pi + 1")
    assert asked == [[r"\pi + 1", r"\pi + 98765"]]


def test_a_worker_that_cannot_start_says_so(monkeypatch):
    monkeypatch.setattr(confined.sys, "executable", shutil.which("false"))
    with pytest.raises(RuntimeError, match="did not start"):
        confined.Confined(Path("nothing.py")).ask(["a", "b"])


@pytest.mark.parametrize(
    ("task", "gold", "message"),
    [
        ("chess", "A", "expected one of boolq, mmlu, math"),
        ("boolq", "maybe", "True or False"),
        ("mmlu", "E", "A, B, C or D"),
        ("math", " ", "expected an answer"),
    ],
)
def test_impossible_golds_and_tasks_are_refused(task, gold, message):
    with pytest.raises(InputError, match=message):
        grade(task, "Answer: A", gold)
