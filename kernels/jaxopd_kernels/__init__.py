"""Vocabulary-scale statistics of language-model heads, fused with the head's matrix product.

Each op has an explicit table of implementations, the XLA reference first; `implementation=None` takes "xla".
"""

from jaxopd_kernels.api import IMPLEMENTATIONS, MAX_TOP_K, Implementation, head_statistics, pair_statistics
from jaxopd_kernels.rows import VocabularyForm
from jaxopd_kernels.statistics import HeadStatistics, PairStatistics

__all__ = [
    "IMPLEMENTATIONS",
    "MAX_TOP_K",
    "HeadStatistics",
    "Implementation",
    "PairStatistics",
    "VocabularyForm",
    "head_statistics",
    "pair_statistics",
]
