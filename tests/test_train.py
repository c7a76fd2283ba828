"""The training loop on the toy suite: exact resumption, invariances, gates, and what stops it."""

import gc
import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from jaxopd import toy
from jaxopd.errors import InputError
from jaxopd.models import load_model
from jaxopd.models.sharding import device_mesh
from jaxopd.train.batch import Batch, question_order
from jaxopd.train.collect import Collector
from jaxopd.train.config import GateConfig, TrainConfig
from jaxopd.train.evaluate import gap_recovery, pass_at
from jaxopd.train.gates import AlignmentTable, gate_weights
from jaxopd.train.geometry import cosine
from jaxopd.train.health import Monitor, TrainingStopped, repetition
from jaxopd.train.log import MetricsLog, check_writers
from jaxopd.train.loop import WHOLE, Trainer, train
from jaxopd.train.metrics import Scored, auroc
from jaxopd.train.objectives import ObjectiveConfig
from jaxopd.train.targets import make_targets, reduced

pytestmark = pytest.mark.slow  # minutes in all: they train

CONFIG = TrainConfig(
    student=str(toy.MODELS / "S"),
    teacher=(f"T2={toy.MODELS / 'T2'}",),
    task="toy",
    questions="all:6:7",
    objective=ObjectiveConfig(k=4),
    steps=4,
    batch=4,
    mini_batch=2,
    rollouts=2,
    micro_batch=8,
    max_tokens=32,
    max_prompt=64,
    learning_rate=1e-3,
    save_every=2,
    show_every=0,
)


def quiet(_: str) -> None:
    pass


def leaves(trainer: Trainer) -> list[np.ndarray]:
    return jax.device_get(jax.tree.leaves((trainer.params, trainer.opt_state)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Trainer:
    """Four uninterrupted steps on one device."""
    trainer = Trainer(CONFIG, tmp_path_factory.mktemp("whole") / "run", quiet, device_mesh(1))
    trainer.run()
    return trainer


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of a run that stopped in its fourth step, its line of the third one half written."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    trainer = Trainer(CONFIG, folder, quiet, device_mesh(1))
    for _ in range(3):
        trainer.advance()
    trainer.checkpoints.close()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "entropy')
    return folder


def test_a_resumed_run_is_the_uninterrupted_one(whole, killed, tmp_path):
    folder = shutil.copytree(killed, tmp_path / "run")
    resumed = Trainer(CONFIG, folder, quiet, device_mesh(1))
    assert resumed.step == 2
    resumed.run()
    for ours, theirs in zip(leaves(resumed), leaves(whole), strict=True):
        assert_array_equal(ours, theirs)
    assert (folder / "metrics.jsonl").read_bytes() == (whole.out / "metrics.jsonl").read_bytes()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 4
    saved = (folder / "student" / "model.safetensors").read_bytes()
    assert saved == (whole.out / "student" / "model.safetensors").read_bytes()


def start(folder: Path, **changes) -> subprocess.Popen:
    """Trains in a process of its own, on the devices that are really there."""
    code = "import sys, pickle; from jaxopd.train.loop import train; train(pickle.load(sys.stdin.buffer), sys.argv[1])"
    environment = {**os.environ, "XLA_FLAGS": ""}
    process = subprocess.Popen([sys.executable, "-c", code, folder], stdin=subprocess.PIPE, env=environment)
    with process.stdin as given:
        given.write(pickle.dumps(replace(CONFIG, **changes)))
    return process


def kill_when(process: subprocess.Popen, reached: Callable[[], bool]) -> None:
    """Sends signal 9 as soon as a moment is reached."""
    while not reached():
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.002)
    process.kill()
    process.wait()


def test_a_process_killed_with_signal_9(tmp_path):
    """Killed when a step was logged, inside a checkpoint, and three times at random, at whatever it was doing then."""
    began = time.perf_counter()
    assert start(tmp_path / "whole").wait() == 0
    whole_run = time.perf_counter() - began
    folder = tmp_path / "run"
    metrics = folder / "metrics.jsonl"
    kill_when(start(folder), lambda: metrics.exists() and metrics.read_text().count("\n") == 1)
    kill_when(start(folder, save_every=1), lambda: any((folder / "checkpoints").glob("*tmp*")))
    for seconds in np.random.default_rng(0).uniform(0, whole_run, 3):
        process = start(folder)
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        process.kill()
        process.wait()
    assert start(folder).wait() == 0
    for name in ("metrics.jsonl", "student/model.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_run_resumed_on_eight_devices(whole, killed, tmp_path):
    folder = shutil.copytree(killed, tmp_path / "run")
    resumed = Trainer(CONFIG, folder, quiet, device_mesh(8))
    resumed.run()
    spread = jax.tree.leaves(resumed.opt_state)[1]
    assert len(spread.sharding.device_set) == 8
    for ours, theirs in zip(leaves(resumed), leaves(whole), strict=True):
        assert_allclose(ours, theirs, atol=1e-5)


def test_a_job_that_lost_its_run_writes_no_more(killed, tmp_path):
    folder = shutil.copytree(killed, tmp_path / "run")
    trainer = Trainer(CONFIG, folder, quiet, device_mesh(1))
    assert not list(folder.rglob("claim.json"))  # held while it runs
    draw = trainer.collect.draw

    def paused(*given):
        trainer.claims.run.write_json(f"pieces/{WHOLE}/claim.json", {"job": "another", "machine": "another", "pid": 1})
        return draw(*given)

    trainer.collect.draw = paused
    with pytest.raises(InputError, match="found a run that another job took over"):
        trainer.run()
    assert trainer.log.read()[-1]["step"] == 1
    assert not (folder / "student").exists()


def test_a_run_that_another_job_took_further_is_refused(killed, tmp_path):
    folder = shutil.copytree(killed, tmp_path / "run")
    trainer = Trainer(CONFIG, folder, quiet, device_mesh(1))
    shutil.copytree(folder / "checkpoints" / "2", folder / "checkpoints" / "4")
    with pytest.raises(InputError, match="checkpoints: found 4 as the newest step, expected 2 as the newest step"):
        trainer.run()


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_run_that_cannot_be_restored_is_given_up(damage, killed, tmp_path):
    folder = shutil.copytree(killed, tmp_path / "run")
    arrays = folder / "checkpoints" / "2" / "arrays"
    if damage == "missing":
        shutil.rmtree(arrays)
    else:
        file = max((arrays / "ocdbt.process_0" / "d").iterdir(), key=lambda file: file.stat().st_size)
        os.truncate(file, file.stat().st_size // 2)
    said = r"found no readable checkpoint \([^\[{]{1,200}\), expected a whole one$"
    with pytest.raises(InputError, match=f"{folder}/checkpoints/2: {said}"):
        Trainer(CONFIG, folder, quiet, device_mesh(1))
    gc.collect()  # a read that orbax left behind would warn
    assert not list(folder.rglob("claim.json"))


def test_a_run_with_other_settings_is_refused(killed):
    with pytest.raises(InputError, match=r"learning_rate: found 0\.001, what the run here began with, expected 0\.002"):
        Trainer(replace(CONFIG, learning_rate=2e-3), killed, quiet, device_mesh(1))


def test_the_trained_student_differs_and_loads(whole):
    before, after = load_model(CONFIG.student), load_model(whole.out / "student")
    change = max(float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, map(nnx.state, (before, after)))))
    assert 1e-4 < change < 0.1
    lines = [json.loads(line) for line in (whole.out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert all(np.isfinite(line["train/loss"]) and 0 <= line["overlap/ratio"] <= 1 for line in lines)


def first_gradients(
    tmp_path, name: str, same_rollouts: bool = False, devices: int = 1, **changes
) -> tuple[float, nnx.State]:
    """Loss and gradients of the first batch; same_rollouts: of float32's responses, whatever the precision."""
    trainer = Trainer(replace(CONFIG, mini_batch=4, **changes), tmp_path / name, quiet, device_mesh(devices))
    drawing = Collector(replace(trainer.config, dtype="float32"), trainer.setup) if same_rollouts else trainer.collect
    batch = drawing.draw(trainer.params, 0)
    scored, micros = trainer.collect.score(trainer.params, batch)
    targets = make_targets(trainer.config, batch, scored, scored.mask.astype(float))
    weighted = reduced(trainer.config, targets, np.arange(len(batch.question)))
    sums = trainer.gradients(micros[0], weighted)
    return float(sums.loss), sums.gradients


@pytest.mark.parametrize("objective", ["topk_paper", "full", "sampled"])
def test_micro_batches_and_remat_do_not_matter(tmp_path, objective):
    changes = {"objective": ObjectiveConfig(objective, k=4, outcome="dr_grpo")}
    loss, gradients = first_gradients(tmp_path, "all", **changes, micro_batch=8)
    for name, other in (("threes", {"micro_batch": 3}), ("remat", {"micro_batch": 8, "remat": True})):
        loss_too, gradients_too = first_gradients(tmp_path, name, **changes, **other)
        assert_allclose(loss_too, loss, rtol=1e-5)
        largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradients))
        for a, b in zip(*map(jax.tree.leaves, (gradients, gradients_too)), strict=True):
            assert_allclose(a, b, atol=2e-5 * largest)


@pytest.mark.parametrize("objective", ["topk_paper", "full"])
def test_a_teacher_split_over_devices_says_the_same(tmp_path, objective):
    changes = {"objective": ObjectiveConfig(objective, k=4)}
    loss, gradients = first_gradients(tmp_path, "whole", **changes)
    loss_too, gradients_too = first_gradients(tmp_path, "split", devices=8, model_parallel=2, fsdp=True, **changes)
    assert_allclose(loss_too, loss, rtol=1e-5)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradients))
    for a, b in zip(*map(jax.tree.leaves, (gradients, gradients_too)), strict=True):
        assert_allclose(a, b, atol=2e-5 * largest)


def test_bfloat16_computes_what_float32_does(tmp_path):
    """Within bfloat16's eight bits; masters and optimizer stay float32."""
    loss, gradients = first_gradients(tmp_path, "float32")
    loss_too, gradients_too = first_gradients(tmp_path, "bfloat16", dtype="bfloat16", same_rollouts=True)
    assert loss_too == pytest.approx(loss, rel=0.1)
    assert {x.dtype for x in jax.tree.leaves(gradients_too)} == {jnp.dtype("float32")}
    assert cosine(gradients, gradients_too) > 0.98


@pytest.mark.parametrize("objective", ["topk_paper", "topk_thunlp", "full", "sampled"])
def test_the_student_as_its_own_teacher_gives_no_gradient(tmp_path, objective):
    changes = {"teacher": (f"S={CONFIG.student}",), "objective": ObjectiveConfig(objective, k=4)}
    loss, gradients = first_gradients(tmp_path, "self", **changes)
    assert abs(loss) < 1e-6
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradients)) < 1e-5


@pytest.mark.parametrize(("passes", "outcome_weight"), [(1, 0.0), (4, 0.0), (4, 1.0)])
def test_the_clip_fraction_counts_tokens_that_lost_their_gradient(tmp_path, passes, outcome_weight):
    """None on the rollouts' own parameters, some in later passes; a divergence has no ratio, its outcome reward has."""
    outcome = {"outcome": "dr_grpo", "outcome_weight": outcome_weight} if outcome_weight else {}
    objective = ObjectiveConfig("full" if outcome else "sampled", k=4, clip_low=0.02, clip_high=0.02, **outcome)
    config = replace(CONFIG, objective=objective, passes=passes, mini_batch=4, rollouts=8)
    found = Trainer(config, tmp_path / "run", quiet, device_mesh(1)).advance()
    low, high = (0, 0) if passes == 1 else (0.01, 0.8)
    assert low <= found["train/clip_fraction"] <= high


@pytest.mark.parametrize("fault", ["score/log_q nan", "train/loss inf"])
def test_what_is_not_finite_stops_training(killed, tmp_path, monkeypatch, fault):
    folder = shutil.copytree(killed, tmp_path / "run")
    trainer = Trainer(CONFIG, folder, quiet, device_mesh(1))
    healthy = trainer.collect.score

    def score(params, batch):
        scored, micros = healthy(params, batch)
        return replace(scored, log_q=np.full_like(scored.log_q, np.nan)), micros

    if fault.startswith("score"):
        trainer.collect.score = score
    else:
        healthy_gradients = trainer.gradients
        monkeypatch.setattr(trainer, "gradients", lambda *given: healthy_gradients(*given)._replace(loss=jnp.inf))
    before = leaves(trainer)
    with pytest.raises(TrainingStopped, match=rf"step 2: found {fault},.*step-000002.npz.*checkpoints/2$"):
        trainer.advance()
    for now, then in zip(leaves(trainer), before, strict=True):
        assert_array_equal(now, then)
    kept = np.load(folder / "replay" / "step-000002.npz")
    assert_array_equal(kept["responses"], trainer.collect.draw(trainer.params, 2).responses)


def test_another_tokenizer_is_refused(tmp_path):
    other = shutil.copytree(toy.MODELS / "T2", tmp_path / "other")
    file = other / "tokenizer.json"
    words = json.loads(file.read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["yes"], vocabulary["no"] = vocabulary["no"], vocabulary["yes"]
    file.write_text(json.dumps(words))
    with pytest.raises(
        InputError,
        match=r"--teacher T2: found another tokenizer \('no' is its token \d+\), expected .* where it is \d+",
    ):
        Trainer(replace(CONFIG, teacher=(f"T2={other}",)), tmp_path / "run", quiet)
    assert not (tmp_path / "run").exists()


def test_teachers_are_routed_by_metadata(tmp_path):
    config = replace(CONFIG, teacher=(*CONFIG.teacher, f"T1={toy.MODELS / 'T1'}"), route=("boolean=T1",), micro_batch=3)
    trainer = Trainer(config, tmp_path / "run", quiet, device_mesh(1))
    flavours = [q.meta["flavour"] for q in trainer.setup.questions]
    assert_array_equal(trainer.setup.teacher_of, [int(flavour == "boolean") for flavour in flavours])
    batch = trainer.collect.draw(trainer.params, 0)
    routed, _ = trainer.collect.score(trainer.params, batch)
    alone, _ = trainer.collect.score(trainer.params, replace(batch, teacher=np.zeros_like(batch.teacher)))
    same = (np.abs(routed.sampled_log_q - alone.sampled_log_q) * batch.mask).max(-1) < 1e-5
    assert_array_equal(same, batch.teacher == 0)
    with pytest.raises(InputError, match="--route: found 'x=T9', expected VALUE=TEACHER with one of T2"):
        train(replace(CONFIG, route=("x=T9",)), tmp_path / "bad", quiet)


# Without a model --------------------------------------------------------------------------------------------------


def small_batch() -> tuple[Batch, Scored]:
    rng = np.random.default_rng(0)
    responses = np.array([[5, 6, 7, 8], [5, 6, -1, -1], [9, 9, 9, -1]])
    batch = Batch(np.array([0, 0, 1]), np.zeros(3, int), responses, np.array([1, 0, -1]), np.zeros(3, bool))
    ids = np.stack([rng.permutation(9)[:2] for _ in range(12)]).reshape(3, 4, 2)
    two, one = -rng.uniform(1, 3, (2, 3, 4, 4)), rng.uniform(0.1, 1, (5, 3, 4))
    return batch, Scored(ids, ids, *two, *one, batch.mask)


def test_gates_multiply():
    batch, scored = small_batch()
    assert_array_equal(gate_weights(GateConfig(), batch, scored), batch.mask)
    wrong = gate_weights(GateConfig(incorrect_only=True), batch, scored)
    assert_array_equal(wrong, batch.mask & (batch.correct != 1)[:, None])
    window = gate_weights(GateConfig(window_start=1, window_end=3), batch, scored)
    assert_array_equal(window, batch.mask & np.array([False, True, True, False]))
    quantile = gate_weights(GateConfig(divergence_quantile=0.5), batch, scored)
    kept = scored.reverse_kl[quantile > 0]
    assert len(kept) == 5
    assert kept.min() >= np.median(scored.reverse_kl[batch.mask])
    both = gate_weights(GateConfig(incorrect_only=True, window_start=1, window_end=3), batch, scored)
    assert_array_equal(both, wrong * window)


def test_alignment_weights_follow_the_diagnosis():
    """Aligned where the divergence is large, opposed where it is small: only the former keeps weight."""
    rng = np.random.default_rng(1)
    divergence, entropy = rng.uniform(0, 1, 4000), rng.uniform(0, 1, 4000)
    nodes = pd.DataFrame(
        {
            "path_correct": rng.uniform(size=4000) < 0.5,
            "reverse_kl": divergence,
            "entropy_student": entropy,
            "align_reverse_kl": np.where(divergence > 0.5, 0.8, -0.4),
            "success_range": 0.3,
        }
    )
    table = AlignmentTable.of_nodes(nodes, "run")
    batch, scored = small_batch()
    scored = replace(scored, reverse_kl=np.where(scored.entropy_student > 0.5, 0.9, 0.1))
    weights = gate_weights(GateConfig(), batch, scored, table)
    assert_array_equal(weights[batch.mask] > 0, scored.reverse_kl[batch.mask] > 0.5)
    assert_allclose(weights[weights > 0], 2.0, rtol=0.05)  # half of the nodes, the mean over all being 1
    # Reversed nodes at which little is at stake change nothing.
    idle = nodes.assign(align_reverse_kl=-nodes["align_reverse_kl"], success_range=1e-4)
    same = AlignmentTable.of_nodes(pd.concat([nodes, idle]), "run")
    assert_allclose(same.weight, table.weight, rtol=0.05, atol=1e-3)
    with pytest.raises(InputError, match="run: found no cell of positive alignment"):
        AlignmentTable.of_nodes(nodes.assign(align_reverse_kl=-0.5), "run")


def test_question_order_is_shuffled_epochs():
    stream = question_order(5, 0, 15, seed=3)
    for epoch in range(3):
        assert_array_equal(np.sort(stream[5 * epoch : 5 * epoch + 5]), np.arange(5))
    assert_array_equal(question_order(5, 7, 6, seed=3), stream[7:13])
    assert not np.array_equal(question_order(5, 0, 15, seed=4), stream)


def test_the_monitor_warns_of_collapse_only():
    normal = {"entropy/student": 0.5, "rollout/length": 40.0, "rollout/repetitive": 0.0, "rollout/truncated": 0.1}
    monitor = Monitor()
    for _ in range(6):
        assert monitor.warnings(normal) == []
    for name, value, said in (
        ("entropy/student", 0.05, "entropy fell"),
        ("rollout/repetitive", 0.5, "repeat themselves"),
        ("rollout/truncated", 0.9, "run into the length limit"),
        ("rollout/length", 200.0, "200 tokens long"),
    ):
        (warning,) = Monitor(monitor.first).warnings(normal | {name: value})
        assert said in warning


def test_a_log_continues_exactly_and_holds_no_undefined_number(tmp_path):
    log = MetricsLog(tmp_path)
    for step in range(3):
        log.write(step, {"b": float("nan") if step else 0.5, "a": [1.0], "warnings": ["x"]})
    written = log.path.read_bytes()
    with log.path.open("a") as file:
        file.write('{"step": 3, "a"')
    log.resume(2)
    assert [line["step"] for line in log.read()] == [0, 1]
    log.write(2, {"a": [1.0], "b": float("inf"), "warnings": ["x"]})
    assert log.path.read_bytes() == written
    assert log.read()[1] == {"step": 1, "a": [1.0], "b": None, "warnings": ["x"]}


def test_a_log_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="log_to: found 'wandb', expected one whose package is installed"):
        check_writers(["wandb"])


def test_repetition():
    assert repetition(np.arange(20)) == 0
    assert repetition(np.array([1, 2, 3, -1])) == 0
    assert repetition(np.tile([1, 2], 20)) == pytest.approx(1 - 2 / 37)


def test_auroc_counts_pairs():
    scores, correct = np.array([0.1, 0.4, 0.4, 0.9]), np.array([False, True, False, True])
    assert auroc(scores, correct) == (1 + 0.5 + 1 + 1) / 4
    assert np.isnan(auroc(scores, np.ones(4, bool)))


def test_pass_at_k_is_the_mean_over_subsets():
    outcomes = [True, False, False, True, False]
    for k in (1, 2, 4):
        subsets = [any(subset) for subset in combinations(outcomes, k)]
        assert pass_at([5], [2], k)[0] == pytest.approx(np.mean(subsets))
    with pytest.raises(InputError, match="pass@k: found k 6, expected 1 to 5"):
        pass_at([5], [2], 6)
    assert gap_recovery(0.5, 0.65, 0.8) == pytest.approx(0.5)
