"""Rescoring from tokens, selection on noisy scores, and robustness: against numpy and against known truths."""

import numpy as np
import pandas as pd
import pytest

from jaxopd.analysis import Baseline, contrast, rank_agreement, rescore, robustness, selective
from jaxopd.errors import InputError

NOISE = 0.15  # standard error of the noisy estimator's P_succ
KEYS = ["question", "path", "t"]


def token_records(seed=0, questions=8, nodes=10, teachers=("a", "b"), noise=NOISE) -> pd.DataFrame:
    """Three candidates a node, of which the third has few visits; `noisy` is truth plus noise."""
    rng = np.random.default_rng(seed)
    rows = []
    for question in range(questions):
        for path in range(2):
            for t in range(nodes):
                p, success = rng.dirichlet([2, 2, 1]), rng.uniform(0.2, 0.8, 3)
                q = {f"q_{name}": rng.dirichlet([2, 2, 1]) for name in teachers}
                noisy = np.clip(success + noise * rng.standard_normal(3), 0.01, 0.99)
                for k in range(3):
                    rows.append({
                        "question": f"q{question}", "path": path, "t": t, "token": k, "p": p[k],
                        "visits": (100, 60, 15)[k], "visits_on_policy": (30, 10, 5)[k], "p_succ_truth": success[k],
                        "p_succ_noisy": noisy[k], "p_succ_on_policy": noisy[k],
                        **{column: values[k] for column, values in q.items()},
                    })  # fmt: skip
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def tokens() -> pd.DataFrame:
    return token_records()


def by_hand(here: pd.DataFrame, teacher: str, success: str) -> dict[str, float]:
    """Eq. 2.1, 2.3, 2.8 and 2.12 in float64."""
    p, q, s = (here[c].to_numpy(float) for c in ("p", f"q_{teacher}", f"p_succ_{success}"))
    p, q = p / p.sum(), q / q.sum()
    ideal, ratio = p * (s - p @ s), np.log(q / p)
    signal = p * (ratio - p @ ratio)
    cosine = ideal @ signal / np.linalg.norm(ideal) / np.linalg.norm(signal)
    return {"align_reverse_kl": cosine, "advantage": (q - p) @ s, "success_range": np.ptp(s)}


@pytest.mark.parametrize(("n_sig", "size"), [(10, 3), (20, 2), (61, 1)])
def test_rescoring_follows_the_formulas_on_its_support(tokens, n_sig, size) -> None:
    found = rescore(tokens, estimator="noisy", n_sig=n_sig)
    if size < 2:
        assert found.empty
        return
    assert len(found) == 8 * 2 * 10 * 2
    for row in found.sample(20, random_state=1).itertuples():
        here = tokens[(tokens[KEYS] == [row.question, row.path, row.t]).all(axis=1)].iloc[:size]
        for name, value in by_hand(here, row.teacher, "noisy").items():
            np.testing.assert_allclose(getattr(row, name), value, atol=2e-4)


def test_exact_success_on_the_estimates_support(tokens) -> None:
    found = rescore(tokens, estimator="noisy", n_sig=20, success="truth", teachers=["b"])
    row = found.iloc[7]
    here = tokens[(tokens[KEYS] == list(row[KEYS])).all(axis=1)].iloc[:2]
    np.testing.assert_allclose(row.align_reverse_kl, by_hand(here, "b", "truth")["align_reverse_kl"], atol=2e-4)
    assert set(found.teacher) == {"b"}


def test_on_policy_support_uses_its_own_visits(tokens) -> None:
    assert rescore(tokens, estimator="on_policy", n_sig=20).empty
    assert len(rescore(tokens, estimator="on_policy", n_sig=10)) == 320


def test_unknown_columns_are_named(tokens) -> None:
    with pytest.raises(InputError, match="p_succ_bellman"):
        rescore(tokens, estimator="bellman", n_sig=20)


def test_selection_on_noise_inflates_the_signal_and_exact_selection_does_not() -> None:
    tokens = token_records(seed=5, questions=30, noise=0.4)
    noisy = rescore(tokens, estimator="noisy", n_sig=20)
    truth = rescore(tokens, estimator="noisy", n_sig=20, success="truth")
    table = selective(noisy, truth).set_index("threshold")
    kept = noisy[noisy.decision].merge(truth, on=[*KEYS, "teacher"], suffixes=("", "_true"))
    chosen = kept[kept.align_reverse_kl > 0.3]
    aim = (chosen.success_range_true * chosen.align_reverse_kl_true).groupby(chosen.question).mean().mean()
    np.testing.assert_allclose(table.loc[0.3, "exact_signal"], aim, rtol=1e-6)
    np.testing.assert_allclose(table.loc[0.3, "kept"], len(chosen) / len(kept))
    # The teachers are independent of success, so nothing is there to keep: yet selection finds a signal.
    assert table.loc[0.0, "signal_low"] > 0
    assert table.loc[0.0, "by_selection_low"] > 0
    np.testing.assert_allclose(table.loc[-np.inf, "by_selection"], 0, atol=1e-12)
    assert table.loc[0.0, "best_signal"] > table.loc[0.0, "exact_signal"]
    assert table.loc[0.0, "paths_better"] == 1.0  # by construction: nodes under the threshold pull the mean down
    assert table.loc[0.0, "exact_paths_better"] < 1.0
    perfect = selective(truth.assign(estimator="noisy"), truth).set_index("threshold")
    np.testing.assert_allclose(perfect["inflation"], 0, atol=1e-9)
    np.testing.assert_allclose(perfect["best_signal"], perfect["exact_signal"])


def test_selection_without_truth_has_no_exact_columns(tokens) -> None:
    table = selective(rescore(tokens, estimator="noisy", n_sig=20))
    assert not [column for column in table if "exact" in column]
    assert table.loc[0, "kept"] == 1
    assert np.isnan(table.loc[0, "paths_better"])


@pytest.fixture(scope="module")
def records(tokens) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Node records of two estimators with a second form; the restricted reading agrees with the first."""
    parts = []
    for name in ("noisy", "truth"):
        found = rescore(tokens, estimator="noisy", success=name, n_sig=20).assign(estimator=name)
        parts.append(found)
    nodes = pd.concat(parts, ignore_index=True)
    nodes["align_reverse_kl_restricted"], nodes["ideal_norm_restricted"] = nodes.align_reverse_kl, nodes.ideal_norm
    nodes["align_opposite"], nodes["align_dr_grpo"] = -nodes.align_reverse_kl, 1.0
    return nodes, tokens


def test_every_factor_is_moved_and_agreement_is_measured(records) -> None:
    table = robustness(*records, Baseline(estimator="noisy"), n_sigs=(10, 20, 61), filters=(0.0, 0.05))
    agreement = rank_agreement(table).set_index(["factor", "setting"])
    assert agreement.kendall_tau.iloc[0] == 1
    assert agreement.loc[("gradient form", "opposite"), "kendall_tau"] == -1
    assert not agreement.loc[("gradient form", "opposite"), "same_best"]
    assert ("gradient form", "dr_grpo") not in agreement.index
    assert agreement.loc[("reading of S_u", "restricted"), "kendall_tau"] == 1
    assert ("N_sig", "10") in agreement.index
    assert ("N_sig", "61") not in agreement.index  # no node is left there
    rows = table.set_index(["factor", "setting", "teacher"])
    for teacher in "ab":
        np.testing.assert_allclose(
            rows.loc[("N_sig", "20", teacher), "mean"], rows.loc[("estimator", "noisy", teacher), "mean"], rtol=1e-6
        )
    fewer = rows.loc[("|g_ideal| above", "0.05", "a"), "nodes"]
    assert 0 < fewer < rows.loc[("|g_ideal| above", "0.0", "a"), "nodes"]


def test_contrast_is_the_paired_difference_of_group_means(records) -> None:
    nodes = records[0].query("estimator == 'truth'")
    means = nodes.groupby(["question", "teacher"]).align_reverse_kl.mean().unstack()
    found = contrast(nodes, ["a"], ["b"])
    np.testing.assert_allclose(found["difference"], (means.a - means.b).mean(), rtol=1e-6)
    assert found["n"] == 8
    np.testing.assert_allclose(contrast(nodes, ["a", "b"], ["b", "a"])["difference"], 0, atol=1e-12)
    assert contrast(nodes, ["a"], ["absent"])["n"] == 0
