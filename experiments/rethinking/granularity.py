"""How many tokens a position: sampled-token, top-k for k of 1, 4 and 16, full vocabulary (paper B, Fig. 15, 16).

    python experiments/rethinking/granularity.py            # experiments/rethinking/results/granularity*
    python experiments/rethinking/granularity.py --smoke

The paper's claims: sampled-token is as good as top-k, k beyond 4 adds little, top-1 is worse and unstable. Top-k is
trained on the advantages of the authors' code: at k = 1 Eq. 5 has no gradient.
"""

from results import write
from runs import Arm, compare, flags, setting

ARMS = [
    Arm("sampled", objective={"objective": "sampled"}),
    *(Arm(f"top{k}", objective={"objective": "topk_thunlp", "k": k}) for k in (1, 4, 16)),
    Arm("full", objective={"objective": "full"}),
]

if __name__ == "__main__":
    chosen = setting(flags(__doc__).parse_args())
    write("granularity", chosen, compare(chosen, ARMS), reference="full")
