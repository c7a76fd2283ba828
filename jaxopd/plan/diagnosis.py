"""The plan of a diagnosis: rollouts, demonstrations, targeted rollouts, and scoring by the student and its teachers."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx

from jaxopd.diagnose.config import RESPONSES, DiagnoseConfig
from jaxopd.models.config import QwenConfig
from jaxopd.models.sharding import abstract_model, gathered_bytes, held_bytes
from jaxopd.plan.hardware import Hardware, ImaginedMesh
from jaxopd.plan.roofline import Stage, decoding, reading
from jaxopd.responses import TOKENS_AT_ONCE
from jaxopd.rollouts.plan import USABLE, MemoryPlan, plan_memory
from jaxopd.train.plan import Reader, gathered_to_read, scoring_bytes


@dataclass(frozen=True)
class DiagnosisWork:
    """What is asked of a diagnosis, by default what `jaxopd diagnose` does; lengths in tokens, numbers a question."""

    questions: int = 100
    """Questions."""
    prompt_tokens: int = 200
    """Tokens of a prompt."""
    response_tokens: int = DiagnoseConfig.max_tokens // 2
    """Tokens of a response in the mean."""
    max_tokens: int = DiagnoseConfig.max_tokens
    """Response length limit, tokens."""
    rollouts: int = DiagnoseConfig.rollouts
    """Initial rollouts a question; exits stop at 20 or soon after where both outcomes are common."""
    targeted_tokens: int | None = None
    """Tokens drawn by a question's targeted rollouts; by default those of 600 mean responses, the most exits take."""
    paths: int = DiagnoseConfig.paths
    """Representative paths of each outcome, correct and incorrect, which every teacher scores."""
    self_teachers: int = 5
    """Teachers that are the student with a context."""
    context_tokens: int = 1000
    """Tokens of such a context."""
    demonstration_trials: int = DiagnoseConfig.demonstration_trials
    """Samples tried for demonstrations, a question and source."""
    slots: int = DiagnoseConfig.slots
    """Sequences decoded at once, over all devices."""
    dtype: str = DiagnoseConfig.dtype
    """Parameters and activations."""
    model_parallel: int = DiagnoseConfig.model_parallel
    """Devices that share one copy of a teacher, or of the larger model."""
    fsdp: bool = DiagnoseConfig.fsdp
    """Split over the other devices what is left of these models' matrices."""
    split_student: bool = DiagnoseConfig.split_student
    """Split the student as the teachers are; by default each device holds a copy."""

    @property
    def all_paths(self) -> int:
        """A question's paths, of both outcomes."""
        return 2 * self.paths


@dataclass(frozen=True)
class Plan:
    """Bytes per device by phase and part, the stages, and what one device has for a run."""

    memory: dict[str, dict[str, float]]
    stages: list[Stage]
    budget: float

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def largest(self) -> tuple[str, float]:
        """The phase that holds most, and its bytes."""
        return max(((phase, sum(parts.values())) for phase, parts in self.memory.items()), key=lambda x: x[1])


def plan_diagnosis(
    student: QwenConfig,
    teachers: Mapping[str, QwenConfig],
    large: QwenConfig | None,
    work: DiagnosisWork,
    hardware: Hardware,
    devices: int,
) -> Plan:
    """Plans a diagnosis on `devices` equal devices, each with the student and its share of one other model at a time.

    Rollouts are spread over the devices, and so are the responses that a model reads. Each teacher reads the paths
    twice (to watch and to score), beside the student, and all initial rollouts for their rewards. Targeted rollouts
    start in the middle of a path in the mean, and so attend to the prompt and half a response. What the devices that
    share a model send each other takes no time here.
    """
    Q, length, prompt = work.questions, work.response_tokens, work.prompt_tokens
    targeted = RESPONSES * length if work.targeted_tokens is None else work.targeted_tokens
    shared = {"slots": work.slots, "devices": devices, "max_tokens": work.max_tokens}
    place = hardware, work.dtype

    def draw(name: str, config: QwenConfig, tokens: float, trunk: float, trunks: int, mean: float = length) -> Stage:
        return decoding(name, config, *place, tokens=tokens, length=mean, trunk=trunk, trunks=trunks, **shared)

    def read(name: str, config: QwenConfig, context: int, sequences: int) -> Stage:
        whole = context + prompt + length
        tokens, scored = Q * sequences * whole, Q * sequences * length
        return reading(name, config, *place, tokens=tokens, scored=scored, length=whole, devices=devices)

    stages = [draw("rollouts", student, Q * work.rollouts * length, prompt, 1)]
    if work.self_teachers:
        writers = {"student": student} | ({"large": large} if large else {})
        trials = Q * work.demonstration_trials * length
        stages += [draw(f"demonstrations, {name}", config, trials, prompt, 1) for name, config in writers.items()]
    stages.append(draw("targeted rollouts", student, Q * targeted, prompt + length / 2, work.all_paths, length / 2))
    readers = [(name, config, 0) for name, config in teachers.items()]
    readers += [(f"self-teacher {n + 1}", student, work.context_tokens) for n in range(work.self_teachers)]
    stages.append(read("scoring, student", student, 0, (1 + len(readers)) * work.all_paths))
    for name, config, context in readers:
        stages.append(read(f"scoring, {name}", config, context, 2 * work.all_paths))
        stages.append(read(f"rewards, {name}", config, context, work.rollouts))
    return Plan(_memory(student, teachers, large, work, hardware, devices), stages, USABLE * hardware.memory)


def _memory(
    student: QwenConfig,
    teachers: Mapping[str, QwenConfig],
    large: QwenConfig | None,
    work: DiagnosisWork,
    hardware: Hardware,
    devices: int,
) -> dict[str, dict[str, float]]:
    trunk = work.prompt_tokens + work.max_tokens
    own = held_bytes(_placed(student, work, hardware, devices, work.split_student)) / devices
    engine, copied = _decoding_memory(student, work, hardware, devices, work.all_paths, trunk, work.split_student)
    own += engine.weights / devices * bool(copied)  # the engine stays, with its copies
    phases = {"targeted rollouts": copied | parts_of_each(engine, devices)}
    if large is not None:
        theirs, copied = _decoding_memory(large, work, hardware, devices, 1, work.prompt_tokens, True, also=own)
        phases["demonstrations, large"] = {"student": own} | copied | parts_of_each(theirs, devices)
    width = work.context_tokens * bool(work.self_teachers) + trunk

    def reader(config: QwenConfig, state: nnx.State, split: bool) -> Reader:
        shards = work.model_parallel if split else 1
        rows = max(1, min(-(-work.all_paths * shards // devices), TOKENS_AT_ONCE // width))
        return Reader(config, rows * devices // shards, width, shards, gathered_to_read(config, state))

    for name, config in teachers.items() or {"self-teacher": student}.items():
        split = bool(teachers) or work.split_student
        state = _placed(config, work, hardware, devices, split)
        both = [reader(student, _placed(student, work, hardware, devices, work.split_student), work.split_student)]
        both.append(reader(config, state, split))
        workspace = scoring_bytes(both, student.vocab_size + config.vocab_size, work.max_tokens, devices) / devices
        weights = held_bytes(state) / devices if teachers else 0
        phases[f"scoring, {name}"] = {"student": own, "teacher": weights, "workspace": workspace}
    return phases


def _placed(config: QwenConfig, work: DiagnosisWork, hardware: Hardware, devices: int, split: bool) -> nnx.State:
    """Gives a model as `Session.model` places it, without arrays."""
    mesh = ImaginedMesh(devices, hardware.kind, work.model_parallel if split else 1)
    return abstract_model(config, work.dtype, mesh.abstract, fsdp=work.fsdp and split)[1]


def _decoding_memory(
    config: QwenConfig, work: DiagnosisWork, hardware: Hardware, devices: int, trunks: int, trunk_length: int,
    split: bool, also: float = 0.0,
) -> tuple[MemoryPlan, dict[str, float]]:  # fmt: skip
    """Gives the engine's plan, and the shards on each device from which it decodes a copy, where it makes one."""
    shards = {}
    if split and work.fsdp and work.model_parallel == 1 < devices:
        shards = {"shards": held_bytes(_placed(config, work, hardware, devices, True)) / devices}
    also += sum(shards.values())
    return rollout_memory(config, work, hardware, devices, trunks, trunk_length, also, split), shards


def rollout_memory(
    config: QwenConfig,
    work: DiagnosisWork,
    hardware: Hardware,
    devices: int,
    trunks: int,
    trunk_length: int,
    also: float = 0.0,
    split: bool = False,
) -> MemoryPlan:
    """Gives the engine's own plan for this work on devices that need not be there.

    also: bytes others hold on each. split: whether the model is one that `model_parallel` devices share.
    """
    shared = split and work.model_parallel > 1  # an engine makes copies of a model that is not split over "model"
    state = _placed(config, work, hardware, devices, shared)
    return plan_memory(
        config,
        jnp.dtype(work.dtype),
        weights=held_bytes(state),
        gathered=gathered_bytes(state),
        trunks=trunks,
        trunk_length=trunk_length,
        most=work.slots,
        max_tokens=work.max_tokens,
        slots=work.slots,
        mesh=ImaginedMesh(devices, hardware.kind, work.model_parallel if shared else 1),
        budget=int(devices * (USABLE * hardware.memory - also)),
    )


def parts_of_each(plan: MemoryPlan, devices: int) -> dict[str, float]:
    """Gives the parts of an engine's plan on each device."""
    return {name: size / devices for name, size in plan.parts.items()}
