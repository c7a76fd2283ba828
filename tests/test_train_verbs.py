"""The training verbs: flags become configurations, bad values sentences; figures reach terminal and files."""

import io
import json

import pandas as pd
import pytest
import tyro
from rich.console import Console

from jaxopd import toy
from jaxopd.errors import InputError
from jaxopd.train.config import GateConfig, TrainConfig
from jaxopd.train.objectives import ObjectiveConfig
from jaxopd.verbs.train import Corpus, Evaluate, Preflight, Train

S, T2 = str(toy.MODELS / "S"), str(toy.MODELS / "T2")


def test_flags_become_a_configuration():
    flags = "--student s --questions q --teacher a=x --teacher b=self:1c --steps 7"
    flags += " --objective topk_thunlp --k 4 --support overlap"
    found = tyro.cli(Train, args=[*flags.split(), "--incorrect-only", "--window-end", "20", "--out", "there"])
    expected = TrainConfig(
        student="s",
        questions="q",
        teacher=("a=x", "b=self:1c"),
        objective=ObjectiveConfig("topk_thunlp", k=4, support="overlap"),
        gate=GateConfig(incorrect_only=True, window_end=20),
        steps=7,
    )
    assert found.checked() == expected
    assert found.out == "there"


def test_defaults_are_table_2():
    found = TrainConfig(teacher=("a=x",))
    assert (found.temperature, found.top_p, found.batch, found.mini_batch, found.rollouts) == (1.0, 1.0, 64, 64, 4)
    assert (found.max_prompt, found.max_tokens, found.learning_rate) == (1024, 7168, 1e-6)
    assert (found.objective.k, found.objective.support, found.updates_per_step) == (16, "student", 1)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--teacher", "a=x", "--objective", "nothing"], "objective: found 'nothing', expected one of sampled"),
        ([], "--teacher: found none, expected at least one for the objective topk_paper"),
        (["--teacher", "a=x", "--batch", "8", "--mini-batch", "3"], "mini_batch: found 3, expected a divisor"),
        (["--teacher", "a=x", "--learning-rate", "0"], "learning_rate: found 0.0, expected a positive number"),
        (["--teacher", "a=x", "--learning-rate", "inf"], "learning_rate: found inf, expected a positive number"),
        (["--teacher", "a=x", "--clip-norm", "0"], "clip_norm: found 0.0, expected a positive number"),
        (["--teacher", "a=x", "--weight-decay", "-1"], "weight_decay: found -1.0, expected 0 or more"),
        (["--teacher", "a=x", "--warmup", "-3"], "warmup: found -3, expected 0 or more"),
        (["--teacher", "a=x", "--probe-every", "-1"], "probe_every: found -1, expected 0 or more"),
        (["--teacher", "a=x", "--seed", "-1"], "seed: found -1, expected 0 or more"),
        (["--teacher", "a=x", "--slots", "0"], "slots: found 0, expected at least 1"),
        (["--teacher", "a=x", "--temperature", "1e-9"], "temperature: found 1e-09, expected 0, or a number from 1e-6"),
        (["--teacher", "a=x", "--top-p", "0"], "top_p: found 0.0, expected in"),
        (
            ["--teacher", "a=x", "--objective", "sampled", "--reward-scale", "nan"],
            "reward_scale: found nan, expected a",
        ),
        (["--teacher", "a=x", "--prefix-strength", "-5"], "prefix_strength: found -5.0, expected 0 or more"),
        (["--teacher", "a=x", "--window-start", "7168"], "window_start: found 7168, where responses have 7168 tokens"),
        (
            ["--objective", "grpo", "--divergence-quantile", "0.5"],
            "divergence_quantile: found 0.5 for grpo, which hears",
        ),
        (["--objective", "grpo", "--rollouts", "1"], "rollouts: found groups of 1, whose rewards have no baseline"),
        (["--teacher", "a=x", "--objective", "sampled", "--corpus", "c"], "corpus: found one for sampled, which is of"),
        (["--teacher", "a=x", "--divergence-quantile", "1"], "divergence_quantile: found 1.0, expected 0 to under 1"),
        (["--teacher", "a=x"], "nowhere: found no such folder"),
    ],
)
def test_bad_values_are_named_before_anything_is_written(flags, expected, tmp_path):
    given = ["--student", "nowhere", "--questions", "q", *flags]
    verb = tyro.cli(Train, args=[*given, "--out", str(tmp_path / "run")])
    with pytest.raises(InputError, match=expected):
        verb.run(Console(file=io.StringIO()))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_evaluate_prints_gap_recovery(tmp_path):
    screen = Console(file=io.StringIO(), width=200)
    common = {"task": "toy", "questions": "all:4:9", "samples": 4, "max_tokens": 80, "temperature": 1.0, "top_p": 1.0}
    Evaluate(model=(S, T2, T2), out=str(tmp_path), **common).run(screen)
    printed = screen.file.getvalue()
    assert "gap_recovery" in printed
    assert "pass@4" in printed
    kept = [pd.read_parquet(file) for file in sorted(tmp_path.glob("*.parquet"))]
    assert [len(table) for table in kept] == [12, 12, 12]
    assert kept[0]["correct"].sum() < kept[1]["correct"].sum()
    assert kept[1].equals(kept[2])


@pytest.mark.slow
def test_corpus_says_what_it_left_out(tmp_path):
    screen, file = Console(file=io.StringIO(), width=200), tmp_path / "corpus.jsonl"
    Corpus(teacher=T2, task="toy", questions="all:2:9", max_tokens=80, out=str(file)).run(screen)
    assert f"6 drawn, {len(file.read_text().splitlines())} kept" in screen.file.getvalue()


@pytest.mark.slow
def test_preflight_of_a_model_with_itself_is_no_go(tmp_path):
    screen, file = Console(file=io.StringIO(), width=200), tmp_path / "figures.json"
    shared = {"task": "toy", "questions": "all:4:9", "batch": 12, "mini_batch": 12, "micro_batch": 48, "max_tokens": 80}
    verb = Preflight(student=S, teacher=(f"S={S}",), out=str(file), **shared)
    with pytest.raises(SystemExit) as stopped:
        verb.run(screen)
    assert stopped.value.code == 4
    found = json.loads(file.read_text())
    assert found["go"] is False
    assert found["reasons"] == ["teacher S is the student, but for rounding: nothing to learn"]
    assert found["figures"]["overlap/ratio"] == 1.0
    assert "no-go" in screen.file.getvalue()
