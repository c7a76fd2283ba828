"""Figure 3: how is alignment distributed on correct and on incorrect paths?

    python experiments/unmasking/figure3.py                               # toy scale
    python experiments/unmasking/figure3.py --scale paper --data DATA     # accelerators

One panel a setting: share of decision nodes per bin of the cosine, all teachers, the default estimator; dashed: means.
Beside it Figure 3's table: mean and SR-weighted cosine, correct against incorrect.
Expected: two columns at -1 and 1 that hold most nodes, and outcomes that hardly differ.
Deviations: the paper's estimator is pooled; its panel is one estimator away (figure3_pooled).
"""

from drawing import distribution, panels
from matplotlib.figure import Figure
from study import Result, Study, main
from table4 import SHOWN, compared

from jaxopd.analysis import scored
from jaxopd.report.arranged import arranged


def make(study: Study) -> Result:
    """Draw both estimators, and tabulate the two metrics."""
    table = study.over(compared)
    if len(table):
        table = table[table["statistic"].isin(["mean", "sr_weighted"])]
    note = "Means over questions with paths of both outcomes; Wilcoxon's signed-rank test over questions."
    figures = {"figure3": figure(study, "bellman"), "figure3_pooled": figure(study, "pooled")}
    return Result([arranged("figure3", "Figure 3: outcomes", note, table, SHOWN, labels=3)], figures)


def figure(study: Study, estimator: str) -> Figure:
    """One panel a setting."""
    nodes = {setting.name: scored(setting.nodes(estimator)) for setting in study.settings}

    def draw(axes, name: str) -> None:
        correct = nodes[name]["path_correct"].astype(bool)
        scores = {"correct": nodes[name].loc[correct, "align"], "incorrect": nodes[name].loc[~correct, "align"]}
        distribution(axes, {side: values.to_numpy(float) for side, values in scores.items()})

    return panels(list(nodes), draw, height=2.6, share=True)


if __name__ == "__main__":
    main(make, __doc__)
