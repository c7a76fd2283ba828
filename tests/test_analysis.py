"""The statistics of jaxopd.analysis against scipy, against loops over questions, and against simulation."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from jaxopd.alignment import paired_difference
from jaxopd.analysis import (
    UNDECIDED,
    agreement,
    cluster_bootstrap,
    compare_runs,
    compare_teachers,
    holm,
    interval_of_mean,
    leaders,
    of_estimator,
    oscillation,
    outcomes,
    path_correlations,
    rank_changes,
    rank_teachers,
    side_by_side,
    verdict,
    within_path,
)
from jaxopd.errors import InputError

TEACHERS = {"good": 0.25, "twin": 0.25, "poor": -0.15}


def node_records(seed=0, questions=24, teachers=TEACHERS, gap=0.2, nodes=12, estimator="bellman"):
    """Clustered synthetic records: question and path effects; incorrect paths are `gap` better aligned."""
    rng = np.random.default_rng(seed)
    rows = []
    for question in range(questions):
        for teacher, level in teachers.items():
            effect = level + 0.1 * rng.standard_normal()
            for path in range(4):
                for t in range(nodes):
                    mean = effect + gap * (path >= 2) - gap / 2
                    rows.append({
                        "question": f"q{question:02d}", "path": path, "path_correct": path < 2, "t": t,
                        "teacher": teacher, "estimator": estimator, "depth": t / nodes,
                        "decision": rng.random() < 0.8, "success_range": rng.uniform(0, 1),
                        "ideal_norm": rng.uniform(0, 0.2), "advantage": 0.1 * (mean + 0.2 * rng.standard_normal()),
                        "align_reverse_kl": float(np.clip(mean + 0.5 * rng.standard_normal(), -1, 1)),
                        "reverse_kl": rng.exponential(), "js": rng.uniform(), "l2": rng.uniform(),
                        "cosine": rng.uniform(),
                    })  # fmt: skip
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def nodes() -> pd.DataFrame:
    return node_records()


def clustered_means(rng, replicates, questions, skewed) -> np.ndarray:
    """[replicates, questions] question means of nodes that share a question effect; their expectation is 1."""
    effect = (
        rng.exponential(size=(replicates, questions)) if skewed else 1 + rng.standard_normal((replicates, questions))
    )
    return effect + rng.standard_normal((replicates, questions, 15)).mean(-1)


@pytest.mark.parametrize(("questions", "skewed"), [(12, False), (40, False), (40, True)])
def test_both_intervals_cover_what_they_say(questions, skewed) -> None:
    means = clustered_means(np.random.default_rng(1), 1000, questions, skewed)
    found = [interval_of_mean(row) for row in means]
    for low, high in (("low", "high"), ("boot_low", "boot_high")):
        covered = np.mean([f[low] <= 1 <= f[high] for f in found])
        assert 0.92 <= covered <= 0.98, (low, covered)


def test_weighted_bootstrap_covers_the_mean_over_nodes() -> None:
    rng = np.random.default_rng(2)
    hits = []
    for _ in range(600):
        sizes = rng.integers(2, 30, 40)
        values = 0.02 * sizes + rng.standard_normal(40)  # large questions differ: the weighted mean is another number
        low, high = cluster_bootstrap(values, sizes, draws=800)
        hits.append(low <= 0.02 * (np.arange(2, 30) ** 2).sum() / np.arange(2, 30).sum() <= high)
    assert 0.92 <= np.mean(hits) <= 0.98


def test_bootstrap_agrees_with_scipy_on_many_questions() -> None:
    values = np.random.default_rng(3).exponential(size=400)  # the correction for few questions is small here
    found = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=4000, rng=np.random.default_rng(0))
    ours = cluster_bootstrap(values, draws=4000)
    np.testing.assert_allclose(ours, found.confidence_interval, atol=0.01)


def test_intervals_of_too_little() -> None:
    assert np.isnan(cluster_bootstrap(np.array([1.0]))).all()
    found = interval_of_mean(np.array([np.nan, 2.0]))
    assert found["mean"] == 2
    assert found["n"] == 1
    assert np.isnan(found["low"])
    assert np.isnan(found["boot_high"])
    assert cluster_bootstrap(np.array([1.0, np.nan, 1.0])) == (1.0, 1.0)


def test_p_values_are_uniform_when_nothing_differs() -> None:
    """1,000 permutations of a data set with a real difference: labels swapped at random within questions."""
    rng = np.random.default_rng(4)
    correct, incorrect = clustered_means(rng, 2, 40, skewed=True)
    signs = rng.choice([-1, 1], (1000, 40))
    p = [paired_difference(sign * (incorrect + 0.5 - correct))["wilcoxon_p"] for sign in signs]
    assert stats.kstest(p, "uniform").pvalue > 0.01
    shifted = paired_difference(incorrect + 2 - correct)["wilcoxon_p"]
    assert shifted < 1e-4


def test_family_wise_error_of_teacher_pairs_is_controlled() -> None:
    false_alarms = 0
    for seed in range(60):
        same = node_records(seed, questions=12, teachers=dict.fromkeys("abcd", 0.1), nodes=3)
        false_alarms += (compare_teachers(same)["verdict"] != UNDECIDED).any()
    assert stats.binomtest(int(false_alarms), 60, 0.05, alternative="greater").pvalue > 0.01


def test_holm_by_hand() -> None:
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm(np.array([0.5, np.nan, 0.9])), [1.0, np.nan, 1.0])
    assert len(holm(np.array([]))) == 0


def test_words_for_decisions() -> None:
    assert [verdict(0.1, 0.01), verdict(-0.1, 0.01), verdict(0.1, 0.2)] == ["higher", "lower", UNDECIDED]
    assert verdict(0.1, np.nan) == UNDECIDED
    assert [agreement(0.1, 0.3, 1), agreement(-0.3, -0.1, 1), agreement(-0.1, 0.3, 1)] == [
        "same",
        "opposite",
        UNDECIDED,
    ]
    assert agreement(-0.3, -0.1, -1) == "same"
    assert agreement(np.nan, np.nan, 1) == UNDECIDED


def test_ranking_is_the_mean_over_question_means(nodes) -> None:
    ranking = rank_teachers(nodes).set_index(["teacher", "statistic"])
    kept = nodes[nodes.decision]
    for teacher in TEACHERS:
        mine = kept[kept.teacher == teacher]
        expected = {
            "mean": mine.groupby("question").align_reverse_kl.mean(),
            "fraction_positive": (mine.align_reverse_kl > 0).groupby(mine.question).mean(),
            "sr_weighted": (mine.align_reverse_kl * mine.success_range).groupby(mine.question).sum()
            / mine.groupby("question").success_range.sum(),
            "advantage": mine.groupby("question").advantage.mean(),
        }
        for statistic, values in expected.items():
            row = ranking.loc[teacher, statistic]
            np.testing.assert_allclose(row["mean"], values.mean(), rtol=1e-6)
            interval = stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))
            np.testing.assert_allclose((row["low"], row["high"]), interval, rtol=1e-6)


def test_twins_are_not_distinguishable_and_the_poor_teacher_is(nodes) -> None:
    pairs = compare_teachers(nodes)
    found = {frozenset((row.first, row.second)): row.verdict for row in pairs.itertuples()}
    assert found == {
        frozenset(("good", "twin")): UNDECIDED,
        frozenset(("good", "poor")): "higher",
        frozenset(("twin", "poor")): "higher",
    }
    assert set(leaders(rank_teachers(nodes), pairs)) == {"good", "twin"}
    wide = nodes[nodes.decision].groupby(["question", "teacher"]).align_reverse_kl.mean().unstack()
    row = pairs[(pairs["first"] == "good") & (pairs["second"] == "poor")].iloc[0]
    np.testing.assert_allclose(row.wilcoxon_p, stats.wilcoxon(wide.good, wide.poor).pvalue)
    np.testing.assert_allclose(row.cohens_dz, (wide.good - wide.poor).mean() / (wide.good - wide.poor).std())


def test_outcomes_against_scipy(nodes) -> None:
    table = outcomes(nodes).set_index("statistic")
    sides = nodes[nodes.decision].groupby(["question", "path_correct"])[["align_reverse_kl", "advantage"]].mean()
    for statistic, column in (("mean", "align_reverse_kl"), ("advantage", "advantage")):
        wide = sides[column].unstack()
        np.testing.assert_allclose(table.loc[statistic, "difference"], (wide[False] - wide[True]).mean(), rtol=1e-5)
        np.testing.assert_allclose(
            table.loc[statistic, "wilcoxon_p"], stats.wilcoxon(wide[False], wide[True]).pvalue, rtol=1e-6
        )
    assert table.loc["mean", "verdict"] == "higher"
    each = outcomes(nodes, per_teacher=True)
    assert len(each) == len(TEACHERS) * 6
    np.testing.assert_allclose(each.holm_p, holm(each.wilcoxon_p.to_numpy()))


def test_within_path_correlations_are_spearmans(nodes) -> None:
    rho = path_correlations(nodes)
    kept = nodes[nodes.decision]
    for row in rho.sample(40, random_state=0).itertuples():
        here = kept[(kept.question == row.question) & (kept.path == row.path) & (kept.teacher == row.teacher)]
        expected = stats.spearmanr(here[row.feature], here.align_reverse_kl).statistic
        np.testing.assert_allclose(row.rho, expected, atol=1e-12)
    table = within_path(nodes, teacher="good").set_index("feature")
    mine = rho[(rho.teacher == "good") & (rho.feature == "js")].groupby("question").rho.mean()
    np.testing.assert_allclose(table.loc["js", "mean"], mine.mean())
    assert (table.verdict == UNDECIDED).all()  # features were drawn independently of alignment


def test_a_constant_feature_has_no_correlation_and_a_monotone_one_has_all(nodes) -> None:
    changed = nodes.assign(js=1.0, l2=np.exp(nodes.align_reverse_kl))
    table = within_path(changed).set_index("feature")
    assert np.isnan(table.loc["js", "mean"])
    np.testing.assert_allclose(table.loc["l2", "mean"], 1.0)
    assert table.loc["l2", "verdict"] == "higher"


def test_oscillation_by_hand() -> None:
    one = node_records(questions=1, teachers={"a": 0.0}, nodes=6).query("path == 0")
    signs = [0.5, -0.5, 0.5, 0.5, -0.5, 0.0]
    found = oscillation(one.assign(align_reverse_kl=signs, decision=True)).iloc[0]
    assert (found.n, found.positive) == (5, 3)
    assert found.changes == 3 / 4
    assert found.by_chance == 2 * 3 * 2 / (5 * 4)


def test_runs_are_paired_where_they_share_questions(nodes) -> None:
    again = nodes.assign(align_reverse_kl=np.clip(nodes.align_reverse_kl + 0.1 * (nodes.teacher == "poor"), -1, 1))
    other = nodes.assign(question="x" + nodes.question)
    paired = compare_runs({"a": nodes, "b": again}).set_index("teacher")
    assert paired.test.str.startswith("Wilcoxon").all()
    assert paired.loc["poor", "verdict"] == "higher"
    assert paired.loc["good", "difference"] == 0
    assert paired.loc["good", "verdict"] == UNDECIDED
    apart = compare_runs({"a": nodes, "c": other})
    assert apart.test.str.startswith("Welch").all()
    assert (apart.verdict == UNDECIDED).all()
    table = side_by_side({"a": nodes, "b": again})
    assert list(table.run) == ["a", "b"] * 3
    assert rank_changes(table).loc[0, "kendall_tau"] > 0


def test_missing_estimator_is_named(nodes) -> None:
    with pytest.raises(InputError, match="found bellman, expected rows of the estimator 'pooled'"):
        of_estimator(nodes, "pooled")


def test_no_decision_nodes_give_empty_answers(nodes) -> None:
    none = nodes.assign(decision=False)
    ranking = rank_teachers(none)
    assert ranking["mean"].isna().all()
    assert leaders(ranking, compare_teachers(none)) == []
    assert (outcomes(none)["n"] == 0).all()
    assert within_path(none)["mean"].isna().all()
