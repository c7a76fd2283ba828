"""Vocabulary-scale statistics and losses of language-model heads, and decoding attention over a shared trunk.

Each op has an explicit table of implementations, the XLA reference first; `implementation=None` chooses by a stated
rule, and takes "xla" where no kernel is meant to win.
"""

from jaxopd_kernels.api import IMPLEMENTATIONS, MAX_TOP_K, Implementation, head_statistics, pair_statistics
from jaxopd_kernels.attention import NO_KEYS, Part, cache_attention
from jaxopd_kernels.loss import divergence_loss, entropy_loss, weighted_divergence_loss
from jaxopd_kernels.products import product
from jaxopd_kernels.statistics import HeadStatistics, PairStatistics
from jaxopd_kernels.trunk_attention import TRUNK_IMPLEMENTATIONS, trunk_attention

__all__ = [
    "IMPLEMENTATIONS",
    "MAX_TOP_K",
    "NO_KEYS",
    "TRUNK_IMPLEMENTATIONS",
    "HeadStatistics",
    "Implementation",
    "PairStatistics",
    "Part",
    "cache_attention",
    "divergence_loss",
    "entropy_loss",
    "head_statistics",
    "pair_statistics",
    "product",
    "trunk_attention",
    "weighted_divergence_loss",
]
