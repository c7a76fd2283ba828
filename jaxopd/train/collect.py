"""From parameters to a scored batch: sample or read responses, grade them, score them under student and teachers."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxopd.distributed import fetch
from jaxopd.rollouts import LENGTH, Engine, Requests, Sampling
from jaxopd.rollouts.sampling import seed_of
from jaxopd.train.batch import Batch, Sequences, padded, question_order
from jaxopd.train.config import TrainConfig
from jaxopd.train.corpus import load_corpus
from jaxopd.train.metrics import Scored
from jaxopd.train.objectives import make_objective
from jaxopd.train.rewards import extrapolated
from jaxopd.train.setup import Setup
from jaxopd.train.step import log_probs_at, score


@dataclass(frozen=True)
class Micro:
    """A micro-batch on the device, with the rows it holds (-1 is filling)."""

    rows: Int[np.ndarray, "b"]
    student: Sequences
    responses: Int[Array, "b S"]
    teacher_states: Float[Array, "b S Dt"]
    teacher_head: Float[Array, "V Dt"]


class Collector:
    """Makes the batch of any step; what it draws is a function of (parameters, seed, step)."""

    def __init__(self, config: TrainConfig, setup: Setup):
        self.config, self.setup = config, setup
        objective = make_objective(config.objective)
        self.needs_states = objective.reach == "full"
        # Fine-tuning listens to neither teacher nor reward: its batches need no forward pass of their own.
        self.scores = objective.from_teacher or objective.from_reward or bool(config.objective.outcome)
        self.base = setup.replicated(setup.initial) if config.objective.reward_scale != 1 else None
        self.corpus = load_corpus(config.corpus, setup.questions) if config.corpus else None

    def draw(self, params: nnx.State, step: int) -> Batch:
        """Gives the responses of a step: the student's own, or the next of the corpus."""
        if self.corpus is None:
            drawn = question_order(
                len(self.setup.questions), step * self.config.batch, self.config.batch, self.config.seed
            )
            return self.roll_out(params, drawn, self.config.rollouts, seed_of(self.config.seed, "rollout", step))
        chosen = question_order(len(self.corpus), step * self.config.batch, self.config.batch, self.config.seed)
        rows = [self.corpus[index] for index in chosen]
        tokens = np.full((len(rows), max(len(row.tokens) for row in rows)), -1, np.int32)
        for row, line in zip(tokens, rows):
            row[: len(line.tokens)] = line.tokens
        question = np.array([row.question for row in rows])
        most = self.config.max_tokens
        return self._batch(question, tokens[:, :most], np.array([len(row.tokens) > most for row in rows]))

    def roll_out(self, params: nnx.State, questions: Int[np.ndarray, "Q"], n: int, seed: int) -> Batch:
        """Samples n responses of the student to each question, and grades them."""
        config, setup = self.config, self.setup
        prompts = [setup.prompts[q] for q in questions]
        model = nnx.merge(setup.graph, self._computed(params))
        options = {"temperature": config.temperature, "top_p": config.top_p}
        sampling = Sampling(config.max_tokens, setup.stop_ids, seed=seed, **options)
        engine = Engine(model, slots=config.slots, mesh=setup.engine_mesh)
        rolled = engine.run(prompts, Requests.continuations(prompts, n), sampling)
        log_p = padded(rolled.raw_logp, config.max_tokens, 0)
        return self._batch(np.repeat(questions, n), rolled.tokens, rolled.finish == LENGTH, log_p)

    def _batch(
        self, question: np.ndarray, tokens: np.ndarray, truncated: np.ndarray, log_p: np.ndarray | None = None
    ) -> Batch:
        responses = padded(tokens, self.config.max_tokens, -1)
        correct = self.setup.grades([self.setup.questions[q] for q in question], responses)
        return Batch(question, self.setup.teacher_of[question], responses, correct, truncated, log_p)

    def score(self, params: nnx.State, batch: Batch) -> tuple[Scored, list[list[Micro]]]:
        """Scores a batch; gives also the micro-batches of each update, ready on the device."""
        arrays: dict[str, np.ndarray] = {}
        updates = []
        for rows in batch.updates(self.config.mini_batch * self.config.group):
            micros = []
            for teacher, part in batch.micro_batches(rows, self.config.micro_batch):
                micro, found = self._score(params, batch, teacher, part)
                micros.append(micro)
                for name, value in found.items():
                    whole = arrays.setdefault(name, np.zeros((len(batch.question), *value.shape[1:]), value.dtype))
                    whole[part[part >= 0]] = value[part >= 0]
            updates.append(micros)
        return Scored(**arrays, mask=batch.mask), updates

    @staticmethod
    def _nothing(B: int, S: int) -> dict[str, np.ndarray]:
        """What `score` gives, of k = 1 and all zero."""
        ids, pair, one = np.zeros((B, S, 1), np.int32), np.zeros((B, S, 2), np.float32), np.zeros((B, S), np.float32)
        names = ("sampled_log_p", "sampled_log_q", "entropy_student", "entropy_teacher", "reverse_kl")
        return {"student_ids": ids, "teacher_ids": ids, "log_p": pair, "log_q": pair} | dict.fromkeys(names, one)

    def _score(self, params: nnx.State, batch: Batch, index: int, rows: np.ndarray):
        setup, config = self.setup, self.config
        responses = np.where((rows >= 0)[:, None], batch.responses[np.maximum(rows, 0)], -1)
        questions = batch.question[np.maximum(rows, 0)]
        student = Sequences.join([setup.prompts[q] for q in questions], responses, setup.width)
        graph, state, sequences, split = setup.graph, None, student, False
        if setup.teachers:
            teacher = setup.teachers[index]
            graph, state, split = teacher.graph, teacher.state, teacher.split
            sequences = Sequences.join([teacher.prompts[q] for q in questions], responses, teacher.width)
        if not self.scores:
            b, S = responses.shape
            return Micro(rows, student, responses, jnp.zeros((b, S, 1)), jnp.zeros((1, 1))), self._nothing(b, S)
        live = state is None
        if live:
            state = self._computed(params)
        options = {"k": config.objective.k, "dtype": config.dtype, "mesh": setup.mesh, "split": split}
        found = score(setup.graph, params, graph, state, student, sequences, responses, **options)
        states = found.pop("teacher_states")
        if self.base is not None:
            found |= self._extrapolated(found, student, responses)
        if not self.needs_states:
            states = jnp.zeros((len(rows), responses.shape[1], 1), states.dtype)
        head = nnx.merge(graph, state).head()
        # A live teacher's head may be the student's own array, whose memory the next update gives away.
        return Micro(rows, student, responses, states, jnp.copy(head) if live else head), fetch(found)

    def _computed(self, params: nnx.State) -> nnx.State:
        """The student in the precision that it is trained in."""
        return jax.tree.map(lambda x: x.astype(self.config.dtype), params)

    def _extrapolated(self, found: dict[str, Array], student: Sequences, responses: np.ndarray) -> dict[str, Array]:
        ids = jnp.concatenate([found["student_ids"], found["teacher_ids"], np.maximum(responses, 0)[..., None]], -1)
        base = log_probs_at(self.setup.graph, self.base, student, ids, mesh=self.setup.mesh)
        scale = self.config.objective.reward_scale
        return {
            "log_q": extrapolated(found["log_q"], base[..., :-1], scale),
            "sampled_log_q": extrapolated(found["sampled_log_q"], base[..., -1], scale),
        }
