"""How long responses may be: OPD under several length limits (paper B, Fig. 11a, 12, 13, 23).

    python experiments/rethinking/response_length.py            # 15 runs of 60 steps; experiments/rethinking/results/
    python experiments/rethinking/response_length.py --smoke    # a minute

The paper's claim: a middle length is best; long limits end in a late collapse that begins at the last tokens. Entropy
by position over training is in each run's metrics.jsonl under position/.
"""

from runs import Arm, compare, setting, write

LIMITS = (8, 16, 32, 56, 80)

if __name__ == "__main__":
    chosen = setting("response_length", __doc__)
    form = {"objective": "topk_thunlp"}
    arms = [Arm(f"limit_{limit}", {"max_tokens": limit}, form) for limit in LIMITS]
    write("response_length", chosen, arms, compare(chosen, arms))
