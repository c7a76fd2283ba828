"""Bad input to the command line: exit code 2, one sentence that names what to mend, and nothing written."""

import hashlib
import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxopd import cli
from jaxopd.models import QwenConfig, load_tokenizer
from jaxopd.runs import RunFolder
from jaxopd.toy.tokenizer import ID, WORDS, save_tokenizer

make_checkpoint = runpy.run_path(str(Path(__file__).with_name("make_checkpoint.py")))["make_checkpoint"]
CONFIG = QwenConfig(
    vocab_size=len(WORDS),
    hidden_size=8,
    intermediate_size=8,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    max_positions=128,
    eos_token_ids=(ID["<|im_end|>"],),
)
BUDGETS = {"rollouts": 4, "max-tokens": 8, "exit-tokens": 32}
QUESTION = {"question": "is it so", "passage": "it is so", "answer": True}
TENSOR = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A student, a teacher and a file of two questions that all work."""
    folder = tmp_path_factory.mktemp("pristine")
    for seed, name in enumerate(("student", "teacher")):
        save_tokenizer(make_checkpoint(folder / name, CONFIG, seed=seed))
    (folder / "questions.jsonl").write_text(2 * (json.dumps(QUESTION) + "\n"))
    return folder


@pytest.fixture
def root(pristine, tmp_path):
    shutil.copytree(pristine, tmp_path / "root")
    return tmp_path / "root"


def command(root, **changes):
    """The arguments of a small diagnosis in `root`."""
    options = {
        "student": root / "student",
        "teacher": f"T={root / 'teacher'}",
        "task": "boolq",
        "questions": root / "questions.jsonl",
        "out": root / "run",
        **BUDGETS,
        **{name.replace("_", "-"): value for name, value in changes.items()},
    }
    return ["diagnose", *(str(x) for name, value in options.items() for x in (f"--{name}", value))]


def everything(root):
    """The digest of every file, so that whatever is written shows."""
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*") if p.is_file()
    }


def refuses(arguments, root, capsys, *said):
    """Runs the command and checks the code, the one sentence and the files."""
    before, existed = everything(root), sorted(root.rglob("*"))
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("jaxopd: ")
    assert error.count("\n") == 1, error
    for words in ("found", *said):
        assert words in error
    assert everything(root) == before
    assert sorted(root.rglob("*")) == existed
    return error


def edit(path, **fields):
    """Sets fields of a JSON file; None removes one."""
    values = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def retensor(folder, **tensors):
    """Replaces tensors of a checkpoint; None removes one."""
    path = folder / "model.safetensors"
    kept = load_file(path) | tensors
    save_file({name: value for name, value in kept.items() if value is not None}, path)


def truncate(path, size):
    path.write_bytes(path.read_bytes()[:size])


def shard(folder, weight_map):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def names(folder):
    return list(load_file(folder / "model.safetensors"))


WEIGHTS = {
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "model.safetensors: found no such file"),
    "empty weights": (lambda m: truncate(m / "model.safetensors", 0), "expected a complete one"),
    "cut in the header": (lambda m: truncate(m / "model.safetensors", 100), "expected a complete one"),
    "cut in the body": (lambda m: truncate(m / "model.safetensors", -1), "expected a complete one"),
    "not safetensors": (lambda m: (m / "model.safetensors").write_bytes(b"PK" * 400), "expected a complete one"),
    "missing tensor": (lambda m: retensor(m, **{TENSOR: None}), f"found no tensor {TENSOR}"),
    "other shape": (lambda m: retensor(m, **{TENSOR: np.zeros((8, 9), np.float32)}), f"{TENSOR}: found shape (8, 9)"),
    "whole numbers": (lambda m: retensor(m, **{TENSOR: np.zeros((8, 8), np.int8)}), f"{TENSOR}: found I8"),
    "missing shard": (lambda m: shard(m, dict.fromkeys(names(m), "model-00002-of-00002.safetensors")), "no such file"),
    "wrong index": (lambda m: shard(m, ["a"]), "field weight_map"),
    "index of some": (lambda m: shard(m, {TENSOR: "model-00001-of-00001.safetensors"}), "found no tensor"),
    "broken index": (lambda m: (m / "model.safetensors.index.json").write_text("{"), "index.json: found no valid JSON"),
    "no config": (lambda m: (m / "config.json").unlink(), "config.json: found no such file"),
    "broken config": (lambda m: truncate(m / "config.json", 50), "config.json: found no valid JSON"),
    "config of a list": (lambda m: (m / "config.json").write_text("[1]"), "expected a JSON object"),
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6}
FIELDS = [  # of config.json, and what the sentence names; None removes the field
    ({"hidden_size": 16}, "found shape"),
    ({"num_hidden_layers": 2}, "found no tensor model.layers.1"),
    ({"tie_word_embeddings": False}, "found no tensor lm_head.weight"),
    ({"model_type": "llama"}, "model_type: found 'llama', expected one of qwen3, qwen2"),
    ({"model_type": "qwen3_moe"}, "found 'qwen3_moe'"),
    ({"model_type": ["qwen3"]}, "model_type"),
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"rope_parameters": None}, "rope_theta"),
    ({"rope_parameters": [1]}, "rope_parameters"),
    ({"rope_parameters": {"rope_theta": "big"}}, "rope_theta"),
    ({"rope_parameters": {"rope_theta": 0}}, "rope_theta"),
    ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "linear"}}, "rope_type: found 'linear'"),
    ({"rope_parameters": YARN}, "factor"),
    ({"rope_parameters": {**YARN, "factor": 2, "beta_fast": "x"}}, "beta_fast"),
    ({"rope_parameters": {**YARN, "factor": 2, "original_max_position_embeddings": "x"}}, "original_max_position"),
    ({"rms_norm_eps": "tiny"}, "rms_norm_eps"),
    ({"eos_token_id": "<eos>"}, "eos_token_id"),
    ({"num_key_value_heads": 3}, "key-value heads"),
    *(
        ({field: None}, f"field {field}: found None")
        for field in (
            *("model_type", "vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"),
            *("num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        )
    ),
]
MODELS = pytest.mark.parametrize("model", ["student", "teacher"])


@MODELS
@pytest.mark.parametrize("case", WEIGHTS)
def test_files_of_a_checkpoint(case, model, root, capsys):
    spoil, said = WEIGHTS[case]
    spoil(root / model)
    refuses(command(root), root, capsys, str(root / model), said)


@MODELS
@pytest.mark.parametrize("fields, said", FIELDS)
def test_fields_of_a_config(fields, said, model, root, capsys):
    edit(root / model / "config.json", **fields)
    refuses(command(root), root, capsys, str(root / model), said)


def more_tokens(model):
    tokenizer = load_tokenizer(model)
    tokenizer.add_tokens(["seventh", "eighth"])
    tokenizer.save_pretrained(model)


def other_tokens(model):
    file = model / "tokenizer.json"
    file.write_text(file.read_text().replace('"yes"', '"aye"'))


def smaller_vocabulary(model):
    """A model whose embedding has fewer rows than the tokenizer has tokens."""
    edit(model / "config.json", vocab_size=40)
    retensor(model, **{"model.embed_tokens.weight": np.zeros((40, 8), np.float32)})


@pytest.mark.parametrize(
    "model, spoil, said",
    [
        ("student", lambda m: (m / "tokenizer.json").unlink(), ["tokenizer", "expected tokenizer.json"]),
        ("student", lambda m: truncate(m / "tokenizer.json", 500), ["tokenizer", "expected tokenizer.json"]),
        ("student", more_tokens, [f"found a tokenizer of {len(WORDS) + 2} tokens", f"the model's {len(WORDS)}"]),
        ("student", smaller_vocabulary, [f"found a tokenizer of {len(WORDS)} tokens", "the model's 40"]),
        ("student", lambda m: edit(m / "tokenizer_config.json", chat_template=None), ["chat template"]),
        ("student", lambda m: edit(m / "tokenizer_config.json", chat_template="{% for %}"), ["chat template"]),
        ("teacher", lambda m: (m / "tokenizer.json").unlink(), ["tokenizer", "expected tokenizer.json"]),
        ("teacher", other_tokens, ["another tokenizer"]),
        ("teacher", more_tokens, ["another tokenizer"]),
        ("teacher", smaller_vocabulary, [f"found a tokenizer of {len(WORDS)} tokens", "the model's 40"]),
    ],
)
def test_tokenizers(model, spoil, said, root, capsys):
    spoil(root / model)
    refuses(command(root), root, capsys, str(root / model), *said)


GOOD = json.dumps(QUESTION)


@pytest.mark.parametrize(
    "task, content, said",
    [
        ("boolq", f'{GOOD}\n{{"question": \n{GOOD}\n', ["line 2", "malformed JSON"]),
        ("boolq", f"{GOOD}\n\n[1]\n", ["line 3", "expected an object"]),
        ("boolq", f'{GOOD}\n{{"question": "q", "answer": true}}\n', ["line 2", "passage: found nothing"]),
        (
            "boolq",
            f"{GOOD}\n{GOOD.replace('true', chr(34) + 'yes' + chr(34))}\n",
            ["line 2", "answer", "true or false"],
        ),
        ("boolq", "", ["found nothing in it"]),
        ("boolq", "\n \n", ["found nothing in it"]),
        ("boolq", b"\xff\xfe{}\n", ["line 1", "UTF-8"]),
        ("math", '{"problem": "1 + 1"}\n', ["line 1", "answer"]),
        ("math", '{"answer": 2}\n', ["line 1", "question"]),
        ("math", "", ["found nothing in it"]),
        ("mmlu", "what,1,2,3,4,E\n", ["line 1", "expected A, B, C or D"]),
        ("mmlu", "what,1,2,3,4,A\nwhat,1,2,3,D\n", ["line 2", "found 5 cells"]),
        ("mmlu", "", ["found nothing in it"]),
        ("toy", '{"question": "boolean red"}\n', ["line 1", "expected"]),
        ("toy", f"{GOOD}\n", ["line 1", "expected"]),
        ("toy", "", ["found no question"]),
        ("toy", b"\xff\xfe{}\n", ["line 1", "UTF-8"]),
    ],
)
def test_questions(task, content, said, root, capsys):
    file = root / "bad"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    refuses(command(root, task=task, questions=file), root, capsys, str(file), *said)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"questions": "nowhere.jsonl"}, ["nowhere.jsonl: found no such file"]),
        ({"questions": "."}, ["found a folder"]),
        ({"task": "toy", "questions": "boolean:3"}, ["flavour:n:seed"]),
        ({"task": "toy", "questions": "boolean:0:1"}, ["boolean:0:1: found no question"]),
        ({"task": "sums"}, ["task: found 'sums'", "boolq, mmlu, math, toy"]),
        ({"student": "nowhere/at/all"}, ["nowhere/at/all: found no such folder"]),
        ({"student": "./nowhere"}, ["found no such folder"]),
        ({"teacher": "T=./nowhere"}, ["./nowhere: found no such folder"]),
        ({"teacher": "T=self:7c"}, ["--teacher T: found context '7c'", "self:1c"]),
        ({"teacher": "T=self:1c@huge"}, ["--teacher T: found source 'huge'"]),
        ({"teacher": "T=self:sum1c"}, ["--large: found none", "teacher T"]),
        ({"teacher": "T=self:1c", "large": "./nowhere"}, ["./nowhere: found no such folder"]),
        ({"teacher": "T2"}, ["--teacher: found 'T2', expected NAME="]),
        ({"teacher": "../T=self:1c"}, ["--teacher ../T"]),
        ({"teacher": "student=self:1c"}, ["--teacher student"]),
        ({"demonstrations": "nowhere.jsonl", "teacher": "T=self:1c"}, ["nowhere.jsonl: found no such file"]),
        ({"dtype": "float16"}, ["dtype: found 'float16'", "bfloat16"]),
        ({"tau": 0.001}, ["tau: found 0.001"]),
        ({"rollouts": 0}, ["rollouts: found 0"]),
        ({"limit": 0}, ["limit: found 0"]),
        ({"limit": -1}, ["limit: found -1"]),
        ({"by_gradient": -1, "allocation": "paper"}, ["by_gradient: found -1"]),
        ({"n_min": 50}, ["--n-min with --allocation exits", "expected --allocation paper"]),
        ({"allocation": "paper", "exit_tokens": 9}, ["--exit-tokens with --allocation paper", "--allocation exits"]),
        ({"demonstration_temperature": -1}, ["demonstration_temperature: found -1"]),
    ],
)
def test_options(changes, said, root, capsys, monkeypatch):
    monkeypatch.chdir(root)
    refuses(command(root, **changes), root, capsys, *said)


def test_no_teacher_and_the_same_name_twice(root, capsys):
    arguments = command(root)
    at = arguments.index("--teacher")
    refuses(arguments[:at] + arguments[at + 2 :], root, capsys, "--teacher: found none")
    refuses([*arguments, "--teacher", "T=self:1c"], root, capsys, "--teacher T: found the name twice")


def test_prompt_longer_than_the_context(root, capsys):
    long = {**QUESTION, "passage": "it is so " * 100, "id": "the-long-one"}
    (root / "questions.jsonl").write_text(f"{GOOD}\n{json.dumps(long)}\n")
    refuses(command(root), root, capsys, "questions.jsonl", "question the-long-one", "tokens", "context of 128")


def test_run_of_another_configuration(root, capsys):
    config = {"student": "another", "seed": 0}
    RunFolder.create(str(root / "run"), config)
    parts = f"{root / 'run'}/config.json", "what the run here began with", "choose another folder"
    refuses(command(root), root, capsys, *parts)


def test_folder_that_is_no_run(root, capsys):
    (root / "run").mkdir()
    (root / "run" / "thesis.txt").write_text("mine")
    refuses(command(root), root, capsys, str(root / "run"), "expected an empty folder or a jaxopd run")


@pytest.mark.parametrize("content", ["{", "[]", "\x00"])
def test_broken_config_of_a_run(content, root, capsys):
    (root / "run").mkdir()
    (root / "run" / "config.json").write_text(content)
    refuses(command(root), root, capsys, f"{root / 'run'}/config.json")
    refuses(["report", str(root / "run")], root, capsys, f"{root / 'run'}/config.json")


def test_out_is_a_file(root, capsys):
    (root / "run").write_text("mine")
    refuses(command(root), root, capsys, str(root / "run"), "expected")
    refuses(command(root, out=root / "run" / "below"), root, capsys, str(root / "run"), "expected")


def test_report_without_a_run(root, capsys):
    refuses(["report", str(root / "nowhere")], root, capsys, "nowhere: found no config.json")
    RunFolder.create(str(root / "begun"), {"student": "S"})
    refuses(["report", str(root / "begun")], root, capsys, "records/questions.parquet", "expected a finished run")


def test_the_commands_above_fail_for_their_reasons_only(root, capsys):
    """The same command without a fault works: with a random model nothing is included, and the report says why."""
    assert cli.main(command(root)) == 0
    assert "report:" in capsys.readouterr().out
    questions = RunFolder.existing(str(root / "run")).read_table("records/questions.parquet")
    assert list(questions["excluded"]) == ["none correct"] * 2
