"""Gradient forms: what a training signal says about each token, as f in P (f - fbar).

A form is an unbatched function Position -> f [K]. To add one, write a small file and give it a line in FORMS; it is
then at once a diagnostic, a training loss and a case of the contract test.
"""

from collections.abc import Mapping
from types import MappingProxyType

from jaxopd.gradients.core import (
    READINGS,
    Form,
    Position,
    Reading,
    gradient,
    logit_gradient,
    on_support,
    renormalize,
    surrogate,
)
from jaxopd.gradients.divergences import (
    forward_kl,
    forward_kl_loss,
    from_loss,
    jsd,
    jsd_loss,
    reverse_kl,
    reverse_kl_loss,
)
from jaxopd.gradients.policy import (
    clipped_surrogate,
    direct,
    importance_ratio,
    is_clipped,
    kl_estimate,
    likelihood,
    returns,
    truncated_surrogate,
)
from jaxopd.gradients.rewarded import dr_grpo, dr_grpo_std, ideal
from jaxopd.gradients.sampled import minillm, score_function, single_sample

FORMS: Mapping[str, Form] = MappingProxyType(
    {
        "ideal": ideal,
        "reverse_kl": reverse_kl,
        "forward_kl": forward_kl,
        "jsd": jsd(0.5),
        "single_sample": single_sample,
        "minillm": minillm,
        "dr_grpo": dr_grpo,
        "dr_grpo_std": dr_grpo_std,
    }
)
SAMPLED = ("single_sample", "minillm", "dr_grpo", "dr_grpo_std")  # FORMS that average rollouts: no samples, no gradient

__all__ = [
    "FORMS",
    "READINGS",
    "SAMPLED",
    "Form",
    "Position",
    "Reading",
    "clipped_surrogate",
    "direct",
    "dr_grpo",
    "dr_grpo_std",
    "forward_kl",
    "forward_kl_loss",
    "from_loss",
    "gradient",
    "ideal",
    "importance_ratio",
    "is_clipped",
    "jsd",
    "jsd_loss",
    "kl_estimate",
    "likelihood",
    "logit_gradient",
    "minillm",
    "on_support",
    "renormalize",
    "returns",
    "reverse_kl",
    "reverse_kl_loss",
    "score_function",
    "single_sample",
    "surrogate",
    "truncated_surrogate",
]
