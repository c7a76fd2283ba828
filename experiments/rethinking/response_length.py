"""How long responses may be: OPD under several length limits (paper B, Fig. 11a, 12, 13, 23).

    python experiments/rethinking/response_length.py            # experiments/rethinking/results/response_length*
    python experiments/rethinking/response_length.py --smoke

Training responses are cut at the limit, evaluation responses never. The paper's claims: a middle length is best; long
limits end in a late collapse. Entropy by position over training is drawn by positions.py.
"""

from results import write
from runs import Arm, compare, flags, setting

if __name__ == "__main__":
    parser = flags(__doc__)
    parser.add_argument("--limits", type=int, nargs="+", default=[8, 16, 32, 48, 80], help="tokens, the longest last")
    given = parser.parse_args()
    chosen = setting(given)
    form = {"objective": "topk_thunlp"}
    arms = [Arm(f"limit_{limit}", {"max_tokens": limit}, form) for limit in given.limits]
    write("response_length", chosen, compare(chosen, arms), reference=arms[-1].name)
