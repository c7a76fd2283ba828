"""Reverse distillation: a student improved by outcome reward, distilled back toward what it was (paper B, Fig. 5).

    python experiments/rethinking/reverse.py            # 9 runs of 60 steps; experiments/rethinking/results/
    python experiments/rethinking/reverse.py --smoke    # a minute

First GRPO lifts the student. Then its own checkpoint from before, and a larger model of the same corpus, teach it.
The paper's claim: both bring it back to where it began, whatever the larger model's score.
"""

import pandas as pd
from runs import Arm, compare, setting, write

from jaxopd import toy

if __name__ == "__main__":
    chosen = setting("reverse", __doc__)
    lift = Arm("grpo", {"teacher": (), "rollouts": 8}, {"objective": "grpo"})
    lifted = compare(chosen, [lift])
    start = str(chosen.folder / "grpo" / "0" / "student")
    arms = [
        Arm("itself_before", {"teacher": (f"before={chosen.config.student}",)}, {"objective": "topk_thunlp"}, start),
        Arm("larger_peer", {"teacher": (f"M={toy.MODELS / 'M'}",)}, {"objective": "topk_thunlp"}, start),
    ]
    runs = pd.concat([lifted, compare(chosen, arms)], ignore_index=True)
    write("reverse", chosen, [lift, *arms], runs)
