"""How much each token of a batch counts: paper A's proposals, runnable."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from jaxopd.errors import InputError
from jaxopd.runs import RunFolder
from jaxopd.train.batch import Batch
from jaxopd.train.config import GateConfig
from jaxopd.train.metrics import Scored
from jaxopd.train.rewards import prefix_weights

BINS = 4  # of divergence and of entropy
PRIOR_NODES = 20  # a cell's alignment is drawn to the overall one as if by so many average nodes
FEATURES = ("reverse_kl", "entropy_student")


@dataclass(frozen=True)
class AlignmentTable:
    """What a diagnosis says of new responses: alignment by outcome, reverse KL and student entropy.

    A diagnosis measures alignment at the tokens of a few paths of a few questions. New responses soon leave those
    paths (82 % of the tokens of toy responses to diagnosed questions lie off them, experiments/rethinking/gates.py),
    most prompts were never diagnosed, and at a node with two tokens the cosine is 1 or -1, often by noise. So a token
    is weighed not by a node but by the nodes like it in what paper A finds to go with alignment (sections 4.1, 4.3)
    and is known of any token: whether its response is right, and the quartiles of its reverse KL and entropy. A cell's
    alignment is the cosine weighted by success range (the paper's SR weighting: where nothing is at stake the cosine
    is noise), shrunk to that of all nodes.

    divergence_edges, entropy_edges  [BINS - 1];  weight  [2, BINS, BINS], wrong responses first, 0 where the alignment
    is negative, 1 on average over the diagnosed nodes
    """

    divergence_edges: Float[np.ndarray, "E"]
    entropy_edges: Float[np.ndarray, "E"]
    weight: Float[np.ndarray, "2 C C"]

    @classmethod
    def of_run(cls, folder: str, student: str, teachers: Sequence[str]) -> "AlignmentTable":
        """Read what a finished diagnosis of `student` says of `teachers`, NAME=MODEL each, by the `bellman` estimator.

        Raises InputError where the diagnosis is of other models, or none of these teachers has a decision node there.
        """
        run = RunFolder.existing(folder, "diagnose")
        config = run.config() or {}
        if _model(config.get("student", "")) != _model(student):
            raise InputError(f"{folder}: found a diagnosis of {config.get('student')}, expected one of {student}")
        measured = {tuple(map(_model, argument.split("=", 1))) for argument in config.get("teacher", ())}
        for argument in teachers:
            if tuple(map(_model, argument.split("=", 1))) not in measured:
                known = ", ".join(config.get("teacher", ()))
                raise InputError(f"{folder}: found a diagnosis of the teachers {known}, expected {argument} among them")
        nodes = run.read_table("records/nodes.parquet")
        names = [argument.partition("=")[0] for argument in teachers]
        known = nodes[(nodes["estimator"] == "bellman") & nodes["teacher"].isin(names)]
        decisions = known[known["align_reverse_kl"].notna()]
        if decisions.empty:
            wanted = ", ".join(names)
            raise InputError(f"{folder}: found no decision node of teacher {wanted}, expected some to weigh tokens by")
        return cls.of_nodes(decisions, folder)

    @classmethod
    def of_nodes(cls, nodes: pd.DataFrame, name: str) -> "AlignmentTable":
        """Bin decision nodes by quartiles of reverse KL and entropy; `name` is what an error calls them."""
        inner = np.arange(1, BINS) / BINS
        edges = [np.quantile(nodes[column], inner) for column in FEATURES]
        cell = _cells(nodes["path_correct"].to_numpy(bool), *(nodes[column] for column in FEATURES), *edges)
        stake = nodes["success_range"].to_numpy(float)
        count, staked, aligned = np.zeros((3, 2, BINS, BINS))
        np.add.at(count, cell, 1)
        np.add.at(staked, cell, stake)
        np.add.at(aligned, cell, stake * nodes["align_reverse_kl"].to_numpy(float))
        prior = PRIOR_NODES * stake.mean()
        overall = aligned.sum() / max(staked.sum(), np.finfo(float).tiny)
        weight = np.maximum((aligned + prior * overall) / np.maximum(staked + prior, np.finfo(float).tiny), 0.0)
        mean = (weight * count).sum() / count.sum()
        if not mean > 0:
            raise InputError(f"{name}: found no cell of positive alignment, expected a teacher that helps somewhere")
        return cls(*edges, weight / mean)

    def of(self, correct: Bool[np.ndarray, "B"], scored: Scored) -> Float[np.ndarray, "B S"]:
        """Look the tokens of a batch up."""
        outcome = np.broadcast_to(correct[:, None], scored.mask.shape)
        edges = self.divergence_edges, self.entropy_edges
        return self.weight[_cells(outcome, scored.reverse_kl, scored.entropy_student, *edges)]


def _cells(correct: np.ndarray, divergence: np.ndarray, entropy: np.ndarray, *edges: np.ndarray) -> tuple:
    bins = (np.searchsorted(edge, np.asarray(x), side="right") for edge, x in zip(edges, (divergence, entropy)))
    return correct.astype(int), *bins


def _model(value: str) -> str:
    """Names a model alike from wherever its folder is looked at."""
    return str(Path(value).resolve()) if "/" in value and Path(value).exists() else value


def gate_weights(
    config: GateConfig, batch: Batch, scored: Scored, table: AlignmentTable | None = None
) -> Float[np.ndarray, "B S"]:
    """Weigh every token of a batch: the product of the configured gates, 0 off the responses."""
    mask = scored.mask
    weights = mask.astype(np.float64)
    if config.incorrect_only:
        weights *= (batch.correct != 1)[:, None]
    if config.divergence_quantile > 0 and mask.any():
        weights *= scored.reverse_kl >= np.quantile(scored.reverse_kl[mask], config.divergence_quantile)
    position = np.arange(mask.shape[1])
    weights *= (position >= config.window_start) & (config.window_end is None or position < config.window_end)
    if config.prefix_strength:
        weights *= prefix_weights(scored.reward, mask, config.prefix_strength)
    if table is not None:
        weights *= table.of(batch.correct == 1, scored)
    return weights
