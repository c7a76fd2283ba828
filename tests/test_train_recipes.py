"""Recipes around the loop: a teacher's corpus and fine-tuning on it, outcome reward, preflight, privileged context."""

import json
from dataclasses import replace

import jax
import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose

from jaxopd import toy
from jaxopd.errors import InputError
from jaxopd.models import chat_tokens, load_model, load_tokenizer
from jaxopd.rollouts import rollout
from jaxopd.runs import RunFolder
from jaxopd.tasks import find_task
from jaxopd.tasks.demonstrations import Demonstration, save_demonstrations
from jaxopd.train import preflight as preflights
from jaxopd.train.config import GateConfig, TrainConfig
from jaxopd.train.corpus import CorpusConfig, load_corpus, write_corpus
from jaxopd.train.evaluate import EvalConfig, evaluate, summary
from jaxopd.train.gates import AlignmentTable, gate_weights
from jaxopd.train.loop import Trainer
from jaxopd.train.objectives import ObjectiveConfig
from jaxopd.train.preflight import preflight
from jaxopd.train.targets import make_targets, reduced

pytestmark = pytest.mark.slow  # minutes in all: they train

S, T2 = str(toy.MODELS / "S"), str(toy.MODELS / "T2")
QUESTIONS = "all:4:7"
BASE = TrainConfig(
    student=S,
    task="toy",
    questions=QUESTIONS,
    objective=ObjectiveConfig(k=8),
    teacher=(f"T2={T2}",),
    steps=4,
    batch=12,
    mini_batch=12,
    rollouts=2,
    micro_batch=24,
    max_tokens=80,
    max_prompt=64,
    learning_rate=1e-3,
    show_every=0,
)


def quiet(_: str) -> None:
    pass


def losses(config: TrainConfig, folder) -> list[dict]:
    trainer = Trainer(config, folder, quiet)
    return [trainer.advance() for _ in range(config.steps)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    counts = write_corpus(CorpusConfig(T2, "toy", QUESTIONS, samples=4, max_tokens=32), path)
    return path, counts


def test_a_corpus_holds_whole_responses(corpus):
    path, counts = corpus
    assert counts["drawn"] == 48
    assert counts["kept"] == 48 - counts["truncated"] - counts["repetitive"]
    assert counts["truncated"] > 0, "the limit of 32 tokens cuts some responses"
    questions = find_task("toy").load(QUESTIONS)
    lines = load_corpus(path, questions)
    assert len(lines) == counts["kept"]
    stops = load_model(S).config.eos_token_ids
    assert all(line.tokens[-1] in stops and len(line.tokens) <= 32 for line in lines)
    written = [json.loads(line) for line in path.read_text().splitlines()]
    graded = [find_task("toy").grade(w["response"], questions[line.question].gold) for w, line in zip(written, lines)]
    assert np.mean([grade is True for grade in graded]) > 0.7, "T2 at temperature .7"


def test_a_broken_corpus_is_named(tmp_path):
    file, questions = tmp_path / "corpus.jsonl", find_task("toy").load(QUESTIONS)
    file.write_text('{"question": "x", "tokens": [1]}\n{"question": "x"}\n')
    with pytest.raises(InputError, match=r"line 2: found .*expected \{\"question\", \"tokens\"\}"):
        load_corpus(file, questions)
    file.write_text('{"question": "x", "tokens": [1]}\n')
    with pytest.raises(InputError, match="found no response to the training questions"):
        load_corpus(file, questions)


def test_a_response_may_hold_what_only_python_takes_for_a_line_end(tmp_path):
    file, questions = tmp_path / "corpus.jsonl", find_task("toy").load(QUESTIONS)
    line = {"question": questions[0].id, "response": "a\u2028b\u0085c", "tokens": [1, 2]}
    file.write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [line.tokens for line in load_corpus(file, questions)] == [(1, 2)]


def test_fine_tuning_on_a_corpus_learns_it(corpus, tmp_path):
    config = replace(
        BASE, teacher=(), objective=ObjectiveConfig("sft"), corpus=str(corpus[0]), schedule="cosine", steps=6
    )
    history = losses(config, tmp_path / "sft")
    assert history[-1]["train/loss"] < 0.9 * history[0]["train/loss"]
    assert history[0]["rollout/truncated"] == 0


def test_outcome_reward_moves_on_mixed_groups_only(tmp_path):
    config = replace(BASE, teacher=(), objective=ObjectiveConfig("grpo"), steps=1, rollouts=4, mini_batch=6)
    trainer = Trainer(config, tmp_path / "grpo", quiet)
    batch = trainer.collect.draw(trainer.params, 0)
    mixed = (batch.correct == 1).reshape(-1, 4)
    assert 0 < (mixed.any(1) & ~mixed.all(1)).sum() < len(mixed), "some groups with and some without a signal"
    assert trainer.advance()["train/gradient_norm"] > 0
    same = replace(batch, correct=np.ones_like(batch.correct))
    trainer.collect.draw = lambda params, step: same
    assert trainer.advance()["train/gradient_norm"] == 0


def test_several_updates_a_batch_use_the_importance_ratio(tmp_path):
    """A second pass starts where P = P_old no longer holds; clipping keeps what it changes bounded."""
    config = replace(BASE, objective=ObjectiveConfig("topk_thunlp", k=8), steps=1, passes=3, mini_batch=6)
    clipped = losses(config, tmp_path / "clipped")[0]
    free = replace(config, objective=replace(config.objective, importance="none"))
    assert clipped["train/loss"] != losses(free, tmp_path / "free")[0]["train/loss"]
    assert np.isfinite(clipped["train/loss"])


def test_preflight_of_a_good_pair_and_of_none(corpus):
    good = preflight(replace(BASE, batch=12, rollouts=4, corpus=str(corpus[0])))
    assert good.figures["floor/reverse_kl"] < 1e-5
    assert good.figures["rollout/mismatch_max"] < 1e-3
    assert good.figures["accuracy/T2"] > good.figures["accuracy/student"]
    assert good.go, good.reasons
    assert not any("T2" in caution for caution in good.cautions)
    one = preflight(replace(BASE, batch=1, rollouts=1))
    assert one.go, one.reasons
    assert any("(95 % interval -1.000 to 1.000), which may be chance" in caution for caution in one.cautions)
    worse = preflight(replace(BASE, student=T2, teacher=(f"S={S}",), rollouts=4))
    assert not worse.go
    assert any("nothing to learn" in reason for reason in worse.reasons)


def test_preflight_asks_each_teacher_its_own_questions_as_the_student(monkeypatch):
    asked = []

    class Recorder(preflights.Engine):
        def run(self, prompts, requests, sampling):
            asked.append((len(prompts), sampling.temperature, sampling.top_p))
            return super().run(prompts, requests, sampling)

    monkeypatch.setattr(preflights, "Engine", Recorder)
    config = replace(BASE, teacher=(f"T2={T2}", f"S={S}", f"T3={T2}"), route=("chain=S",), temperature=0.9, top_p=0.8)
    found = preflight(config)
    assert asked == [(8, 0.9, 0.8), (4, 0.9, 0.8)]
    assert any("S is the student" in reason for reason in found.reasons)
    assert any("no question of the batch is routed to teacher T3" in caution for caution in found.cautions)


def test_preflight_refuses_what_scores_nothing():
    with pytest.raises(InputError, match="objective: found sft, expected one that scores responses"):
        preflight(replace(BASE, objective=ObjectiveConfig("sft")))
    with pytest.raises(InputError, match="--teacher: found none, expected at least one to compare with the student"):
        preflight(replace(BASE, teacher=(), objective=ObjectiveConfig("grpo")))


def test_a_self_teacher_reads_demonstrations(tmp_path):
    """Shown a right solution, the student is a teacher whose reward prefers right responses."""
    task, tokenizer = find_task("toy"), load_tokenizer(S)
    questions, file = task.load(QUESTIONS), tmp_path / "demonstrations.jsonl"
    drawn = rollout(load_model(T2), [chat_tokens(tokenizer, q.text) for q in questions], 4, max_tokens=80)
    given = []
    for index, (tokens, length) in enumerate(zip(drawn.tokens, drawn.length)):
        question, text = questions[index // 4], tokenizer.decode(tokens[:length], skip_special_tokens=True)
        correct = task.grade(text, question.gold) is True
        given.append(Demonstration(question.id, text, correct))
    save_demonstrations(file, given)
    config = replace(BASE, teacher=("Self-1C=self:1c",), demonstrations=str(file), rollouts=4, steps=1)
    trainer = Trainer(config, tmp_path / "self", quiet)
    found = trainer.advance()
    (teacher,) = trainer.setup.teachers
    longer = [len(shown) > len(plain) for shown, plain in zip(teacher.prompts, trainer.setup.prompts)]
    assert all(longer)
    assert found["reward/auroc"] > 0.6
    with pytest.raises(InputError, match="--demonstrations: found none"):
        Trainer(replace(config, demonstrations=None), tmp_path / "none", quiet)


def test_evaluation_counts_what_was_graded():
    tokenizer, config = load_tokenizer(T2), EvalConfig("toy", QUESTIONS, 4, 1.0, 1.0, 80)
    table = evaluate(load_model(T2), tokenizer, config)
    assert list(table["samples"]) == [4] * 12
    found = summary(table)
    assert found["avg"] == pytest.approx((table["correct"] / 4).mean())
    assert found["pass@1"] == pytest.approx(found["avg"])
    assert found["pass@4"] == pytest.approx((table["correct"] > 0).mean())
    assert found["avg"] > 0.7


def test_a_gate_is_the_loss_of_the_tokens_it_keeps(tmp_path):
    """The gradient on incorrect responses alone is that of a batch from which the correct ones were taken out."""
    config = replace(BASE, objective=ObjectiveConfig("full"), gate=GateConfig(incorrect_only=True), rollouts=4)
    trainer = Trainer(config, tmp_path / "gated", quiet)
    batch = trainer.collect.draw(trainer.params, 0)

    def gradient(batch, gate: GateConfig):
        scored, updates = trainer.collect.score(trainer.params, batch)
        targets = make_targets(config, batch, scored, gate_weights(gate, batch, scored))
        rows = np.arange(len(batch.question))
        return trainer.gradients(updates[0], reduced(config, targets, rows)).gradients

    wrong = batch.correct != 1
    assert 0 < wrong.sum() < len(wrong)
    fields = {name: getattr(batch, name) for name in batch.__dataclass_fields__}
    kept = replace(batch, **{name: array[wrong] for name, array in fields.items()})
    for a, b in zip(*(jax.tree.leaves(g) for g in (gradient(batch, config.gate), gradient(kept, GateConfig())))):
        assert_allclose(a, b, atol=1e-5 * float(np.abs(b).max()) + 1e-8)


def test_a_diagnosis_weighs_by_the_teacher_that_trains(tmp_path):
    """Of two diagnosed teachers, one aligned on wrong paths and one on right ones, the run's own is heard."""
    nodes = pd.DataFrame({"path_correct": np.arange(400) % 2 == 0, "estimator": "bellman", "success_range": 0.2})
    nodes["reverse_kl"], nodes["entropy_student"] = np.random.default_rng(0).uniform(size=(2, 400))
    sides = {"T2": ~nodes["path_correct"], "T3": nodes["path_correct"]}
    parts = [nodes.assign(teacher=name, align_reverse_kl=np.where(on, 1.0, -1.0)) for name, on in sides.items()]
    run = RunFolder.create(str(tmp_path / "diagnosis"), {"student": S, "teacher": [*BASE.teacher, "T9=other"]})
    run.write_table("records/nodes.parquet", pd.concat(parts))
    config = replace(BASE, objective=ObjectiveConfig("full"), gate=GateConfig(diagnosis=run.path), rollouts=4)
    trainer = Trainer(config, tmp_path / "run", quiet)
    batch = trainer.collect.draw(trainer.params, 0)
    scored, _ = trainer.collect.score(trainer.params, batch)
    weights = gate_weights(config.gate, batch, scored, trainer.table)
    wrong = (batch.correct != 1)[:, None] & scored.mask
    assert (weights[wrong] > 0).all()
    assert (weights[~wrong] == 0).all()
    with pytest.raises(InputError, match="found no decision node of teacher T9"):
        AlignmentTable.of_run(run.path, S, ["T9=other"])
    with pytest.raises(InputError, match=r"found a diagnosis of the teachers T2=.*, expected T2=other among them"):
        AlignmentTable.of_run(run.path, S, ["T2=other"])
    with pytest.raises(InputError, match=r"found a diagnosis of .*S, expected one of other"):
        AlignmentTable.of_run(run.path, "other", BASE.teacher)
