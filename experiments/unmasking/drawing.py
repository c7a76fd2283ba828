"""The figures of this folder: dots with intervals, histograms, a score along one path."""

from collections.abc import Callable, Mapping

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxopd.report.plots import CORRECT, ESTIMATOR_COLOURS, INCORRECT, INK, STYLE

COLUMNS = 3  # panels side by side
BINS = np.linspace(-1, 1, 21)
COLOURS = ESTIMATOR_COLOURS | {"correct": CORRECT, "incorrect": INCORRECT}


def panels(names: list[str], draw: Callable[[Axes, str], None], *, height: float, share: bool = False) -> Figure:
    """One panel a name, drawn by `draw(axes, name)`."""
    rows = -(-len(names) // COLUMNS)
    with matplotlib.rc_context(STYLE):
        columns = min(COLUMNS, len(names))
        figure = Figure(figsize=(4.2 * columns, height * rows + 0.4), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharey=share)
        for axes, name in zip(grid.flat, names, strict=False):
            draw(axes, name)
            axes.set_title(name)
            if not axes.has_data():
                axes.text(0.5, 0.5, "no decision node", ha="center", va="center", transform=axes.transAxes)
        for axes in grid.flat[len(names) :]:
            axes.set_visible(False)
        labelled = [axes for axes in grid.flat if axes.get_legend_handles_labels()[1]]
        if labelled and labelled[0].get_legend() is None:  # panels whose labels are their own keep them
            handles, labels = labelled[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper right", ncols=len(labels))
    return figure


def dots(axes: Axes, series: Mapping[str, pd.DataFrame], order: list[str]) -> None:
    """Means with intervals (mean, low, high by teacher), one row a teacher and one dot a series."""
    for place, (name, table) in enumerate(series.items()):
        rows = table.set_index("teacher").reindex(order)
        middle, low, high = (rows[column].to_numpy(float) for column in ("mean", "low", "high"))
        heights = np.arange(len(order)) + 0.18 * (place - (len(series) - 1) / 2)
        error = np.nan_to_num(np.stack([middle - low, high - middle]))
        axes.errorbar(
            middle, heights, xerr=error, fmt="o", markersize=4, elinewidth=1.2, color=COLOURS.get(name, INK), label=name
        )
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.grid(axis="x")
    axes.set(yticks=range(len(order)), yticklabels=order, ylim=(max(1, len(order)) - 0.5, -0.5))


def distribution(axes: Axes, scores: Mapping[str, np.ndarray]) -> None:
    """Share of decision nodes per alignment bin, one outline a group (a key of COLOURS), its mean dashed."""
    for name, values in scores.items():
        colour = COLOURS[name]
        share, _ = np.histogram(values, BINS, weights=np.full(len(values), 1 / max(1, len(values))))
        axes.stairs(share, BINS, color=colour, fill=True, alpha=0.25)
        axes.stairs(share, BINS, color=colour, label=f"{name} (n = {len(values):,})")
        if len(values):
            axes.axvline(values.mean(), color=colour, linestyle="--", linewidth=1)
    axes.set(xlim=(-1, 1), xlabel="alignment", xticks=(-1, -0.5, 0, 0.5, 1))
    if scores:
        axes.legend(fontsize=8, loc="upper center")


def along_path(axes: Axes, tokens: list[str], score: np.ndarray) -> None:
    """A score at each decision node of a path, over the path's tokens."""
    place = np.arange(len(tokens))
    axes.bar(place, np.nan_to_num(score), color=np.where(score > 0, CORRECT, INCORRECT))
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set(ylim=(-1.05, 1.05), xlim=(-1, len(tokens)))
    axes.set_xticks(place, [token.strip() or "\u2423" for token in tokens], rotation=90, fontsize=6)
