"""Does the update point where success grows? The probe of jaxopd.train.geometry against finite differences.

    python experiments/rethinking/geometry.py            # experiments/rethinking/results/geometry*
    python experiments/rethinking/geometry.py --smoke

Paper B leaves the geometry of the update open (section 6.2). Two tables. `probes`: what probes of several sizes, most
with several draws, say of full-vocabulary OPD's alignment with the gradient of the success probability, on questions
spread over the training file and on a file of twelve. `slopes`: how
the accuracy really changes along a direction, (J(x + e d) - J(x - e d)) / 2e from fresh responses with common random
numbers, beside what the probe's gradient predicts, <grad J, d>. Directions come from one half of the largest probe and
the predictions from the other: descent of the OPD loss, the first step of Adam on it (signs), ascent of J itself.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from flax import nnx
from results import settings
from runs import Setting, digest, flags, setting

from jaxopd.alignment import t_interval
from jaxopd.train.evaluate import evaluate
from jaxopd.train.geometry import Probe, inner, probe
from jaxopd.train.loop import Trainer

LENGTHS = (0.03, 0.1, 0.3)  # of a step, in parameter space; the first one of Adam at 1e-3 is .3 long on the toy student


def trainer_on(chosen: Setting, questions: str) -> Trainer:
    """Makes the trainer of full-vocabulary OPD on some questions, at its first step."""
    objective = replace(chosen.config.objective, objective="full")
    config = replace(chosen.config, objective=objective, questions=questions)
    return Trainer(config, chosen.folder / f"geometry-{digest(dataclasses.asdict(config))}")


def probes(trainer: Trainer, sizes: Sequence[tuple[int, int, int]]) -> tuple[pd.DataFrame, Probe]:
    """Measures the alignment with probes of (questions, rollouts, draws): means, ranges, and the last probe itself."""
    rows = []
    for questions, rollouts, draws in sizes:
        trainer.config = replace(trainer.config, probe_questions=questions, probe_rollouts=rollouts)
        found = [probe(trainer, seed)[0] for seed in range(draws)]
        measured = pd.DataFrame([each.metrics() for each in found])
        row = {"file": trainer.config.questions, "questions": questions, "rollouts": rollouts, "draws": draws}
        for name in ("cosine", "alignment"):
            values = measured[f"geometry/{name}"]
            row |= {name: values.mean(), f"{name}_low": values.min(), f"{name}_high": values.max()}
        rows.append(row | {"reliability": measured["geometry/reliability"].mean()})
        print(rows[-1], flush=True)
    return pd.DataFrame(rows), found[-1]


def slopes(chosen: Setting, trainer: Trainer, found: Probe) -> pd.DataFrame:
    """Compares predicted and measured slopes of the accuracy on the probe questions."""
    n = trainer.config.probe_rollouts // 2
    (update, _), (ideal, success) = found.update, found.ideal
    directions = {
        "OPD gradient": update,
        "Adam's first step": jax.tree.map(jnp.sign, update),
        "success gradient": ideal,
    }
    rows = []
    for name, gradient in directions.items():
        size = float(optax.tree.norm(gradient))
        # Of -J, so that the two signs of descent cancel; a baseline that holds its own reward loses 1 / n.
        predicted = inner(success, gradient) / size * n / (n - 1)
        for length in LENGTHS[-1:] if chosen.smoke else LENGTHS:
            moved = [accuracy(chosen, trainer, gradient, sign * length / size) for sign in (-1, 1)]
            interval = t_interval(((moved[0] - moved[1]) / (2 * length)).to_numpy())
            row = {"direction": name, "length": length, "predicted": predicted, "measured": interval["mean"]}
            rows.append(row | {end: interval[end] for end in ("low", "high")})
            print(rows[-1], flush=True)
    return pd.DataFrame(rows)


def accuracy(chosen: Setting, trainer: Trainer, gradient: nnx.State, step: float) -> pd.Series:
    """Gives the share of right responses to each probe question, `step` gradients away from the student."""
    moved = jax.tree.map(lambda x, g: x + step * g, trainer.params, gradient)
    setup, config = trainer.setup, trainer.config
    at = np.linspace(0, len(setup.questions) - 1, config.probe_questions).astype(int)
    sampled = replace(chosen.evaluation, samples=config.probe_rollouts)
    found = evaluate(nnx.merge(setup.graph, moved), setup.tokenizer, sampled, [setup.questions[i] for i in at])
    return found["correct"] / found["samples"]


if __name__ == "__main__":
    parser = flags(__doc__)
    parser.add_argument("--few", help="a file of few questions, to see how much they matter; toy: all:4:7")
    given = parser.parse_args()
    chosen = setting(given)
    small, large = ((3, 4, 2), (6, 8, 1)) if chosen.smoke else ((12, 16, 5), (60, 64, 1))
    middle = [] if chosen.smoke else [(60, 16, 3)]
    few = given.few or ("all:4:7" if given.scale == "toy" else chosen.config.questions)
    on_few, _ = probes(trainer_on(chosen, few), [small])
    trainer = trainer_on(chosen, chosen.config.questions)
    many, largest = probes(trainer, [small, *middle, large])
    tables = {"geometry_probes": pd.concat([on_few, many]), "geometry_slopes": slopes(chosen, trainer, largest)}
    chosen.results.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        print(table.to_string(index=False, float_format="{:.4f}".format))
        table.to_csv(chosen.results / f"{name}.csv", index=False, float_format="%.5f")
    settings("geometry", chosen)
