"""Teachers as written on the command line, the demonstrations they are shown and the messages they read."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxopd.errors import InputError
from jaxopd.tasks import TASKS
from jaxopd.tasks.contexts import (
    KINDS,
    TeacherSpec,
    choice_record,
    demonstrations_for,
    parse_teacher,
    parse_teachers,
    summary_message,
    teacher_message,
)
from jaxopd.tasks.demonstrations import Demonstration, load_demonstrations, save_demonstrations
from jaxopd.types import Question


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("T2=path/to/model", TeacherSpec("T2", model="path/to/model")),
        ("T2=a=b", TeacherSpec("T2", model="a=b")),
        ("Self-1C=self:1c", TeacherSpec("Self-1C", "1C", 1, 0)),
        ("Self-1C-32B=self:1c@large", TeacherSpec("Self-1C-32B", "1C", 1, 0, source="large")),
        ("Self-3C=self:3c", TeacherSpec("Self-3C", "3C", 3, 0)),
        ("Self-1C1W=self:1C1W", TeacherSpec("Self-1C1W", "1C1W", 1, 1)),
        ("Self-Sum-1C=self:sum1c", TeacherSpec("Self-Sum-1C", "Sum1C", 1, 0, summarized=True)),
        ("S=self:sum1c1w@student", TeacherSpec("S", "Sum1C1W", 1, 1, summarized=True)),
    ],
)
def test_teachers_are_parsed(argument, expected):
    assert parse_teacher(argument) == expected


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("path/to/model", "NAME=path/to/model or NAME=self:KIND"),
        ("=self:1c", "NAME="),
        ("T=", "NAME="),
        ("T=self:2c", "self:1c, self:3c, self:1c1w, self:sum1c, self:sum1c1w"),
        ("T=self:", "expected one of"),
        ("T=self:1c@huge", "student, large"),
        ("T=self:1c@", "student, large"),
    ],
)
def test_wrong_teachers_are_refused(argument, message):
    with pytest.raises(InputError, match=message):
        parse_teacher(argument)


def test_two_teachers_cannot_share_a_name():
    assert [spec.name for spec in parse_teachers(["A=self:1c", "B=m"])] == ["A", "B"]
    with pytest.raises(InputError, match="A: found the name twice"):
        parse_teachers(["A=self:1c", "A=m"])


QUESTION = Question("q1", "math", "What is {{ 1 + 1 }}?", "2")
POOL = [
    Demonstration("q1", f"{source} text {number}", number % 2 == 0, source, f"{source} digest {number}")
    for source in ("student", "large")
    for number in range(12)
] + [Demonstration("q2", "another question", True)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", ["student", "large"])
def test_the_context_precedes_the_question_and_marks_its_solutions(kind, source):
    spec = parse_teacher(f"S=self:{kind}@{source}")
    chosen = demonstrations_for(spec, "q1", POOL, seed=3)
    message = teacher_message(spec, QUESTION, chosen)
    assert message.endswith("\n\n" + QUESTION.text)
    expected_word = f"{source} {'digest' if spec.summarized else 'text'}"
    shown = re.findall(r"\[begin (correct|wrong) \w+\]\n(\w+ \w+) (\d+)\n\[end \1 \w+\]", message)
    assert [mark for mark, _, _ in shown] == ["correct"] * spec.correct + ["wrong"] * spec.wrong
    assert all(
        words == expected_word and (int(number) % 2 == 0) == (mark == "correct") for mark, words, number in shown
    )
    assert len({number for _, _, number in shown}) == spec.correct + spec.wrong
    assert ("Warning" in message) == bool(spec.wrong)


def test_an_external_teacher_sees_the_question_alone():
    spec = parse_teacher("T=model")
    assert demonstrations_for(spec, "q1", POOL, seed=0) == ()
    assert teacher_message(spec, QUESTION) == QUESTION.text


@given(st.permutations(POOL), st.integers(0, 2**31))
def test_the_choice_depends_on_the_seed_and_not_on_the_order(pool, seed):
    one, three, mixed, digest = (parse_teacher(f"S=self:{kind}") for kind in ("1c", "3c", "1c1w", "sum1c"))
    chosen = demonstrations_for(one, "q1", pool, seed=seed)
    assert chosen == demonstrations_for(one, "q1", POOL, seed=seed)
    assert chosen == demonstrations_for(three, "q1", pool, seed=seed)[:1]
    assert chosen == demonstrations_for(mixed, "q1", pool, seed=seed)[:1]
    assert chosen == demonstrations_for(digest, "q1", pool, seed=seed)


def test_seeds_reach_every_demonstration():
    one = parse_teacher("S=self:1c")
    reached = {demonstrations_for(one, "q1", POOL, seed=seed)[0].text for seed in range(200)}
    assert reached == {f"student text {number}" for number in range(0, 12, 2)}


def test_too_few_demonstrations_are_reported_and_recorded():
    three = parse_teacher("S=self:3c")
    repeated = [Demonstration("q1", "same", True)] * 3 + [Demonstration("q1", "other", True)]
    assert demonstrations_for(three, "q1", repeated, seed=0) is None
    assert choice_record(three, "q1", None, seed=0)["available"] is False
    unsummarized = [Demonstration("q1", "text", True)]
    assert demonstrations_for(parse_teacher("S=self:sum1c"), "q1", unsummarized, seed=0) is None
    record = choice_record(three, "q1", chosen := demonstrations_for(three, "q1", POOL, seed=0), seed=0)
    assert [entry["correct"] for entry in record["demonstrations"]] == [True] * len(chosen)
    assert len({entry["id"] for entry in record["demonstrations"]}) == 3
    assert json.loads(json.dumps(record)) == record


def test_a_message_refuses_what_does_not_fit_its_context():
    with pytest.raises(InputError, match=r"found \(1, 0\) \(correct, wrong\) demonstrations, expected \(1, 1\)"):
        teacher_message(parse_teacher("S=self:1c1w"), QUESTION, [Demonstration("q1", "a", True)])
    with pytest.raises(InputError, match="found no summary"):
        teacher_message(parse_teacher("S=self:sum1c"), QUESTION, [Demonstration("q1", "a", True)])


def test_the_toy_task_words_its_own_contexts():
    question = TASKS["toy"].load("choice:1:1")[0]
    pool = [
        Demonstration(question.id, "so 1", True, summary="1"),
        Demonstration(question.id, "so 2", False, summary="2"),
    ]
    spec = parse_teacher("S=self:sum1c1w")
    message = teacher_message(spec, question, demonstrations_for(spec, question.id, pool, seed=0))
    assert message == f"correct 1 wrong 2 question {question.text}"
    assert summary_message(question, "so 1") == f"summarize {question.text} solution so 1"


def test_the_summary_request_holds_problem_and_solution():
    message = summary_message(QUESTION, "It is {{ 2 }}.\n")
    assert f"[begin problem]\n{QUESTION.text}\n[end problem]" in message
    assert "[begin solution]\nIt is {{ 2 }}.\n[end solution]" in message


def test_demonstrations_survive_their_file(tmp_path):
    pool = [*POOL, Demonstration("q\u2028", "line\nbreak \u2028 é", False)]
    save_demonstrations(tmp_path / "d.jsonl", pool)
    assert load_demonstrations(tmp_path / "d.jsonl") == pool


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "t", "correct": true}', "line 1: question: found nothing, expected text"),
        (
            '{"question": "q", "text": "t", "correct": "yes"}',
            'line 1: correct: found str "yes", expected true or false',
        ),
        (
            '{"question": "q", "text": "t", "correct": true, "source": "me"}',
            "line 1: source: found 'me', expected student or large",
        ),
        ('{"question": "q", "text": "t", "correct": true, "summary": 3}', "line 1: summary: found int 3"),
    ],
)
def test_bad_demonstrations_are_refused(tmp_path, line, message):
    path = tmp_path / "d.jsonl"
    path.write_text(line)
    with pytest.raises(InputError, match=message):
        load_demonstrations(path)
