"""What depth does to the signal: entropy, overlap and the reward's AUROC by position (paper B, Fig. 13, 14, 23).

    python experiments/rethinking/positions.py            # experiments/rethinking/results/positions*
    python experiments/rethinking/positions.py --smoke

Read from the metrics of the full-vocabulary arm of granularity.py: its first, middle and last steps, all seeds. The
AUROC is that of the mean reward inside a window of positions, among the responses that reach it. The paper's claims:
the reward gets less reliable with depth; entropy rises at late positions first, in the student and then the teacher.
"""

import matplotlib
import numpy as np
import pandas as pd
from granularity import ARMS
from matplotlib.figure import Figure
from results import settings
from runs import Setting, flags, metrics, setting

from jaxopd.report.plots import STYLE

SHARE = 5  # the first, middle and last fifth of the steps
METRICS = ("auroc", "entropy_student", "entropy_teacher", "overlap", "reverse_kl", "reward")


def by_position(chosen: Setting) -> pd.DataFrame:
    """Averages each metric a stage and window over steps and seeds, with the AUROC of whole responses beside it."""
    arm = next(arm for arm in ARMS if arm.name == "full")
    rows = []
    for seed in range(chosen.seeds):
        logged = metrics(chosen.trained(chosen.config_of(arm, seed)))
        count = max(1, len(logged) // SHARE)
        middle = (len(logged) - count) // 2
        stages = {"first": slice(count), "middle": slice(middle, middle + count), "last": slice(-count, None)}
        for stage, steps in stages.items():
            for _, line in logged[steps].iterrows():
                starts = line["position/start"]
                for place, start in enumerate(starts):
                    values = {name: line[f"position/{name}"][place] for name in METRICS}
                    width = starts[1] - starts[0] if len(starts) > 1 else 0
                    values["auroc_whole"] = line["reward/auroc"]
                    rows.append({"stage": stage, "width": width, "start": start} | values)
    found = pd.DataFrame(rows).astype(dict.fromkeys((*METRICS, "auroc_whole"), float))
    # Windows are eighths of a step's longest response; the few steps whose eighths differ are left out.
    found = found[found["width"] == found["width"].mode()[0]].drop(columns="width")
    grouped = found.groupby(["stage", "start"], sort=False)
    return grouped.mean().assign(steps=grouped["reward"].count()).reset_index()


def figure(found: pd.DataFrame) -> Figure:
    """Draws each metric against position, a line a stage."""
    drawn = Figure(figsize=(10.2, 5.0), layout="constrained")
    for axes, name in zip(drawn.subplots(2, 3).flat, METRICS, strict=True):
        for stage, part in found.groupby("stage", sort=False):
            axes.plot(part["start"], part[name], marker="o", markersize=3, label=stage)
        if name == "auroc":
            axes.axhline(0.5, linewidth=0.8, linestyle=":", color="grey")
        axes.set(title=name, xlabel="position")
    drawn.axes[0].legend()
    return drawn


if __name__ == "__main__":
    chosen = setting(flags(__doc__).parse_args())
    found = by_position(chosen)
    print(found.to_string(index=False, float_format="{:.3f}".format))
    chosen.results.mkdir(parents=True, exist_ok=True)
    found.to_csv(chosen.results / "positions.csv", index=False, float_format="%.4f")
    settings("positions", chosen)
    with matplotlib.rc_context(STYLE):
        figure(found.replace([np.inf], np.nan)).savefig(chosen.results / "positions.png", dpi=80)
