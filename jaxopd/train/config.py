"""What a training run does; the defaults are paper B's (Table 2)."""

import dataclasses
from typing import Literal

from jaxopd.errors import InputError, check_fields
from jaxopd.rollouts.sampling import Sampling
from jaxopd.train.objectives import ObjectiveConfig, make_objective
from jaxopd.train.rewards import Reduction


@dataclasses.dataclass(frozen=True)
class GateConfig:
    """Which tokens the teacher is heard at, and how loudly; everything here multiplies."""

    incorrect_only: bool = False
    """Distil on responses that are not correct alone."""
    divergence_quantile: float = 0.0
    """Keep the tokens whose reverse KL is at or above this quantile of the batch."""
    window_start: int = 0
    """First response position that counts."""
    window_end: int | None = None
    """Position before which tokens count; None for all."""
    prefix_strength: float = 0.0
    """Weight 1 + strength (1 - share of the response's |reward| before the token), as IW-OPD."""
    diagnosis: str = ""
    """Run folder of jaxopd diagnose: tokens weigh by the alignment measured where divergence and entropy are alike."""

    def __post_init__(self) -> None:
        if not 0 <= self.divergence_quantile < 1:
            raise InputError(f"divergence_quantile: found {self.divergence_quantile}, expected 0 to under 1")
        if self.window_start < 0 or (self.window_end is not None and self.window_end <= self.window_start):
            found = f"{self.window_start} to {self.window_end}"
            raise InputError(f"window_start, window_end: found {found}, expected a start of 0 or more before an end")
        if not 0 <= self.prefix_strength < float("inf"):
            raise InputError(f"prefix_strength: found {self.prefix_strength}, expected 0 or more")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """What is trained, on what, by which objective."""

    student: str = ""
    """Hugging Face folder or hub id of the student."""
    teacher: tuple[str, ...] = ()
    """NAME=path/to/model, or NAME=self:KIND (privileged context from --demonstrations), as in jaxopd diagnose."""
    task: str = "math"
    """boolq, mmlu, math or toy."""
    questions: str = ""
    """File of training questions; of toy, FLAVOUR:NUMBER:SEED, as in all:20:7."""
    route: tuple[str, ...] = ()
    """VALUE=TEACHER: questions with that value in their metadata (toy: the flavour) learn from that teacher; the
    others from the first one."""
    demonstrations: str | None = None
    """JSONL file of demonstrations for self: teachers."""
    corpus: str = ""
    """Train on the responses of this file (jaxopd corpus) instead of the student's own: objective sft, or off-policy
    distillation; a batch is then `batch` responses."""
    self_teacher: Literal["initial", "live"] = "initial"
    """A self: teacher is the student as it began, or as it is."""
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    gate: GateConfig = dataclasses.field(default_factory=GateConfig)
    reduction: Reduction = "token_mean"
    """token_mean, sequence_mean, sequence_sum or fixed_length."""
    steps: int = 200
    """Batches of rollouts."""
    batch: int = 64
    """Prompts a batch."""
    rollouts: int = 4
    """Responses a prompt."""
    mini_batch: int = 64
    """Prompts an optimiser update; under `batch` there are several updates a batch."""
    passes: int = 1
    """Passes over a batch's rollouts."""
    micro_batch: int = 64
    """Responses in a forward and backward pass, all devices together."""
    max_prompt: int = 1024
    """Longest prompt, tokens; a longer one is refused."""
    max_tokens: int = 7168
    """Longest response, tokens."""
    temperature: float = 1.0
    """Of rollouts. Objectives of the sampled token (sampled, minillm, grpo, an outcome) take it for a draw from the
    student itself: with another temperature or top_p than 1 their gradient is biased."""
    top_p: float = 1.0
    """Of rollouts."""
    learning_rate: float = 1e-6
    warmup: int = 0
    """Updates of linear warm-up."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Of the learning rate after the warm-up; cosine decays to 0 at the last step."""
    weight_decay: float = 0.01
    """On matrices."""
    clip_norm: float = 1.0
    """Global norm that gradients are clipped to."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the forward and backward pass; master parameters and optimizer state are float32."""
    remat: bool = False
    """Keep the inputs of layers only, and compute the rest again in the backward pass."""
    probe_every: int = 0
    """Steps between measurements of the update's geometry on probe questions (spread over the file); 0 for none."""
    probe_questions: int = 16
    probe_rollouts: int = 16
    """Responses a probe question; an even number, as both gradients are estimated from each half of them."""
    save_every: int = 20
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints kept."""
    log_to: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where metrics go besides metrics.jsonl; needs tensorboardX or wandb."""
    show_every: int = 20
    """Steps between printed sample responses; 0 prints nothing, not even a line a step."""
    thinking: bool | None = None
    """enable_thinking of the chat template; None leaves its default."""
    slots: int = 256
    """Sequences decoded at once."""
    model_parallel: int = 1
    """Devices that share one copy of a teacher: its vocabulary, heads and FFN are split over them."""
    fsdp: bool = False
    """Split over the other devices what --model-parallel leaves of a teacher's matrices; gathered when used."""
    seed: int = 0
    """Seed of every draw."""

    def __post_init__(self) -> None:
        names = (
            "steps",
            "batch",
            "rollouts",
            "mini_batch",
            "passes",
            "micro_batch",
            "max_tokens",
            "save_every",
            "keep",
            "slots",
            "model_parallel",
            "probe_questions",
        )
        check_fields(self, *((name, getattr(self, name) >= 1, "at least 1") for name in names))
        if self.batch % self.mini_batch and self.mini_batch < self.batch:
            raise InputError(f"mini_batch: found {self.mini_batch}, expected a divisor of the batch of {self.batch}")
        if self.probe_every and (self.probe_rollouts % 2 or self.probe_rollouts < 4):
            raise InputError(f"probe_rollouts: found {self.probe_rollouts}, expected an even number of 4 or more")
        if self.probe_every and self.objective.objective == "sft":
            raise InputError("probe_every: found with the objective sft, expected one that scores responses")
        check_fields(
            self,
            ("learning_rate", 0 < self.learning_rate < float("inf"), "a positive number"),
            ("clip_norm", self.clip_norm > 0, "a positive number; inf clips nothing"),
            ("weight_decay", 0 <= self.weight_decay < float("inf"), "0 or more"),
            *(
                (name, getattr(self, name) >= 0, "0 or more")
                for name in ("warmup", "probe_every", "show_every", "seed")
            ),
        )
        Sampling(self.max_tokens, temperature=self.temperature, top_p=self.top_p)  # says what is wrong with them
        if self.gate.window_start >= self.max_tokens:
            found = f"found {self.gate.window_start}, where responses have {self.max_tokens} tokens at most"
            raise InputError(f"window_start: {found}; expected less")
        objective, name = make_objective(self.objective), self.objective.objective
        if objective.from_teacher and not self.teacher:
            raise InputError(f"--teacher: found none, expected at least one for the objective {name}")
        if self.gate.divergence_quantile and not objective.from_teacher:
            found = f"found {self.gate.divergence_quantile} for {name}, which hears no teacher"
            raise InputError(f"divergence_quantile: {found}; expected 0")
        if self.corpus and objective.reach == "sampled" and name != "sft":
            raise InputError(f"corpus: found one for {name}, which is of the student's own draws; expected none")
        if (objective.from_reward or self.objective.outcome) and self.group < 2:
            found = f"found groups of {self.group}, whose rewards have no baseline"
            raise InputError(f"rollouts: {found}; expected 2 or more of the student's own, no corpus")

    @property
    def group(self) -> int:
        """Responses a prompt; 1 where they come from a file."""
        return 1 if self.corpus else self.rollouts

    @property
    def updates_per_step(self) -> int:
        return self.passes * max(1, self.batch // self.mini_batch)
