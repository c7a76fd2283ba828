"""Paper A's proposals trained: plain OPD against incorrect-only, divergence-gated and alignment-weighted OPD.

    python experiments/rethinking/gates.py --diagnosis runs/demo    # 20 runs of 60 steps; needs a finished diagnosis
    python experiments/rethinking/gates.py --smoke                  # a minute, without the diagnosis's arm

Every arm sees the same number of batches from the same prompts; losses are means over the tokens that count. The
divergence gate keeps the half of the tokens with the larger reverse KL.
"""

import sys

from runs import Arm, compare, setting, write

from jaxopd.train.config import GateConfig


def flag(name: str) -> str:
    """Takes a flag of this script alone out of the arguments."""
    if name not in sys.argv:
        return ""
    at = sys.argv.index(name)
    value = sys.argv[at + 1]
    del sys.argv[at : at + 2]
    return value


if __name__ == "__main__":
    diagnosis = flag("--diagnosis")
    chosen = setting("gates", __doc__)
    gates = {
        "plain": GateConfig(),
        "incorrect_only": GateConfig(incorrect_only=True),
        "divergence": GateConfig(divergence_quantile=0.5),
        "prefix": GateConfig(prefix_strength=0.5),
    }
    if diagnosis:
        gates["alignment"] = GateConfig(diagnosis=diagnosis)
    arms = [Arm(name, {"gate": gate}, {"objective": "full"}) for name, gate in gates.items()]
    write("gates", chosen, arms, compare(chosen, arms))
