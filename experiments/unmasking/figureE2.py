"""Figure E.2: does the score change sign from token to token along a path?

    python experiments/unmasking/figureE2.py                               # toy scale
    python experiments/unmasking/figureE2.py --scale paper --data DATA     # accelerators

The best teacher's alignment along one incorrect path a setting, and for all paths the share of neighbouring decision
nodes whose signs differ beside the share that a random order of the same signs would give.
Expected, with exact success: signs change at .47 to .50 of the neighbours, by chance at .47 to .49; more in 0, fewer
in 0 of 6 settings.
Deviations: the paper shows an example; the comparison with chance is new.
"""

import pandas as pd
from drawing import along_path, panels
from study import Result, Setting, Study, main

from jaxopd.alignment import paired_difference
from jaxopd.analysis import oscillation, rank_teachers, scored
from jaxopd.analysis.teachers import judged
from jaxopd.report.arranged import arranged

LONGEST = 60  # tokens drawn
SHOWN = {
    **{name: name for name in ("setting", "estimator", "changes", "by_chance")},
    "difference": ("difference", "low", "high"),
    "Wilcoxon p": "wilcoxon_p",
    "changes are": "verdict",
    "questions": "n",
}


def make(study: Study) -> Result:
    """Count the changes of sign, and draw one path a setting."""
    note = "Means over questions, all teachers; difference: changes minus chance, with its 95 % t interval."
    table = study.over(counted)
    paths = {setting.name: example(setting) for setting in study.settings}
    paths = {name: path for name, path in paths.items() if path is not None}

    def draw(axes, name: str) -> None:
        along_path(axes, *paths[name])

    figures = {"figureE2": panels(list(paths), draw, height=2.6, share=True)} if paths else {}
    return Result([arranged("figureE2", "Figure E.2: changes of sign", note, table, SHOWN, labels=2)], figures)


def counted(setting: Setting, nodes: pd.DataFrame) -> pd.DataFrame:
    """One row: observed changes of sign against chance."""
    means = oscillation(nodes).groupby("question")[["changes", "by_chance"]].mean()
    row = {"changes": means["changes"].mean(), "by_chance": means["by_chance"].mean()}
    test = paired_difference((means["changes"] - means["by_chance"]).to_numpy(float))
    return judged(pd.DataFrame([row | test]), "difference")


def example(setting: Setting) -> tuple[list[str], object] | None:
    """Tokens and scores of the incorrect path with the most decision nodes, under the best teacher."""
    nodes = setting.nodes("bellman")
    ranking = rank_teachers(nodes)
    means = ranking[ranking["statistic"] == "mean"].set_index("teacher")["mean"]
    if means.isna().all():
        return None
    mine = nodes[nodes["teacher"] == means.idxmax()]
    wrong = scored(mine[~mine["path_correct"].astype(bool)])
    if wrong.empty:
        return None
    question, path = wrong.groupby(["question", "path"]).size().idxmax()
    rows = mine[(mine["question"] == question) & (mine["path"] == path)].sort_values("t").head(LONGEST)
    return list(rows["text"]), rows["align_reverse_kl"].to_numpy(float)


if __name__ == "__main__":
    main(make, __doc__)
