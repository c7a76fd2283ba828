"""The nouns of jaxopd, the legend of dimensions and the sign convention.

Dimensions (a suffix on a local variable names its axes, e.g. ``logits_BTV``):

====  =====================================  ====  =====================================
B     batch of sequences or decode slots     G     rollouts
T     token positions                        M     paths, trunks or teachers (stated)
V     vocabulary                             D     hidden width
K     candidate tokens at a node             H     attention heads, h head width
N     nodes (unique prefixes of the paths)   L     layers
====  =====================================  ====  =====================================

Sign: a gradient form ``f`` is reward-like, and ``P (f - fbar)`` is an ascent direction on the student's
logits. The only minus sign is in the surrogate loss (`jaxopd.gradients.core.surrogate`).

Divergences: reverse_kl = KL(student || teacher), forward_kl = KL(teacher || student). A ``*_mask`` is True
where an entry is kept.
"""

from dataclasses import dataclass, field
from typing import Any

BUCKET_STEP = 4096


def bucket(size: int, least: int = 1) -> int:
    """Gives the size that an axis is padded to: few shapes are compiled, and long axes waste little.

    The next power of two that is `least` or more; beyond 4096 the next multiple of it.
    """
    size = max(size, least)
    return 1 << (size - 1).bit_length() if size <= BUCKET_STEP else -(-size // BUCKET_STEP) * BUCKET_STEP


@dataclass(frozen=True)
class Question:
    """A question with its gold answer; `text` is the user message before the chat template."""

    id: str
    task: str
    text: str
    gold: str
    meta: dict[str, Any] = field(default_factory=dict)
