"""The generation tree: paths, visits, targets, success probabilities and the exact oracle."""

from jaxopd.tree.paths import EXIT, LEAF, Branches, Counts, PathTree, Responses, Walks, build_tree, count, tally, walk
from jaxopd.tree.success import ESTIMATORS, SuccessEstimate, back_up, exit_values, success_estimates, support
from jaxopd.tree.targeting import Targets, depth_window, exit_targets, paper_targets

__all__ = [
    "ESTIMATORS",
    "EXIT",
    "LEAF",
    "Branches",
    "Counts",
    "PathTree",
    "Responses",
    "SuccessEstimate",
    "Targets",
    "Walks",
    "back_up",
    "build_tree",
    "count",
    "depth_window",
    "exit_targets",
    "exit_values",
    "paper_targets",
    "success_estimates",
    "support",
    "tally",
    "walk",
]
