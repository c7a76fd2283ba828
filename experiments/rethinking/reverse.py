"""Reverse distillation: a student improved by outcome reward, distilled back toward what it was (paper B, Fig. 5).

    python experiments/rethinking/reverse.py            # experiments/rethinking/results/reverse*
    python experiments/rethinking/reverse.py --smoke

First GRPO lifts the student. Then its own checkpoint from before, and a larger model of the same corpus, teach it.
The paper's claim: both bring it back to where it began, whatever the larger model's score.
"""

from results import write
from runs import Arm, compare, flags, setting

from jaxopd import toy

if __name__ == "__main__":
    parser = flags(__doc__)
    parser.add_argument("--peer", default=str(toy.MODELS / "M"), help="the larger model of the same corpus")
    given = parser.parse_args()
    chosen = setting(given)
    lifted = Arm("grpo", {"teacher": (), "rollouts": 8}, {"objective": "grpo"})
    before, peer = (f"before={chosen.config.student}",), (f"peer={given.peer}",)
    form = {"objective": "topk_thunlp"}
    back = [
        Arm("itself_before", {"teacher": before}, form, lifted),
        Arm("larger_peer", {"teacher": peer}, form, lifted),
    ]
    write("reverse", chosen, compare(chosen, [lifted, *back]), reference="itself_before")
