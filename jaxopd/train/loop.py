"""The training loop: roll out, grade, score, weigh, update, log, save."""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array

from jaxopd.claims import Claims
from jaxopd.distributed import Preempted, decided, fetch, several, stop_if_preempted
from jaxopd.models import Qwen, save_model
from jaxopd.models.sharding import device_mesh
from jaxopd.rollouts.plan import device_budget
from jaxopd.runs import RunFolder
from jaxopd.train import metrics as measured
from jaxopd.train.batch import Batch, taken
from jaxopd.train.checkpoint import Checkpoints
from jaxopd.train.collect import Collector, Micro
from jaxopd.train.config import TrainConfig
from jaxopd.train.gates import AlignmentTable, gate_weights
from jaxopd.train.geometry import update_geometry
from jaxopd.train.health import Monitor, check_finite, rollout_metrics
from jaxopd.train.log import MetricsLog, check_writers
from jaxopd.train.metrics import Scored
from jaxopd.train.objectives import make_objective
from jaxopd.train.plan import plan_training
from jaxopd.train.setup import Setup
from jaxopd.train.step import LossSettings, Sums, Targets, add_gradients, apply_gradients, spread
from jaxopd.train.targets import make_targets, reduced

Report = Callable[[str], None]
# What may differ between a run and its resumption.
FREE_FIELDS = ("steps", "save_every", "keep", "log_to", "show_every", "slots", "model_parallel", "fsdp")
WHOLE = "training"  # the piece that a run is, of which jobs have no shares


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW on clipped gradients, decay on matrices; linear warm-up, then constant or cosine."""
    peak = config.learning_rate
    after = optax.constant_schedule(peak)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(1, config.steps * config.updates_per_step - config.warmup))
    rate = optax.join_schedules([optax.linear_schedule(0.0, peak, config.warmup), after], [config.warmup])
    matrices = partial(jax.tree.map, lambda x: x.ndim == 2)
    adamw = optax.adamw(rate, weight_decay=config.weight_decay, mask=matrices)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


class Trainer:
    """A run: parameters, optimizer state and the step they are at; resumes from the newest checkpoint of `out`."""

    def __init__(
        self, config: TrainConfig, out: str | Path, report: Report = print, mesh: jax.sharding.Mesh | None = None
    ):
        self.config, self.out, self.report = config, Path(out), report
        check_writers(config.log_to)
        budget = device_budget(device_mesh() if mesh is None else mesh)
        self.setup = Setup(config, mesh)
        self.plan = plan_training(config, self.setup, budget)
        self.collect = Collector(config, self.setup)
        self.mesh, self.graph = self.setup.mesh, self.setup.graph
        self.objective, self.transform = make_objective(config.objective), optimizer(config)
        self.settings = LossSettings(
            self.objective, config.objective, bool(config.objective.outcome), config.dtype, config.remat
        )
        diagnosis = config.gate.diagnosis
        self.table = AlignmentTable.of_run(diagnosis, config.student, config.teacher) if diagnosis else None
        free = FREE_FIELDS if config.schedule == "constant" else FREE_FIELDS[1:]  # a cosine ends where the run does
        identity = {k: v for k, v in dataclasses.asdict(config).items() if k not in free}
        if self.table is not None:  # the folder's name does not say what it holds
            identity["alignment_weights"] = self.table.weight.tolist()
        self.claims = Claims(RunFolder.create(str(out), json.loads(json.dumps(identity))))
        self.log = MetricsLog(out, config.log_to, identity)
        with self.claims.alone(WHOLE):  # what a killed job left half written is cleared away
            self.checkpoints = Checkpoints(self.out / "checkpoints", config.keep)
            # Copies: an update gives its arguments' memory away. The initial model lives on only where it is a teacher.
            self.params = spread(jax.tree.map(jnp.copy, self.setup.initial), self.mesh)
            del self.setup.initial
            self.opt_state = spread(self.transform.init(self.params), self.mesh)
            self.step, self.monitor = 0, Monitor()
            if self.checkpoints.latest is not None:
                self._restore()
            self.log.resume(self.step)

    @property
    def student(self) -> Qwen:
        """The model as it is, whole in every process."""
        return nnx.merge(self.graph, jax.tree.map(jnp.copy, fetch(self.params) if several() else self.params))

    def run(self) -> Qwen:
        """Trains to the configured step and saves the student as a Hugging Face folder in OUT/student."""
        left = self.config.steps - self.step
        done = f"{self.out}: made {self.step} steps, asked for {self.config.steps}: nothing is left to train"
        self.report(str(self.plan) if left > 0 else done)
        with self.claims.alone(WHOLE):
            decided(self.checkpoints.check_unchanged)  # nobody held the run since it was restored
            self.log.resume(self.step)
            try:
                while self.step < self.config.steps:
                    stop_if_preempted()
                    self.advance()
            except Preempted:  # only between updates, so the parameters are those of a whole step
                self._close()
                raise
            self._close()
            student = self.student
            self.claims.confirm(WHOLE)
            decided(lambda: save_model(student, self.out / "student", tokenizer=self.setup.tokenizer))
        return student

    def advance(self) -> dict[str, Any]:
        """Makes one step: a batch of rollouts and its updates; gives what was logged."""
        config, step, seconds = self.config, self.step, {}
        with _timed(seconds, "rollout"):
            batch = self.collect.draw(self.params, step)
        with _timed(seconds, "score"):
            scored, micros = self.collect.score(self.params, batch)
        self._check(measured.undefined(scored), batch)
        gate = gate_weights(config.gate, batch, scored, self.table)
        targets = make_targets(config, batch, scored, gate)
        found = rollout_metrics(batch) | self._scoring_metrics(batch, scored, targets)
        found["gate/share"] = float((gate[scored.mask] > 0).mean()) if scored.mask.any() else 0.0
        if config.probe_every and step % config.probe_every == 0:
            with _timed(seconds, "probe"):
                found |= update_geometry(self)
        with _timed(seconds, "update"):
            found |= self._update(batch, micros, targets)
        self._check({name: value for name, value in found.items() if name.startswith("train/")}, batch)
        for warning in self.monitor.warnings(found):
            found.setdefault("warnings", []).append(warning)
            self.report(f"step {step}: warning: {warning}")
        self.claims.confirm(WHOLE)
        self.log.write(step, found)
        self.log.time(step, seconds)
        self._show(step, batch, found, sum(seconds.values()))
        self.step += 1
        if self.step % config.save_every == 0:
            self._save()
        return found

    def _update(self, batch: Batch, updates: list[list[Micro]], targets: Targets) -> dict[str, float]:
        """Makes the optimiser updates of a batch; gives the mean loss and norms over them."""
        history: list[dict[str, Array]] = []
        for _ in range(self.config.passes):
            for micros in updates:
                rows = np.concatenate([micro.rows[micro.rows >= 0] for micro in micros])
                sums = self.gradients(micros, reduced(self.config, targets, rows))
                size = float(optax.tree.norm(sums.gradients))
                if not np.isfinite(size + float(sums.loss)):  # the parameters are still good: keep them
                    return {"train/loss": float(sums.loss), "train/gradient_norm": size}
                self.params, self.opt_state, norms = apply_gradients(
                    self.transform, self.params, self.opt_state, sums.gradients
                )
                clipped = {"train/clip_fraction": sums.clipped / sums.pushed} if sums.pushed else {}
                history.append({"train/loss": sums.loss} | norms | clipped)
        fetched = jax.device_get(history)
        names = {name: None for one in fetched for name in one}
        return {name: float(np.mean([one[name] for one in fetched if name in one])) for name in names}

    def gradients(self, micros: list[Micro], targets: Targets, settings: LossSettings | None = None) -> Sums:
        """Adds up loss and float32 gradients of micro-batches; `targets` are those of the whole batch, reduced."""
        settings = settings or self.settings
        so_far = Sums.zeros(self.params)
        for micro in micros:
            part = jax.tree.map(lambda x, rows=micro.rows: taken(x, rows), targets)
            batch = micro.student, part, micro.responses, micro.teacher_states, micro.teacher_head
            so_far = add_gradients(self.graph, settings, so_far, self.params, *batch, mesh=self.mesh)
        return so_far

    def _scoring_metrics(self, batch: Batch, scored: Scored, targets: Targets) -> dict[str, Any]:
        if not self.collect.scores:
            return {}
        found: dict[str, Any] = measured.entropy_metrics(scored)
        mismatch = {} if batch.log_p is None else measured.engine_mismatch(scored, batch.log_p)
        if not self.setup.teachers:
            return {"entropy/student": found["entropy/student"]} | mismatch
        found |= mismatch
        pooled = self.objective.reach == "support" and self.objective.loss is None
        advantage = targets.advantage if pooled else None
        found |= measured.overlap_metrics(scored, advantage)
        correct = batch.correct == 1
        found |= measured.reward_metrics(scored, correct)
        k = scored.k
        direct = measured.direct_advantage(scored.log_p[..., :k], scored.log_q[..., :k])
        found["extreme/p_minus_q"] = measured.largest_advantage_gap(scored, direct)
        found["train/reverse_kl"] = measured.mean_over(scored.reverse_kl, scored.mask)
        return found | measured.by_position(scored, correct)

    def _show(self, step: int, batch: Batch, found: dict[str, Any], seconds: float) -> None:
        if not self.config.show_every:
            return
        self.report(
            f"step {step + 1} of {self.config.steps}: loss {found['train/loss']:.4f}, accuracy "
            f"{found['rollout/accuracy']:.3f}, {found['rollout/length']:.0f} tokens a response, {seconds:.1f} s"
        )
        if step % self.config.show_every:
            return
        question, marks = self.setup.questions[batch.question[0]], {1: "correct", 0: "wrong", -1: "no answer"}
        self.report(
            f"  {question.text[-200:]!r} -> {self.setup.text(batch.responses[0])[-300:]!r} "
            f"({marks[int(batch.correct[0])]})"
        )

    def _check(self, values: dict[str, float], batch: Batch) -> None:
        check_finite(values, self.step, batch, self.out, self.checkpoints.latest)

    def _close(self) -> None:
        """Sees that the present step is kept."""
        if self.checkpoints.latest != self.step:
            self._save()
        self.checkpoints.close()

    def _save(self) -> None:
        self.claims.confirm(WHOLE)
        facts = {"step": self.step, "first": self.monitor.first, "questions_seen": self.step * self.config.batch}
        self.checkpoints.save(self.step, (self.params, self.opt_state), facts)

    def _restore(self) -> None:
        (self.params, self.opt_state), facts = self.checkpoints.restore((self.params, self.opt_state))
        self.step, self.monitor = facts["step"], Monitor(facts["first"])
        self.report(f"resumed {self.out} at step {self.step}")


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - began


def train(config: TrainConfig, out: str | Path, report: Report = print) -> Qwen:
    """Trains a student by `config` in folder `out`, resuming what is there; gives the trained model.

    Raises InputError on bad input, before anything is written, and TrainingStopped on a loss that is not finite.
    """
    return Trainer(config, out, report).run()
