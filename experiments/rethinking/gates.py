"""Paper A's proposals trained: does it help to hear the teacher at some tokens more than at others?

    python experiments/rethinking/gates.py            # experiments/rethinking/results/gates*
    python experiments/rethinking/gates.py --smoke

Closes the loop: a diagnosis of training questions (made unless --diagnosis names one), then full-vocabulary OPD with
plain weights, on incorrect responses alone, on the half of the tokens with the larger reverse KL, and weighted by the
alignment that was diagnosed (`jaxopd.train.gates.AlignmentTable`). Every arm samples and scores the same number of
responses to the same prompts; the column `distilled` is the share of tokens that its loss hears, a mean over them.
"""

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import pandas as pd
from results import write
from runs import Arm, Setting, compare, digest, flags, setting

from jaxopd import load_model, load_tokenizer, rollout
from jaxopd.diagnose import DiagnoseConfig, diagnose
from jaxopd.models import chat_tokens
from jaxopd.runs import RunFolder
from jaxopd.train.config import GateConfig
from jaxopd.train.gates import AlignmentTable


def diagnosed(chosen: Setting, questions: str, limit: int) -> str:
    """Diagnoses the student under its teacher, beside the training runs; gives the folder."""
    shared = {name: getattr(chosen.config, name) for name in ("student", "teacher", "task", "max_tokens", "dtype")}
    tiny = {"rollouts": 40, "exit_tokens": 2000} if chosen.smoke else {}
    config = DiagnoseConfig(**shared, questions=questions, limit=limit, **tiny)
    folder = chosen.folder / f"diagnosis-{digest(asdict(config))}"
    return diagnose(config, str(folder)).path


def alignment(diagnosis: str, teachers: Sequence[str]) -> dict[str, float]:
    """Sums the diagnosis up: decision nodes, and their alignment weighted by success range, also by outcome."""
    nodes = RunFolder.existing(diagnosis).read_table("records/nodes.parquet")
    known = nodes[(nodes["estimator"] == "bellman") & nodes["teacher"].isin(teachers)]
    decisions = known[known["align_reverse_kl"].notna()]
    parts = {"": decisions, "_correct": decisions[decisions["path_correct"]]}
    parts["_wrong"] = decisions.drop(parts["_correct"].index)
    found = {f"nodes{name}": float(len(part)) for name, part in parts.items()}
    for name, part in parts.items():
        found[f"alignment{name}"] = float(np.average(part["align_reverse_kl"], weights=part["success_range"]))
    return found


def on_diagnosed_paths(chosen: Setting, diagnosis: str, n: int = 16) -> float:
    """Gives the share of the tokens of new responses to the diagnosed questions that are drawn at a diagnosed node."""
    run, config = RunFolder.existing(diagnosis), chosen.config
    nodes = run.read_table("records/nodes.parquet").drop_duplicates(["question", "path", "t"])
    paths = nodes.sort_values("t").groupby(["question", "path"])["token"].apply(np.array)
    asked = run.read_table("records/questions.parquet").set_index("question")["prompt"]
    tokenizer, model = load_tokenizer(config.student), load_model(config.student, dtype=config.dtype)
    prompts = [chat_tokens(tokenizer, asked[question]) for question in paths.index.unique("question")]
    drawn = rollout(model, prompts, n, max_tokens=config.max_tokens, seed=1)
    at_node = 0
    for place, question in enumerate(paths.index.unique("question")):
        for tokens in drawn.tokens[place * n : (place + 1) * n]:
            at_node += max(_shared(tokens, path) for path in paths[question])
    return at_node / float(drawn.length.sum())


def _shared(tokens: np.ndarray, path: np.ndarray) -> int:
    """Counts the positions of a response whose prefix is the path's: those of the common prefix, and the next."""
    size = min(len(tokens), len(path))
    apart = np.flatnonzero(tokens[:size] != path[:size])
    return int(apart[0]) + 1 if len(apart) else size


def weights(table: AlignmentTable) -> pd.DataFrame:
    """Lays the weights out: a row an outcome and divergence bin, a column an entropy bin."""
    outcome, divergence, entropy = np.indices(table.weight.shape)
    rows = {"response": np.array(["wrong", "correct"])[outcome], "divergence_bin": divergence, "entropy_bin": entropy}
    flat = pd.DataFrame({name: values.ravel() for name, values in rows.items()} | {"weight": table.weight.ravel()})
    return flat.pivot(index=["response", "divergence_bin"], columns="entropy_bin", values="weight").reset_index()


if __name__ == "__main__":
    parser = flags(__doc__, seeds=5)
    parser.add_argument("--diagnosis", help="a finished one of the same models; by default one is made")
    parser.add_argument("--diagnosed", help="questions to diagnose, of those that are trained on")
    parser.add_argument("--limit", type=int, default=60, help="how many of them")
    given = parser.parse_args()
    chosen = setting(given)
    some = "all:2:7" if given.smoke else "all:20:7"  # of the three flavours, the first of the training questions
    questions = given.diagnosed or (some if given.scale == "toy" else chosen.config.questions)
    diagnosis = given.diagnosis or diagnosed(chosen, questions, given.limit)
    gates = {
        "plain": GateConfig(),
        "incorrect_only": GateConfig(incorrect_only=True),
        "divergence": GateConfig(divergence_quantile=0.5),
        "alignment": GateConfig(diagnosis=diagnosis),
    }
    arms = [Arm(name, {"gate": gate}, {"objective": "full"}) for name, gate in gates.items()]
    names = [value.partition("=")[0] for value in chosen.config.teacher]
    facts = alignment(diagnosis, names) | {"on_diagnosed_paths": on_diagnosed_paths(chosen, diagnosis)}
    print(facts)
    write("gates", chosen, compare(chosen, arms), reference="plain", **facts)
    found = weights(AlignmentTable.of_run(diagnosis, chosen.config.student, chosen.config.teacher))
    print(found.to_string(index=False, float_format="{:.2f}".format))
    found.to_csv(chosen.results / "gates_weights.csv", index=False, float_format="%.4f")
