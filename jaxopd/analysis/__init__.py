"""The statistics behind paper A's tables and figures, as functions of a run's records.

Node tables (`nodes.parquet`) of ONE estimator go in, small tables come out. The unit of every interval and test is
the question: nodes of one question share its rollouts. Tests and intervals are named in the columns they fill.
"""

from jaxopd.analysis.decisions import ALPHA, UNDECIDED, agreement, holm, verdict
from jaxopd.analysis.intervals import cluster_bootstrap, interval_of_mean
from jaxopd.analysis.rescore import rescore
from jaxopd.analysis.robustness import Baseline, rank_agreement, robustness
from jaxopd.analysis.runs import compare_runs, rank_changes, side_by_side
from jaxopd.analysis.selective import selective
from jaxopd.analysis.teachers import (
    compare_teachers,
    contrast,
    leaders,
    of_estimator,
    outcomes,
    question_summaries,
    rank_teachers,
)
from jaxopd.analysis.within_path import oscillation, path_correlations, scored, within_path

__all__ = [
    "ALPHA",
    "UNDECIDED",
    "Baseline",
    "agreement",
    "cluster_bootstrap",
    "compare_runs",
    "compare_teachers",
    "contrast",
    "holm",
    "interval_of_mean",
    "leaders",
    "of_estimator",
    "oscillation",
    "outcomes",
    "path_correlations",
    "question_summaries",
    "rank_agreement",
    "rank_changes",
    "rank_teachers",
    "rescore",
    "robustness",
    "scored",
    "selective",
    "side_by_side",
    "verdict",
    "within_path",
]
