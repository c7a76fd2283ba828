"""The report of a run: its numbers against numpy, its page against hostile text and degenerate runs.

`synthetic_run(folder)` is deterministic and follows the records' schema: `write_report` it to look at a page.
"""

import base64
import hashlib
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from jaxopd.errors import InputError
from jaxopd.report import ranking_table, write_report
from jaxopd.report.tables import side_by_side
from jaxopd.report.tokens import visible, with_gaps

HOSTILE = "<script>alert('x')</script>"
TEACHERS = {"T3": 0.5, "T2": 0.3, "self-1C": 0.15, "self <b>1C1W</b>": -0.05}
ESTIMATORS = {"pooled": 0.5, "on_policy": 0.25, "bellman": 0.12, "truth": 0.0}  # name -> chance that a sign is wrong
FORMS = ("reverse_kl", "forward_kl", "jsd", "single_sample", "minillm", "dr_grpo", "dr_grpo_std")
WORDS = "so 4 a minus 3 gives 1 ; so 1 b plus 6 gives 0 . thus 0 c times 5 = 0 ; wait 4 a plus 2 gives 6 . answer C"
NASTY = [
    "So ", "the ", HOSTILE, "\n", "</script", "><!--", ' "quoted" ', "it's", " &amp;", "\u202egnp.exe", "\u2067",
    "\u2069", "\u05e9\u05dc\u05d5\u05dd", "\U0001f642", "\ufffd", "\x00", "", "`md`", "|", "{{ 7*7 }}",
    "onclick=alert(1)", "\u2028", "\t", " answer", ": ", "{", "D", "}",
]  # fmt: skip
EXCLUDED = ("none correct", "none incorrect")


def synthetic_run(folder, *, questions=9, teachers=TEACHERS, estimators=tuple(ESTIMATORS), decisions=0.4, seed=0):
    """Write a run that follows the records' schema; the last two questions are excluded."""
    rng = np.random.default_rng(seed)
    folder = Path(folder)
    (folder / "records").mkdir(parents=True, exist_ok=True)
    question_rows, path_rows, node_rows, token_rows = [], [], [], []
    for index in range(questions):
        name = f"chain-{index:03d}" if index else f"chain-{HOSTILE}|000"
        excluded = EXCLUDED[index - questions] if index >= questions - len(EXCLUDED) else ""
        pass_rate = {"none correct": 0.0, "none incorrect": 1.0, "": rng.uniform(0.15, 0.95)}[excluded]
        question_rows.append({
            "question": name, "task": "toy/chain", "gold": "zero", "pass_rate": pass_rate, "excluded": excluded,
            "prompt": "a is 4 ; b is a minus 3 ; what is b modulo 7 ?" + (HOSTILE if index == 0 else ""),
            "difficulty": "medium", "n_initial": 200, "n_targeted": 0 if excluded else 1000 + index,
        })  # fmt: skip
        for path in range(0 if excluded else 4):
            words = NASTY if index == 0 else WORDS.split()[: int(rng.integers(24, 34))]
            text = ("" if index == 0 else " ").join(words)
            place = {"question": name, "path": path}
            finish = "stop" if path else "length"
            path_rows.append(place | {"correct": path < 2, "length": len(words), "finish": finish, "text": text})
            for t, word in enumerate(words):
                rows, candidates = _position(rng, decisions, teachers, estimators, path < 2)
                here = place | {"t": t, "text": word}
                node_rows += [here | {"path_correct": path < 2} | row for row in rows]
                token_rows += [here | ({"text": f"alt{k}"} if k else {}) | c for k, c in enumerate(candidates)]
    tables = {"questions": question_rows, "paths": path_rows, "nodes": node_rows, "tokens": token_rows}
    for table, rows in tables.items():
        pd.DataFrame(rows).to_parquet(folder / "records" / f"{table}.parquet")
    config = {"student": "toy/S", "task": "toy/chain", "teacher": [f"{name}=toy/X" for name in teachers], "seed": seed}
    config |= {"budget": {"n_min": 100, "n_sig": 20, "tau": 0.02}, "note": HOSTILE}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _position(rng, decisions, teachers, estimators, correct):
    """Rows of one path position (teacher x estimator) and its candidate tokens."""
    decision, p, span = rng.random() < decisions, rng.beta(4, 1.5), min(rng.exponential(0.12), 0.9)
    span, norm = span if decision else 0.0, rng.uniform(0.1, 0.5)
    value, visits = rng.uniform(0.2, 0.9), int(rng.integers(20, 900))
    share = rng.dirichlet(np.ones(3)) * (1 - p)
    candidates = [{"token": k, "p": prob, "visits": int(visits * prob)} for k, prob in enumerate([p, *share])]
    rows = []
    for teacher, skill in teachers.items():
        q = rng.beta(4, 1.5)
        for k, candidate in enumerate(candidates):
            candidate[f"q_{teacher}"] = q if k == 0 else (1 - q) / 3
        hit = rng.random() < 0.5 + skill * (0.3 if correct else 0.6)
        magnitude = 1.0 if rng.random() < 0.6 else rng.uniform(0.1, 1)
        for estimator in estimators:
            wrong = rng.random() < ESTIMATORS[estimator]
            align = magnitude * (1 if hit != wrong else -1) if decision else np.nan
            row = {
                "teacher": teacher, "estimator": estimator, "decision": decision, "support": 3 if decision else 1,
                "visits": visits, "p": p, "q": q, "p_succ": value if decision else np.nan, "value": value,
                "p_succ_low": max(value - 0.08, 0), "p_succ_high": min(value + 0.08, 1),
                "success_range": span, "ideal_norm": span * norm, "ideal_norm_restricted": span * 0.2,
                "advantage": 0.1 * span * (1 - 2 * wrong),
            }  # fmt: skip
            for f, form in enumerate(FORMS):
                row[f"align_{form}"] = align * (1 - 0.1 * f)
                row[f"align_{form}_restricted"] = align * 0.8
            rows.append(row)
    for candidate in candidates:
        for estimator in estimators:
            candidate[f"p_succ_{estimator}"] = rng.uniform(0, 1) if decision else np.nan
            candidate[f"se_{estimator}"] = 0.04
    return rows, candidates


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return synthetic_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def written(run):
    return write_report(run)


class Page(HTMLParser):
    """Elements and attributes of a page; fails where tags do not nest."""

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.text = [], [], {}
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len(attrs) == len(dict(attrs)), f"<{tag}> repeats an attribute"
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.text[self.open[-1]] = self.text.get(self.open[-1], "") + data

    def data(self):
        return json.loads(self.text["script"].partition('"use strict"')[0])


def records(run, table):
    return pd.read_parquet(run / "records" / f"{table}.parquet")


def test_page_is_well_formed_and_says_what_the_run_was(written):
    page = Page(written["html"])
    text = " ".join(page.text.values())
    for expected in (
        "2 of 9 questions are excluded",
        "1 none correct",
        "toy/S",
        "budget.n_sig",
        *TEACHERS,
        *ESTIMATORS,
        *FORMS,
    ):
        assert expected in text, expected
    assert [tag for tag, _ in page.elements].count("img") == 3
    tokens = [a for _, a in page.elements if "data-i" in a]
    assert len(tokens) == sum(len(path["p"]) for path in page.data()["paths"])
    assert sum(a["tabindex"] == "0" for a in tokens) == len(page.data()["paths"])  # one tab stop a path, arrows inside


def test_model_text_cannot_leave_its_place(written):
    page, raw = Page(written["html"]), written["html"].read_text(encoding="utf-8")
    assert [tag for tag, _ in page.elements].count("script") == 2
    assert HOSTILE not in raw
    assert "<b>1C1W" not in raw
    assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)
    assert not set("\u202e\u2067\u2069\u2028\x00") & set(raw)
    assert "\u27e8U+202E\u27e9" in raw  # shown by its code point instead
    assert HOSTILE in page.text["bdi"]
    for name in ("ranking", "correct_incorrect", "distribution"):
        ElementTree.parse(written[f"{name}.svg"])


def test_no_request_leaves_the_page(written):
    page, raw = Page(written["html"]), written["html"].read_text(encoding="utf-8")
    assert "http://" not in raw
    assert "https://" not in raw
    assert "url(" not in raw
    for _, attrs in page.elements:
        for name in ("src", "href", "action", "srcset", "data"):
            assert attrs.get(name, "#").startswith(("#", "data:image/svg+xml;base64,")), attrs
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    script = raw[raw.rindex("<script>") + len("<script>") : raw.rindex("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none';")


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
    assert [name for line in lines for name in TEACHERS if line.strip().startswith(name)] == list(TEACHERS)
    assert ranking_table(records(run, "nodes")).row_count == len(TEACHERS)


def test_explorer_holds_the_records(run, written):
    data, nodes = Page(written["html"]).data(), records(run, "nodes")
    assert data["teachers"] == list(TEACHERS)
    question, t = "chain-001", 5
    column = data["paths"][4 + 2]  # the second question's path 2
    for m, teacher in enumerate(TEACHERS):
        for e, estimator in enumerate(data["estimators"]):
            at = (nodes["question"] == question) & (nodes["path"] == 2) & (nodes["teacher"] == teacher)
            rows = nodes[at & (nodes["estimator"] == estimator)].set_index("t")
            block = column["e"][e]
            assert block["d"] == list(rows.index[rows["decision"]])
            np.testing.assert_allclose(block["a"][m], rows.loc[rows["decision"], "align_reverse_kl"], atol=0.0051)
            np.testing.assert_allclose(np.array(block["s"], float), rows["p_succ"], atol=0.00051)
            assert column["q"][m][t] == round(rows.loc[t, "q"], 3)
            assert column["n"][t] == rows.loc[t, "visits"]
    assert set(column["c"]) == {str(i) for block in column["e"] for i in block["d"]}
    assert [row[0] for row in column["c"][str(column["e"][0]["d"][0])]][-1].startswith("alt")


def test_explorer_stays_small(run, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxopd.report.tokens.EXPLORER_TOKENS", 250)
    page = Page(write_report(run, tmp_path)["html"])
    assert "The first 2 of 7 questions are shown" in page.text["p"]


def test_gaps_of_word_level_tokens():
    assert with_gaps(["so", "4", "a", ";"], "so 4 a ;") == [("", "so"), (" ", "4"), (" ", "a"), (" ", ";")]
    assert with_gaps(["So", " 4", "a\n"], "So 4a\n") == [("", "So"), ("", " 4"), ("", "a\n")]
    assert with_gaps(["\ufffd", "x", "y"], "\U0001f642x y") == [("", "\ufffd"), ("", "x"), (" ", "y")]
    assert visible("a\u202eb\x07") == "a\u27e8U+202E\u27e9b\u2407"


def _without_decisions(folder):
    return synthetic_run(folder, questions=3, decisions=0.0)


def _without_alignment(folder):
    nodes = records(synthetic_run(folder, questions=4), "nodes")
    nodes[[c for c in nodes.columns if c.startswith("align_")]] = np.nan
    nodes[["p_succ", "p_succ_low", "value", "success_range", "advantage"]] = np.nan
    nodes.to_parquet(folder / "records" / "nodes.parquet")
    return folder


def _truth_on_one_question(folder):
    nodes = records(synthetic_run(folder, questions=4), "nodes")
    nodes[(nodes["estimator"] != "truth") | (nodes["question"] == "chain-001")].to_parquet(
        folder / "records/nodes.parquet"
    )
    return folder


def _without_paths(folder):
    return synthetic_run(folder, questions=2)  # every question is excluded: tables without rows or columns


def _one_of_each(folder):
    return synthetic_run(folder, questions=3, teachers={"only": 0.2}, estimators=("on_policy",))


DEGENERATE = (_without_decisions, _without_alignment, _truth_on_one_question, _without_paths, _one_of_each)


@pytest.mark.parametrize("degenerate", DEGENERATE)
def test_degenerate_runs_get_a_complete_report(tmp_path, degenerate):
    paths = write_report(degenerate(tmp_path / "run"))
    page = Page(paths["html"])
    for section in ("ranking", "paths", "distribution", "forms", "explorer", "excluded", "run"):
        assert any(attrs.get("id") == section for _, attrs in page.elements)
    assert "nan" not in paths["markdown"].read_text(encoding="utf-8").lower()
    assert all(path.stat().st_size for path in paths.values())
    Console(quiet=True).print(ranking_table(tmp_path / "run"))


def test_markdown_cells_cannot_break_out(written):
    text = written["markdown"].read_text("utf-8")
    assert "self \\<b\\>1C1W\\</b\\>" in text
    assert not any(line.startswith("<") for line in text.splitlines())


def test_files_appear_whole_or_not_at_all(run, written, tmp_path, monkeypatch):
    out = tmp_path / "report"
    monkeypatch.setattr("jaxopd.report.all_plots", lambda records: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(run, out)
    assert not out.exists()
    monkeypatch.undo()
    before = write_report(run, out)["html"].read_bytes()
    assert before == written["html"].read_bytes()  # the same run gives the same bytes

    def full_disk(file, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_report(run, out)
    assert (out / "report.html").read_bytes() == before
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_bad_runs_are_named(tmp_path):
    with pytest.raises(InputError, match=r"config\.json"):
        write_report(tmp_path / "absent")
    run = synthetic_run(tmp_path / "run", questions=3)
    nodes = run / "records" / "nodes.parquet"
    records(run, "nodes").drop(columns="success_range").to_parquet(nodes)
    with pytest.raises(InputError, match=r"nodes\.parquet: found no column 'success_range'"):
        write_report(run)
    nodes.write_bytes(b"not parquet")
    with pytest.raises(InputError, match=r"nodes\.parquet: found an unreadable table"):
        write_report(run)
    (run / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json: found no valid JSON"):
        write_report(run)
    assert not (run / "report").exists()
