"""jaxopd lab: a form, estimator or aggregate of one's own beside the known ones, against exact truth."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import tyro
from rich.console import Console

from jaxopd.diagnose import DiagnoseConfig
from jaxopd.errors import InputError
from jaxopd.gradients import FORMS, SAMPLED
from jaxopd.lab.contest import FIXED, Contest, Entry
from jaxopd.lab.own import load_own
from jaxopd.lab.problems import random_problem, recorded_problems, run_config
from jaxopd.lab.summary import aggregate_table, form_table, saving_table, success_table
from jaxopd.tree import ESTIMATORS
from jaxopd.verbs.console import as_table, bars, made_folder

RANDOM = DiagnoseConfig(student="random", teacher=("random",), task="toy", questions="random")  # its budgets alone
NOTES = {  # how to read a table
    "success": "The largest budgets. Tokens are spent on a question; bias, its mean size and rmse are of P_succ, over "
    "tokens and replicates; coverage is of 95 % intervals; known is the share of tokens with any estimate.",
    "aggregates": "The largest budgets. Root mean squares over questions and teachers. At a million: what a million "
    "tokens a question would leave, bias and all. Difference: of two teachers. Ranking: how often two that truly "
    "differ are put in order.",
    "forms": "Nothing is sampled here. Cosines to the ideal gradient P (P_succ - its mean) and to full reverse KL's; "
    "the last column says how often a form names the same best teacher as reverse KL does.",
    "savings": "Theirs is the paper's allocation with this estimator. Of: whose error is equal, a teacher's cosine or "
    "a difference of two. nan: not reached. At least: our smallest budget errs less already, so the saving is larger.",
}


@dataclasses.dataclass(frozen=True)
class Lab:
    """Measures estimators, gradient forms and allocations of tokens where every success probability is exact."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Finished runs of `jaxopd diagnose` or `truth`, whose questions become decision processes; random ones where
    absent."""
    form: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """FILE.py:NAME of a gradient form, Position -> f [K]; stands beside reverse KL and, in one table, all exact ones.
    The code in FILE.py runs as you."""
    estimator: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """FILE.py:NAME of an estimator of P_succ, (tree, counts, p [N, K]) -> SuccessEstimate; stands beside the known
    ones."""
    aggregate: str = "global"
    """Summary of alignment: global, mean, sr_weighted, filtered, fraction_positive, or FILE.py:NAME of (cosine [N],
    ideal_norm [N], success_range [N], decision_mask [N]) -> number."""
    problems: int = 12
    """Random processes drawn, where no run is given."""
    replicates: int = 20
    """Replicates of every allocation, a question; at least 2."""
    n_min: tuple[int, ...] = (100, 25)
    """The paper's allocation: visits to which targets are raised."""
    tokens: tuple[int, ...] = (1000, 4000, 16000)
    """Exits, exits with low-discrepancy rollouts, and uniform: tokens spent on a question after its initial
    rollouts."""
    target_se: float | None = None
    """Exits: stop at this standard error; by default the tokens are spent."""
    seed: int = 0
    """Seed of every draw."""
    out: str | None = None
    """Folder for the whole tables and every error, as CSV. What is printed is of the largest budgets and of the tokens
    above tau of the student or a teacher; the files have all, and the paper's own set: tokens with N_sig pooled
    visits."""

    def run(self, console: Console) -> None:
        base = run_config(self.runs[0]) if self.runs else RANDOM
        if self.out is not None:
            made_folder(self.out)
        if other := [run for run in self.runs if run_config(run).tau != base.tau]:
            raise InputError(f"{other[0]}: found another tau than {self.runs[0]}'s, expected runs of one tau")
        own_forms = _added(FORMS, self.form)
        forms = {name: FORMS[name] for name in FORMS if name not in (*SAMPLED, "ideal")} | own_forms
        contest = Contest(
            self._entries(base),
            {**ESTIMATORS, **_added(ESTIMATORS, self.estimator)},
            own_forms,
            load_own(self.aggregate)[1] if ":" in self.aggregate else self.aggregate,
            self.replicates,
            self.seed,
        )
        with bars(console) as report:
            problems = [problem for run in self.runs for problem in recorded_problems(run, report)]
            if not self.runs:
                draws = [np.random.default_rng([self.seed, n]) for n in range(self.problems)]
                problems = [random_problem(f"random-{n}", rng) for n, rng in enumerate(draws)]
            errors = contest.run(problems, report)
        tables = {
            "success": (f"Success of the tokens compared, {len(problems)} questions", success_table(errors)),
            "aggregates": (f"Alignment, {self.aggregate}: errors a question and teacher", aggregate_table(errors)),
            "forms": ("What each form's exact gradient points at", form_table(problems, forms, base.tau)),
            "savings": ("Tokens at equal error, against the paper's allocation", saving_table(errors)),
        }
        for name, (title, table) in tables.items():
            if len(table):
                console.print(as_table(title, self._printed(table)), NOTES[name], sep="\n", markup=False)
            if self.out is not None:
                table.to_csv(Path(self.out) / f"{name}.csv", index=False)
        if self.out is not None:
            errors.success.to_csv(Path(self.out) / "errors_success.csv", index=False)
            errors.aggregates.to_csv(Path(self.out) / "errors_aggregates.csv", index=False)

    def _printed(self, table: pd.DataFrame) -> pd.DataFrame:
        """What fits a terminal: the fixed set, the largest budgets, of savings the main rows, and whole tokens."""
        for column in ("set", "their set"):
            if column in table:
                table = table[table[column] == FIXED].drop(columns=column)
        if "budget" in table:
            largest = f"N_min {max(self.n_min)}", f"{max(self.tokens)} tokens"
            table = table[table["budget"].isin(largest)]
            table = table.assign(allocation=table["allocation"] + ", " + table["budget"]).drop(columns="budget")
        if "form" in table and (table["form"] == "reverse_kl").all():
            table = table.drop(columns="form")
        if "saving" in table:
            table = table[table["estimator"].isin(("pooled", "bellman")) & (table["allocation"] != "uniform")]
        whole = {name: table[name].map("{:,.0f}".format) for name in table if name.endswith("tokens")}
        return table.assign(**whole)

    def _entries(self, base: DiagnoseConfig):
        """The paper's allocation at each N_min, the others at each number of tokens; other budgets are the run's."""
        entries = [Entry("paper", f"N_min {n}", dataclasses.replace(base, n_min=n)) for n in self.n_min]
        se = 1e-9 if self.target_se is None else self.target_se  # never reached: all tokens are spent
        for allocation in ("exits", "low discrepancy", "uniform"):
            for tokens in self.tokens:
                config = dataclasses.replace(base, exit_tokens=tokens, target_se=se)
                entries.append(Entry(allocation, f"{tokens} tokens", config))
        return entries


def _added(known: Mapping[str, Callable], places: tuple[str, ...]) -> dict[str, Callable]:
    """Loads a user's functions; raises InputError where two, or one and a known one, have the same name."""
    added: dict[str, Callable] = {}
    for place in places:
        name, own = load_own(place)
        if name in known or name in added:
            raise InputError(
                f"{place}: found a name that is taken, expected another than {', '.join([*known, *added])}"
            )
        added[name] = own
    return added
