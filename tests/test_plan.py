"""jaxopd plan: its memory is the engine's and the trainer's, its times are sums done here by hand."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose

from jaxopd import cli
from jaxopd.diagnose import DiagnoseConfig
from jaxopd.errors import InputError
from jaxopd.models import QwenConfig, init_model
from jaxopd.models.sharding import device_mesh, held_bytes, parameter_shardings
from jaxopd.plan import (
    HARDWARE,
    DiagnosisWork,
    Hardware,
    TrainingWork,
    find_hardware,
    plan_diagnosis,
    plan_training_run,
)
from jaxopd.plan.diagnosis import rollout_memory
from jaxopd.plan.roofline import decoding, reading, weight_bytes
from jaxopd.rollouts import Engine, Requests, Sampling
from jaxopd.rollouts.plan import USABLE
from jaxopd.train.config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
SMALL = QwenConfig(997, 32, 64, 3, 4, 2, 8, max_positions=4096)
UNTIED = dataclasses.replace(SMALL, model_type="qwen2", tie_embeddings=False, hidden_size=48)
SLOW = Hardware("cpu", memory=1e9, flops=2e6, bandwidth=1e6, step_flops=1e6)
QWEN3_0_6B = QwenConfig(151936, 1024, 3072, 28, 16, 8, 128, max_positions=40960)
QWEN3_8B = QwenConfig(151936, 4096, 12288, 36, 32, 8, 128, max_positions=40960, tie_embeddings=False)


@pytest.mark.parametrize("config", [SMALL, UNTIED])
def test_weights_are_those_of_the_model(config):
    model = init_model(config, dtype="bfloat16")
    assert weight_bytes(config, "bfloat16") == Engine(model, mesh=device_mesh(1)).weights


def test_a_real_model_has_its_published_size():
    assert_allclose(weight_bytes(QWEN3_0_6B, "bfloat16") / 2, 0.596e9, rtol=1e-3)  # parameters of Qwen3-0.6B
    assert_allclose(weight_bytes(QWEN3_8B, "bfloat16") / 2, 8.19e9, rtol=1e-3)  # of Qwen3-8B


@pytest.mark.parametrize("devices", [1, 4])
def test_memory_is_what_the_engine_plans_for_the_same_work(devices):
    engine = Engine(init_model(SMALL), slots=64, mesh=device_mesh(devices), budget=int(devices * USABLE * 1e9))
    prompt = np.zeros(300, np.int32)
    work = DiagnosisWork(max_tokens=200, slots=64, dtype="float32")
    theirs = engine.plan([prompt] * 2, Requests.continuations([prompt] * 2, 64), Sampling(200))
    assert rollout_memory(SMALL, work, SLOW, devices, 2, 300) == theirs


def test_slots_shrink_until_they_fit_the_imagined_memory():
    tiny = dataclasses.replace(SLOW, memory=4e6)
    plan = rollout_memory(SMALL, DiagnosisWork(max_tokens=2048, slots=256, dtype="float32"), tiny, 1, 4, 64)
    assert plan.total <= USABLE * 4e6
    assert plan.groups * plan.slots < 256


def test_a_decoding_step_is_the_sum_of_its_operations():
    """By hand: 8 slots, float32, the weights bound by arithmetic, attention and logits by memory."""
    found = decoding(
        "x", SMALL, SLOW, "float32", tokens=80, length=20, trunk=100, slots=8, trunks=1, devices=1, max_tokens=20
    )
    weights = 3 * 32 * (2 * (4 + 2) * 8 + 3 * 64) + 997 * 32
    token = 2 * 3 * 2 * 8 * 4  # keys and values, layers, heads, width, bytes
    trunk = max(8 * 100 * 4 * 3 * 4 * 8 / 1e6, 100 * token / 1e6)
    suffix = max(8 * 32 * 4 * 3 * 4 * 8 / 1e6, 8 * 32 * token / 1e6)  # the ring of 32 columns
    step = 2 * 8 * weights / 1e6 + trunk + suffix + 6 * 4 * 8 * 997 / 1e6
    assert_allclose(found.seconds, 10 * step)
    assert found.limit == "arithmetic"
    assert_allclose(found.rate, 80 / found.seconds)


def test_what_binds_changes_with_the_number_of_slots():
    fast = HARDWARE["h200"]
    work = {"tokens": 1e6, "length": 500.0, "trunk": 200.0, "trunks": 1, "devices": 1, "max_tokens": 1000}
    few, many = (decoding("x", QWEN3_8B, fast, "bfloat16", slots=slots, **work) for slots in (1, 64))
    assert (few.limit, many.limit) == ("memory bandwidth", "memory bandwidth")
    assert many.rate > 20 * few.rate  # the weights are read once a step
    assert reading("x", QWEN3_8B, fast, "bfloat16", tokens=1e6, length=2e3, devices=1).limit == "arithmetic"


def test_devices_share_the_time_and_a_reached_share_divides_it():
    work = DiagnosisWork(slots=256, dtype="bfloat16")
    one = plan_diagnosis(QWEN3_0_6B, {"T": QWEN3_8B}, QWEN3_8B, work, HARDWARE["h200"], 1)
    reached = plan_diagnosis(QWEN3_0_6B, {"T": QWEN3_8B}, QWEN3_8B, work, HARDWARE["h200"], 1)
    faster = dataclasses.replace(HARDWARE["h200"], reached=1.0)
    assert_allclose(plan_diagnosis(QWEN3_0_6B, {"T": QWEN3_8B}, QWEN3_8B, work, faster, 1).seconds, one.seconds / 2)
    assert one == reached
    eight = plan_diagnosis(QWEN3_0_6B, {"T": QWEN3_8B}, QWEN3_8B, work, HARDWARE["h200"], 8)
    assert one.seconds / 8 < eight.seconds < one.seconds  # weights are read by each device
    assert set(one.memory) == {"targeted rollouts", "demonstrations, large", "scoring, T"}
    assert one.memory["scoring, T"]["teacher"] == weight_bytes(QWEN3_8B, "bfloat16")


def test_training_holds_masters_moments_and_teachers():
    work = TrainingWork(batch=8, rollouts=2, micro_batch=8, max_tokens=256, response_tokens=100, dtype="bfloat16")
    plan = plan_training_run(SMALL, {"T": UNTIED}, work, SLOW, 2)
    update = plan.memory["update"]
    numbers = sum(leaf.size for leaf in jax.tree.leaves(Engine(init_model(SMALL), mesh=device_mesh(1)).state))
    assert (update["masters"], update["optimizer"]) == (4 * numbers / 2, 8 * numbers / 2)  # spread over both devices
    assert update["teachers"] == weight_bytes(UNTIED, "bfloat16")  # whole on each
    assert plan.stages[0].tokens == 200 * 8 * 2 * 100
    doubled = plan_training_run(SMALL, {"T": UNTIED}, dataclasses.replace(work, steps=400), SLOW, 2)
    assert_allclose(doubled.seconds, 2 * plan.seconds)


@pytest.mark.parametrize("work, verb", [(DiagnosisWork(), DiagnoseConfig), (TrainingWork(), TrainConfig)])
def test_a_plan_is_by_default_of_what_the_verb_does(work, verb):
    known: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(verb)}
    shared = {name: value for name, value in dataclasses.asdict(work).items() if name in known}
    shared.pop("questions", None)  # a number here, a file there
    assert len(shared) >= 5
    assert shared == {name: known[name] for name in shared}


def test_a_split_teacher_is_counted_as_it_lies():
    graph, state = nnx.split(init_model(UNTIED))
    there = jax.device_put(state, parameter_shardings(state, UNTIED, device_mesh(8, model=2), fsdp=True))
    work = DiagnosisWork(dtype="float32", model_parallel=2, fsdp=True)
    plan = plan_diagnosis(SMALL, {"T": UNTIED}, UNTIED, work, SLOW, 8)
    assert plan.memory["scoring, T"]["teacher"] == held_bytes(there) / 8
    engine = Engine(nnx.merge(graph, there))
    assert dict(engine.mesh.shape) == {"data": 4, "model": 2}
    assert plan.memory["demonstrations, large"]["weights"] == engine.weights / 8
    training = TrainingWork(batch=8, rollouts=2, micro_batch=8, max_tokens=256, response_tokens=100, dtype="float32")
    training = dataclasses.replace(training, model_parallel=2, fsdp=True)
    found = plan_training_run(SMALL, {"T": UNTIED}, training, SLOW, 8)
    assert found.memory["update"]["teachers"] == held_bytes(there) / 8
    with pytest.raises(InputError, match="--model-parallel: found 3"):
        plan_diagnosis(SMALL, {"T": UNTIED}, None, dataclasses.replace(work, model_parallel=3), SLOW, 8)


def test_what_decodes_with_fsdp_alone_is_copied_beside_its_shards():
    state = nnx.split(init_model(UNTIED))[1]
    there = jax.device_put(state, parameter_shardings(state, UNTIED, device_mesh(8), fsdp=True))
    work = DiagnosisWork(dtype="float32", fsdp=True)
    writing = plan_diagnosis(SMALL, {"T": UNTIED}, UNTIED, work, SLOW, 8).memory["demonstrations, large"]
    assert writing["shards"] == held_bytes(there) / 8
    assert writing["weights"] == weight_bytes(UNTIED, "float32")
    shared = dataclasses.replace(work, model_parallel=2)
    assert "shards" not in plan_diagnosis(SMALL, {}, UNTIED, shared, SLOW, 8).memory["demonstrations, large"]


def test_a_split_student_is_counted_as_it_lies():
    graph, state = nnx.split(init_model(SMALL))
    there = jax.device_put(state, parameter_shardings(state, SMALL, device_mesh(8, model=2), fsdp=True))
    work = DiagnosisWork(dtype="float32", model_parallel=2, fsdp=True, split_student=True)
    memory = plan_diagnosis(SMALL, {"T": UNTIED}, None, work, SLOW, 8).memory
    assert memory["scoring, T"]["student"] == held_bytes(there) / 8
    assert memory["targeted rollouts"]["weights"] == Engine(nnx.merge(graph, there)).weights / 8


def test_both_verbs_plan_the_rows_of_a_teacher_that_devices_share():
    """Its hidden states, of m times the rows of one on every device, and nothing else that grows with them."""
    wide = dataclasses.replace(UNTIED, hidden_size=512, num_kv_heads=4)  # its heads and FFN are split over all four
    training = TrainingWork(batch=8, rollouts=2, micro_batch=8, max_tokens=256, response_tokens=100, prompt_tokens=64)
    diagnosis = DiagnosisWork(dtype="float32", paths=4, max_tokens=256, prompt_tokens=64, self_teachers=0)
    for plan, work, phase, width in (
        (plan_training_run, training, "scoring", 64 + 256),
        (lambda *given: plan_diagnosis(*given[:2], None, *given[2:]), diagnosis, "scoring, T", 64 + 256),
    ):
        one, four = (
            plan(SMALL, {"T": wide}, dataclasses.replace(work, model_parallel=m), SLOW, 8).memory[phase]["workspace"]
            for m in (1, 4)
        )
        assert four - one == 2 * 4 * width * 512 * (4 - 1)  # a row a device


def test_this_machine_is_measured():
    here = find_hardware("here", SMALL, "float32", 8)
    assert min(here.flops, here.step_flops, here.bandwidth, here.memory) > 0
    assert here.reached == 1.0
    with pytest.raises(InputError, match="expected one of h200"):
        find_hardware("abacus", SMALL, "float32", 8)


def test_the_command(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(SMALL.to_json("float32")))
    arguments = ["plan", str(tmp_path / "config.json"), "--teacher", f"T={tmp_path / 'config.json'}", "--devices", "2"]
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    assert "targeted rollouts" in said
    assert "bound by" in said
    assert cli.main([*arguments, "training", "--steps", "3"]) == 0
    assert "forward and backward" in capsys.readouterr().out
    for wrong, words in (
        (["--devices", "0"], "--devices: found 0"),
        (["--reached", "2"], "--reached: found 2.0"),
        (["--hardware", "abacus"], "--hardware: found 'abacus'"),
        (["--large", str(tmp_path / "none.json")], "none.json: found no such file"),
        (["--teacher", "T"], "--teacher: found 'T'"),
        (["diagnosis", "--slots", "0"], "slots: found 0"),
        (["diagnosis", "--response-tokens", "600"], "response_tokens: found 600, expected at most max_tokens, 512"),
    ):
        assert cli.main([*arguments, *wrong]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.slow
def test_the_comparison_with_measurements_runs():
    done = subprocess.run(
        [sys.executable, ROOT / "experiments" / "plan_measured.py", "--smoke"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "smoke: " in done.stdout
