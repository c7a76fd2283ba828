"""Who can teach? One student, several teachers: gains, overlap, reward (paper B, Fig. 2, 4, 6, 14, 18 to 20).

    python experiments/rethinking/teachers.py            # experiments/rethinking/results/teachers*
    python experiments/rethinking/teachers.py --smoke

The paper's claims: a higher score is no better teacher; where OPD succeeds overlap rises and the entropy gap narrows,
where it fails they stand still; the AUROC of the sequence-mean reward is as high for a teacher that fails. M is the
student's larger peer (the same corpus, fewer wrong facts), T1 to T3 and X know more, X is the largest summariser.
"""

from pathlib import Path

import pandas as pd
from results import write
from runs import Arm, compare, flags, metrics, setting

from jaxopd import toy

FIRST = 5  # steps, at which the student is still nearly what it was
REWARD = ("reward/auroc", "reward/sequence_mean_correct", "reward/sequence_mean_wrong")
OVERLAP = ("overlap/ratio", "overlap/mass_student_paper", "entropy/gap_paper", "train/gradient_norm")

if __name__ == "__main__":
    parser = flags(__doc__)
    parser.add_argument(
        "--teachers", nargs="+", default=[str(toy.MODELS / name) for name in ("M", "T1", "T2", "T3", "X")]
    )
    given = parser.parse_args()
    chosen = setting(given)
    form = {"objective": "topk_thunlp"}
    arms = [Arm(Path(path).name, {"teacher": (f"{Path(path).name}={path}",)}, form) for path in given.teachers]
    compared = compare(chosen, arms)
    write("teachers", chosen, compared, reference=arms[0].name)
    rows = []
    for arm in arms:
        first = pd.concat(
            [metrics(chosen.trained(chosen.config_of(arm, seed)))[:FIRST] for seed in range(chosen.seeds)]
        )
        rows.append({"teacher": arm.name} | {name: first[name].mean() for name in (*REWARD, *OVERLAP)})
    signal = pd.DataFrame(rows)
    print(signal.to_string(index=False))
    signal.to_csv(chosen.results / "teachers_signal.csv", index=False, float_format="%.4f")
