"""experiments/unmasking on finished runs: every script, degenerate runs included, and the smoke run of the whole."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from jaxopd.diagnose.records import empty_nodes
from jaxopd.verbs.compare import Compare

pytestmark = pytest.mark.slow  # a minute each, most of it compiling

FOLDER = Path(__file__).resolve().parents[1] / "experiments" / "unmasking"
TEACHERS = ("Self-1C=self:1c", "Self-Sum-1C=self:sum1c", "Self-1C1W=self:1c1w", "T1=some/model")
NAMES = [teacher.partition("=")[0] for teacher in TEACHERS]
QUESTIONS = ["q|0", "q1", "q2", "q3"]


def write_run(folder: Path, *, excluded: bool, decisions: bool = True) -> Path:
    """Writes the records of a run: all questions analysed (with or without decision nodes), or all excluded."""
    rng = np.random.default_rng(0)
    question_rows = [
        {
            "question": q, "task": "toy", "prompt": "p", "gold": "1", "pass_rate": 0.5, "difficulty": "medium",
            "n_initial": 200, "n_targeted": 10, "excluded": "none correct" if excluded else "",
        }
        for q in QUESTIONS
    ]  # fmt: skip
    paths, nodes, tokens = [], [], []
    for question in () if excluded else QUESTIONS:
        for path in range(4):
            place = {"question": question, "path": path}
            paths.append(place | {"correct": path < 2, "length": 12, "finish": "stop", "text": "t"})
            for t in range(12):
                here = place | {"t": t, "token": int(rng.integers(5))}
                q = {f"q_{name}": rng.dirichlet(np.ones(2)) for name in NAMES}
                p = rng.dirichlet(np.ones(2))
                for k in range(2):
                    success = {f"p_succ_{name}": rng.uniform() for name in ("pooled", "on_policy", "bellman", "truth")}
                    seen = {"p": p[k], "visits": 90, "visits_on_policy": 40, "text": "w", "token": k}
                    tokens.append(here | seen | success | {name: values[k] for name, values in q.items()})
                for teacher in NAMES:
                    for estimator in ("pooled", "bellman", "truth"):
                        known = ("reverse_kl", "forward_kl", "js", "l2", "cosine", "p", "q")
                        scores = dict.fromkeys((*known, "entropy_student", "entropy_teacher"), 0.1)
                        scores |= {
                            name: rng.uniform() for name in ("reverse_kl", "js", "l2", "cosine", "success_range")
                        }
                        scores |= dict.fromkeys(("p_succ", "p_succ_low", "p_succ_high", "value", "visits"), 0.5)
                        scores |= {"advantage": rng.normal(), "ideal_norm": 0.1, "ideal_norm_restricted": 0.1}
                        align = rng.uniform(-1, 1) if decisions else np.nan
                        forms = {"align_reverse_kl": align, "align_reverse_kl_restricted": align, "align_jsd": align}
                        who = {"teacher": teacher, "estimator": estimator, "path_correct": path < 2, "text": "w"}
                        who |= {"decision": decisions, "support": 2, "depth": t / 12}
                        nodes.append(here | who | scores | forms)
    tables = {
        "questions": pd.DataFrame(question_rows),
        "paths": pd.DataFrame(paths, columns=["question", "path", "correct", "length", "finish", "text"]),
        "nodes": pd.DataFrame(nodes) if nodes else empty_nodes(),
        "tokens": pd.DataFrame(tokens) if tokens else pd.DataFrame({"question": [], "path": []}),
    }
    (folder / "records").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"teacher": TEACHERS, "n_sig": 20, "task": "toy"}))
    for name, table in tables.items():
        table.to_parquet(folder / "records" / f"{name}.parquet")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    return [
        write_run(root / "full", excluded=False),
        write_run(root / "undecided", excluded=False, decisions=False),
        write_run(root / "excluded", excluded=True),
    ]


@pytest.fixture
def scripts(monkeypatch):
    """Gives a loader of the folder's scripts, whose modules are gone afterwards: their names are common words."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for path in FOLDER.glob("*.py"):
        monkeypatch.delitem(sys.modules, path.stem, raising=False)
    yield importlib.import_module
    for path in FOLDER.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.mark.parametrize("which", [(2,), (0, 1, 2)], ids=["excluded", "full, undecided and excluded"])
def test_every_script_ends_with_its_results(scripts, runs, which, tmp_path) -> None:
    everything, study = scripts("all"), scripts("study")
    chosen = study.study(["--runs", *(str(runs[i]) for i in which), "--out", str(tmp_path)])
    everything.run(chosen)
    index = (tmp_path / "results" / "index.md").read_text()
    for title in (
        "findings beside ours",
        *(f"Table {n}:" for n in range(1, 7)),
        "Figure 3:",
        "Figure 7:",
        "Robustness:",
    ):
        assert title in index
    for figure in ("figure3", "figure4", "figureE1"):
        assert "<svg" in (tmp_path / "results" / f"{figure}.svg").read_text()


def test_every_script_is_part_of_the_whole_and_of_the_readme(scripts) -> None:
    parts = {path.stem for path in FOLDER.glob("*.py")} - {"all", "study", "claims", "paper", "drawing"}
    assert set(scripts("all").SCRIPTS) == parts
    readme = (FOLDER / "README.md").read_text()
    for part in parts:
        assert f"`{part}.py`" in readme
        text = (FOLDER / f"{part}.py").read_text()
        assert f"python experiments/unmasking/{part}.py" in text
        assert "--scale paper" in text
        assert "Deviations:" in text


def test_tables_hold_the_papers_numbers_for_the_settings_that_play_its_part(scripts, runs) -> None:
    study, table1, paper = scripts("study"), scripts("table1"), scripts("paper")
    setting = study.Setting("S boolean", runs[0], paper=("0.6B", "BoolQ"))
    made = table1.make(study.Study((setting,), runs[0]))
    shown = made.tables[0].cells.set_index(["estimator", "teacher"])["paper"]
    assert shown["pooled", "Self-1C"] == "0.047 \u00b1 0.021"
    assert shown["bellman", "T1"] == "0.018 \u00b1 0.024"  # the smallest external teacher
    assert {len(row) for row in paper.RANKING.values()} == {8}


def test_the_papers_own_differences_follow_from_its_tables(scripts, runs) -> None:
    study, claims = scripts("study"), scripts("claims")
    played = study.Setting("S boolean", runs[0], paper=("0.6B", "BoolQ"))
    printed = {claim.text: claim.paper(played) for claim in claims.CLAIMS}
    by_hand = {
        "the teacher is better aligned on incorrect paths than on correct ones": 0.044 - 0.011,
        "contexts of correct demonstrations beat external teachers": (47 + 47 + 41 - 16 - 18 - 18) / 3000,
        "a wrong demonstration beside the correct one hurts": 0.047 - 0.019,
        "similarity of the distributions goes against alignment": 0.029,
    }
    for text, number in by_hand.items():
        np.testing.assert_allclose(printed[text], number, atol=1e-12)
    own = study.Setting("full", runs[0])
    assert all(np.isnan(claim.paper(own)) for claim in claims.CLAIMS)


def test_a_planted_finding_is_found_and_its_opposite_too(scripts, runs, tmp_path) -> None:
    study, findings = scripts("study"), scripts("findings")
    verdicts = {}
    for name, sign in (("same", 1), ("opposite", -1)):
        folder = tmp_path / name
        write_run(folder, excluded=False)
        nodes = pd.read_parquet(folder / "records/nodes.parquet")
        many = pd.concat([nodes.assign(question=nodes.question + str(copy)) for copy in range(3)], ignore_index=True)
        noise = 0.05 * np.random.default_rng(1).standard_normal(len(many))
        many["align_reverse_kl"] = sign * np.where(many.path_correct, -0.5, 0.5) + noise
        many.to_parquet(folder / "records/nodes.parquet")
        found = findings.make(study.Study((study.Setting(name, folder),), tmp_path)).tables[1].numbers
        claim = found[found.finding.str.startswith("the teacher is better aligned on incorrect")]
        verdicts[name] = set(claim[claim.instrument != "bellman, global"].verdict)
    assert verdicts == {"same": {"same"}, "opposite": {"opposite"}}


def test_compare_puts_runs_side_by_side(runs, tmp_path) -> None:
    folders = tuple(str(run) for run in runs[:2])
    Compare(folders, statistic="mean", out=str(tmp_path)).run(Console(quiet=True))
    wide = pd.read_csv(tmp_path / "compare_runs.csv").set_index("teacher")
    nodes = pd.read_parquet(runs[0] / "records/nodes.parquet").query("estimator == 'bellman'")
    expected = nodes.groupby(["teacher", "question"]).align_reverse_kl.mean().groupby("teacher").mean()
    np.testing.assert_allclose(wide["mean full"], expected[wide.index], rtol=1e-5)
    assert wide["mean undecided"].isna().all()
    tests = pd.read_csv(tmp_path / "compare_tests.csv")
    assert set(tests.verdict) == {"not distinguishable"}


@pytest.mark.slow
def test_smoke(tmp_path) -> None:
    command = [sys.executable, str(FOLDER / "all.py"), "--smoke", "--out", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    subprocess.run(command, check=True, env=environment)
    assert "Table 9" in (tmp_path / "results" / "index.md").read_text()
