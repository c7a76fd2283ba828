"""Task files: what loads, and how a bad file, line or field is named."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxopd.errors import InputError
from jaxopd.tasks import TASKS, find_task, prompts


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_boolq_loads(tmp_path):
    rows = (
        '\ufeff{"question": "is it", "passage": "P\u2028Q", "answer": true}\r\n\n'
        '{"question": "is it?", "passage": "P", "title": "T", "answer": false}'
    )
    first, second = TASKS["boolq"].load(written(tmp_path, "b.jsonl", rows))
    assert (first.id, first.gold, first.meta["line"]) == ("b-1", "True", 1)
    assert (second.id, second.gold, second.meta["line"]) == ("b-3", "False", 3)
    assert "P\u2028Q" in first.text
    assert "Question: is it?\n" in first.text
    assert "T. P" in second.text


def test_mmlu_loads_quoted_cells_from_a_file_and_a_folder(tmp_path):
    path = written(tmp_path, "big_animals_test.csv", '"Which,\nof ""these""\u2028?",a,"b, c",,4,B\nNext,1,2,3,4,D\n')
    written(tmp_path, "big_animals_dev.csv", "Dev,1,2,3,4,A\n")
    written(tmp_path, "ants_test.csv", "Ant,1,2,3,4,A\n")
    first, second = TASKS["mmlu"].load(path)
    assert 'Which,\nof "these"\u2028?' in first.text
    assert "A) a\nB) b, c\nC) \nD) 4\n" in first.text
    assert "big animals" in first.text
    assert (first.gold, first.meta["line"], second.gold, second.meta["line"]) == ("B", 1, "D", 3)
    assert [question.id for question in TASKS["mmlu"].load(tmp_path)] == [
        "ants_test-0",
        "big_animals_test-0",
        "big_animals_test-1",
    ]


def test_math_loads_every_shape_of_record(tmp_path):
    records = [
        {"question": "Q0", "answer": 70, "id": 0},
        {"problem": "Q1 \frac{a}{b}", "answer": "336^\\circ", "id": "x"},
        {"prompt": "Q2 Answer: now", "answer": 142.0, "id": "x"},
        {
            "prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q3"}],
            "reward_model": {"ground_truth": "5"},
            "extra_info": {"index": "AMC-3"},
        },
    ]
    jsonl = written(tmp_path, "m.jsonl", "\n".join(json.dumps(record) for record in records))
    whole = written(tmp_path, "m.json", json.dumps(records, indent=1))
    questions = TASKS["math"].load(jsonl)
    assert [question.id for question in questions] == ["0", "x", "x#2", "AMC-3"]
    assert [question.gold for question in questions] == ["70", "336^\\circ", "142.0", "5"]
    assert questions[0].text == "Q0\n\nReason step by step, and write the final answer inside \\boxed{}."
    assert questions[1].text.startswith(r"Q1 \frac{a}{b}")
    assert questions[2].text == "Q2 Answer: now"
    assert questions[3].text.startswith("S\n\nQ3\n\n")
    assert [(q.text, q.gold) for q in TASKS["math"].load(whole)] == [(q.text, q.gold) for q in questions]


def test_math_loads_raw_control_characters_and_parquet(tmp_path):
    raw = written(tmp_path, "raw.jsonl", b'{"problem": "a \x0crac{1}{2}\tb", "answer": "1"}\n')
    assert TASKS["math"].load(raw)[0].text.startswith("a \\frac{1}{2}\tb")
    prompt = [[{"content": "Q", "role": "user"}], [{"content": "R", "role": "user"}]]
    table = pa.table({"prompt": prompt, "reward_model": [{"ground_truth": "1"}, {"ground_truth": "2"}]})
    pq.write_table(table, tmp_path / "p.parquet")
    assert [(q.text[0], q.gold) for q in TASKS["math"].load(tmp_path / "p.parquet")] == [("Q", "1"), ("R", "2")]


GOOD = '{"question": "q", "passage": "p", "answer": true}\n'
BAD_FILES = [
    ("boolq", "b.jsonl", GOOD + "{oops\n", "line 2: found malformed JSON"),
    ("boolq", "b.jsonl", GOOD + '{"question": "q", "answer": true}', "line 2: passage: found nothing, expected text"),
    (
        "boolq",
        "b.jsonl",
        GOOD + '{"question": "q", "passage": "p", "answer": "yes"}',
        'line 2: answer: found str "yes", expected true or false',
    ),
    ("boolq", "b.jsonl", '{"question": "q", "passage": "p", "answer": 1}', "line 1: answer: found int 1"),
    ("boolq", "b.jsonl", '{"question": " ", "passage": "p", "answer": true}', "line 1: question: found blank text"),
    ("boolq", "b.jsonl", GOOD + "[1]", r"line 2: found list \[1\], expected an object"),
    ("boolq", "b.jsonl", "", "expected at least one record"),
    ("boolq", "b.jsonl", GOOD.encode() + b"\xff\n", "line 2: found bytes that are not UTF-8"),
    ("boolq", "b.json", '{"question": "q"}', "expected a list of objects"),
    ("boolq", "b.json", '[{"question": "q",\n "passage": }]', "line 2: found malformed JSON"),
    ("boolq", "b.jsonl", "[" * 100_000, "line 1: found malformed JSON"),
    ("mmlu", "m_test.csv", "q,1,2,3,4,A\nq,1,2,3,4,E\n", "line 2: answer: found 'E', expected A, B, C or D"),
    ("mmlu", "m_test.csv", '"q\nr",1,2,3,4,A\nq,1,2,3,A\n', "line 3: found 5 cells, expected 6"),
    ("mmlu", "m_test.csv", 'q,1,2,3,4,A\n"q,1,2,3,4,A\n', "line 2: found a malformed CSV row"),
    ("mmlu", "m_test.csv", " ,1,2,3,4,A\n", "line 1: question: found an empty cell"),
    ("mmlu", "m_test.csv", "", "expected at least one record"),
    (
        "math",
        "m.jsonl",
        '{"answer": 1}',
        "line 1: question: found nothing, expected one of the fields question, problem, prompt",
    ),
    ("math", "m.jsonl", '{"problem": 3, "answer": 1}', "line 1: problem: found int 3, expected text"),
    (
        "math",
        "m.jsonl",
        '{"problem": "p"}',
        "line 1: answer or reward_model.ground_truth: found nothing, expected text or a number",
    ),
    ("math", "m.jsonl", '{"problem": "p", "answer": true}', "line 1: answer: found True, expected text or a number"),
    ("math", "m.jsonl", '{"problem": "p", "answer": ["1"]}', "line 1: answer: found"),
    ("math", "m.jsonl", '{"problem": "p", "reward_model": "1"}', 'line 1: reward_model: found str "1"'),
    (
        "math",
        "m.jsonl",
        '{"prompt": [{"role": "assistant", "content": "x"}], "answer": 1}',
        "line 1: prompt: found message",
    ),
    ("math", "m.jsonl", '{"prompt": [], "answer": 1}', "line 1: prompt: found no message"),
    ("math", "m.json", '[{"problem": "p", "answer": 1}, {"problem": "p"}]', "record 2: answer or"),
    ("math", "m.parquet", "not parquet", "found no readable parquet table"),
]


@pytest.mark.parametrize(("task", "name", "content", "message"), BAD_FILES, ids=[row[3][:40] for row in BAD_FILES])
def test_bad_files_are_refused_with_file_and_line(tmp_path, task, name, content, message):
    path = written(tmp_path, name, content)
    with pytest.raises(InputError, match=message) as error:
        TASKS[task].load(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("task", ["boolq", "mmlu", "math"])
def test_missing_files_and_folders_are_refused(tmp_path, task):
    with pytest.raises(InputError, match="found no such file"):
        find_task(task).load(tmp_path / "absent.jsonl")
    with pytest.raises(InputError, match=re.escape(str(tmp_path))):
        find_task(task).load(tmp_path)


def test_a_broken_template_is_named(tmp_path, monkeypatch):
    environment = prompts.ENVIRONMENT.overlay(loader=prompts.jinja2.FileSystemLoader(tmp_path))
    monkeypatch.setattr(prompts, "ENVIRONMENT", environment)
    for content, message in (("{{ nothing }}", "'nothing' is undefined"), ("a\n{% if %}", "line 2")):
        written(tmp_path, "math.jinja", content)
        environment.cache.clear()
        with pytest.raises(InputError, match=message):
            prompts.render("math", problem="p")
