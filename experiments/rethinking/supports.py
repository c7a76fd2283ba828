"""Which tokens carry the signal: student, overlap, non-overlap, teacher and union top-k OPD (paper B, Fig. 7).

    python experiments/rethinking/supports.py            # 15 runs of 60 steps; experiments/rethinking/results/
    python experiments/rethinking/supports.py --smoke    # a minute

The paper's claim: overlap matches student top-k, non-overlap is weaker. --thunlp trains on the advantages of the
authors' code instead of Eq. 5.
"""

import sys

from runs import Arm, compare, setting, write

from jaxopd.train.supports import SUPPORTS

if __name__ == "__main__":
    form = "topk_thunlp" if "--thunlp" in sys.argv else "topk_paper"
    sys.argv = [argument for argument in sys.argv if argument != "--thunlp"]
    name = f"supports_{form.removeprefix('topk_')}"
    chosen = setting(name, __doc__)
    arms = [Arm(support, objective={"objective": form, "support": support}) for support in SUPPORTS]
    write(name, chosen, arms, compare(chosen, arms))
