"""What every stage of a diagnosis shares: questions, models, prompts, grading and the run folder."""

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from jaxopd import distributed
from jaxopd.claims import Claims
from jaxopd.diagnose.config import DiagnoseConfig
from jaxopd.errors import InputError
from jaxopd.models import Qwen, chat_tokens, check_model, check_vocabulary, load_model, load_tokenizer, stop_token_ids
from jaxopd.models.sharding import device_mesh
from jaxopd.rollouts import Engine, Sampling
from jaxopd.rollouts.sampling import seed_of
from jaxopd.runs import RunFolder
from jaxopd.tasks import find_task
from jaxopd.tasks.contexts import parse_teachers
from jaxopd.tasks.demonstrations import load_demonstrations
from jaxopd.types import Question

Progress = Callable[[str, int, int], None]  # stage, pieces done, pieces in all
F = TypeVar("F", bound=Callable[..., Any])


SAMPLED_BYTES = 1 << 20  # of each end of a model's file: reading 60 GB to resume would take minutes
PLACEMENT = ("model_parallel", "fsdp", "split_student")  # a run may be resumed with others: its results are the same
WAIT_SECONDS = 1.0  # between looks at the pieces of other jobs
KEPT = 256  # results of `per_question` functions a session holds


def per_question(function: F) -> F:
    """Keeps, in the session, what `function(session, index, ...)` last made of finished pieces."""

    @functools.wraps(function)
    def kept(session: "Session", index: int, *rest: Any) -> Any:
        key = (function.__name__, index, *rest)
        if key not in session.kept:
            while len(session.kept) >= KEPT:
                del session.kept[next(iter(session.kept))]
            session.kept[key] = function(session, index, *rest)
        return session.kept[key]

    return kept  # type: ignore[return-value]


class Session:
    """One run. Everything that can be wrong with the input is found here, before the first byte is written."""

    def __init__(self, config: DiagnoseConfig, out: str, progress: Progress):
        self.config, self.progress = config, progress
        self.teachers = {spec.name: spec for spec in parse_teachers(config.teacher)}
        for name in self.teachers:
            if "/" in name or name == "student":  # names become folders, and the student's is taken
                raise InputError(f"--teacher {name}: found a slash or the name 'student', expected another name")
        self.rivals = self._rivals()
        self.task = find_task(config.task)
        self.questions: list[Question] = self.task.load(config.questions)[: config.limit]
        if not self.questions:
            raise InputError(f"{config.questions}: found no question, expected at least one")
        self.given = load_demonstrations(config.demonstrations) if config.demonstrations else None
        needs_large = [spec.name for spec in self.teachers.values() if spec.summarized or spec.source == "large"]
        if needs_large and config.large is None and self.given is None:
            raise InputError(f"--large: found none, expected a model: teacher {needs_large[0]} needs one")
        self.kept: dict[tuple, Any] = {}
        self._models: dict[str, Qwen] = {}
        self._engines: dict[str, Engine] = {}
        self.mesh = device_mesh(model=config.model_parallel)
        self.student = self.model(config.student)
        self.tokenizer = load_tokenizer(config.student)
        check_vocabulary(self.tokenizer, self.student.config, config.student)
        self.stop_ids = stop_token_ids(self.tokenizer, self.student.config)
        others = {s.model for s in self.teachers.values() if s.model} | ({config.large} - {None})
        self.contexts = {path: self._check(path) for path in sorted(others)} | {
            config.student: self.student.config.max_positions
        }
        context = min(self.contexts[path] for path in (config.student, config.large) if path)
        self.prompts = [self.prompt(q.text) for q in self.questions]
        longest = max(range(len(self.prompts)), key=lambda i: len(self.prompts[i]))
        if len(self.prompts[longest]) + 1 >= context:
            raise InputError(
                f"{config.questions}: question {self.questions[longest].id}: found a prompt of "
                f"{len(self.prompts[longest])} tokens, expected under the context of {context}"
            )
        kept = [field for field in dataclasses.fields(config) if field.name not in PLACEMENT]
        facts = json.loads(json.dumps({f.name: getattr(config, f.name) for f in kept}))  # as read: tuples are lists
        defaults = {f.name: f.default for f in kept if f.default is not dataclasses.MISSING}
        self.run = RunFolder.create(out, facts | {"input_digest": self._input_digest()}, defaults)
        self.claims = Claims(self.run)

    def _rivals(self) -> tuple[int, int] | None:
        """The places of the two teachers to be told apart."""
        if self.config.decide is None:
            return None
        names = list(self.teachers)
        for name in self.config.decide:
            if name not in names:
                raise InputError(f"--decide: found {name!r}, expected two of {', '.join(names)}")
        a, b = (names.index(name) for name in self.config.decide)
        if a == b:
            raise InputError(f"--decide: found {names[a]!r} twice, expected two teachers")
        return a, b

    def _input_digest(self) -> str:
        """Digests what the files held, so that a run is not resumed with others under the same names."""
        digest = hashlib.sha256(repr((self.questions, self.given)).encode("utf-8", "surrogatepass"))
        for folder in sorted(self.contexts):
            for file in sorted([*Path(folder).glob("*.json"), *Path(folder).glob("*.safetensors")]):
                with file.open("rb") as opened:
                    digest.update(f"{file.name} {file.stat().st_size}".encode() + opened.read(SAMPLED_BYTES))
                    opened.seek(max(0, file.stat().st_size - SAMPLED_BYTES))
                    digest.update(opened.read())
        return digest.hexdigest()

    def model(self, path: str) -> Qwen:
        """Loads a model over all devices; the student stays, of the others only the last one used."""
        if path not in self._models:
            for other in [p for p in self._models if p != self.config.student]:
                del self._models[other]
                self._engines.pop(other, None)
            split = path != self.config.student or self.config.split_student
            mesh, fsdp = (self.mesh, self.config.fsdp) if split else (device_mesh(), False)
            self._models[path] = load_model(path, dtype=self.config.dtype, mesh=mesh, fsdp=fsdp)
        return self._models[path]

    def engine(self, path: str) -> Engine:
        model = self.model(path)
        if path not in self._engines:
            self._engines[path] = Engine(model, slots=self.config.slots)
        return self._engines[path]

    def _check(self, path: str) -> int:
        """Checks a model that is loaded later; gives its context."""
        model = check_model(path)
        check_vocabulary(self.tokenizer, model, path)
        if load_tokenizer(path).get_vocab() != self.tokenizer.get_vocab():
            raise InputError(f"{path}: found another tokenizer than the student's, expected the same vocabulary")
        return model.max_positions

    def prompt(self, message: str) -> list[int]:
        return chat_tokens(self.tokenizer, message, thinking=self.config.thinking)

    def text(self, tokens: Iterable[int]) -> str:
        return self.tokenizer.decode([int(t) for t in tokens if t >= 0], skip_special_tokens=True)

    def token_text(self, token: int) -> str:
        return self.tokenizer.decode([token], skip_special_tokens=False)

    def grades(self, responses: np.ndarray, gold: str) -> np.ndarray:
        """Grades whole responses [G, S]: 1 correct, 0 wrong, -1 no answer found."""
        # Graders have time limits, so one process grades for all.
        return np.array(distributed.decided(lambda: self._grades(responses, gold)), np.int8)

    def _grades(self, responses: np.ndarray, gold: str) -> list[int]:
        answers: dict[str, bool | None] = {}
        graded = []
        for tokens in responses:
            text = self.text(tokens)
            if text not in answers:
                answers[text] = self.task.grade(text, gold)
            graded.append(-1 if answers[text] is None else int(answers[text]))
        return graded

    def seed(self, stage: str, index: int) -> int:
        return seed_of(self.config.seed, stage, self.questions[index].id)

    def sampling(self, stage: str, index: int, **options: Any) -> Sampling:
        return Sampling(self.config.max_tokens, stop_ids=self.stop_ids, seed=self.seed(stage, index), **options)

    def pieces(self, stage: str, indices: Iterable[int] | None = None) -> Iterator[tuple[int, str]]:
        """Yields the questions of a stage that are ours to do, with their pieces' names; ends when all are done.

        Those that other jobs work on are waited for, and yielded if such a job dies.
        """
        pending = list(range(len(self.questions)) if indices is None else indices)
        total, finished = len(pending), 0
        while pending:
            theirs = []
            for index in pending:
                distributed.stop_if_preempted()
                self.progress(stage, finished, total)
                piece = f"{stage}/{index:05d}"
                state = self.claims.ask(piece)
                if state == "theirs":
                    theirs.append(index)
                    continue
                if state == "ours":
                    with self.claims.working(piece):
                        yield index, piece
                finished += 1
            if len(theirs) == len(pending):
                time.sleep(WAIT_SECONDS)
            pending = theirs
        self.progress(stage, total, total)
