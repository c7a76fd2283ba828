"""Whole diagnoses of BoolQ, MMLU and AIME files with Qwen3's own tokenizer, its template and its 151,936 rows."""

import importlib
import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file, save_file

from jaxopd import cli
from jaxopd.models import load_tokenizer

pytestmark = [pytest.mark.fixtures, pytest.mark.slow]
SHARED = Path(__file__).resolve().parents[2] / "shared"
TOKENIZER = SHARED / "tokenizer" / "qwen3_hf"
UNMASKING = Path(__file__).resolve().parents[1] / "experiments" / "unmasking"
MAKE = runpy.run_path(str(Path(__file__).with_name("make_checkpoint.py")))
PRODUCED = 151669  # ids from here on have a row in the model and no text in the tokenizer
SILENT = 151900
# How an answering model goes on after a token: {next token: log weight}.
ANSWERS = (" True", " False", " A", " B", " C", " D")
CHAIN = {
    "\n": {"The": 1.0, "So": 0.0, "\n": -4.0},
    "The": {" answer": 0.0},
    "So": {" the": 0.0},
    " the": {" answer": 0.0},
    " answer": {" is": 0.0},
    " is": dict.fromkeys(ANSWERS, 0.0) | {" not": -2.0},
    " not": dict.fromkeys(ANSWERS, 0.0),
    **{answer: {".": 0.0, "<|im_end|>": -1.0, SILENT: -2.0} for answer in ANSWERS},
    ".": {"<|im_end|>": 0.0},
    SILENT: {"<|im_end|>": 0.0},
}
FILES = {
    "boolq": ("boolq", "boolq/dev_first1200.jsonl"),
    "mmlu": ("mmlu", "mmlu"),
    "aime, json": ("math", "aime25/opd_test.json"),
    "aime, jsonl": ("math", "aime25/areal_test.jsonl"),
    "aime, parquet": ("math", "aime25/opd_test.parquet"),
}


@pytest.fixture(scope="module")
def random_checkpoint(tmp_path_factory):
    return MAKE["make_checkpoint"](tmp_path_factory.mktemp("models") / "random", tokenizer=TOKENIZER)


def answering_checkpoint(folder, *, seed, always=None):
    """A random model that mostly says "The answer is <answer>.": its last layers move the odds with the context.

    Each token of CHAIN has a direction of its own in the residual stream, and the head's rows of the tokens that may
    follow it point there, 18 nats above the other 151,900; with `always`, so do that answer's above the others'.
    """
    MAKE["make_checkpoint"](folder, replace(MAKE["SMALL"], tie_embeddings=False), tokenizer=TOKENIZER, seed=seed)
    tokenizer, weights = load_tokenizer(TOKENIZER), load_file(folder / "model.safetensors")

    def number(token):
        (found,) = [token] if isinstance(token, int) else tokenizer(token)["input_ids"]
        return found

    embedding, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    width = embedding.shape[1]
    for direction, (token, following) in enumerate(CHAIN.items()):
        embedding[number(token)] = 0
        embedding[number(token), direction] = 1
        for after, log_weight in following.items():
            sure = 12 * (after == always)
            head[number(after), direction] = (18 + log_weight + sure) / width**0.5
    for name in weights:
        if "o_proj" in name or "down_proj" in name:
            weights[name] *= 5
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def answering(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [answering_checkpoint(folder / f"answering-{seed}", seed=seed) for seed in (0, 1)]


def diagnose(out, student, task, questions, *teachers, **budgets):
    options = {
        "student": student,
        "task": task,
        "questions": SHARED / "data" / questions,
        "limit": 2,
        "rollouts": 32,
        "max-tokens": 10,
        "exit-tokens": 2000,
        "demonstration-trials": 20,
        "slots": 32,
        "out": out,
    } | {name.replace("_", "-"): value for name, value in budgets.items()}
    pairs = [*options.items(), *(("teacher", teacher) for teacher in teachers)]
    return cli.main(["diagnose", *(str(x) for name, value in pairs for x in (f"--{name}", value))])


@pytest.fixture
def scripts(monkeypatch):
    """Gives a loader of experiments/unmasking, whose modules are gone afterwards: their names are common words."""
    monkeypatch.syspath_prepend(str(UNMASKING))
    yield importlib.import_module
    for path in UNMASKING.glob("*.py"):
        sys.modules.pop(path.stem, None)


def records(out):
    return {file.stem: pd.read_parquet(file) for file in (out / "records").iterdir()}


@pytest.mark.parametrize("name", FILES)
def test_random_model_is_reported_as_excluded(name, random_checkpoint, tmp_path):
    task, questions = FILES[name]
    out = tmp_path / "run"
    teachers = ("Self-1C=self:1c", f"T={random_checkpoint}")
    assert diagnose(out, random_checkpoint, task, questions, *teachers, rollouts=4) == 0
    found = records(out)
    assert len(found["questions"]) == 2
    assert set(found["questions"]["excluded"]) == {"none correct"}
    assert (found["questions"]["pass_rate"] == 0).all()
    assert (found["questions"]["prompt"].str.len() > 50).all()
    assert not len(found["nodes"])
    page = (out / "report" / "report.html").read_text()
    assert "2 of 2 questions are excluded" in page
    assert "2 none correct" in page
    assert "none correct" in (out / "report" / "tables.md").read_text()


@pytest.mark.parametrize("task, questions", [FILES["boolq"], FILES["mmlu"]])
def test_answering_model_is_analysed(task, questions, answering, tmp_path):
    student, other = answering
    teachers = ("Self-1C1W=self:1c1w", "Self-Sum-1C=self:sum1c@large", f"T={other}")
    out = tmp_path / "run"
    assert diagnose(out, student, task, questions, *teachers, large=other) == 0
    found = records(out)
    included = found["questions"][found["questions"]["excluded"] == ""]
    assert len(included) >= 1
    assert (included["pass_rate"].between(0, 1, inclusive="neither")).all()
    assert (included["n_targeted"] > 0).all()

    paths, nodes, tokens = found["paths"], found["nodes"], found["tokens"]
    assert paths.groupby("question")["correct"].nunique().eq(2).all(), "paths of both outcomes"
    assert paths["text"].str.contains("answer is").any()
    assert set(nodes["teacher"]) == {"Self-1C1W", "Self-Sum-1C", "T"}
    assert set(nodes["estimator"]) == {"pooled", "on_policy", "bellman"}
    assert nodes["decision"].any()
    assert np.isfinite(nodes.loc[nodes["decision"], "align_reverse_kl"]).all()
    assert nodes["p"].between(0, 1).all()
    assert nodes["q"].between(0, 1).all()
    assert (nodes["reverse_kl"] > -1e-5).all()
    assert (nodes["entropy_student"] <= np.log(151936)).all()

    tokenizer = load_tokenizer(TOKENIZER)
    rows = nodes.drop_duplicates(["question", "path", "t"])
    assert list(rows["text"]) == [tokenizer.decode([token]) for token in rows["token"]]
    assert (rows.loc[rows["token"] >= PRODUCED, "text"] == "").all()
    answers = tokens[tokens["text"].isin([" True", " False"] if task == "boolq" else [" A", " B", " C", " D"])]
    assert answers["p_succ_bellman"].notna().any()

    page = (out / "report" / "report.html").read_text()
    assert all(teacher.partition("=")[0] in page for teacher in teachers)
    assert f"{2 - len(included)} of 2 questions are excluded" in page or len(included) == 2


def test_a_token_without_text_can_be_sampled_and_recorded(answering, tmp_path):
    """The model has 267 rows more than the tokenizer has tokens; here it prefers one of them."""
    weights = load_file(answering[0] / "model.safetensors")
    weights["lm_head.weight"][SILENT] *= 1.2
    student = tmp_path / "student"
    student.mkdir()
    for file in answering[0].iterdir():
        if file.suffix == ".json":
            (student / file.name).write_bytes(file.read_bytes())
    save_file(weights, student / "model.safetensors")
    assert diagnose(tmp_path / "run", student, *FILES["boolq"], f"T={answering[1]}") == 0
    tokens = records(tmp_path / "run")["tokens"]
    silent = tokens[tokens["token"] == SILENT]
    assert len(silent)
    assert (silent["text"] == "").all()
    assert (silent["visits"] > 0).any()


def test_every_experiment_ends_with_a_report_that_says_what_is_missing(
    answering, random_checkpoint, scripts, tmp_path
) -> None:
    """Two benchmarks, one question with one teacher, a student that is always right, and one that never is."""
    student, other = answering
    first = json.loads((SHARED / "data" / FILES["boolq"][1]).read_text().split("\n")[0])
    right = answering_checkpoint(tmp_path / "always right", seed=0, always=f" {first['answer']}")
    teachers = ("Self-1C=self:1c", f"T={other}")
    runs = {
        "boolq": (student, "boolq", teachers, {"truth_rollouts": 4}),
        "mmlu": (student, "mmlu", teachers, {}),
        "single": (student, "boolq", teachers[1:], {"limit": 1}),
        "right": (right, "boolq", teachers, {"limit": 1}),
        "aime": (random_checkpoint, "aime, jsonl", teachers[:1], {"rollouts": 4}),
    }
    for name, (model, benchmark, judges, budgets) in runs.items():
        assert diagnose(tmp_path / name, model, *FILES[benchmark], *judges, **budgets) == 0
    chosen = scripts("study").study(["--runs", *(str(tmp_path / name) for name in runs), "--out", str(tmp_path)])
    scripts("all").run(chosen)
    table = pd.read_csv(tmp_path / "results" / "settings.csv", keep_default_na=False).set_index("setting")
    assert table.loc["right", "left out"] == "1 none incorrect"
    assert table.loc["aime", "left out"] == "2 none correct"
    assert table.loc[["right", "aime"], "missing"].str.contains("no alignment").all()
    assert "one question: no interval, no test; one teacher: no ranking" in table.loc["single", "missing"]
    assert "no oracle" in table.loc["mmlu", "missing"]
    assert "no oracle" not in table.loc["boolq", "missing"]
    assert table.loc[["boolq", "mmlu"], "analysed"].ge(1).all()
    index = (tmp_path / "results" / "index.md").read_text()
    for table in (tmp_path / "results").glob("*.md"):
        assert table.stem == "index" or table.read_text() in index
    assert "no decision node" in (tmp_path / "results" / "figure4.svg").read_text()
