"""The report's figures as SVG text: plain for files, adaptive to a light or dark scheme for the page."""

import io
import warnings

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from jaxopd.report.records import Records
from jaxopd.report.tables import FORM, NAMES, by_global_cosine, statistics

INK, QUIET = "#1b1f24", "#c9ced6"  # text and axes, grid
DARK_INK, DARK_QUIET = "#e4e7eb", "#454c56"
ESTIMATOR_COLOURS = {"pooled": "#d9822b", "on_policy": "#8c8cc4", "bellman": "#2f7fc1", "truth": INK}
OTHER_COLOURS = ("#5a9e6f", "#b07aa1", "#9c755f")
CORRECT, INCORRECT = "#2f7fc1", "#d9822b"
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "jaxopd", "font.size": 10, "text.parse_math": False,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": QUIET, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "ytick.major.size": 0,
    "xtick.major.size": 0, "grid.color": QUIET, "grid.linewidth": 0.5, "axes.axisbelow": True, "axes.titlesize": 10,
    "axes.titlelocation": "left", "legend.frameon": False,
}  # fmt: skip


def all_plots(records: Records) -> dict[str, str]:
    """Draw the figures that this run has data for: SVG text by name."""
    nodes = records.nodes
    front = nodes[nodes["estimator"] == records.estimator]
    scores = front.loc[front["decision"].eq(True) & front[f"align_{FORM}"].notna()]
    if scores.empty:
        return {}
    measured = statistics(nodes)
    order = by_global_cosine(measured[measured["estimator"] == records.estimator])
    sides = statistics(front, ("teacher", "path_correct"))
    with matplotlib.rc_context(STYLE):
        return {
            "ranking": _ranking(measured, order, records.estimators),
            "correct_incorrect": _correct_incorrect(sides, order),
            "distribution": _distribution(scores),
        }


def adaptive(svg: str) -> str:
    """Let an SVG switch its ink with the reader's scheme, for display by a browser."""
    scheme = (
        f"<style>:root{{--ink:{INK};--quiet:{QUIET}}}"
        f"@media (prefers-color-scheme: dark){{:root{{--ink:{DARK_INK};--quiet:{DARK_QUIET}}}}}</style>"
    )
    svg = svg[svg.index("<svg") :].replace(INK, "var(--ink)").replace(QUIET, "var(--quiet)")
    start = svg.index(">") + 1
    return svg[:start] + scheme + svg[start:]


def _ranking(measured: pd.DataFrame, teachers: list[str], estimators: list[str]) -> str:
    spare = iter(OTHER_COLOURS * len(estimators))
    series = {name: ESTIMATOR_COLOURS.get(name) or next(spare) for name in estimators}
    groups = {name: measured[measured["estimator"] == name] for name in estimators}
    return _dots(groups, series, teachers)


def _correct_incorrect(sides: pd.DataFrame, teachers: list[str]) -> str:
    groups = {
        "correct paths": sides[sides["path_correct"].eq(True)],
        "incorrect paths": sides[sides["path_correct"].eq(False)],
    }
    return _dots(groups, {"correct paths": CORRECT, "incorrect paths": INCORRECT}, teachers)


def _dots(groups: dict[str, pd.DataFrame], colours: dict[str, str], teachers: list[str]) -> str:
    """Means with intervals, one row a teacher and one dot a group: global cosine left, mean cosine right."""
    spread = 0.16 * (len(groups) - 1)
    height = 1.1 + len(teachers) * max(0.36, 0.14 * len(groups))
    figure = Figure(figsize=(9, height), layout=ConstrainedLayoutEngine(wspace=0.06))
    for axes, statistic in zip(figure.subplots(1, 2, sharey=True), ("global", "mean"), strict=True):
        for index, (name, group) in enumerate(groups.items()):
            rows = group[group["statistic"] == statistic].set_index("teacher").reindex(teachers)
            offset = spread * (index / max(1, len(groups) - 1) - 0.5)
            middle, half = rows["mean"].to_numpy(float), ((rows["high"] - rows["low"]) / 2).to_numpy(float)
            heights = np.arange(len(teachers)) + offset
            axes.errorbar(
                middle,
                heights,
                xerr=np.nan_to_num(half),
                fmt="o",
                markersize=4.5,
                elinewidth=1.4,
                color=colours[name],
                label=name,
            )
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.grid(axis="x")
        for boundary in range(1, len(teachers)):
            axes.axhline(boundary - 0.5, color=QUIET, linewidth=0.5)
        axes.set(title=NAMES[statistic], yticks=range(len(teachers)), ylim=(len(teachers) - 0.5, -0.5))
        axes.set_yticklabels([_short(teacher) for teacher in teachers])
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper right", ncols=len(names), handletextpad=0.3, columnspacing=1.4)
    return _svg(figure)


def _distribution(scores: pd.DataFrame) -> str:
    """Share of decision nodes per alignment bin, counted alike (left) and by success range (right)."""
    figure = Figure(figsize=(9, 2.9), layout=ConstrainedLayoutEngine(wspace=0.06))
    align, stakes = scores[f"align_{FORM}"].to_numpy(float), scores["success_range"].fillna(0).to_numpy(float)
    left, right = figure.subplots(1, 2, sharey=True)
    _histogram(left, align, np.ones(len(align)), "every decision node alike")
    _histogram(right, align, stakes, "weighted by success range")
    left.set_ylabel("share")
    return _svg(figure)


def _histogram(axes: Axes, align: np.ndarray, weights: np.ndarray, title: str) -> None:
    share, edges = np.histogram(align, bins=20, range=(-1, 1), weights=weights / (weights.sum() or 1))
    colours = [CORRECT if centre > 0 else INCORRECT for centre in (edges[1:] + edges[:-1]) / 2]
    axes.bar(edges[:-1], share, width=np.diff(edges) * 0.9, align="edge", color=colours)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.grid(axis="y")
    axes.set(
        title=title, xlabel="alignment (\u22121 harmful, +1 helpful)", xlim=(-1.02, 1.02), xticks=(-1, -0.5, 0, 0.5, 1)
    )


def _short(name: str) -> str:
    return name if len(name) <= 28 else name[:27] + "\u2026"


def _svg(figure: Figure) -> str:
    out = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing from"
        )  # names may hold any character; readers have other fonts
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return out.getvalue().replace("fill: #ffffff", "fill: none")
