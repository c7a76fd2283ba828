"""Figures 5 to 7 and appendix A: question by question, the longest traces, N_sig 40.

    python experiments/unmasking/figure7.py                               # toy scale: two chain questions a student
    python experiments/unmasking/figure7.py --scale paper --data DATA     # accelerators: AIME 2025

Per case: the teachers' mean cosine over decision nodes with at least 40 visits a child, with a 95 % interval over
PATHS (a case study has one question, so nothing is said about others); correct against incorrect, at all decision nodes
and at those whose success range is in the question's upper half. Cases: the questions with the longest paths of the
hardest benchmark at hand. Truncated paths and repetition are counted.
Expected: with four paths a question the intervals are wide; no path is truncated.
Deviations: toy chains have 17 to 57 tokens, not 5,000 to 30,000.
"""

import pandas as pd
from drawing import dots, panels
from study import Result, Setting, Study, main

from jaxopd.alignment import t_interval
from jaxopd.analysis import rescore
from jaxopd.report.arranged import arranged

N_SIG = 40
CASES = 2  # a setting
HARD = ("chain", "AIME")
NODE = ["question", "path", "t"]
SHOWN = {
    **{name: name for name in ("setting", "question", "pass rate", "teacher")},
    "mean cosine": ("mean", "low", "high"),
    **{name: name for name in ("correct", "incorrect", "correct, high stakes", "incorrect, high stakes", "nodes")},
}
TRACES = {name: name for name in ("setting", "question", "paths", "longest", "truncated", "repeated")}


def make(study: Study) -> Result:
    """Pick the cases, tabulate and draw them."""
    hard = [s for s in study.settings if s.name.endswith(HARD)] or list(study.settings)
    cases = {}
    for setting in hard:
        for question in longest(setting):
            cases[f"{setting.name}: {question}"] = case(setting, question)
    table = pd.concat([pd.DataFrame(), *cases.values()], ignore_index=True)
    note = f"Estimator bellman, S_u of tokens with {N_SIG} visits. High stakes: success range in the upper half."
    tables = [arranged("figure7", "Figure 7: case studies", note, table, SHOWN, labels=2)]
    note = "Repeated: the largest share of a path's 8-token windows that occur more than once in it."
    counted = pd.concat([pd.DataFrame(), *(traces(setting) for setting in hard)], ignore_index=True)
    tables.append(arranged("figure7_traces", "Appendix A: traces", note, counted, TRACES, labels=2))

    def draw(axes, name: str) -> None:
        rows = cases[name].sort_values("mean", ascending=False)
        dots(axes, {"bellman": rows}, list(rows["teacher"]))
        axes.set_xlabel("mean cosine")

    return Result(tables, {"figure7": panels(list(cases), draw, height=2.8)} if cases else {})


def longest(setting: Setting) -> list[str]:
    """The questions with the longest paths."""
    lengths = setting.records.paths.groupby("question")["length"].max() if len(setting.records.paths) else pd.Series()
    return list(lengths.sort_values(ascending=False, kind="stable").index[:CASES])


def case(setting: Setting, question: str) -> pd.DataFrame:
    """One row a teacher of one question."""
    records = setting.records
    tokens = records.tokens[records.tokens["question"] == question]
    scores = rescore(tokens, estimator="bellman", n_sig=N_SIG if setting.n_sig else 0)
    paths = records.paths[records.paths["question"] == question].set_index("path")["correct"]
    scores = scores[scores["decision"]].dropna(subset=["align_reverse_kl"]) if len(scores) else scores
    rows = []
    for teacher, mine in scores.groupby("teacher") if len(scores) else ():
        correct, stakes = mine["path"].map(paths).astype(bool), mine["success_range"]
        high, align = stakes > stakes.median(), mine["align_reverse_kl"].astype(float)
        found = t_interval(align.groupby(mine["path"]).mean().to_numpy(float))
        row = {"setting": setting.name, "question": question, "teacher": teacher, "nodes": len(mine)}
        row |= {"mean": found["mean"], "low": found["low"], "high": found["high"]}
        row |= {"correct": align[correct].mean(), "incorrect": align[~correct].mean()}
        row |= {
            "correct, high stakes": align[correct & high].mean(),
            "incorrect, high stakes": align[~correct & high].mean(),
        }
        rows.append(row)
    passed = records.questions.set_index("question").loc[question, "pass_rate"]
    columns = ["setting", "question", "teacher", "nodes", "mean", "low", "high"]
    return pd.DataFrame(rows, columns=None if rows else columns).assign(**{"pass rate": float(passed)})


def traces(setting: Setting) -> pd.DataFrame:
    """One row a question: how long its paths are, how many were cut off, how much they repeat."""
    nodes = setting.records.nodes
    words = nodes.drop_duplicates(NODE).groupby(["question", "path"])["token"].apply(list)
    rows = []
    for question, paths in setting.records.paths.groupby("question"):
        repeated = max(repetition(words.get((question, path), [])) for path in paths["path"])
        row = {
            "setting": setting.name,
            "question": question,
            "paths": len(paths),
            "longest": int(paths["length"].max()),
        }
        rows.append(row | {"truncated": int((paths["finish"] == "length").sum()), "repeated": repeated})
    return pd.DataFrame(rows)


def repetition(tokens: list[int], width: int = 8) -> float:
    """Share of a sequence's windows of `width` tokens that occur more than once in it."""
    windows = [tuple(tokens[start : start + width]) for start in range(len(tokens) - width + 1)]
    return float(pd.Series(windows).duplicated(keep=False).mean()) if windows else 0.0


if __name__ == "__main__":
    main(make, __doc__)
