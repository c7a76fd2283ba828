"""The report's page and files: well formed, safe against hostile text, complete on degenerate runs."""

import base64
import hashlib
import json
import re
import runpy
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from jaxopd.errors import InputError
from jaxopd.report import ranking_table, write_report
from jaxopd.report.html import SCRIPTS

made = runpy.run_path(str(Path(__file__).with_name("make_run.py")))
synthetic_run, HOSTILE = made["synthetic_run"], made["HOSTILE"]
TEACHERS, ESTIMATORS, FORMS = made["TEACHERS"], made["ESTIMATORS"], made["FORMS"]


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
        self.open, self.elements, self.text, self.scripts = [], [], {}, {}
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len(attrs) == len(dict(attrs)), f"<{tag}> repeats an attribute"
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.text[self.open[-1]] = self.text.get(self.open[-1], "") + data
        if self.open and self.open[-1] == "script":
            name = self.elements[-1][1].get("id", "program")
            self.scripts[name] = self.scripts.get(name, "") + data

    @property
    def ids(self):
        return {attrs["id"] for _, attrs in self.elements if "id" in attrs}

    def block(self, name):
        """The JSON of one script element."""
        return json.loads(self.scripts[name])


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
    assert [page.block(f"question-{number}")["gold"] for number in range(7)] == ["zero"] * 7


def test_the_script_finds_every_element_it_asks_for(written):
    page, program = (
        Page(written["html"]),
        "".join((files("jaxopd.report") / "templates" / n).read_text() for n in SCRIPTS),
    )
    asked = set(re.findall(r'byId\("([^"]+)"\)', program))
    assert {"head", "node", "table", "csv", "legend"} <= asked <= page.ids
    choices = re.search(r"const CHOICES = \{(.*?)\};", program, re.DOTALL)[1]
    assert set(re.findall(r"(\w+): HEAD", choices)) == {"colour", "teacher", "form", "estimator"} < page.ids
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval|fetch|XMLHttpRequest", program)


def test_model_text_cannot_leave_its_place(written):
    page, raw = Page(written["html"]), written["html"].read_text(encoding="utf-8")
    assert [tag for tag, _ in page.elements].count("script") == 1 + 1 + 7  # names, program, and one a question
    assert HOSTILE not in raw
    assert "<b>1C1W" not in raw
    assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)
    assert not set("\u202e\u2067\u2069\u2028\x00") & set(raw)
    assert "\u27e8U+202E\u27e9" in raw  # shown by its code point instead
    assert HOSTILE in page.text["dd"] + page.text["bdi"]
    block = page.block("question-0")
    assert {HOSTILE, "</script", "><!--", ' "quoted" ', "\u05e9\u05dc\u05d5\u05dd", "\U0001f642"} <= set(
        block["edges"]["text"]
    )
    assert block["prompt"].endswith(HOSTILE)
    assert page.block("head")["questions"][0]["id"] == f"chain-{HOSTILE}|000"
    for name in ("ranking", "correct_incorrect", "distribution"):
        ElementTree.parse(written[f"{name}.svg"])


def luminance(colour):
    """Relative luminance of #rrggbb (WCAG 2)."""
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def test_text_is_readable_in_both_schemes():
    style = (files("jaxopd.report") / "templates" / "report.css").read_text()
    schemes = [
        dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    ]
    assert len(schemes) == 2
    for scheme in schemes:
        light = {name: luminance(colour) for name, colour in scheme.items()}
        pairs = [("on", f"a{step}") for step in range(11)]
        pairs += [(text, on) for text in ("ink", "quiet", "plain", "good", "bad", "link") for on in ("ground", "wash")]
        for text, ground in pairs:
            dim, bright = sorted((light[text], light[ground]))
            assert (bright + 0.05) / (dim + 0.05) >= 4.5, f"{text} on {ground}: WCAG AA asks for 4.5"


def test_no_request_leaves_the_page(written):
    page, raw = Page(written["html"]), written["html"].read_text(encoding="utf-8")
    assert "http://" not in raw.replace("http://www.w3.org/", "")  # names of XML namespaces, which nothing fetches
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
    with pytest.raises(InputError, match=r"nodes\.parquet: found no valid parquet"):
        write_report(run)
    (run / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json: found no valid JSON"):
        write_report(run)
    assert not (run / "report").exists()
