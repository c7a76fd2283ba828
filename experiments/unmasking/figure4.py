"""Figures 4 and 8 to 11: the teachers' ranking, one panel a setting.

    python experiments/unmasking/figure4.py                               # toy scale
    python experiments/unmasking/figure4.py --scale paper --data DATA     # accelerators

Mean cosine (figure4) and global cosine (figure4_global) of reverse KL with 95 % t intervals across questions, under the
paper's estimator, the default one and, at toy scale, the truth. Teachers in the order of the default estimator.
Expected: intervals that overlap; pooled global cosines lie below the exact ones.
Deviations: the paper draws one estimator and four settings in four figures.
"""

from drawing import dots, panels
from matplotlib.figure import Figure
from study import Result, Study, main

from jaxopd.analysis import rank_teachers


def make(study: Study) -> Result:
    """Draw the rankings by mean and by global cosine."""
    rankings = {
        setting.name: {name: rank_teachers(setting.nodes(name)) for name in setting.estimators}
        for setting in study.settings
    }
    return Result(figures={"figure4": figure(rankings, "mean"), "figure4_global": figure(rankings, "global")})


def figure(rankings: dict, statistic: str) -> Figure:
    """One panel a setting, one colour an estimator."""

    def draw(axes, name: str) -> None:
        series = {key: table[table["statistic"] == statistic] for key, table in rankings[name].items()}
        front = series.get("bellman", next(iter(series.values()), None))
        if front is not None:
            dots(axes, series, list(front.sort_values("mean", ascending=False)["teacher"]))
        axes.set_xlabel(f"{statistic} cosine")

    return panels(list(rankings), draw, height=3.2)


if __name__ == "__main__":
    main(make, __doc__)
