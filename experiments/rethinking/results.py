"""What is made of compared arms: means over seeds, differences to one arm with intervals, curves as a figure."""

import dataclasses
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from runs import CURVES, Compared, Setting

from jaxopd.alignment import paired_difference, t_interval
from jaxopd.analysis import holm
from jaxopd.report.plots import STYLE
from jaxopd.runs import environment

SHOWN = ("before", "early", "after", "teacher", "gap_recovery", "while_training", "gradient_peak")
ROOT = Path(__file__).resolve().parents[2]
SMOOTHED = 5  # steps, of the accuracy curve
SIGNIFICANT = 0.05


def means(runs: pd.DataFrame) -> pd.DataFrame:
    """Averages every column over seeds; beside the accuracy after training its standard error."""
    grouped = runs.drop(columns="seed").groupby("arm", sort=False)
    found = grouped.mean(numeric_only=True)
    found.insert(list(found.columns).index("after") + 1, "after_error", grouped["after"].sem())
    return found.reset_index()


def contrasts(correct: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Compares each arm's accuracy [run, question] with the reference's, in pairs of one seed and one question.

    Two things were drawn, seeds and questions, so there are two 95 % t intervals: over seeds (what training again
    would change) and over questions (what other questions would change). `verdict` is higher or lower where both lie
    on one side of 0 and Wilcoxon's signed-rank test over questions, Holm over arms, is below .05.
    """
    rows = []
    for arm in correct.index.unique(0).drop(reference):
        difference = correct.loc[arm] - correct.loc[reference]
        over_seeds = t_interval(difference.mean(axis=1).to_numpy())
        over_questions = paired_difference(difference.mean(axis=0).to_numpy())
        row = {"arm": arm, "reference": reference, "difference": over_seeds["mean"]}
        row |= {f"seeds_{end}": over_seeds[end] for end in ("low", "high")}
        row |= {f"questions_{end}": over_questions[end] for end in ("low", "high")}
        rows.append(row | {"wilcoxon_p": over_questions["wilcoxon_p"]})
    found = pd.DataFrame(rows)
    found["holm_p"] = holm(found["wilcoxon_p"].fillna(1.0).to_numpy())
    low = found[["seeds_low", "questions_low"]].min(axis=1, skipna=False)
    high = found[["seeds_high", "questions_high"]].max(axis=1, skipna=False)
    sure = found["holm_p"] < SIGNIFICANT
    found["verdict"] = np.select([sure & (low > 0), sure & (high < 0)], ["higher", "lower"], "not distinguishable")
    return found


def write(name: str, chosen: Setting, compared: Compared, reference: str, **facts: float) -> None:
    """Prints the tables and writes them: NAME.csv a row a run, NAME_contrasts.csv, curves, figure and settings."""
    chosen.results.mkdir(parents=True, exist_ok=True)
    written = {name: compared.runs, f"{name}_curves": _mean_curves(compared)}
    found = means(compared.runs)
    print(found[["arm", *found.columns.intersection((*SHOWN, "after_error"))]].to_string(index=False))
    parts = [contrasts(correct, reference).assign(when=when) for when, correct in compared.correct.items()]
    written[f"{name}_contrasts"] = pd.concat(parts)
    print(written[f"{name}_contrasts"].to_string(index=False))
    for key, table in written.items():
        table.to_csv(chosen.results / f"{key}.csv", index=False, float_format="%.4g")
    settings(name, chosen, **facts)
    with matplotlib.rc_context(STYLE):
        figure(compared).savefig(chosen.results / f"{name}.png", dpi=80)


def settings(name: str, chosen: Setting, **facts: float) -> None:
    """Writes how the results came about: command, versions, configurations, and facts that are no table."""
    about = {
        "command": " ".join(["python", f"experiments/rethinking/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "environment": environment(),
        "config": dataclasses.asdict(chosen.config),
        "evaluation": dataclasses.asdict(chosen.evaluation),
        "seeds": chosen.seeds,
        **facts,
    }
    text = json.dumps(about, indent=1).replace(f"{ROOT}/", "")
    (chosen.results / f"{name}.json").write_text(text + "\n")


def figure(compared: Compared) -> Figure:
    """Draws accuracy and the curves against steps, a line an arm: means over seeds, the range of accuracy shaded."""
    drawn = Figure(figsize=(3.4 * 3, 5.4), layout="constrained")
    for axes, metric in zip(drawn.subplots(2, 3).flat, ("rollout/accuracy", *CURVES), strict=True):
        for arm in compared.arms:
            if metric not in compared.curves:
                continue
            lines = compared.curves[compared.curves["arm"] == arm.name].pivot(
                index="step", columns="seed", values=metric
            )
            if metric == "rollout/accuracy":
                lines = lines.rolling(SMOOTHED, min_periods=1, center=True).mean()
                axes.fill_between(lines.index, lines.min(axis=1), lines.max(axis=1), alpha=0.15, linewidth=0)
            axes.plot(lines.index, lines.mean(axis=1), label=arm.name)
        axes.set(title=metric, xlabel="step")
    handles, labels = drawn.axes[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)))
    return drawn


def _mean_curves(compared: Compared) -> pd.DataFrame:
    curves = compared.curves.drop(columns="seed").groupby(["arm", "step"], sort=False)
    return curves.mean().reset_index()
