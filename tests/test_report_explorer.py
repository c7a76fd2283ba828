"""The token explorer's data: the records in it, the tree, gradients and intervals against numpy, its size."""

import json
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from jaxopd.errors import InputError
from jaxopd.report import write_report
from jaxopd.report.explorer import PAGE_BYTES, explore, measures
from jaxopd.report.noise import Noise, form_gradients, known_tokens
from jaxopd.report.records import read_records
from jaxopd.report.text import script_json, visible, with_gaps
from jaxopd.report.trees import question_tree
from jaxopd.tree import EXIT, LEAF

made = runpy.run_path(str(Path(__file__).with_name("make_run.py")))
synthetic_run, FORMS = made["synthetic_run"], made["FORMS"]
OPTIONAL = ("visits_on_policy", "launches", "low_", "high_", "samples", "sample_advantage", "reward_to_go_")


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return read_records(synthetic_run(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def explored(records):
    return explore(records)


def block(explored, number=1):
    return json.loads(explored.inside[number])


def tree_of(records, question="chain-001"):
    return question_tree(records, *(frame[frame["question"] == question] for frame in (records.nodes, records.tokens)))


def triples(values):
    """[rows, 3] of numbers from whole thousandths."""
    return np.array([np.nan if v is None else v / 1000 for v in values]).reshape(-1, 3)


def test_the_page_holds_the_records(records, explored):
    data, nodes = block(explored), records.nodes[records.nodes["question"] == "chain-001"]
    assert explored.head["teachers"] == [visible(name) for name in records.teachers]
    for number, path in enumerate(data["paths"]):
        for e, estimator in enumerate(records.estimators):
            for m, teacher in enumerate(records.teachers):
                at = (nodes["path"] == number) & (nodes["teacher"] == teacher) & (nodes["estimator"] == estimator)
                rows, found = nodes[at].sort_values("t"), data["estimators"][e]
                success = triples(found["success"])[path["edges"]]
                np.testing.assert_allclose(success, rows[["p_succ", "p_succ_low", "p_succ_high"]], atol=0.00051)
                for name in ("p", "q"):
                    column = data["edges"]["p"] if name == "p" else data["edges"]["q"][m]
                    np.testing.assert_allclose(np.array(column)[path["edges"]] / 1000, rows[name], atol=0.00051)
                gap = rows["entropy_teacher"] - rows["entropy_student"]
                for name, values in (("reverse_kl", rows["reverse_kl"]), ("js", rows["js"]), ("entropy_gap", gap)):
                    shown = np.array(data["teachers"][m][name])[path["nodes"]] / 1000
                    np.testing.assert_allclose(shown, values, atol=0.00051)
                place = [found["decisions"].index(node) for node in np.array(path["nodes"])[rows["decision"]]]
                decided = rows[rows["decision"]]
                for f, form in enumerate(FORMS):
                    shown = triples(found["alignment"][f][m])[place, 0]
                    np.testing.assert_allclose(shown, decided[f"align_{form}"], atol=0.00051)
                np.testing.assert_allclose(triples(found["advantage"][m])[place, 0], decided["advantage"], atol=0.00051)
                for name in ("value", "success_range"):
                    np.testing.assert_allclose(triples(found[name])[place, 0], decided[name], atol=0.00051)
            assert len(place) == rows["decision"].sum() > 0


def test_every_measure_can_be_switched(explored):
    head, data = explored.head, block(explored)
    exact, judged, along = {"reverse_kl", "js", "entropy_gap"}, {"alignment", "advantage", "success_range"}, {"p_succ"}
    assert {measure["key"] for measure in head["measures"]} == exact | judged | along
    assert all(measure["high"] > 0 and measure["low"] in (0, -measure["high"]) for measure in head["measures"])
    nodes, edges = len(data["nodes"]["t"]), len(data["edges"]["text"])
    assert [set(teacher) for teacher in data["teachers"]] == [exact] * len(head["teachers"])
    assert {len(column) for teacher in data["teachers"] for column in teacher.values()} == {nodes}
    assert len(data["estimators"]) == len(head["estimators"])
    for estimates in data["estimators"]:
        size = 3 * len(estimates["decisions"])
        assert len(estimates["success"]) == 3 * edges
        assert len(estimates["value"]) == len(estimates["success_range"]) == size
        assert [len(column) for column in estimates["advantage"]] == [size] * len(head["teachers"])
        shape = [[size] * len(head["teachers"])] * len(head["forms"])
        assert [[len(column) for column in form] for form in estimates["alignment"]] == shape
        assert len(estimates["ideal"]) == 3 * len(estimates["known"])
        assert {len(signs) for signs in estimates["signs"]} == {len(head["teachers"]) * len(head["forms"])}


def test_paths_share_nodes_until_they_part(records):
    tree = tree_of(records)
    words = {path: list(rows["text"]) for path, rows in tree.spine.groupby("path")}
    places = {}
    for path, rows in tree.spine.groupby("path"):
        for t, (node, edge) in enumerate(zip(rows["node"], rows["edge"], strict=True)):
            assert places.setdefault(node, tuple(words[path][:t])) == tuple(words[path][:t])
            assert tree.depth[node] == t
            assert tree.edges.loc[edge, "text"] == words[path][t]
            follows = LEAF if t + 1 == len(rows) else rows["node"].iloc[t + 1]
            assert tree.edges.loc[edge, "child"] == follows
    assert len(set(places.values())) == len(places) == len(tree.depth)
    assert (tree.edges["child"] == EXIT).sum() == len(tree.edges) - (len(tree.depth) - 1) - 4  # the root; four ends
    assert (tree.edges.groupby("node").size() == 4).all()


def test_known_tokens_are_the_most_visited(records):
    tree, e = tree_of(records), records.estimators.index("on_policy")
    known = known_tokens(tree, "on_policy", e)
    assert len(known.nodes) > 3
    for node, edges in zip(known.nodes, known.edges, strict=True):
        mine = tree.edges[tree.edges["node"] == node].sort_values("visits_on_policy", ascending=False)
        assert set(edges[edges >= 0]) == set(mine.index[:3])


def on_known(tree, known, *columns):
    """Float64 columns of each decision node's S_u, one list entry a node."""
    return [[tree.edges.loc[edges[edges >= 0], name].to_numpy(float) for name in columns] for edges in known.edges]


def test_form_gradients_equal_numpy(records):
    tree, known = tree_of(records), known_tokens(tree_of(records), "bellman", records.estimators.index("bellman"))
    found = form_gradients(tree, known, "bellman", "T3", FORMS)
    assert set(found) == set(FORMS)
    columns = ("p", "q_T3", "samples", "reward_to_go_T3", "sample_advantage")
    for row, (p, q, n, to_go, advantage) in enumerate(on_known(tree, known, *columns)):
        shift = np.log(p.sum()) - np.log(q.sum())
        p, q = p / p.sum(), q / q.sum()
        mixed = (p + q) / 2

        def sampled(w, n=n, p=p):
            return n * w / n.sum() - p * (n * w).sum() / n.sum()

        def ascent(f, p=p):
            return p * (f - (p * f).sum())

        expected = {
            "reverse_kl": ascent(np.log(q / p)), "forward_kl": q - p, "jsd": ascent(np.log(mixed / p) / 2),
            "single_sample": sampled(np.log(q / p) - 1), "minillm": sampled(to_go + shift - 1),
            "dr_grpo": sampled(advantage), "dr_grpo_std": sampled(advantage),
        }  # fmt: skip
        for form, gradient in expected.items():
            np.testing.assert_allclose(found[form][row, : len(p)], gradient, atol=2e-5, err_msg=form)
            assert not found[form][row, len(p) :].any()


def test_intervals_of_linear_numbers_equal_their_standard_errors(records, monkeypatch):
    monkeypatch.setattr("jaxopd.report.noise.DRAWS", 20_000)
    tree = tree_of(records)
    inner = 0.3 + 0.4 * tree.edges["p_succ_bellman"]  # no draw is cut at 0 or 1
    tree = replace(tree, edges=tree.edges.assign(p_succ_bellman=inner))
    known = known_tokens(tree, "bellman", records.estimators.index("bellman"))
    nodes = on_known(tree, known, "p", "q_T3", "p_succ_bellman", "se_bellman")
    nodes = [(p / p.sum(), q / q.sum(), s, se[0]) for p, q, s, se in nodes]
    noise = Noise(tree, known, "bellman")
    value = noise.value(np.array([p @ s for p, _, s, _ in nodes]))
    advantage = noise.advantage(np.array([(q - p) @ s for p, q, s, _ in nodes]), tree.edges["q_T3"])
    stakes, ideal = noise.success_range(np.array([np.ptp(s) for _, _, s, _ in nodes])), noise.ideal()
    for row, (p, q, s, se) in enumerate(nodes):
        half = 1.959964 * se * np.array([-1, 0, 1])
        close = {"rtol": 0, "atol": 0.08 * 1.96 * se}  # of a quantile of 20,000 draws
        np.testing.assert_allclose(value[row, [1, 0, 2]], p @ s + half * np.linalg.norm(p), **close)
        np.testing.assert_allclose(advantage[row, [1, 0, 2]], (q - p) @ s + half * np.linalg.norm(q - p), **close)
        np.testing.assert_allclose(stakes[row, [1, 0, 2]], np.maximum(np.ptp(s) + half * 2**0.5, 0), **close)
        jacobian = np.linalg.norm(np.diag(p) - np.outer(p, p), axis=1)[:, None]  # of P (P_succ - mean) in P_succ
        expected = (p * (s - p @ s))[:, None] + half * jacobian
        np.testing.assert_allclose(ideal[row, : len(p)][:, [1, 0, 2]], expected, **close)


def test_the_sign_of_two_tokens_is_certain_or_unknown(records):
    tree, e = tree_of(records), records.estimators.index("bellman")
    known = known_tokens(tree, "bellman", e)
    pair = replace(known, edges=np.where(np.arange(known.edges.shape[1]) < 2, known.edges, -1))
    first = tree.edges.index.isin(pair.edges[:, 0])
    for gap, expected in ((0.5, [1, 1, 1]), (0.001, [1, -1, 1])):
        edges = tree.edges.assign(p_succ_bellman=np.where(first, 0.2 + gap, 0.2))
        ascent = np.where(pair.mask, np.where(np.arange(pair.edges.shape[1]) == 0, 1.0, -1.0), 0.0)
        found = Noise(replace(tree, edges=edges), pair, "bellman").alignment(np.ones(len(pair.nodes)), ascent)
        np.testing.assert_allclose(found, np.tile(expected, (len(found), 1)), atol=1e-5)


def test_runs_without_the_newer_columns_are_shown(records):
    kept = [c for c in records.tokens if not c.startswith(OPTIONAL)]
    data = block(explore(replace(records, tokens=records.tokens[kept])))
    assert data["edges"]["launches"] is None
    estimates, full = data["estimators"][2], block(explore(records))["estimators"][2]
    sampled = [form in ("reverse_kl", "forward_kl", "jsd") for form in FORMS] * len(records.teachers)
    for signs, all_signs in zip(estimates["signs"], full["signs"], strict=True):
        assert signs == "".join(s if known else "?" for s, known in zip(all_signs, sampled, strict=True))
        assert "?" not in all_signs
    assert triples(estimates["alignment"][0][0])[0].tolist() == triples(full["alignment"][0][0])[0].tolist()
    assert np.isnan(triples(estimates["alignment"][3][0])[:, 1:]).all()
    success = triples(estimates["success"])
    known = ~np.isnan(success[:, 0])
    np.testing.assert_allclose((success[:, 2] - success[:, 1])[known], 2 * 1.96 * 0.04, atol=0.0021)


@pytest.mark.parametrize("column", ["p_succ_bellman", "se_truth", "q_T2"])
def test_tokens_without_a_teacher_or_an_estimator_are_named(records, column):
    with pytest.raises(InputError, match=rf"tokens\.parquet: found no column '{column}'"):
        explore(replace(records, tokens=records.tokens.drop(columns=column)))


def test_twenty_questions_fit_one_page_and_the_rest_lies_beside(tmp_path, monkeypatch):
    teachers = {f"teacher {m}": 0.1 * m for m in range(8)}
    run = synthetic_run(
        tmp_path / "run", questions=22, teachers=teachers, estimators=("pooled", "on_policy", "bellman")
    )
    paths = write_report(run)
    page = paths["html"].read_text("utf-8")
    assert PAGE_BYTES < 10_000_000 > paths["html"].stat().st_size > 1_000_000
    assert page.count('id="question-') == 20
    assert not (run / "report" / "explorer").exists()
    assert "file:" not in page
    whole = explore(read_records(run))
    monkeypatch.setattr("jaxopd.report.explorer.PAGE_BYTES", sum(len(whole.inside[n].encode()) for n in range(3)))
    paths = write_report(run, tmp_path / "small")
    page = paths["html"].read_text("utf-8")
    assert page.count('id="question-') == 3
    assert "17 of 20 questions" in page
    assert "'self' file:;" in page
    beside = tmp_path / "small" / "explorer" / "00019.js"
    assert paths["explorer/00019.js"] == beside
    assert beside.read_text("utf-8") == f"receive(19,{whole.inside[19]});\n"
    assert '"file":"explorer/00019.js"' in page


def test_json_cannot_leave_its_script_element():
    text = "</script><script>alert(1)</script><!-- & \u2028\u2029 'quotes\" \\ \U0001f642"
    written = script_json({"text": text, text: [text]})
    assert not set("<>&\u2028\u2029") & set(written)
    assert json.loads(written) == {"text": text, text: [text]}
    with pytest.raises(ValueError):
        script_json([float("nan")])


def test_gaps_and_visible_signs():
    assert with_gaps(["so", "4", "a", ";"], "so 4 a ;") == [("", "so"), (" ", "4"), (" ", "a"), (" ", ";")]
    assert with_gaps(["So", " 4", "a\n"], "So 4a\n") == [("", "So"), ("", " 4"), ("", "a\n")]
    assert with_gaps(["\ufffd", "x", "y"], "\U0001f642x y") == [("", "\ufffd"), ("", "x"), (" ", "y")]
    assert visible("a\u202eb\x07\u200b") == "a\u27e8U+202E\u27e9b\u2407\u27e8U+200B\u27e9"


def test_scales_end_at_round_numbers(records):
    nodes = pd.concat([records.nodes.assign(reverse_kl=0.013), records.nodes.assign(reverse_kl=0.0)])
    found = {measure.key: measure for measure in measures(nodes)}
    assert (found["reverse_kl"].low, found["reverse_kl"].high) == (0, 0.02)
    assert (found["alignment"].low, found["alignment"].high) == (-1, 1)
