"""Figure E.1: how is the alignment score distributed over all decision points?

    python experiments/unmasking/figureE1.py                               # toy scale
    python experiments/unmasking/figureE1.py --scale paper --data DATA     # accelerators

All teachers; mean over nodes with its cluster-bootstrap interval over questions, standard deviation over nodes, shares
of positive nodes and of nodes at +-1 (two tokens in S_u leave no other values). The paper: means .027 and .026 on
BoolQ, standard deviations of .83 to .91.
Expected: standard deviations of .88 to .95, .63 to .86 of the nodes at 1 or -1.
Deviations: none.
"""

import numpy as np
import pandas as pd
from drawing import distribution, panels
from study import Result, Setting, Study, main

from jaxopd.analysis import cluster_bootstrap, scored
from jaxopd.report.arranged import arranged

SHOWN = {
    **{name: name for name in ("setting", "estimator")},
    "mean over nodes": ("mean", "low", "high"),
    **{name: name for name in ("standard deviation", "positive", "at 1 or -1", "nodes")},
}


def make(study: Study) -> Result:
    """Tabulate and draw the distribution of every setting."""
    note = (
        "Half the width of the 95 % cluster bootstrap over questions stands after the mean; see the CSV for its ends."
    )
    table = study.over(summary)
    scores = {
        setting.name: {name: scored(setting.nodes(name)) for name in setting.estimators} for setting in study.settings
    }

    def draw(axes, name: str) -> None:
        kept = {key: scores[name][key]["align"].to_numpy(float) for key in ("pooled", "bellman") if key in scores[name]}
        distribution(axes, kept)

    figure = panels(list(scores), draw, height=2.6, share=True)
    return Result(
        [arranged("figureE1", "Figure E.1: alignment scores", note, table, SHOWN, labels=2)], {"figureE1": figure}
    )


def summary(setting: Setting, nodes: pd.DataFrame) -> pd.DataFrame:
    """One row: the distribution of one setting and estimator."""
    align = scored(nodes)["align"].astype(float)
    per_question = align.groupby(scored(nodes)["question"]).agg(["mean", "size"])
    low, high = cluster_bootstrap(per_question["mean"].to_numpy(float), per_question["size"].to_numpy(float))
    row = {"mean": align.mean(), "low": low, "high": high, "standard deviation": align.std(), "nodes": len(align)}
    row |= {"positive": (align > 0).mean(), "at 1 or -1": (np.abs(align) > 1 - 1e-4).mean()}
    return pd.DataFrame([row])


if __name__ == "__main__":
    main(make, __doc__)
