"""Is a pair worth training? One batch of the student's responses, scored before any update.

What no training can repair is a no-go: a numeric floor that drowns the signal, a teacher that is not better on these
questions, a reward that does not tell right from wrong, probability mass that the two models do not share.
"""

import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int
from scipy import stats

from jaxopd.alignment import t_interval
from jaxopd.errors import InputError
from jaxopd.models import chat_tokens, load_tokenizer
from jaxopd.rollouts import Engine, Requests, Sampling
from jaxopd.rollouts.sampling import seed_of
from jaxopd.train import metrics as measured
from jaxopd.train.batch import Batch
from jaxopd.train.collect import Collector
from jaxopd.train.config import TrainConfig
from jaxopd.train.health import rollout_metrics
from jaxopd.train.metrics import Scored
from jaxopd.train.setup import Setup, Teacher
from jaxopd.tree.success import Z95

MOST_FLOOR = 1e-3  # nats: the reverse KL of a model with itself
LEAST_SHARED_MASS = 0.5
LEAST_OVERLAP = 0.5
FALSE_ALARMS = 0.05  # share of batches with such a window, of a reward that says nothing


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
    if not config.teacher:
        raise InputError("--teacher: found none, expected at least one to compare with the student")
    if config.objective.objective == "sft" and not config.objective.outcome:
        raise InputError("objective: found sft, expected one that scores responses")
    config = replace(config, corpus="")  # a corpus holds another model's responses
    setup = Setup(config)
    collector = Collector(config, setup)
    batch = collector.draw(setup.initial, 0)
    scored, _ = collector.score(setup.initial, batch)
    correct = batch.correct == 1
    figures = rollout_metrics(batch) | measured.entropy_metrics(scored) | measured.overlap_metrics(scored)
    figures |= measured.reward_metrics(scored, correct) | measured.by_position(scored, correct)
    figures["reward/auroc_error"] = _auroc_error(correct)
    if batch.log_p is not None:
        figures |= measured.engine_mismatch(scored, batch.log_p)
    figures["floor/reverse_kl"] = _floor(config, setup, batch)
    figures["accuracy/student"] = figures["rollout/accuracy"]
    reasons, cautions = _reasons(figures), _cautions(figures, setup, scored, correct)
    for index, teacher in enumerate(setup.teachers):
        figures |= _comparison(config, setup, index, batch, scored)
        against, doubts = judged(figures, teacher.spec.name)
        reasons, cautions = reasons + against, cautions + doubts
    return Preflight(figures, reasons, cautions)


def _auroc_error(correct: Bool[np.ndarray, "B"]) -> float:
    """Standard error of the AUROC of a reward that says nothing, from the rank-sum statistic's variance."""
    right, wrong = int(correct.sum()), int((~correct).sum())
    return float(np.sqrt((right + wrong + 1) / max(1, 12 * right * wrong)))


def _floor(config: TrainConfig, setup: Setup, batch: Batch) -> float:
    """The largest |KL| of the student with itself: what is left when there is nothing to learn."""
    alone = copy.copy(setup)
    alone.teachers = []
    scored, _ = Collector(config, alone).score(setup.initial, batch)
    return float(np.abs(np.where(scored.mask, scored.reverse_kl, 0.0)).max())


def _comparison(config: TrainConfig, setup: Setup, index: int, batch: Batch, scored: Scored) -> dict[str, float]:
    """How far a teacher is from the student, and how much better, on the questions routed to it."""
    teacher, rows = setup.teachers[index], batch.teacher == index
    if not rows.any():
        return {}
    questions, owner = np.unique(batch.question[rows], return_inverse=True)
    ours = np.bincount(owner, batch.correct[rows] == 1) / np.bincount(owner)
    theirs = _accuracy(config, setup, teacher, questions)
    gain = t_interval(theirs - ours)
    found = {
        "accuracy": theirs.mean(),
        "gain": gain["mean"],
        "gain_low": np.nan_to_num(gain["low"], nan=-1.0),  # one question bounds nothing
        "gain_high": np.nan_to_num(gain["high"], nan=1.0),
        "reverse_kl_max": np.abs(np.where(scored.mask, scored.reverse_kl, 0.0)[rows]).max(),
    }
    return {f"{key}/{teacher.spec.name}": float(value) for key, value in found.items()}


def _accuracy(
    config: TrainConfig, setup: Setup, teacher: Teacher, questions: Int[np.ndarray, "Q"]
) -> Float[np.ndarray, "Q"]:
    """The teacher's share of right responses to each question, drawn as the student's are."""
    state = setup.initial if teacher.state is None else teacher.state
    prompts = [teacher.prompts[q] for q in questions]
    seed = seed_of(config.seed, "preflight", teacher.spec.name)
    options = {"temperature": config.temperature, "top_p": config.top_p}
    sampling = Sampling(config.max_tokens, setup.stop_ids, seed=seed, **options)
    mesh = None if teacher.split else setup.engine_mesh
    engine = Engine(nnx.merge(teacher.graph, state), slots=config.slots, mesh=mesh)
    rolled = engine.run(prompts, Requests.continuations(prompts, config.rollouts), sampling)
    asked = [setup.questions[q] for q in np.repeat(questions, config.rollouts)]
    return (setup.grades(asked, rolled.tokens) == 1).reshape(-1, config.rollouts).mean(-1)


def judged(figures: dict[str, Any], name: str) -> tuple[list[str], list[str]]:
    """Say what speaks against a teacher, and what is in doubt, by its figures."""
    if f"gain/{name}" not in figures:
        return [], [f"no question of the batch is routed to teacher {name}"]
    if figures[f"reverse_kl_max/{name}"] <= MOST_FLOOR:
        return [f"teacher {name} is the student, but for rounding: nothing to learn"], []
    gain, low, high = (figures[f"{key}/{name}"] for key in ("gain", "gain_low", "gain_high"))
    said = f"the accuracy of teacher {name} less the student's is {gain:.3f} (95 % interval {low:.3f} to {high:.3f})"
    if high <= 0:
        return [f"{said}: nothing to learn"], []
    return [], [f"{said}, which may be chance"] if low <= 0 else []


def misleading_windows(
    figures: dict[str, Any], mask: Bool[np.ndarray, "B S"], correct: Bool[np.ndarray, "B"]
) -> list[str]:
    """Name each window of `by_position` whose reward prefers wrong responses, by more than chance among so many."""
    starts = [int(start) for start in figures["position/start"]]
    found, z = [], stats.norm.isf(FALSE_ALARMS / max(1, len(starts)))
    for start, end, value in zip(starts, [*starts[1:], mask.sum(-1).max()], figures["position/auroc"]):
        if value is not None and value < 0.5 - z * _auroc_error(correct[mask[:, start]]):
            found.append(f"at tokens {start} to {end - 1} the reward prefers wrong responses (AUROC {value:.2f})")
    return found


def _reasons(figures: dict[str, Any]) -> list[str]:
    found = []
    if figures["floor/reverse_kl"] > MOST_FLOOR:
        found.append(f"the student differs from itself by {figures['floor/reverse_kl']:.2g} nats: use float32")
    if figures.get("reward/auroc", 1.0) < 0.5 - Z95 * figures["reward/auroc_error"]:
        found.append(f"the reward prefers wrong responses (AUROC {figures['reward/auroc']:.2f})")
    shared = figures.get("overlap/mass_student_paper", 0.0)
    if shared < LEAST_SHARED_MASS:
        found.append(f"shared tokens hold {shared:.0%} of the student's mass: start cold, from the teacher's responses")
    return found


def _cautions(figures: dict[str, Any], setup: Setup, scored: Scored, correct: Bool[np.ndarray, "B"]) -> list[str]:
    found = misleading_windows(figures, scored.mask, correct)
    if figures["overlap/ratio"] < LEAST_OVERLAP:
        found.append(f"{figures['overlap/ratio']:.0%} of the top {scored.k} tokens are shared")
    if figures["rollout/truncated"] > 0.1:
        found.append(f"{figures['rollout/truncated']:.0%} of the responses run into the length limit")
    if figures["rollout/accuracy"] in (0.0, 1.0):
        found.append("responses are all right or all wrong: the reward's reliability is unknown")
    if 0.5 > (value := figures.get("reward/auroc", 1.0)) >= 0.5 - Z95 * figures["reward/auroc_error"]:
        found.append(f"the reward prefers wrong responses (AUROC {value:.2f}), which so few may do by chance")
    for teacher in setup.teachers:
        if teacher.spec.model is not None:
            theirs = chat_tokens(load_tokenizer(teacher.spec.model), setup.questions[0].text)
            if theirs != chat_tokens(setup.tokenizer, setup.questions[0].text):
                found.append(f"teacher {teacher.spec.name} has another chat template; it is shown the student's")
    return found
