"""Vocabulary-scale statistics of next-token distributions, from hidden states and LM heads.

Public operations with an explicit table of implementations: the XLA reference first, others beside it.
"""

from jaxopd_kernels.statistics import (
    IMPLEMENTATIONS,
    HeadStatistics,
    PairStatistics,
    head_statistics,
    pair_statistics,
)

__all__ = ["IMPLEMENTATIONS", "HeadStatistics", "PairStatistics", "head_statistics", "pair_statistics"]
