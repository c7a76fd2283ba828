"""Is a pair worth training? One batch of the student's responses, scored before any update.

What no training can repair is a no-go: a numeric floor that drowns the signal, a teacher that is not better on these
questions, a reward that does not tell right from wrong, probability mass that the two models do not share.
"""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import nnx

from jaxopd.models import chat_tokens, load_tokenizer
from jaxopd.rollouts import Engine, Requests, Sampling
from jaxopd.rollouts.sampling import seed_of
from jaxopd.train import metrics as measured
from jaxopd.train.collect import Collector
from jaxopd.train.config import TrainConfig
from jaxopd.train.health import rollout_metrics
from jaxopd.train.metrics import Scored
from jaxopd.train.setup import Setup, Teacher
from jaxopd.tree.success import Z95

MOST_FLOOR = 1e-3  # nats: the reverse KL of a model with itself
LEAST_SHARED_MASS = 0.5
LEAST_OVERLAP = 0.5


@dataclass(frozen=True)
class Preflight:
    """Figures of a pair, what speaks against training it, and what to keep an eye on."""

    figures: dict[str, Any]
    reasons: list[str]
    cautions: list[str]

    @property
    def go(self) -> bool:
        return not self.reasons


def preflight(config: TrainConfig) -> Preflight:
    """Measure a pair on one batch. Raises InputError where student and teacher cannot be paired at all."""
    setup = Setup(config)
    collector = Collector(config, setup)
    batch = collector.draw(setup.initial, 0)
    scored, _ = collector.score(setup.initial, batch)
    correct = batch.correct == 1
    figures = rollout_metrics(batch) | measured.entropy_metrics(scored) | measured.overlap_metrics(scored)
    figures |= measured.reward_metrics(scored, correct) | measured.by_position(scored, correct)
    right, wrong = correct.sum(), (~correct).sum()
    # Of the AUROC of a reward that says nothing: its standard error, from the rank-sum statistic's variance.
    figures["reward/auroc_error"] = float(np.sqrt((right + wrong + 1) / max(1, 12 * right * wrong)))
    if batch.log_p is not None:
        figures |= measured.engine_mismatch(scored, batch.log_p)
    figures["floor/reverse_kl"] = _floor(config, setup, batch)
    for teacher in setup.teachers:
        figures[f"accuracy/{teacher.spec.name}"] = _accuracy(config, setup, teacher, np.unique(batch.question))
    figures["accuracy/student"] = figures["rollout/accuracy"]
    return Preflight(figures, _reasons(figures, setup.teachers), _cautions(figures, setup, scored))


def _floor(config: TrainConfig, setup: Setup, batch: Any) -> float:
    """The largest |KL| of the student with itself: what is left when there is nothing to learn."""
    alone = copy.copy(setup)
    alone.teachers = []
    scored, _ = Collector(config, alone).score(setup.initial, batch)
    return float(np.abs(np.where(scored.mask, scored.reverse_kl, 0.0)).max())


def _accuracy(config: TrainConfig, setup: Setup, teacher: Teacher, questions: np.ndarray) -> float:
    state = setup.initial if teacher.state is None else teacher.state
    prompts = [teacher.prompts[q] for q in questions]
    seed = seed_of(config.seed, "preflight", teacher.spec.name)
    sampling = Sampling(config.max_tokens, setup.stop_ids, temperature=config.temperature, seed=seed)
    mesh = None if teacher.split else setup.engine_mesh
    engine = Engine(nnx.merge(teacher.graph, state), slots=config.slots, mesh=mesh)
    rolled = engine.run(prompts, Requests.continuations(prompts, config.rollouts), sampling)
    asked = [setup.questions[q] for q in np.repeat(questions, config.rollouts)]
    return float(np.mean(setup.grades(asked, rolled.tokens) == 1))


def _reasons(figures: dict[str, Any], teachers: list[Teacher]) -> list[str]:
    found = []
    if figures["floor/reverse_kl"] > MOST_FLOOR:
        found.append(f"the student differs from itself by {figures['floor/reverse_kl']:.2g} nats: use float32")
    for teacher in teachers:
        name = teacher.spec.name
        theirs, ours = figures[f"accuracy/{name}"], figures["accuracy/student"]
        if theirs <= ours:
            found.append(f"teacher {name} answers {theirs:.1%} right and the student {ours:.1%}: nothing to learn")
    if figures.get("reward/auroc", 1.0) < 0.5 - Z95 * figures["reward/auroc_error"]:
        found.append(f"the reward prefers wrong responses (AUROC {figures['reward/auroc']:.2f})")
    shared = figures.get("overlap/mass_student_paper", 0.0)
    if shared < LEAST_SHARED_MASS:
        found.append(f"shared tokens hold {shared:.0%} of the student's mass: start cold, from the teacher's responses")
    return found


def _cautions(figures: dict[str, Any], setup: Setup, scored: Scored) -> list[str]:
    found = []
    if figures["overlap/ratio"] < LEAST_OVERLAP:
        found.append(f"{figures['overlap/ratio']:.0%} of the top {scored.k} tokens are shared")
    if figures["rollout/truncated"] > 0.1:
        found.append(f"{figures['rollout/truncated']:.0%} of the responses run into the length limit")
    if figures["rollout/accuracy"] in (0.0, 1.0):
        found.append("responses are all right or all wrong: the reward's reliability is unknown")
    if 0.5 > (value := figures.get("reward/auroc", 1.0)) >= 0.5 - Z95 * figures["reward/auroc_error"]:
        found.append(f"the reward prefers wrong responses (AUROC {value:.2f}), which so few may do by chance")
    pairs = zip(figures["position/start"], figures["position/auroc"])
    if unreliable := [int(start) for start, value in pairs if value is not None and value < 0.5]:
        found.append(f"in the window from token {unreliable[0]} on the reward prefers wrong responses")
    for teacher in setup.teachers:
        if teacher.spec.model is not None:
            theirs = chat_tokens(load_tokenizer(teacher.spec.model), setup.questions[0].text)
            if theirs != chat_tokens(setup.tokenizer, setup.questions[0].text):
                found.append(f"teacher {teacher.spec.name} has another chat template; it is shown the student's")
    return found
