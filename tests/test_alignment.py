"""Alignment scores against a plain float64 route, and their summaries against loops, scipy and pandas by hand."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats

from jaxopd.alignment import (
    STATISTICS,
    _all_nodes,
    across_questions,
    aggregate,
    alignment,
    correct_vs_incorrect,
    node_alignment,
    summarize,
    teacher_advantage,
)
from jaxopd.errors import InputError
from jaxopd.gradients import FORMS, READINGS, Position, ideal, reverse_kl

GOLDEN = Path(__file__).parent / "goldens" / "gradients.npz"
V = 9


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def make_nodes(n: int, seed: int = 0, dtype: str = "float32") -> Position:
    """Nodes over a vocabulary of 9 with 0 to 6 supported tokens and sampled statistics."""
    rng = np.random.default_rng(seed)
    log_p, log_q = (log_softmax(2 * rng.normal(size=(n, V))) for _ in range(2))
    counts = np.array([rng.multinomial(60, np.exp(row)) for row in log_p], float).reshape(n, V)
    fields = {
        "support": rng.permuted(np.arange(V)[None, :] < rng.integers(0, 7, n)[:, None], axis=1),
        "success": rng.uniform(size=(n, V)),
        "counts": counts,
        "n_samples": counts.sum(-1),
        "reward_to_go": rng.normal(size=(n, V)),
        "advantage": rng.normal(size=(n, V)),
        "advantage_std": np.full(n, 0.5),
    }
    return Position.create(jnp.asarray(log_p, dtype), jnp.asarray(log_q, dtype), **fields)


def one(nodes: Position, i: int) -> Position:
    return jax.tree.map(lambda x: x[i], nodes)


def plain_scores(node: Position, reading: str) -> dict[str, float]:
    """Cosine for the analytic forms, and the node's own numbers, written out in numpy."""
    p, q, s = np.exp(np.float64(node.log_p)), np.exp(np.float64(node.log_q)), np.asarray(node.support)
    success = np.float64(node.success)[s]
    inside_p, inside_q = p[s] / p[s].sum(), q[s] / q[s].sum()
    nan = dict.fromkeys(("align_reverse_kl", "align_forward_kl", "advantage", "value"), np.nan)
    if not s.any():
        return nan
    scores = nan | {"advantage": (inside_q - inside_p) @ success, "value": inside_p @ success}
    if s.sum() < 2:
        return scores
    if reading == "renormalized":
        g_ideal = inside_p * (success - inside_p @ success)
        ratio = np.log(inside_q / inside_p)
        signals = {"reverse_kl": inside_p * (ratio - inside_p @ ratio), "forward_kl": inside_q - inside_p}
    else:
        g_ideal = p[s] * (success - p[s] @ success)
        ratio = np.log(q / p)
        signals = {"reverse_kl": (p * (ratio - p @ ratio))[s], "forward_kl": (q - p)[s]}
    norm = np.linalg.norm
    return scores | {f"align_{k}": g_ideal @ g / norm(g_ideal) / norm(g) for k, g in signals.items()}


@pytest.mark.parametrize("reading", READINGS)
def test_scores_equal_the_plain_route(reading):
    with jax.enable_x64(True):
        nodes = make_nodes(40, dtype="float64")
        scores = node_alignment(nodes)
        suffix = "" if reading == "renormalized" else "_restricted"
        for i in range(40):
            for name, expected in plain_scores(one(nodes, i), reading).items():
                column = name + (suffix if name.startswith("align") else "")
                assert_allclose(scores[column][i], expected, atol=1e-12, err_msg=f"{column} of node {i}")


def test_node_alignment_equals_the_unbatched_functions():
    nodes = make_nodes(10)
    scores = node_alignment(nodes)
    columns = {f"align_{f}{s}" for f in FORMS if f != "ideal" for s in ("", "_restricted")}
    assert set(scores) == columns | {"advantage", "success_range", "value", "ideal_norm", "ideal_norm_restricted"}
    for i in range(10):
        node = one(nodes, i)
        assert_allclose(scores["advantage"][i], teacher_advantage(node), atol=1e-6)
        for name in ("jsd", "single_sample", "minillm", "dr_grpo", "dr_grpo_std"):
            assert_allclose(scores[f"align_{name}"][i], alignment(node, FORMS[name]), atol=1e-5)
            restricted = alignment(node, FORMS[name], "restricted")
            assert_allclose(scores[f"align_{name}_restricted"][i], restricted, atol=1e-5)


def test_the_ideal_is_aligned_with_itself_and_opposed_to_its_negative():
    nodes = make_nodes(30)
    decision = np.asarray(nodes.support).sum(-1) >= 2
    scores = node_alignment(nodes, {"itself": ideal, "opposite": lambda p: -ideal(p)})
    for reading in ("", "_restricted"):
        assert_allclose(scores[f"align_itself{reading}"], np.where(decision, 1, np.nan), atol=1e-6)
        assert_allclose(scores[f"align_opposite{reading}"], np.where(decision, -1, np.nan), atol=1e-6)


def test_two_tokens_renormalised_give_plus_or_minus_one():
    nodes = make_nodes(50, seed=1)
    nodes = Position.create(nodes.log_p, nodes.log_q, support=np.tile(np.arange(V) < 2, (50, 1)), success=nodes.success)
    scores = node_alignment(nodes, {"reverse_kl": reverse_kl}, ["renormalized"])["align_reverse_kl"]
    assert_allclose(np.abs(scores), 1, atol=1e-6)
    log_odds = np.diff(np.asarray(nodes.log_q - nodes.log_p)[:, :2])[:, 0]
    assert_array_equal(np.sign(scores), np.sign(log_odds * np.diff(np.asarray(nodes.success)[:, :2])[:, 0]))


def test_what_is_no_decision_node_has_no_alignment():
    p = jnp.log(jnp.array([0.5, 0.3, 0.2]))
    q = jnp.log(jnp.array([0.2, 0.2, 0.6]))
    equal = Position.create(p, q, success=jnp.full(3, 0.1))
    lonely = Position.create(p, q, success=jnp.array([0.1, 0.9, 0.2]), support=jnp.array([False, True, False]))
    same_teacher = Position.create(p, p, success=jnp.array([0.1, 0.9, 0.2]))
    for node in (equal, lonely, same_teacher):
        assert np.isnan(alignment(node, reverse_kl))
        assert np.isnan(alignment(node, reverse_kl, "restricted"))
    assert teacher_advantage(same_teacher) == 0
    nowhere = Position.create(p, q, support=jnp.zeros(3, bool))
    assert np.isnan(teacher_advantage(nowhere))


@pytest.mark.parametrize("log_odds", [-12.0, -60.0])
def test_a_very_sure_student_keeps_its_sign_in_float32(log_odds):
    """P = 1 - 6e-6 and 1 - 9e-27: the gradients are tiny, their squares would underflow, the cosine is still exact."""
    for teacher, expected in ((-1.0, 1), (log_odds - 1, -1)):
        p, q = (jax.nn.log_softmax(jnp.array([0.0, z])) for z in (log_odds, teacher))
        node = Position.create(p, q, success=jnp.array([0.5, 0.9]))
        assert_allclose(alignment(node, reverse_kl), expected, atol=1e-6)


def test_candidates_with_known_f_equal_the_full_vocabulary():
    nodes = make_nodes(20, seed=2)
    analytic = {name: FORMS[name] for name in ("reverse_kl", "forward_kl", "jsd")}
    whole = node_alignment(nodes, analytic, ["restricted"])
    some = np.argsort(~np.asarray(nodes.support), axis=1, kind="stable")[:, :6]  # 6 candidates hold every S_u

    def pick(x):
        return np.take_along_axis(np.asarray(x), some, 1) if x.ndim == 2 else x

    p, known = np.exp(np.asarray(nodes.log_p)), {}
    for name, form in analytic.items():
        f = np.asarray(jax.vmap(form)(nodes))
        known[name] = (pick(f), (p * f).sum(-1))
    part = node_alignment(jax.tree.map(pick, nodes), analytic, ["restricted"], known)
    for name in whole:
        assert_allclose(part[name], whole[name], atol=1e-5, err_msg=name)
    with pytest.raises(InputError, match="known: found the form 'nonsense', expected some of reverse_kl"):
        node_alignment(nodes, analytic, known={"nonsense": known["jsd"]})


def test_padding_changes_nothing_and_compiles_once_a_bucket():
    nodes = make_nodes(60)
    scores = node_alignment(nodes)
    before = _all_nodes._cache_size()
    for n in (0, 1, 33):
        few = node_alignment(jax.tree.map(lambda x, n=n: x[:n], nodes))
        for name, values in few.items():
            assert_array_equal(values, scores[name][:n])
    assert _all_nodes._cache_size() == before


def test_golden_node():
    """One node of 53 tokens, nine of them visited 20 times: Eq. 2.1 and 2.12 by float64 autograd."""
    golden = np.load(GOLDEN)
    visits = golden["node_visits"]
    with jax.enable_x64(True):
        log_p, log_q = (jnp.asarray(log_softmax(golden[f"node_{who}_logits"])) for who in ("student", "teacher"))
        success = golden["node_successes"] / np.maximum(visits, 1)
        node = Position.create(log_p, log_q, support=visits >= 20, success=success)
        assert_allclose(teacher_advantage(node), golden["node/nsig20/teacher_advantage_eq2.1"], rtol=1e-10)
        assert_allclose(alignment(node, reverse_kl), golden["node/nsig20/renorm/align"], rtol=1e-10)
        assert_allclose(alignment(node, reverse_kl, "restricted"), golden["node/nsig20/fullvocab/align"], rtol=1e-10)


# Summaries ----------------------------------------------------------------------------------------------------------


def node_numbers(shape: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    cosine = np.where(rng.uniform(size=shape) < 0.1, np.nan, rng.uniform(-1, 1, shape))
    norm, spread = rng.exponential(0.02, shape), rng.uniform(size=shape)
    return cosine, norm, spread, rng.uniform(size=shape) < 0.7


def plain_summary(cosine, norm, spread, decision) -> dict[str, float]:
    rows = [row for row in zip(cosine, norm, spread, decision, strict=True) if row[3] and not np.isnan(row[0])]
    strong = [c for c, g, _, _ in rows if g > 0.01]
    gradients = [np.array([g, 0.0]) for _, g, _, _ in rows]
    units = [np.array([c, np.sqrt(1 - c * c)]) for c, _, _, _ in rows]
    inner = sum(g @ u for g, u in zip(gradients, units, strict=True))
    lengths = np.sqrt(sum(g @ g for g in gradients)) * np.sqrt(sum(u @ u for u in units))
    return {
        "mean": sum(c for c, _, _, _ in rows) / len(rows),
        "sr_weighted": sum(c * s for c, _, s, _ in rows) / sum(s for _, _, s, _ in rows),
        "filtered": sum(strong) / len(strong),
        "global": inner / lengths,  # the cosine of all gradients laid end to end
        "fraction_positive": sum(c > 0 for c, _, _, _ in rows) / len(rows),
        "n": len(rows),
    }


def test_summarize_equals_a_loop_over_any_leading_axes():
    numbers = node_numbers((2, 3, 50))
    summary = summarize(*numbers)
    for i, j in np.ndindex(2, 3):
        expected = plain_summary(*(x[i, j] for x in numbers))
        assert set(expected) == set(summary)
        for name, value in expected.items():
            assert summary[name].shape == (2, 3)
            assert_allclose(summary[name][i, j], value, rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("n", [0, 4])
def test_summary_of_nothing_says_zero(n):
    summary = summarize(np.full(n, np.nan), np.full(n, np.nan), np.full(n, np.nan), np.ones(n, bool))
    assert summary["n"] == 0
    assert all(np.isnan(summary[name]) for name in STATISTICS)


def node_table(n_questions: int = 6, seed: int = 0) -> pd.DataFrame:
    """The columns of records/nodes.parquet that the summaries read: 2 teachers, 2 paths, 30 positions."""
    index = pd.MultiIndex.from_product(
        [[f"q{i}" for i in range(n_questions)], [0, 1], range(30), ["first", "second"], ["bellman"]],
        names=["question", "path", "t", "teacher", "estimator"],
    )
    nodes = index.to_frame(index=False)
    cosine, norm, spread, decision = node_numbers((len(nodes),), seed)
    return nodes.assign(
        path_correct=nodes["path"] == 0,
        decision=decision,
        success_range=spread,
        ideal_norm=norm,
        ideal_norm_restricted=norm / 2,
        align_reverse_kl=cosine,
        align_reverse_kl_restricted=-cosine,
    )


def expected_summary(rows: pd.DataFrame, sign: int = 1) -> dict[str, float]:
    columns = (rows[c].to_numpy() for c in ("align_reverse_kl", "ideal_norm", "success_range", "decision"))
    cosine, norm, spread, decision = columns
    return plain_summary(sign * cosine, norm, spread, decision)


@pytest.mark.parametrize("by", [["question", "path", "teacher", "estimator"], ["question", "teacher"], ["teacher"]])
def test_aggregate_equals_selecting_by_hand(by):
    nodes = node_table()
    table = aggregate(nodes, "reverse_kl", by)
    assert len(table) == len(nodes[by].drop_duplicates())
    for row in table.to_dict("records"):
        mine = nodes[np.logical_and.reduce([nodes[c] == row[c] for c in by])]
        for name, value in expected_summary(mine).items():
            assert_allclose(row[name], value, rtol=1e-12, err_msg=name)
    other = aggregate(nodes, "reverse_kl", by, reading="restricted")
    assert_allclose(other["mean"], -table["mean"], rtol=1e-12)
    assert_allclose(other["global"], -table["global"], rtol=1e-12)


def test_aggregate_keeps_empty_groups_and_names_missing_columns():
    nodes = node_table()
    nodes.loc[nodes["question"] == "q3", "decision"] = False
    table = aggregate(nodes, "reverse_kl").set_index("question")
    assert (table.loc["q3", "n"] == 0).all()
    assert table.loc["q3", "mean"].isna().all()
    assert list(aggregate(nodes.iloc[:0], "reverse_kl").columns) == list(aggregate(nodes, "reverse_kl").columns)
    with pytest.raises(InputError, match="nodes: found no column 'align_unheard_of'"):
        aggregate(nodes, "unheard_of")


def test_across_questions_is_a_t_interval_over_questions():
    nodes = node_table()
    nodes.loc[nodes["question"] == "q3", "decision"] = False
    table = across_questions(nodes, "reverse_kl").set_index(["teacher", "statistic"])
    for teacher in ("first", "second"):
        questions = [nodes[(nodes["question"] == f"q{i}") & (nodes["teacher"] == teacher)] for i in (0, 1, 2, 4, 5)]
        values = [expected_summary(rows)["global"] for rows in questions]
        low, high = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
        row = table.loc[(teacher, "global")]
        assert_allclose(row[["mean", "low", "high", "n"]].astype(float), [np.mean(values), low, high, 5], rtol=1e-12)
    single = across_questions(nodes[nodes["question"] == "q0"], "reverse_kl")
    assert (single["n"] == 1).all()
    assert single["mean"].notna().all()
    assert single["low"].isna().all()
    nothing = across_questions(nodes.assign(decision=False), "reverse_kl")
    assert (nothing["n"] == 0).all()
    assert nothing["mean"].isna().all()


def test_correct_vs_incorrect_pairs_questions():
    nodes = node_table(9)
    nodes = nodes[~((nodes["question"] == "q1") & nodes["path_correct"])]  # q1 has incorrect paths only
    table = correct_vs_incorrect(nodes, "reverse_kl").set_index(["teacher", "statistic"])
    mine = nodes[nodes["teacher"] == "first"]
    both = [f"q{i}" for i in (0, *range(2, 9))]
    halves = [[mine[(mine["question"] == q) & (mine["path_correct"] == side)] for q in both] for side in (True, False)]
    sides = [[expected_summary(rows)["mean"] for rows in half] for half in halves]
    difference = np.subtract(sides[1], sides[0])
    row = table.loc[("first", "mean")]
    t_test = stats.ttest_rel(sides[1], sides[0]).confidence_interval(0.95)
    assert row["n"] == 8
    assert_allclose([row["correct"], row["incorrect"]], np.mean(sides, axis=1), rtol=1e-12)
    assert_allclose([row["difference"], row["low"], row["high"]], [difference.mean(), *t_test], rtol=1e-12)
    assert_allclose(row["wilcoxon_p"], stats.wilcoxon(sides[1], sides[0]).pvalue, rtol=1e-12)
    assert_allclose(row["cohens_dz"], difference.mean() / difference.std(ddof=1), rtol=1e-12)


def test_correct_vs_incorrect_without_pairs_or_differences():
    nodes = node_table()
    lonely = correct_vs_incorrect(nodes[nodes["path_correct"]], "reverse_kl")
    assert len(lonely) == 2 * len(STATISTICS)
    assert (lonely["n"] == 0).all()
    assert lonely[["difference", "wilcoxon_p", "cohens_dz"]].isna().all(axis=None)
    flat = nodes.assign(align_reverse_kl=0.5, success_range=1.0, ideal_norm=1.0, decision=True)
    same = correct_vs_incorrect(flat, "reverse_kl")
    assert (same["difference"] == 0).all()
    assert same["cohens_dz"].isna().all()
    assert (same["n"] == 6).all()
    pair = correct_vs_incorrect(nodes[nodes["question"] == "q0"], "reverse_kl")
    assert (pair["n"] == 1).all()
    assert pair["low"].isna().all()
