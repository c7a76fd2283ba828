"""The estimator lab against what is known without it: exact processes, an oracle, twins, curves of known slope."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from jaxopd import cli
from jaxopd.errors import InputError
from jaxopd.gradients import FORMS
from jaxopd.lab.allocations import ALLOCATIONS
from jaxopd.lab.contest import CLEANED, FIXED, Contest, Entry, Errors
from jaxopd.lab.own import load_own
from jaxopd.lab.problems import random_problem
from jaxopd.lab.summary import aggregate_table, form_table, saving_table, success_table
from jaxopd.tree import ESTIMATORS, EXIT, SuccessEstimate, count
from jaxopd.tree.allocation import SpreadNumbers, global_cosines
from jaxopd.verbs.lab import RANDOM

BUDGETS = dataclasses.replace(RANDOM, rollouts=60, n_min=20, exit_tokens=800, target_se=1e-9)
ENTRIES = [Entry(name, "budget", BUDGETS) for name in ALLOCATIONS]


@pytest.fixture(scope="module")
def problem():
    return random_problem("r", np.random.default_rng(3))


def test_values_are_those_of_every_sequence(problem) -> None:
    """Against enumeration: V(prefix) = sum over its sequences of probability and success."""
    process, tree = problem.process, problem.tree
    sequences, depth = process.sequences, process.sequences.shape[1]
    mass = np.ones(len(sequences))
    at = np.zeros(len(sequences), np.int64)
    for t in range(depth):
        at = process.first_child[at] + sequences[:, t]
        mass *= process.p[at]
    np.testing.assert_allclose(mass.sum(), 1, atol=1e-12)
    for n in range(len(tree.owner)):
        t, prefix = tree.depth[n], tree.tokens[tree.owner[n], : tree.depth[n]]
        for k, token in enumerate(tree.candidates[n]):
            below = (sequences[:, : t + 1] == [*prefix, token]).all(1)
            expected = (mass * process.success)[below].sum() / mass[below].sum()
            np.testing.assert_allclose(problem.success[n, k], expected, atol=1e-12)
    np.testing.assert_allclose(problem.q.sum(-1), 1, atol=1e-12)


def test_watching_pools_what_no_model_likes(problem) -> None:
    tau = 0.15
    seen = problem.watching(tau)
    own = seen.tree.child != EXIT  # the paths' own tokens stay candidates
    liked = (seen.p > tau) | (seen.q > tau).any(0)
    assert ((seen.tree.candidates < 0) | own | liked).all()
    pooled = np.array([problem.process.p[others].sum() for others in seen.others])
    assert pooled.max() > 0.01
    np.testing.assert_allclose(seen.p.sum(1) + pooled, 1, atol=1e-12)
    np.testing.assert_allclose(seen.exits(tau).rest, pooled, atol=1e-12)
    match = seen.tree.candidates[:, :, None] == problem.tree.candidates[:, None, :]
    expected = np.where(match, problem.success[:, None], 0).sum(-1)
    np.testing.assert_allclose(np.nan_to_num(seen.success), np.where(seen.tree.candidates >= 0, expected, 0))


@pytest.mark.parametrize("tau", [0.02, 0.15])
@pytest.mark.parametrize("name", ALLOCATIONS)
def test_rollouts_begin_where_they_say(problem, name, tau) -> None:
    """Each launch follows a path up to its last given token; exits leave the paths with it."""
    seen = problem.watching(tau)
    rolled = ALLOCATIONS[name](seen, dataclasses.replace(BUDGETS, tau=tau), np.random.default_rng(0))
    common = seen.walks[rolled.rows].common.max(1)
    targeted = rolled.launch > 0
    assert targeted.any()
    assert (common[targeted] >= rolled.launch[targeted] - 1).all()
    if name != "paper":
        np.testing.assert_array_equal(common[targeted], rolled.launch[targeted] - 1)
        spent = (seen.lengths[rolled.rows] - rolled.launch)[targeted].sum()
        assert 0.7 * BUDGETS.exit_tokens < spent < 1.3 * BUDGETS.exit_tokens
    by_hand = count(seen.tree, seen.walks[rolled.rows], seen.process.success[rolled.rows], rolled.launch)
    np.testing.assert_array_equal(rolled.counts.pooled, by_hand.pooled)


def test_spread_numbers_are_even_and_each_is_uniform(problem) -> None:
    """Every 8 consecutive numbers of an exit fall about evenly; over exits and shifts they are uniform."""
    tree, rng = problem.tree, np.random.default_rng(0)
    number = np.zeros((len(tree.owner), tree.candidates.shape[1] + 1), np.int64)
    number[2, 1], number[5, 0], number[3, -1] = 8, 3, 8
    first = []
    for _ in range(400):
        sequences = SpreadNumbers(tree, rng)
        drawn, more = sequences.next(number), sequences.next(number)
        of_first = np.concatenate([drawn[:8], more[:8]])  # of the exit at node 2; then node 5's, then the rest
        gaps = np.diff(np.sort(of_first), append=1 + of_first.min())
        assert gaps.max() < 2.7 / 16  # 16 independent numbers leave gaps of 4 to 5 times 1/16
        first.append(drawn[0])
    assert stats.kstest(first, "uniform").pvalue > 1e-3


def test_walks_by_spread_numbers_are_exact_and_less_noisy(problem) -> None:
    process, rng = problem.process, np.random.default_rng(0)
    start = np.zeros(100_000, np.int64)
    rows = process.sample(start, rng, rng.random(len(start)))
    mass = np.ones(len(process.sequences))
    at = np.zeros(len(mass), np.int64)
    for t in range(process.sequences.shape[1]):
        at = process.first_child[at] + process.sequences[:, t]
        mass *= process.p[at]
    often = mass > 1e-3
    seen = np.bincount(rows, minlength=len(mass))
    observed, expected = np.append(seen[often], seen[~often].sum()), np.append(mass[often], mass[~often].sum())
    assert stats.chisquare(observed, expected * len(start)).pvalue > 1e-3
    even = [(rng.random() + np.arange(32) * 0.6180339887498949) % 1 for _ in range(1500)]
    means = {
        "even": [process.success[process.sample(start[:32], rng, u)].mean() for u in even],
        "independent": [process.success[process.sample(start[:32], rng)].mean() for _ in even],
    }
    assert abs(np.mean(means["even"]) - process.value[0]) < 4 * np.std(means["even"]) / np.sqrt(1500)
    assert np.var(means["even"]) < 0.85 * np.var(means["independent"])


def test_a_decided_comparison_ends_the_spend(problem) -> None:
    """The teacher that knows nothing against the one that knows most: fewer tokens, the right one found."""
    asked = dataclasses.replace(BUDGETS, exit_tokens=20_000)
    tokens = {}
    for decide in (None, ("teacher-0", "teacher-2"), ("teacher-2", "teacher-2")):
        rolled = ALLOCATIONS["exits"](problem, dataclasses.replace(asked, decide=decide), np.random.default_rng(1))
        tokens[decide] = rolled.tokens
        cosine, _ = global_cosines(problem.exits(asked.tau), rolled.counts)
        assert cosine[2] > cosine[0]
    whole, decided, never = tokens.values()
    assert decided < 0.6 * whole
    assert never == whole  # a teacher and itself never differ


@pytest.mark.parametrize(("target", "most"), [(0.5, 700), (0.1, 2500), (0.05, 7000), (1e-9, 13_500)])
def test_a_looser_target_costs_less(problem, target, most) -> None:
    asked = dataclasses.replace(BUDGETS, exit_tokens=12_000, target_se=target)
    rolled = ALLOCATIONS["exits"](problem, asked, np.random.default_rng(1))
    assert rolled.tokens < most
    se = np.sqrt(np.diag(global_cosines(problem.exits(asked.tau), rolled.counts)[1]).max())
    assert se < target or rolled.tokens > 11_000


def test_an_oracle_errs_nowhere_and_twins_agree(problem) -> None:
    """A user's estimator that knows the truth, a copy of reverse KL, and its negative."""

    def knows(tree, counts, p):
        sure = np.zeros(p.shape)
        return SuccessEstimate(problem.success, sure, problem.success, problem.success, counts.pooled[:, :-1])

    forms = {
        "reverse_kl": FORMS["reverse_kl"],
        "twin": lambda at: FORMS["reverse_kl"](at) + 3.0,  # a constant changes no P (f - fbar)
        "opposite": lambda at: -FORMS["reverse_kl"](at),
    }
    estimators = {"knows": knows, "bellman": ESTIMATORS["bellman"]}
    errors = Contest(ENTRIES, estimators, forms, replicates=3).run([problem])
    success = success_table(errors).set_index("estimator")
    assert success.loc["knows", "rmse"].max() < 1e-12 < success.loc["bellman", "rmse"].min()
    assert (success.loc["knows", "coverage"] == 1).all()
    table = aggregate_table(errors)
    sure = table[table["estimator"] == "knows"]
    assert sure["rmse"].max() < 1e-5
    assert (sure["ranking"].dropna() == 1).all()
    of_form = {form: group["rmse"].to_numpy() for form, group in table[table["estimator"] == "bellman"].groupby("form")}
    np.testing.assert_allclose(of_form["twin"], of_form["reverse_kl"], atol=1e-5)
    np.testing.assert_allclose(of_form["opposite"], of_form["reverse_kl"], atol=1e-5)
    exact = form_table([problem], {**forms, "ideal": FORMS["ideal"]}, 0.02).set_index("form")
    assert exact.loc["twin", "cosine to reverse_kl"] == pytest.approx(1, abs=1e-5)
    assert exact.loc["opposite", "cosine to reverse_kl"] == pytest.approx(-1, abs=1e-5)
    assert exact.loc["ideal", "mean cosine"] == pytest.approx(1, abs=1e-5)
    assert exact.loc["opposite", "global cosine"] == pytest.approx(-exact.loc["reverse_kl", "global cosine"], abs=1e-5)


def test_an_aggregate_of_ones_own(problem) -> None:
    forms = {"reverse_kl": FORMS["reverse_kl"]}

    def share(cosine, ideal_norm, success_range, decision_mask):
        return (cosine[decision_mask] > 0).mean()

    tables = [
        Contest(ENTRIES[:1], ESTIMATORS, forms, aggregate, replicates=3).run([problem]).aggregates
        for aggregate in (share, "fraction_positive")
    ]
    pd.testing.assert_frame_equal(*tables, atol=1e-6)


def test_bias_and_spread_of_known_errors() -> None:
    """Normal errors of known mean and deviation: the noise of a mean of 20 is no bias."""
    rng, rows = np.random.default_rng(0), []
    for bias, budget in ((0.0, "unbiased"), (0.05, "biased")):
        for question in range(40):
            for error in bias + 0.03 * rng.normal(size=20):
                rows.append((budget, str(question), 0.3 + error, 4000))
    table = pd.DataFrame(rows, columns=["budget", "question", "value", "tokens"])
    table = table.assign(
        allocation="exits", estimator=CLEANED, form="f", set=FIXED, truth=0.3, teacher="t", difference=False
    )
    table["half"] = 1.96 * 0.03
    found = aggregate_table(Errors(pd.DataFrame(), table)).set_index("budget")
    assert found.loc["unbiased", "bias"] < 0.003  # the root mean square of means of 20 is .0067
    assert found.loc["unbiased", "at a million"] == pytest.approx(0.03 * np.sqrt(4000 / 1e6), rel=0.9)
    assert found.loc["biased", "bias"] == pytest.approx(0.05, rel=0.05)
    assert found["sd"].to_numpy() == pytest.approx(0.03, rel=0.05)
    assert found.loc["unbiased", "coverage"] == pytest.approx(0.95, abs=0.025)
    assert np.isnan(found["difference rmse"]).all()  # one teacher


def test_saving_of_known_curves() -> None:
    """Errors of exactly c / sqrt(tokens): at equal error the saving is the ratio of the c squared."""
    rows = []
    for allocation, estimator, c, budgets in (("paper", "pooled", 6.0, [40_000]), ("exits", CLEANED, 1.5, [500, 8000])):
        for tokens in budgets:
            for question in "ab":
                for sign in (-1, 1):
                    for difference in (False, True):
                        error = sign * c / np.sqrt(tokens)
                        rows.append(
                            (allocation, f"{tokens}", estimator, question, 0.3 + error, 0.3, tokens, difference)
                        )
    names = ["allocation", "budget", "estimator", "question", "value", "truth", "tokens", "difference"]
    table = pd.DataFrame(rows, columns=names).assign(form="reverse_kl", set=FIXED, teacher="t", half=np.nan)
    saved = saving_table(Errors(pd.DataFrame(), table))
    np.testing.assert_allclose(saved["saving"], 16, rtol=1e-9)
    np.testing.assert_allclose(saved["median question"], 16, rtol=1e-9)
    np.testing.assert_allclose(saved["our tokens"], 2500, rtol=1e-9)
    assert not saved["at least"].any()
    near = saving_table(Errors(pd.DataFrame(), table[(table["allocation"] == "paper") | (table["tokens"] == 8000)]))
    np.testing.assert_allclose(near["saving"], 5)
    assert near["at least"].all()
    far = saving_table(Errors(pd.DataFrame(), table[(table["allocation"] == "paper") | (table["tokens"] == 500)]))
    assert far[["saving", "median question"]].isna().all(axis=None)


def test_the_verb_takes_a_form_of_ones_own(tmp_path, capsys) -> None:
    (tmp_path / "own.py").write_text(
        "import jax.numpy as jnp\ndef squared(at): return jnp.exp(at.log_q) - jnp.exp(at.log_p)\n"
    )
    arguments = ["--form", f"{tmp_path / 'own.py'}:squared", "--problems", "2", "--replicates", "2"]
    assert cli.main(["lab", *arguments, "--tokens", "500", "--n-min", "10", "--out", str(tmp_path / "out")]) == 0
    assert "squared" in capsys.readouterr().out
    forms = pd.read_csv(tmp_path / "out" / "forms.csv").set_index("form")
    assert 0 < forms.loc["squared", "cosine to reverse_kl"] < 1
    assert set(pd.read_csv(tmp_path / "out" / "aggregates.csv")["form"]) == {"reverse_kl", "squared"}


def test_the_verb_takes_an_estimator_and_an_aggregate_of_ones_own(tmp_path, capsys) -> None:
    (tmp_path / "own.py").write_text(
        "from jaxopd.tree import ESTIMATORS\n"
        "def twin(tree, counts, p): return ESTIMATORS['bellman'](tree, counts, p)\n"
        "def share(cosine, ideal_norm, success_range, decision_mask): return (cosine[decision_mask] > 0).mean()\n"
        "bellman = twin\n"
    )
    own = str(tmp_path / "own.py")
    small = ["--problems", "2", "--replicates", "2", "--tokens", "300", "--n-min", "10"]
    out = ["--out", str(tmp_path / "out")]
    assert cli.main(["lab", "--estimator", f"{own}:twin", "--aggregate", f"{own}:share", *small, *out]) == 0
    success = pd.read_csv(tmp_path / "out" / "success.csv").set_index(["allocation", "estimator"])["rmse"]
    np.testing.assert_allclose(success.xs("twin", level=1), success.xs("bellman", level=1))
    assert cli.main(["lab", "--estimator", f"{own}:bellman", *small]) == 2
    assert "found a name that is taken" in capsys.readouterr().err


def test_functions_of_ones_own_that_break_their_contract(problem) -> None:
    known = {"bellman": ESTIMATORS["bellman"]}
    for forms in ({"flat": lambda at: at.log_p.sum()}, {"two": lambda at, more: at.log_p}):
        with pytest.raises(InputError, match=r"form \w+: found"):
            Contest(ENTRIES[:1], known, forms, replicates=2)
    with pytest.raises(InputError, match="estimator none: found a NoneType"):
        Contest(ENTRIES[:1], {"none": lambda *given: None}, {}, replicates=2).run([problem])
    with pytest.raises(InputError, match="aggregate: found 'much'"):
        Contest(ENTRIES[:1], known, {}, lambda *given: "much", replicates=2).run([problem])
    with pytest.raises(InputError, match="twice"):
        Contest(ENTRIES[:1], known, {}, replicates=2).run([problem, problem])


@pytest.mark.parametrize(
    ("code", "place", "said"),
    [
        ("", "own.py", "no FILE.py:NAME"),
        (None, "gone.py:f", "no such file"),
        ("x = 1", "own.py:f", "no function f"),
        ("f = 1 / 0", "own.py:f", "ZeroDivisionError"),
    ],
)
def test_own_code_that_cannot_be_used(tmp_path, monkeypatch, code, place, said) -> None:
    monkeypatch.chdir(tmp_path)
    if code is not None:
        (tmp_path / "own.py").write_text(code)
    with pytest.raises(InputError, match=said):
        load_own(place)
