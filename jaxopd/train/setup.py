"""Everything a run needs in memory: questions, prompts, models, grading. What is wrong with the input is found here."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Int

from jaxopd.distributed import decided, place
from jaxopd.errors import InputError
from jaxopd.models import chat_tokens, check_vocabulary, load_model, load_tokenizer, stop_token_ids
from jaxopd.models.sharding import device_mesh
from jaxopd.tasks import find_task
from jaxopd.tasks.contexts import TeacherSpec, demonstrations_for, parse_teachers, teacher_message
from jaxopd.tasks.demonstrations import load_demonstrations
from jaxopd.train.batch import prompt_width
from jaxopd.train.config import TrainConfig
from jaxopd.types import Question


@dataclass(frozen=True)
class Teacher:
    """A teacher with its prompts, one a question; `state` is None for a live self-teacher.

    split: whether its parameters are split over devices; otherwise each device holds them all.
    """

    spec: TeacherSpec
    graph: nnx.GraphDef
    state: nnx.State | None
    prompts: list[list[int]]
    width: int
    split: bool = False


class Setup:
    """Loads and checks what a training run is made of.

    mesh: the devices, rows over both axes, a split teacher over "model". engine_mesh: the same, each with a copy.
    """

    def __init__(self, config: TrainConfig, mesh: jax.sharding.Mesh | None = None):
        devices = None if mesh is None else mesh.devices.flatten()
        self.config, self.mesh = config, device_mesh(devices, model=config.model_parallel)
        self.engine_mesh = device_mesh(devices)
        self.task, self.tokenizer = find_task(config.task), load_tokenizer(config.student)
        model = load_model(config.student)
        self.model_config = model.config
        check_vocabulary(self.tokenizer, model.config, config.student)
        self.stop_ids = stop_token_ids(self.tokenizer, model.config)
        self.graph, self.initial = nnx.split(model)
        self.specs = parse_teachers(config.teacher)
        if not config.questions:
            raise InputError("--questions: found none, expected a file of questions")
        self.questions = self._with_demonstrations(self._questions(config.questions))
        self.prompts = [self.prompt(q.text) for q in self.questions]
        self._check_lengths(self.prompts, config.student, model.config.max_positions)
        self.width = prompt_width(self.prompts)
        self.teachers = [self._teacher(spec) for spec in self.specs]
        self.teacher_of = self._routes()
        if config.micro_batch % self.mesh.size:
            found = f"{config.micro_batch} for {self.mesh.size} devices"
            raise InputError(f"micro_batch: found {found}, expected a multiple of their number")

    def prompt(self, message: str) -> list[int]:
        """Gives the tokens of a user message in the chat template."""
        return chat_tokens(self.tokenizer, message, thinking=self.config.thinking)

    def text(self, tokens: Iterable[int]) -> str:
        """Decodes a response."""
        return self.tokenizer.decode([int(t) for t in tokens if t >= 0], skip_special_tokens=True)

    def grades(self, questions: Sequence[Question], responses: Int[np.ndarray, "B S"]) -> Int[np.ndarray, "B"]:
        """Grades responses: 1 correct, 0 wrong, -1 no answer found."""
        pairs = list(zip(questions, responses, strict=True))
        # Graders have time limits, so one process grades for all.
        found = decided(lambda: [self.task.grade(self.text(row), q.gold) for q, row in pairs])
        return np.array([-1 if grade is None else int(grade) for grade in found], np.int8)

    def replicated(self, tree: Any) -> Any:
        """Copies arrays to every device."""
        return place(tree, NamedSharding(self.mesh, PartitionSpec()))

    def _questions(self, path: str) -> list[Question]:
        questions = self.task.load(path)
        if not questions:
            raise InputError(f"{path}: found no question, expected at least one")
        return questions

    def _with_demonstrations(self, questions: list[Question]) -> list[Question]:
        """Keeps the questions for which every self-teacher has what it is shown."""
        self.shown: dict[tuple[str, str], tuple] = {}
        contexts = [spec for spec in self.specs if spec.correct + spec.wrong]
        if not contexts:
            return questions
        if self.config.demonstrations is None:
            raise InputError(f"--demonstrations: found none, expected a file: teacher {contexts[0].name} is shown some")
        given, kept = load_demonstrations(self.config.demonstrations), []
        for question in questions:
            found = [demonstrations_for(spec, question.id, given, seed=self.config.seed) for spec in contexts]
            if all(shown is not None for shown in found):
                kept.append(question)
                self.shown |= {(spec.name, question.id): shown for spec, shown in zip(contexts, found)}
        if not kept:
            where = self.config.demonstrations
            raise InputError(f"{where}: found too few demonstrations for every question, expected enough for one")
        return kept

    def _teacher(self, spec: TeacherSpec) -> Teacher:
        messages = [teacher_message(spec, q, self.shown.get((spec.name, q.id), ())) for q in self.questions]
        prompts = [self.prompt(message) for message in messages]
        if spec.model is None:
            live = self.config.self_teacher == "live"
            state = None if live else self.replicated(self._cast(self.initial))
            self._check_lengths(prompts, spec.name, self.model_config.max_positions)
            return Teacher(spec, self.graph, state, prompts, prompt_width(prompts))
        found = load_tokenizer(spec.model)
        ours, theirs = self.tokenizer.get_vocab(), found.get_vocab()
        if ours != theirs:
            odd = min(dict(ours.items() ^ theirs.items()))
            raise InputError(
                f"--teacher {spec.name}: found another tokenizer ({odd!r} is its token {theirs.get(odd)}), expected "
                f"the student's, where it is {ours.get(odd)}: its log-probabilities would belong to other tokens"
            )
        model = load_model(spec.model, dtype=self.config.dtype, mesh=self.mesh, fsdp=self.config.fsdp)
        self._check_lengths(prompts, spec.model, model.config.max_positions)
        graph, state = nnx.split(model)
        split = self.config.fsdp or self.config.model_parallel > 1
        return Teacher(spec, graph, state, prompts, prompt_width(prompts), split)

    def _cast(self, state: nnx.State) -> nnx.State:
        return jax.tree.map(lambda x: jnp.asarray(x, self.config.dtype), state)

    def _check_lengths(self, prompts: list[list[int]], path: str, context: int) -> None:
        longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
        found, question = len(prompts[longest]), self.questions[longest].id
        if path == self.config.student and found > self.config.max_prompt:
            raise InputError(
                f"question {question}: found a prompt of {found} tokens, expected {self.config.max_prompt}"
            )
        if found + self.config.max_tokens > context:
            wanted = f"{found} prompt and {self.config.max_tokens} response tokens"
            raise InputError(f"{path}: question {question}: found {wanted}, expected {context} in all (its context)")

    def _routes(self) -> Int[np.ndarray, "Q"]:
        names, chosen = [spec.name for spec in self.specs], np.zeros(len(self.questions), np.int64)
        for route in self.config.route:
            value, equals, name = route.partition("=")
            if not equals or name not in names:
                raise InputError(f"--route: found {route!r}, expected VALUE=TEACHER with one of {', '.join(names)}")
            matching = [value in map(str, q.meta.values()) for q in self.questions]
            if not any(matching):
                raise InputError(f"--route: found {value!r} in no question's metadata, expected it in at least one")
            chosen[matching] = names.index(name)
        return chosen
