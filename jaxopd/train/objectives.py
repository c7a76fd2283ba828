"""What is optimised at a position: a gradient form on a support, used as a loss.

Two families. A *divergence* (Eq. 4 and 5 of paper B, GKD, forward KL) is exact at the present parameters: the value is
the divergence, the gradient is its form's. A *policy gradient* (Eq. 3, MiniLLM, the k-token advantages of paper B's
code, GRPO) freezes its advantages A = P_old f when the rollouts are scored; later updates on the same rollouts reach
them through the importance ratio. In both, the minus sign is that of the surrogate.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxopd.errors import InputError, check_fields
from jaxopd.gradients import (
    Form,
    Position,
    clipped_surrogate,
    direct,
    dr_grpo,
    dr_grpo_std,
    forward_kl,
    forward_kl_loss,
    importance_ratio,
    is_clipped,
    jsd,
    jsd_loss,
    likelihood,
    minillm,
    returns,
    reverse_kl,
    reverse_kl_loss,
    surrogate,
    truncated_surrogate,
)
from jaxopd.gradients.core import LOG_ZERO, probability
from jaxopd.train.supports import Mass, Support, with_mass

Reach = Literal["full", "support", "sampled"]  # the tokens an objective needs at each position
Importance = Literal["clip", "truncate", "none"]
Divergence = Literal["reverse_kl", "forward_kl", "jsd"]
Weighting = Literal["student", "teacher", "uniform"]
Outcome = Literal["", "grpo", "dr_grpo"]
CHOICES: dict[str, Any] = {
    "support": Support,
    "mass": Mass,
    "divergence": Divergence,
    "weighting": Weighting,
    "outcome": Outcome,
    "importance": Importance,
}
Loss = Callable[[Float[Array, "K"], Float[Array, "K"]], Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
class Objective:
    """A form and where it is applied.

    reach       "full": the whole vocabulary; "support": top-k tokens; "sampled": the token drawn
    loss        the divergence of (log_p, log_q) that the form descends; None for a policy gradient
    kernel      (kind, beta) of the fused full-vocabulary loss, for reach "full"
    from_teacher, from_reward  what the form listens to
    """

    form: Form
    reach: Reach
    loss: Loss | None = None
    support: Support = "student"
    k: int = 0
    mass: Mass = "raw"
    kernel: tuple[str, float] = ("reverse_kl", 0.5)
    from_teacher: bool = True
    from_reward: bool = False


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """The choice of an objective; the defaults are top-k OPD as paper B prints it."""

    objective: str = "topk_paper"
    """sampled (Eq. 3 as a policy gradient), sampled_paper (with the -1 of its derivative), full (Eq. 4), topk_paper
    (Eq. 5), topk_thunlp (advantages of the authors' code), gkd, forward_kl, minillm, sft, grpo or dr_grpo."""
    k: int = 16
    """Tokens of a top-k set."""
    support: Support = "student"
    """student, teacher, overlap, union or non_overlap, of the two top-k sets."""
    mass: Mass = "renormalized"
    """Probability outside the support of topk_paper: renormalized away, a tail bucket, or raw (not of reverse KL)."""
    divergence: Divergence = "reverse_kl"
    """Divergence of full and topk_paper."""
    beta: float = 0.5
    """Mixture weight of gkd and jsd: M = beta Q + (1 - beta) P; 0 is forward and 1 reverse KL."""
    weighting: Weighting = "student"
    """Weights of topk_thunlp."""
    discount: float | None = None
    """Of future rewards in sampled objectives, per token; by default 0, of minillm 1."""
    reward_scale: float = 1.0
    """lambda of reward extrapolation: the teacher becomes base + lambda (teacher - base) in log-probabilities."""
    outcome: Outcome = ""
    """Outcome reward mixed into a distillation objective."""
    outcome_weight: float = 1.0
    """Its coefficient."""
    importance: Importance = "clip"
    """How a policy gradient (sampled, topk_thunlp, minillm, grpo, dr_grpo) reaches rollouts of older parameters: clip
    (PPO), truncate, or none. train/clip_fraction of metrics.jsonl is the share of (position, token) pairs where the
    ratio is beyond, averaged over a step's updates."""
    clip_low: float = 0.2
    """The clip's lower end is 1 - clip_low."""
    clip_high: float = 0.2
    """Its upper end is 1 + clip_high."""
    truncation: float = 2.0
    """Largest importance ratio of truncate."""
    dual_clip: float = 3.0
    """Bound of the loss of negative advantages, in units of them."""

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise InputError(f"objective: found {self.objective!r}, expected one of {', '.join(OBJECTIVES)}")
        for name, choice in CHOICES.items():
            if (value := getattr(self, name)) not in get_args(choice):
                raise InputError(f"{name}: found {value!r}, expected one of {', '.join(map(repr, get_args(choice)))}")
        check_fields(
            self,
            ("k", self.k >= 1, "at least 1"),
            ("discount", self.discount is None or 0 <= self.discount <= 1, "0 to 1"),
            ("outcome_weight", 0 < self.outcome_weight < float("inf"), "a positive number"),
            ("reward_scale", 0 < self.reward_scale < float("inf"), "a positive number"),
            ("clip_low", 0 <= self.clip_low < 1, "0 or more, and less than 1"),
            ("clip_high", self.clip_high >= 0, "0 or more"),
            ("truncation", self.truncation > 0, "more than 0"),
            ("dual_clip", self.dual_clip > 1, "more than 1"),
        )
        reads = _reads(self)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default and not reads.get(field.name, True):
                found = f"found {value!r}, which the objective {self.objective} does not read"
                raise InputError(f"{field.name}: {found}, expected {field.default!r}")
        self._check_combination()

    def _check_combination(self) -> None:
        objective = make_objective(self)
        if self.outcome and objective.from_reward:
            raise InputError(f"outcome: found {self.outcome!r} mixed into {self.objective}, expected a distillation")
        if self.objective != "topk_paper" or self.mass == "renormalized":
            return
        if self.mass == "raw" and objective.form is reverse_kl:
            raise InputError("mass: found 'raw' with reverse KL, which is no divergence; expected renormalized or tail")
        if self.reward_scale != 1:
            found = f"found {self.reward_scale} with mass {self.mass!r}, but an extrapolated teacher is not normalised"
            raise InputError(f"reward_scale: {found}; expected 1, or mass 'renormalized'")

    @property
    def gamma(self) -> float:
        """The discount that the rewards-to-go take."""
        by_default = 1.0 if self.objective == "minillm" else 0.0
        return by_default if self.discount is None else self.discount


def _reads(config: ObjectiveConfig) -> dict[str, bool]:
    """Tell of the settings that not every objective reads whether this one does."""
    objective, name = make_objective(config), config.objective
    corrected = objective.loss is None or config.outcome != ""
    clips = corrected and config.importance == "clip"
    return {
        "support": objective.reach == "support",
        "mass": name == "topk_paper",
        "divergence": name in ("full", "topk_paper"),
        "beta": name == "gkd" or config.divergence == "jsd",
        "weighting": name == "topk_thunlp",
        "discount": objective.reach == "sampled" and objective.from_teacher,
        "reward_scale": objective.reach != "full" and objective.from_teacher,
        "outcome_weight": config.outcome != "",
        "importance": corrected,
        "clip_low": clips,
        "clip_high": clips,
        "dual_clip": clips,
        "truncation": corrected and config.importance == "truncate",
    }


def _divergence(config: ObjectiveConfig) -> tuple[Form, Loss]:
    return {
        "reverse_kl": (reverse_kl, reverse_kl_loss),
        "forward_kl": (forward_kl, forward_kl_loss),
        "jsd": (jsd(config.beta), lambda log_p, log_q: jsd_loss(log_p, log_q, config.beta)),
    }[config.divergence]


def _full(config: ObjectiveConfig) -> Objective:
    form, loss = _divergence(config)
    return Objective(form, "full", loss, kernel=(config.divergence, config.beta))


def _topk_paper(config: ObjectiveConfig) -> Objective:
    form, loss = _divergence(config)
    return Objective(form, "support", loss, config.support, config.k, config.mass)


def _topk_thunlp(config: ObjectiveConfig) -> Objective:
    # The authors' code renormalises the weights on every support but the symmetric difference.
    form = direct(config.weighting, config.support != "non_overlap")
    return Objective(form, "support", None, config.support, config.k, "raw")


def _reward(form: Form) -> Callable[[ObjectiveConfig], Objective]:
    return lambda _: Objective(form, "sampled", from_teacher=False, from_reward=True)


OBJECTIVES: dict[str, Callable[[ObjectiveConfig], Objective]] = {
    "sampled": lambda _: Objective(returns, "sampled"),
    "sampled_paper": lambda _: Objective(minillm, "sampled"),
    "full": _full,
    "topk_paper": _topk_paper,
    "topk_thunlp": _topk_thunlp,
    "gkd": lambda c: _full(dataclasses.replace(c, objective="full", divergence="jsd")),
    "forward_kl": lambda c: _full(dataclasses.replace(c, objective="full", divergence="forward_kl")),
    "minillm": lambda _: Objective(minillm, "sampled"),
    "sft": lambda _: Objective(likelihood, "sampled", lambda log_p, _: -jnp.sum(log_p), from_teacher=False),
    "grpo": _reward(dr_grpo_std),
    "dr_grpo": _reward(dr_grpo),
}


def make_objective(config: ObjectiveConfig) -> Objective:
    """Make the objective that a configuration names."""
    return OBJECTIVES[config.objective](config)


def make_outcome(config: ObjectiveConfig) -> Objective | None:
    """Make the outcome-reward objective that is mixed in, if any."""
    return OBJECTIVES[config.outcome](config) if config.outcome else None


def position_loss(objective: Objective, position: Position) -> Float[Array, ""]:
    """Return an objective's loss at one position, differentiable in log_p; P_old = P.

    The value is the divergence, or -sum_k P_k f_k; the gradient in the logits is -P (f - fbar) over the vocabulary or
    the support, by the objective's mass.
    """
    seen = with_mass(position, objective.mass)
    descent = surrogate(seen.log_p, jax.lax.stop_gradient(objective.form(seen)))
    if objective.loss is None:
        return descent
    return descent + jax.lax.stop_gradient(objective.loss(seen.log_p, seen.log_q) - descent)


def frozen_advantage(objective: Objective, position: Position) -> Float[Array, "K"]:
    """Return A = P f of a policy gradient at the parameters that drew the rollouts."""
    seen = with_mass(position, objective.mass)
    possible = seen.log_p > LOG_ZERO
    return jnp.where(possible, probability(seen.log_p) * objective.form(seen), 0.0)


class Correction(NamedTuple):
    """How a policy gradient reaches rollouts of older parameters; both take (log_p, log_p_old, advantage).

    loss        of one position, [K] each
    is_limited  at which tokens, [*batch, K], the ratio is clipped or truncated
    """

    loss: Callable[[Array, Array, Array], Float[Array, ""]]
    is_limited: Callable[[Array, Array, Array], Bool[Array, "*batch K"]]


def importance_correction(config: ObjectiveConfig) -> Correction:
    """Make the importance correction that a configuration names."""
    most = config.truncation
    if config.importance == "clip":
        bounds = {"low": config.clip_low, "high": config.clip_high, "dual": config.dual_clip}
        return Correction(partial(clipped_surrogate, **bounds), partial(is_clipped, **bounds))
    if config.importance == "truncate":
        return Correction(
            partial(truncated_surrogate, most=most),
            lambda log_p, old, _: importance_ratio(log_p, old) > most,
        )
    return Correction(
        lambda log_p, _, advantage: truncated_surrogate(log_p, log_p, advantage, 1.0),
        lambda log_p, *_: jnp.zeros(log_p.shape, bool),
    )
