"""The plan of a training run: rollouts, teachers, forward and backward passes and updates of every step."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace

import jax

from jaxopd.models.config import QwenConfig
from jaxopd.models.sharding import abstract_model
from jaxopd.plan.diagnosis import Plan, parts_of_each
from jaxopd.plan.hardware import Hardware, ImaginedMesh
from jaxopd.plan.roofline import Operation, decoding, reading, stage
from jaxopd.rollouts.plan import USABLE
from jaxopd.tasks.contexts import TeacherSpec
from jaxopd.train.batch import prompt_width
from jaxopd.train.config import TrainConfig
from jaxopd.train.plan import TrainingPlan, plan_training

UPDATE_BYTES = 40  # a parameter: gradient, two moments and master are read, the last three and the copy written


@dataclass(frozen=True)
class TrainingWork:
    """What is asked of a training run, by default what `jaxopd train` does; lengths in tokens."""

    steps: int = TrainConfig.steps
    """Batches of rollouts."""
    batch: int = TrainConfig.batch
    """Prompts a batch."""
    rollouts: int = TrainConfig.rollouts
    """Responses a prompt."""
    micro_batch: int = TrainConfig.micro_batch
    """Responses in a forward and backward pass, all devices together."""
    prompt_tokens: int = 200
    """Tokens of a prompt."""
    response_tokens: int = 3000
    """Tokens of a response in the mean."""
    max_tokens: int = TrainConfig.max_tokens
    """Response length limit, tokens."""
    remat: bool = TrainConfig.remat
    """Keep the inputs of layers only, and compute the rest again in the backward pass."""
    slots: int = TrainConfig.slots
    """Sequences decoded at once, over all devices."""
    dtype: str = TrainConfig.dtype
    """Of the forward and backward pass; masters and optimizer are float32."""
    model_parallel: int = TrainConfig.model_parallel
    """Devices that share one copy of a teacher."""
    fsdp: bool = TrainConfig.fsdp
    """Split over the other devices what is left of a teacher's matrices."""


def plan_training_run(
    student: QwenConfig, teachers: Mapping[str, QwenConfig], work: TrainingWork, hardware: Hardware, devices: int
) -> Plan:
    """Plans a run in which one teacher scores each response; memory is that of `plan_training`, the run's own."""
    responses = work.batch * work.rollouts
    drawn, whole = responses * work.response_tokens, work.prompt_tokens + work.response_tokens
    place = hardware, work.dtype
    stages = [
        decoding(
            "rollouts", student, *place, tokens=drawn, length=work.response_tokens, trunk=work.prompt_tokens,
            trunks=work.batch, slots=work.slots, devices=devices, max_tokens=work.max_tokens,
        )
    ]  # fmt: skip
    passes = {"tokens": responses * whole, "scored": drawn, "length": whole, "devices": devices}
    readers = {"student": student} | dict(list(teachers.items())[:1])
    stages += [reading(f"scoring, {name}", config, *place, **passes) for name, config in readers.items()]
    stages.append(reading("forward and backward", student, *place, **passes, cost=4.0 if work.remat else 3.0))
    numbers = sum(leaf.size for leaf in jax.tree.leaves(abstract_model(student, "float32")[1]))
    update = [Operation(10 * numbers, UPDATE_BYTES * numbers / devices)]
    stages.append(stage("update", drawn, update, hardware, times=1, flops=hardware.flops))
    scaled = [replace(s, tokens=work.steps * s.tokens, seconds=work.steps * s.seconds) for s in stages]
    plan = training_memory(student, teachers, work, hardware, devices)
    recomputed = work.remat and not hardware.kind.startswith("cpu")  # as in `recomputes`, but for that device
    activations = plan.activations_with_remat if recomputed else plan.activations
    return Plan(_parts(replace(plan, activations=activations), devices), scaled, USABLE * hardware.memory)


def training_memory(
    student: QwenConfig, teachers: Mapping[str, QwenConfig], work: TrainingWork, hardware: Hardware, devices: int
) -> TrainingPlan:
    """Gives the training step's own plan for models without weights on devices that need not be there."""
    config = TrainConfig(
        teacher=tuple(f"{name}=x" for name in teachers) or ("x=x",), steps=work.steps, batch=work.batch,
        rollouts=work.rollouts, mini_batch=work.batch, micro_batch=work.micro_batch, max_tokens=work.max_tokens,
        dtype=work.dtype, remat=work.remat, slots=work.slots,
    )  # fmt: skip
    prompts = [[0] * work.prompt_tokens] * work.batch
    width, mesh = prompt_width(prompts), ImaginedMesh(devices, hardware.kind, work.model_parallel)
    split = work.fsdp or work.model_parallel > 1
    setup = SimpleNamespace(
        mesh=mesh, engine_mesh=ImaginedMesh(devices, hardware.kind), width=width, model_config=student, prompts=prompts,
        questions=prompts, initial=abstract_model(student, "float32")[1],
        teachers=[
            SimpleNamespace(spec=TeacherSpec(name), graph=graph, state=state, prompts=prompts, width=width, split=split)
            for name, model in teachers.items()
            for graph, state in [abstract_model(model, work.dtype, mesh.abstract, fsdp=work.fsdp)]
        ],
    )  # fmt: skip
    return plan_training(config, setup, int(devices * USABLE * hardware.memory))


def _parts(plan: TrainingPlan, devices: int) -> dict[str, dict[str, float]]:
    held = {name: getattr(plan, name) / devices for name in ("masters", "optimizer", "teachers")}
    shared = {name: getattr(plan, name) / devices for name in ("states", "weights")}
    of_update = {name: getattr(plan, name) / devices for name in ("gradients", "activations", "head")}
    return {
        "rollout": held | parts_of_each(plan.rollout, devices),
        "scoring": held | shared | {"workspace": plan.scoring / devices},
        "update": held | shared | of_update,
    }
