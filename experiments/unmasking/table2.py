"""Table 2: how much signal would remain if the teacher were followed only where it is aligned?

    python experiments/unmasking/table2.py                               # toy scale
    python experiments/unmasking/table2.py --scale paper --data DATA     # accelerators; no truth there

Signal of a decision node = success range x cosine of reverse KL; means over nodes of a question, then over questions.
Expected: keeping cosines above 0 leaves .56 to .62 of the nodes and a pooled signal of .34 to .42, of which .26 to
.36 is there; noise makes .29 to .43 of the gain (bellman: .10 to .21).
Deviations: the paper selects and measures with the same noisy score. Beside it stands, where an oracle ran, the exact
signal of the same nodes on the same S_u, what selecting on noise adds, and what selecting on exact scores would keep.
That every path beats the unselected signal is so by construction for the noisy score, not for the exact one.
"""

import pandas as pd
from paper import SELECTIVE
from study import Result, Setting, Study, main

from jaxopd.analysis import rescore, selective
from jaxopd.report.arranged import arranged

SHOWN = {
    "setting": "setting",
    "estimator": "estimator",
    "kept nodes": "strategy",
    "signal": ("signal", "signal_low", "signal_high"),
    "share kept": "kept",
    "paths better": "paths_better",
    "exact signal of the same": ("exact_signal", "exact_signal_low", "exact_signal_high"),
    "added by selecting on noise": ("by_selection", "by_selection_low", "by_selection_high"),
    "share of the gain": "noise_share",
    "paths better, exactly": "exact_paths_better",
    "exact selection": ("best_signal", "best_signal_low", "best_signal_high"),
    "paper": "paper",
    "questions": "n",
}
EXACT = [name for cell in list(SHOWN.values())[6:11] for name in ([cell] if isinstance(cell, str) else cell)]


def make(study: Study) -> Result:
    """Measure full and selective signals of every setting."""
    note = (
        "Means over questions with 95 % t intervals, all teachers. The signal of kept nodes holds the estimator's "
        "bias and the luck of the selection; the exact signal of the same nodes holds neither. Share of the gain: of "
        "what selection seems to gain over all nodes, the part that noise added. Exact selection chooses by the "
        "oracle's own rollouts, so some luck of theirs is in it. Dashes: no oracle ran."
    )
    table = study.over(selected, but=["truth"])
    return Result([arranged("table2", "Table 2: selective distillation", note, table, SHOWN, labels=3)])


def selected(setting: Setting, nodes: pd.DataFrame) -> pd.DataFrame:
    """Signals of one setting and estimator at the paper's thresholds, with the exact ones where they are known."""
    exact = None
    tokens = setting.records.tokens
    if "p_succ_truth" in tokens.columns and len(nodes):
        exact = rescore(tokens, estimator=nodes["estimator"].iloc[0], n_sig=setting.n_sig, success="truth")
    found = selective(nodes, exact if exact is not None and len(exact) else None)
    if "by_selection" in found:
        gain = found["signal"] - found["signal"].iloc[0]
        found["noise_share"] = (found["by_selection"] / gain).where(gain > 0)
    printed = SELECTIVE.get(setting.paper, {})
    values = [printed.get(None if threshold < 0 else threshold) for threshold in found["threshold"]]
    found = found.assign(
        strategy=["all" if threshold < 0 else f"cosine > {threshold:g}" for threshold in found["threshold"]],
        paper=["{:.3f} \u00b1 {:.3f}".format(*value[:2]) if value else "" for value in values],
    )
    return found.reindex(columns=[*found.columns, *(name for name in EXACT if name not in found.columns)])


if __name__ == "__main__":
    main(make, __doc__)
