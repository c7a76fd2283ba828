"""Graders against judgements of people and of math-verify, and loaders against real data sets."""

import json
from pathlib import Path

import pytest

from jaxopd.tasks import TASKS, grade

pytestmark = pytest.mark.fixtures

SHARED = Path(__file__).resolve().parents[2] / "shared"
EXPECTED = {"mcq4": {letter: letter for letter in "ABCD"}, "bool": {True: "True", False: "False"}}
TASK_OF = {"mcq4": "mmlu", "bool": "boolq"}
# math-verify and the peers differ on these; the verdict is then a person's, which ours is but for one row
OPEN_ROWS = {(r"\boxed{i}", r"\sqrt{-1}")}


def read(name: str, field: str) -> list[dict]:
    path = SHARED / "fixtures" / "grading" / name
    return json.loads(path.read_text())[field] if path.exists() else []


@pytest.mark.parametrize("row", read("math_pairs.json", "rows"), ids=lambda row: row["tag"])
def test_math_verdicts_match(row):
    verdict = grade("math", row["prediction"], row["gold"])
    if row["peers_unanimous"]:
        assert bool(verdict) == row["math_verify"] == row["human"]
    elif (row["prediction"], row["gold"]) not in OPEN_ROWS:
        assert bool(verdict) == row["human"]


@pytest.mark.parametrize("case", read("extraction_cases.json", "cases"), ids=lambda case: case["text"][:30])
def test_extracted_answer_matches(case):
    values = EXPECTED[case["kind"]]
    verdicts = {value: grade(TASK_OF[case["kind"]], case["text"], gold) for value, gold in values.items()}
    if case["expected"] is None:
        assert set(verdicts.values()) == {None}
    else:
        assert verdicts == {value: value == case["expected"] for value in values}


FILES = [
    ("boolq", "boolq/dev_first1200.jsonl", 1200),
    ("mmlu", "mmlu", 817),
    ("mmlu", "mmlu/computer_security_test.csv", 100),
    ("mmlu", "mmlu/machine_learning_dev.csv", 5),
    ("math", "aime25/areal_test.jsonl", 30),
    ("math", "aime25/opd_test.json", 30),
    ("math", "aime25/opd_test.parquet", 30),
    ("math", "amc23/opd_test.json", 83),
    ("math", "amc23/opd_test.parquet", 83),
    ("math", "dapo_math_17k/dapo-math-17k_first500.jsonl", 500),
    ("math", "dapo_math_17k/dapo-math-17k-processed_first200.jsonl", 200),
    ("math", "dapo_math_17k/dapo-math-17k-processed_first500.parquet", 500),
    ("math", "deepmath/DeepMath_deduped_first500.jsonl", 500),
]


@pytest.mark.parametrize(("task", "file", "count"), FILES, ids=[file for _, file, _ in FILES])
def test_real_files_load_and_their_golds_grade_as_right(task, file, count):
    questions = TASKS[task].load(SHARED / "data" / file)
    assert len(questions) == count == len({question.id for question in questions})
    for question in questions:
        assert question.text.strip()
        assert not set(question.text) & set("\x08\x0c")
        assert grade(task, f"So \\boxed{{{question.gold}}}.", question.gold) is True, question.gold


def test_the_two_copies_of_aime_agree():
    ours, theirs = (TASKS["math"].load(SHARED / "data/aime25" / name) for name in ("areal_test.jsonl", "opd_test.json"))
    for left, right in zip(ours, theirs, strict=True):
        assert grade("math", rf"\boxed{{{left.gold}}}", right.gold) is True


def test_prompts_with_instructions_are_kept():
    folder = SHARED / "data" / "dapo_math_17k"
    for name in ("dapo-math-17k_first500.jsonl", "dapo-math-17k-processed_first200.jsonl"):
        lines = (folder / name).read_text().split("\n")
        raw = [json.loads(line)["prompt"][0]["content"] for line in lines if line]
        assert [question.text for question in TASKS["math"].load(folder / name)] == raw


def test_lost_latex_commands_are_restored():
    problems = TASKS["math"].load(SHARED / "data/aime25/areal_test.jsonl")
    assert r"\frac{\log_k (5^{" in problems[18].text
    assert r"$\triangle DEF$" in problems[19].text
    assert r"$\frac{m}{n}$" in problems[27].text
