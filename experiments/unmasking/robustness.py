"""Does the ranking of teachers survive other choices of the instrument?

    python experiments/unmasking/robustness.py                               # toy scale
    python experiments/unmasking/robustness.py --scale paper --data DATA     # accelerators

One factor at a time from a baseline (bellman, N_sig of the run, renormalized S_u, reverse KL, mean cosine): estimator
of P_succ, N_sig, reading of S_u, filter on |g_ideal|, gradient form, statistic. Kendall's tau of each ranking with the
baseline's, and whether the best teacher stays. The paper says that rankings are largely robust, with one reversal.
Expected, median tau: N_sig 40 .89, exact success .57, pooled .68, restricted S_u .79, MiniLLM .32, global cosine .75.
Deviations: the paper varies the metric and, on AIME, the filter; the other factors are new.
"""

import pandas as pd
from study import Result, Study, main

from jaxopd.analysis import Baseline, rank_agreement, robustness
from jaxopd.report.arranged import arranged

MEANS = {
    **{name: name for name in ("run", "factor", "setting", "teacher")},
    "mean": ("mean", "low", "high"),
    "questions": "n",
    "nodes": "nodes",
}
AGREEMENT = {
    **{name: name for name in ("run", "factor", "setting")},
    "Kendall tau": "kendall_tau",
    "p": "kendall_p",
    "best teacher": "best",
    "same as baseline": "same_best",
}


def make(study: Study) -> Result:
    """Move every factor in every setting."""
    measured, agreed = [], []
    for setting in study.settings:
        if "bellman" in setting.estimators:
            records = setting.records
            table = robustness(records.nodes, records.tokens, Baseline(n_sig=setting.n_sig))
            measured.append(table.assign(run=setting.name))
            agreed.append(rank_agreement(table).assign(run=setting.name))
    empty = pd.DataFrame()
    means, ranks = (pd.concat([empty, *parts], ignore_index=True) for parts in (measured, agreed))
    note = "Means over questions with 95 % t intervals; settings under which no node is left are missing."
    return Result(
        [
            arranged(
                "robustness", "Robustness: agreement with the baseline", "Kendall's tau_b.", ranks, AGREEMENT, labels=3
            ),
            arranged("robustness_means", "Robustness: means per teacher", note, means, MEANS, labels=4),
        ]
    )


if __name__ == "__main__":
    main(make, __doc__)
