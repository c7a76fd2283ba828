"""Hostile files and answers: what once broke a loader, a slice of the fuzzing, and the fuzzer's own eyes."""

import contextlib
import importlib
import json
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from jaxopd.errors import InputError
from jaxopd.models import chat_tokens, load_tokenizer
from jaxopd.tasks import TASKS
from jaxopd.toy import MODELS

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = ROOT / "experiments"
CORPUS = sorted((Path(__file__).parent / "fuzz_corpus").iterdir())
CASES = 12  # a target; experiments/fuzz.py runs as many as one has time for
NAMES = (
    *("config", "generation_config", "safetensors", "shard", "index", "tokenizer", "tokenizer_config"),
    *("chat_template", "boolq_file", "toy_file", "math_file", "math_json", "math_parquet", "mmlu_file"),
    *("demonstrations", "boolq_grade", "mmlu_grade", "math_grade", "toy_grade"),
)


@pytest.fixture(scope="module")
def targets():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXPERIMENTS)
        return importlib.import_module("fuzz_targets").TARGETS


def test_every_target_is_tried(targets):
    assert set(targets) == set(NAMES)


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_what_once_broke_a_loader_is_refused(path, targets, tmp_path):
    with pytest.raises(InputError):
        targets[path.name.partition("-")[0]].run(path.read_bytes(), tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_valid_seeds_are_read_and_broken_ones_refused(name, targets, tmp_path):
    target = targets[name]
    for seed in () if name.endswith("grade") else target.seeds:
        target.run(seed, tmp_path)
    for index in range(CASES):
        with contextlib.suppress(InputError):  # anything else fails the test
            target.run(target.case(random.Random(f"slice {name} {index}")), tmp_path)


def test_a_small_table_of_many_values_is_refused(tmp_path):
    values = 2**24 + 1
    nested = pa.ListArray.from_arrays([0, values], pa.nulls(values, pa.int8()))
    pa.parquet.write_table(pa.table({"problem": ["p"], "answer": ["1"], "x": nested}), tmp_path / "bomb.parquet")
    assert (tmp_path / "bomb.parquet").stat().st_size < 100_000
    with pytest.raises(InputError, match="values in its columns"):
        TASKS["math"].load(tmp_path / "bomb.parquet")


def test_chat_templates_are_filled_as_transformers_does():
    tokenizer = load_tokenizer(MODELS / "S")
    tokenizer.chat_template = (
        "{%- for m in messages %}{{ m.role }} {{ m.content | trim }} {{ eos_token }}{% endfor %}\n"
        "{% if add_generation_prompt and not enable_thinking %}answer {{ [1, 'ä'] | tojson }}{% endif %}"
    )
    messages = [{"role": "user", "content": " plus ü \U0001f600\n"}]
    for thinking in (True, False):
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert chat_tokens(tokenizer, messages[0]["content"], thinking=thinking) == expected


PLANTED = """
import time
from types import SimpleNamespace
from jaxopd.errors import InputError

def run(data, folder):
    {"a": lambda: None, "b": lambda: 1 / 0, "c": spin, "d": lambda: bytearray(3 << 30), "e": refuse}[data.decode()]()

def spin():
    end = time.process_time() + 6
    while time.process_time() < end:
        pass

def refuse():
    raise InputError("found a case, expected it")

TARGETS = {
    name: SimpleNamespace(seeds=[b"a"], run=run, share=1, case=lambda rng, name=name: name.encode()) for name in "abcde"
}
"""


@pytest.mark.slow
def test_the_fuzzer_sees_a_crash_a_hang_and_an_allocation(tmp_path):
    (tmp_path / "planted.py").write_text(PLANTED)
    command = [sys.executable, EXPERIMENTS / "fuzz.py", "--cases", "5", "--targets", "planted"]
    command += ["--keep", tmp_path / "k"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 1, done.stderr
    assert [(fault["target"], fault["kind"]) for fault in found] == [("b", "crash"), ("c", "hang"), ("d", "memory")]
    assert {kept.name: kept.read_text() for kept in (tmp_path / "k").iterdir()} == {"b-0": "b", "c-0": "c", "d-0": "d"}
