"""How many tokens a position: sampled-token, top-k for k of 1, 4, 16 and 64, full vocabulary (paper B, Fig. 15, 16).

    python experiments/rethinking/granularity.py            # 21 runs of 60 steps; experiments/rethinking/results/
    python experiments/rethinking/granularity.py --smoke    # a minute

The paper's claims: sampled-token is as good as top-k, k beyond 4 adds little, top-1 is unstable. Top-k is trained on
the authors' advantages (at k = 1 Eq. 5 has no gradient: the arm top1_paper shows that it stands still).
"""

from runs import Arm, compare, setting, write

if __name__ == "__main__":
    chosen = setting("granularity", __doc__)
    arms = [
        Arm("sampled", objective={"objective": "sampled"}),
        *(Arm(f"top{k}", objective={"objective": "topk_thunlp", "k": k}) for k in (1, 4, 16, 64)),
        Arm("full", objective={"objective": "full"}),
        Arm("top1_paper", objective={"objective": "topk_paper", "k": 1}),
    ]
    write("granularity", chosen, arms, compare(chosen, arms))
