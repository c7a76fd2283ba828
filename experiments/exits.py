"""How many tokens does the exits allocation need for the error of the paper's?

    jaxopd truth --seed 1 --out runs/truth-1
    PYTHONPATH=.:kernels python experiments/exits.py runs/truth-1 [--replicates 20] [--smoke]

Every question of the runs becomes a finite decision process, on which both allocations are replayed with fresh draws:
paper A's (200 initial rollouts, N_min 100; 20 + 20 targets a path, window and teacher, and 5 + 5, as the paper prints
no number) and exits at growing budgets, with independent and with low-discrepancy rollouts. Tokens are all that is
generated after a launch, initial rollouts included. Writes errors and savings to results/exits.csv and
results/exits_savings.csv; no absolute time is measured.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import pandas as pd

from jaxopd.lab.contest import Contest, Entry, Errors
from jaxopd.lab.problems import recorded_problems
from jaxopd.lab.summary import aggregate_table, saving_table
from jaxopd.tree import ESTIMATORS
from jaxopd.verbs.lab import RANDOM

RESULTS = Path(__file__).parent / "results"
TOKENS = (1000, 2000, 4000, 8000, 16000, 32000, 64000)


def entries(tokens: tuple[int, ...]) -> tuple[list[Entry], list[Entry]]:
    """The paper's allocation with two budgets of targets; exits, with independent and with low-discrepancy rollouts."""
    spent = replace(RANDOM, target_se=1e-9)  # never reached: all tokens are spent
    few = replace(RANDOM, by_gradient=5, by_difference=5)
    paper = [Entry("paper", "20 + 20", RANDOM), Entry("paper", "5 + 5", few)]
    exits = [Entry("exits", f"{n} tokens", replace(spent, exit_tokens=n)) for n in tokens]
    return paper, [*exits, *(replace(entry, allocation="low discrepancy") for entry in exits)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="finished runs of `jaxopd diagnose` or `jaxopd truth`")
    parser.add_argument("--replicates", type=int, default=20)
    parser.add_argument("--smoke", action="store_true", help="two budgets, one question, two replicates")
    parser.add_argument("--folder", type=Path, default=RESULTS)
    options = parser.parse_args()
    problems = [problem for run in options.runs for problem in recorded_problems(run)]
    tokens, replicates = (TOKENS, options.replicates) if not options.smoke else (TOKENS[:2], 2)
    problems = problems[:1] if options.smoke else problems
    paper, exits = entries(tokens)
    known = {name: ESTIMATORS[name] for name in ("pooled", "bellman")}
    parts = [  # of exits only what `diagnose` records as cosines is compared, which needs no further estimator
        Contest(chosen, estimators, {}, replicates=replicates).run(problems, lambda *stage: print(*stage, flush=True))
        for chosen, estimators in ((paper, known), (exits, {}))
    ]
    errors = Errors(*(pd.concat([getattr(part, name) for part in parts]) for name in ("success", "aggregates")))
    table = aggregate_table(errors)
    savings = saving_table(errors)
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, frame in (("exits", table), ("exits_savings", savings)):
        print(frame.round(4).to_string(index=False))
        frame.round(5).to_csv(options.folder / f"{name}.csv", index=False)


if __name__ == "__main__":
    main()
