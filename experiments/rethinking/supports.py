"""Which tokens carry the signal: student, overlap, non-overlap, teacher and union top-k OPD (paper B, Fig. 7).

    python experiments/rethinking/supports.py            # experiments/rethinking/results/supports_paper*
    python experiments/rethinking/supports.py --thunlp   # the advantages of the authors' code instead of Eq. 5
    python experiments/rethinking/supports.py --smoke

The paper's claims: overlap matches student top-k, non-overlap is weaker.
"""

from results import write
from runs import Arm, compare, flags, setting

from jaxopd.train.supports import SUPPORTS

if __name__ == "__main__":
    parser = flags(__doc__)
    parser.add_argument("--thunlp", action="store_true", help="train on the advantages of the authors' code")
    parser.add_argument("--supports", nargs="+", choices=SUPPORTS, default=SUPPORTS, help="student is the reference")
    given = parser.parse_args()
    chosen, version = setting(given), "thunlp" if given.thunlp else "paper"
    arms = [Arm(support, objective={"objective": f"topk_{version}", "support": support}) for support in given.supports]
    write(f"supports_{version}", chosen, compare(chosen, arms), reference="student")
