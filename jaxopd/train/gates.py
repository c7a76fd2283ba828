"""How much each token of a batch counts: paper A's proposals, runnable."""

from dataclasses import dataclass

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
PRIOR_NODES = 20  # a cell's mean alignment is drawn to the overall mean as if by so many nodes


@dataclass(frozen=True)
class AlignmentTable:
    """Mean alignment of a teacher's signal by outcome, reverse KL and student entropy, from a diagnosis.

    divergence_edges, entropy_edges  [BINS - 1];  weight  [2, BINS, BINS], wrong paths first, 0 where the mean is
    negative, 1 on average over the diagnosed nodes
    """

    divergence_edges: Float[np.ndarray, "E"]
    entropy_edges: Float[np.ndarray, "E"]
    weight: Float[np.ndarray, "2 C C"]

    @classmethod
    def of_run(cls, folder: str, form: str = "reverse_kl", estimator: str = "bellman") -> "AlignmentTable":
        """Read a finished diagnosis. Raises InputError where it has no decision node."""
        return cls.of_nodes(RunFolder.existing(folder).read_table("records/nodes.parquet"), folder, form, estimator)

    @classmethod
    def of_nodes(cls, nodes: pd.DataFrame, name: str, form: str, estimator: str) -> "AlignmentTable":
        """Bin the decision nodes of one estimator by quartiles of reverse KL and entropy."""
        score = f"align_{form}"
        nodes = nodes[(nodes["estimator"] == estimator) & nodes[score].notna()]
        if nodes.empty:
            raise InputError(
                f"{name}: found no decision node of estimator {estimator}, expected some to weigh tokens by"
            )
        inner = np.arange(1, BINS) / BINS
        edges = [np.quantile(nodes[column], inner) for column in ("reverse_kl", "entropy_student")]
        cell = _cells(nodes["path_correct"].to_numpy(bool), nodes["reverse_kl"], nodes["entropy_student"], *edges)
        count, total = np.zeros((2, 2, BINS, BINS))
        np.add.at(count, cell, 1)
        np.add.at(total, cell, nodes[score].to_numpy())
        overall = nodes[score].mean()
        weight = np.maximum((total + PRIOR_NODES * overall) / (count + PRIOR_NODES), 0.0)
        mean = (weight * count).sum() / count.sum()
        if not mean > 0:
            raise InputError(
                f"{name}: found no cell of positive mean alignment, expected a teacher that helps somewhere"
            )
        return cls(*edges, weight / mean)

    def of(self, correct: Bool[np.ndarray, "B"], scored: Scored) -> Float[np.ndarray, "B S"]:
        """Look the tokens of a batch up."""
        outcome = np.broadcast_to(correct[:, None], scored.mask.shape)
        edges = self.divergence_edges, self.entropy_edges
        return self.weight[_cells(outcome, scored.reverse_kl, scored.entropy_student, *edges)]


def _cells(correct: np.ndarray, divergence: np.ndarray, entropy: np.ndarray, *edges: np.ndarray) -> tuple:
    bins = (np.searchsorted(edge, np.asarray(x), side="right") for edge, x in zip(edges, (divergence, entropy)))
    return correct.astype(int), *bins


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
