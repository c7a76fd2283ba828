"""The report's tables: its numbers against numpy, its cells against the numbers, its text against markdown."""

import io
import json
import runpy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from jaxopd.report import ranking_table, write_report
from jaxopd.report.tables import side_by_side

made = runpy.run_path(str(Path(__file__).with_name("make_run.py")))
TEACHERS, ESTIMATORS, FORMS = made["TEACHERS"], made["ESTIMATORS"], made["FORMS"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made["synthetic_run"](tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def written(run):
    return write_report(run)


def records(run, table):
    return pd.read_parquet(run / "records" / f"{table}.parquet")


def by_hand(nodes, teacher, estimator, correct=None):
    """The per-question statistics of one teacher, straight from their formulas: {statistic: [per question]}."""
    out = {name: [] for name in ("mean", "sr_weighted", "filtered", "global", "fraction_positive", "advantage")}
    for question in sorted(set(nodes["question"])):
        rows = [
            r for r in nodes[(nodes["question"] == question) & (nodes["teacher"] == teacher)].to_dict("records")
            if r["estimator"] == estimator and r["decision"] and correct in (None, r["path_correct"])
        ]  # fmt: skip
        c, g, s, a = (
            np.array([r[k] for r in rows]) for k in ("align_reverse_kl", "ideal_norm", "success_range", "advantage")
        )
        out["mean"].append(c.mean())
        out["sr_weighted"].append((c * s).sum() / s.sum())
        out["filtered"].append(c[g > 0.01].mean())
        out["global"].append((c * g).sum() / np.sqrt(len(c) * (g**2).sum()))
        out["fraction_positive"].append((c > 0).mean())
        out["advantage"].append(a.mean())
    return out


T_6 = 2.446911848791681  # 97.5 % quantile of Student's t with 6 degrees of freedom


def test_exits_put_their_cosines_first(tmp_path):
    """Against the mean and t interval by hand; a question without a decision has no cosine."""
    run = made["synthetic_run"](tmp_path)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"allocation": "exits"}))
    rng, teachers = np.random.default_rng(0), list(TEACHERS)
    values = rng.normal(0.2, 0.1, (8, len(teachers)))
    values[3] = np.nan
    rows = [(f"q{i}", teacher, x, 0.03) for i, row in enumerate(values) for teacher, x in zip(teachers, row)]
    cosines = pd.DataFrame(rows, columns=["question", "teacher", "global_cosine", "se"])
    cosines.to_parquet(run / "records" / "cosines.parquet")
    written = write_report(run)
    table = pd.read_csv(written["cosines.csv"]).set_index("teacher")
    assert list(table["mean"]) == sorted(table["mean"], reverse=True)
    kept = np.delete(values, 3, 0)
    half = T_6 * kept.std(0, ddof=1) / np.sqrt(7)
    np.testing.assert_allclose(table.loc[teachers, "mean"], kept.mean(0))
    np.testing.assert_allclose(table.loc[teachers, "low"], kept.mean(0) - half)
    text = written["markdown"].read_text()
    assert text.index("exits were aimed at") < text.index("Ranking under")


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_ranking_equals_numpy(run, written, estimator):
    nodes, table = records(run, "nodes"), pd.read_csv(written[f"ranking_{estimator}.csv"]).set_index("teacher")
    assert list(table["global"]) == sorted(table["global"], reverse=True)
    for teacher in TEACHERS:
        for name, values in by_hand(nodes, teacher, estimator).items():
            half = T_6 * np.std(values, ddof=1) / np.sqrt(7)
            expected = [np.mean(values), np.mean(values) - half, np.mean(values) + half]
            np.testing.assert_allclose(
                table.loc[teacher, [name, f"{name}_low", f"{name}_high"]].to_numpy(float), expected, atol=1e-9
            )
        mine = nodes[(nodes["teacher"] == teacher) & (nodes["estimator"] == estimator)]
        assert table.loc[teacher, "n_nodes"] == mine["decision"].sum()
        assert table.loc[teacher, "n_questions"] == 7


def test_correct_against_incorrect_equals_numpy(run, written):
    nodes = records(run, "nodes")
    table = pd.read_csv(written["correct_incorrect.csv"]).set_index(["teacher", "estimator", "statistic"])
    for teacher in TEACHERS:
        right, wrong = (by_hand(nodes, teacher, "bellman", side) for side in (True, False))
        for name in ("global", "mean"):
            row, gap = table.loc[teacher, "bellman", name], np.subtract(wrong[name], right[name])
            half = T_6 * gap.std(ddof=1) / np.sqrt(7)
            expected = [np.mean(right[name]), np.mean(wrong[name]), gap.mean(), gap.mean() - half]
            np.testing.assert_allclose(
                row[["correct", "incorrect", "difference", "low"]].to_numpy(float), expected, atol=1e-9
            )


def test_cells_round_the_numbers(written):
    table = pd.read_csv(written["ranking_bellman.csv"]).iloc[0]
    half = (table["global_high"] - table["global_low"]) / 2
    cell = f"{table['global']:.3f} \u00b1 {half:.3f}".replace("-", "\u2212")
    assert f"| {table['teacher']} | {cell} |" in written["markdown"].read_text(encoding="utf-8")
    assert cell in written["html"].read_text(encoding="utf-8")


def test_forms_table_holds_every_form_and_reading(run, written):
    table, nodes = pd.read_csv(written["forms.csv"]), records(run, "nodes")
    assert list(dict.fromkeys(table["form"])) == list(FORMS)
    mine = nodes[(nodes["estimator"] == "bellman") & nodes["decision"]]
    expected = np.mean([np.mean(group["align_minillm_restricted"]) for _, group in mine.groupby("question")])
    row = table[
        (table["form"] == "minillm") & (table["reading"] == "restricted") & (table["teacher"] == "all teachers")
    ]
    np.testing.assert_allclose(row.loc[row["statistic"] == "mean", "mean"], expected, atol=1e-9)


def test_estimators_are_compared_on_the_nodes_that_all_of_them_judge(run):
    nodes = records(run, "nodes")
    few = sorted(set(nodes["question"]))[:3]
    nodes = nodes[(nodes["estimator"] != "truth") | nodes["question"].isin(few)]
    table = side_by_side(nodes)
    judged = {}
    for row in nodes.itertuples():
        if row.decision:
            judged.setdefault((row.question, row.path, row.t, row.teacher), set()).add(row.estimator)
    common = {place for place, names in judged.items() if names == set(ESTIMATORS)}
    assert f"Over the {len({place[:3] for place in common})} nodes" in table.note
    places = zip(nodes["question"], nodes["path"], nodes["t"], nodes["teacher"], strict=True)
    same = nodes[[place in common for place in places]]
    found = table.numbers.set_index(["teacher", "estimator", "statistic"])
    for estimator in ESTIMATORS:
        expected = np.mean(by_hand(same, "T3", estimator)["global"])
        np.testing.assert_allclose(found.loc["T3", estimator, "global"]["mean"], expected, atol=1e-9)


def test_terminal_table(run):
    out = io.StringIO()
    Console(file=out, width=100).print(ranking_table(run))
    lines = out.getvalue().splitlines()
    nodes = records(run, "nodes")
    best_first = sorted(TEACHERS, key=lambda name: -np.mean(by_hand(nodes, name, "bellman")["global"]))
    assert [name for line in lines for name in TEACHERS if line.strip().startswith(name)] == best_first
    assert ranking_table(nodes).row_count == len(TEACHERS)


def test_markdown_cells_cannot_break_out(written):
    text = written["markdown"].read_text("utf-8")
    assert "self \\<b\\>1C1W\\</b\\>" in text
    assert not any(line.startswith("<") for line in text.splitlines())
