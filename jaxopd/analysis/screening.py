"""Tables 7 to 9: which demonstrations were to be had, and what each context does to the pass rate.

The screening table has one row per question and context: question, context, available, pass_rate, difficulty (of the
question's baseline), kept (does the question enter the analysis), excluded (why not, or "").
"""

import numpy as np
import pandas as pd

from jaxopd.alignment import paired_difference
from jaxopd.analysis.intervals import interval_of_mean
from jaxopd.analysis.teachers import judged

BASELINE = "Baseline"
BINS = ("hard", "medium", "easy")


def context_accuracy(screening: pd.DataFrame) -> pd.DataFrame:
    """Average the pass rate per context over the kept questions that have the context (Table 8).

    One row a context, in the table's order: accuracy with its t interval across questions (low, high), n questions,
    difference to the baseline on the SAME questions (difference_low, difference_high; NaN for the baseline),
    wilcoxon_p, holm_p over the contexts, cohens_dz, verdict.
    """
    kept = screening[screening["kept"] & screening["available"]]
    wide = kept.pivot(index="question", columns="context", values="pass_rate")
    rows = []
    for context in dict.fromkeys(screening["context"]):
        rates = wide[context] if context in wide else pd.Series(dtype=float)
        found = interval_of_mean(rates.to_numpy(float))
        row = {"context": context, "accuracy": found["mean"], "low": found["low"], "high": found["high"]}
        difference = np.full(1, np.nan)
        if context in wide and context != BASELINE:
            difference = (rates - wide[BASELINE]).to_numpy(float)
        test = paired_difference(difference)
        row |= {"difference": test["difference"], "difference_low": test["low"], "difference_high": test["high"]}
        row |= {"wilcoxon_p": test["wilcoxon_p"], "cohens_dz": test["cohens_dz"], "n": found["n"]}
        rows.append(row)
    table = judged(pd.DataFrame(rows), "difference")
    return table.assign(verdict=table["verdict"].where(table["context"] != BASELINE, ""))


def accuracy_by_difficulty(screening: pd.DataFrame) -> pd.DataFrame:
    """Average the pass rate per context and difficulty bin over the kept questions (Table 9).

    One row a context: accuracy_BIN and n_BIN for hard, medium, easy and all.
    """
    kept = screening[screening["kept"] & screening["available"]]
    rows = []
    for context in dict.fromkeys(screening["context"]):
        mine, row = kept[kept["context"] == context], {"context": context}
        for name in (*BINS, "all"):
            rates = mine.loc[mine["difficulty"] == name, "pass_rate"] if name != "all" else mine["pass_rate"]
            row |= {f"accuracy_{name}": float(rates.mean()) if len(rates) else np.nan, f"n_{name}": len(rates)}
        rows.append(row)
    return pd.DataFrame(rows)


def availability(screening: pd.DataFrame, demonstrations: pd.DataFrame) -> pd.DataFrame:
    """Count the questions with demonstrations (Table 7), then what keeps questions out.

    Rows (what, questions): screened; with a correct demonstration of each source, and of all sources; with each
    context available; each exclusion; kept.
    """
    per_question = screening[screening["context"] == BASELINE]
    rows = [("screened", len(per_question))]
    sources = list(dict.fromkeys(demonstrations["source"]))
    correct = demonstrations[demonstrations["correct"]]
    having = {source: set(correct.loc[correct["source"] == source, "question"]) for source in sources}
    rows += [(f"correct demonstration: {source}", len(questions)) for source, questions in having.items()]
    if len(having) > 1:
        rows.append(("correct demonstration: all sources", len(set.intersection(*having.values()))))
    counts = screening[screening["available"]].groupby("context", sort=False).size()
    for context in dict.fromkeys(screening["context"]):
        if context != BASELINE:
            rows.append((f"context available: {context}", int(counts.get(context, 0))))
    reasons = per_question.loc[per_question["excluded"] != "", "excluded"]
    rows += [(f"excluded: {reason}", int(n)) for reason, n in reasons.value_counts().sort_index().items()]
    rows.append(("kept", int(per_question["kept"].sum())))
    return pd.DataFrame(rows, columns=["what", "questions"])
