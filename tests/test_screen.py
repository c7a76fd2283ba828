"""Screening end to end on the toy suite: tables recomputed from the records, resumption, exclusions."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from jaxopd.analysis.screening import BASELINE, accuracy_by_difficulty, availability, context_accuracy
from jaxopd.diagnose import DiagnoseConfig
from jaxopd.diagnose.screen import CONTEXTS, screen
from jaxopd.errors import InputError
from jaxopd.runs import RunFolder
from jaxopd.toy import MODELS
from jaxopd.verbs.compare import comparison_tables
from jaxopd.verbs.screen import Screen, screening_tables

pytestmark = pytest.mark.slow  # a minute each, most of it compiling

CONFIG = DiagnoseConfig(
    student=str(MODELS / "S"),
    teacher=CONTEXTS,
    task="toy",
    questions="choice:3:3",
    large=str(MODELS / "X"),
    rollouts=24,
    max_tokens=80,
    slots=64,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("screen") / "a"
    screen(CONFIG, str(out))
    return out


@pytest.fixture(scope="module")
def screening(folder) -> pd.DataFrame:
    return RunFolder.existing(str(folder)).read_table("records/screening.parquet")


@pytest.fixture(scope="module")
def demonstrations(folder) -> pd.DataFrame:
    return RunFolder.existing(str(folder)).read_table("records/demonstrations.parquet")


def test_every_context_is_sampled_or_says_why_not(screening) -> None:
    assert len(screening) == 3 * 7
    assert list(dict.fromkeys(screening.context)) == [BASELINE, *(c.partition("=")[0] for c in CONTEXTS)]
    sampled = screening[screening.available]
    assert (sampled.n == CONFIG.rollouts).all()
    assert sampled.pass_rate.between(0, 1).all()
    assert sampled.groupby("question").seed.nunique().eq(1).all()
    missing = screening[~screening.available]
    assert set(missing.missing) <= {"no demonstration", "prompt too long"}
    assert missing.pass_rate.isna().all()


def test_what_was_shown_is_recorded_and_can_be_found_again(screening, demonstrations) -> None:
    known = demonstrations.set_index(["question", "id"]).correct.groupby(level=[0, 1]).first()
    wanted = {"Self-1C": "correct", "Self-1C1W": "correct wrong", "Self-3C": "correct correct correct"}
    checked = 0
    for row in screening[screening.available & (screening.context != BASELINE)].itertuples():
        outcomes = ["correct" if known[row.question, one] else "wrong" for one in row.shown.split()]
        assert " ".join(outcomes) == row.shown_correct
        assert row.shown_correct == wanted.get(row.context, row.shown_correct)
        checked += 1
    assert checked > 10
    shown = screening.set_index(["question", "context"]).shown
    for question in screening.question.unique():
        if shown[question, "Self-1C1W"] and shown[question, "Self-3C"]:
            assert shown[question, "Self-1C1W"].split()[0] == shown[question, "Self-3C"].split()[0]


def test_tables_are_the_means_of_the_records(screening, demonstrations) -> None:
    kept = screening[screening.kept & screening.available]
    accuracy = context_accuracy(screening).set_index("context")
    np.testing.assert_allclose(
        accuracy.accuracy.dropna(), kept.groupby("context").pass_rate.mean()[accuracy.accuracy.dropna().index]
    )
    wide = kept.pivot(index="question", columns="context", values="pass_rate")
    paired = (wide["Self-1C"] - wide[BASELINE]).dropna()
    np.testing.assert_allclose(accuracy.loc["Self-1C", "difference"], paired.mean())
    binned = accuracy_by_difficulty(screening).set_index("context")
    assert (binned.n_hard + binned.n_medium + binned.n_easy == binned.n_all).all()
    counts = availability(screening, demonstrations).set_index("what").questions
    assert counts["screened"] == 3
    assert counts["kept"] + counts[counts.index.str.startswith("excluded")].sum() == 3
    both = set(demonstrations[demonstrations.correct & (demonstrations.source == "student")].question)
    assert counts["correct demonstration: student"] == len(both)


def test_a_correct_demonstration_helps(screening) -> None:
    wide = screening[screening.available].pivot(index="question", columns="context", values="pass_rate")
    assert wide["Self-1C"].mean() > wide[BASELINE].mean()


def test_lost_pieces_come_back_the_same(folder, tmp_path) -> None:
    again = tmp_path / "b"
    shutil.copytree(folder, again)
    shutil.rmtree(again / "records")
    for stage in ("screen", "summaries", "demonstrations-student"):
        sorted((again / "pieces" / stage).rglob("done.json"))[-1].unlink()
    screen(CONFIG, str(again))
    for name in ("screening", "demonstrations"):
        assert (again / f"records/{name}.parquet").read_bytes() == (folder / f"records/{name}.parquet").read_bytes()


def synthetic(pass_rates: dict[str, list[float]], excluded: list[str]) -> pd.DataFrame:
    """A screening table: pass rates per context, one a question, NaN where the context was not available."""
    rows = []
    for context, rates in pass_rates.items():
        for question, (rate, reason) in enumerate(zip(rates, excluded, strict=True)):
            rows.append({
                "question": str(question), "context": context, "pass_rate": rate, "available": not np.isnan(rate),
                "excluded": reason, "kept": not reason, "difficulty": "medium",
            })  # fmt: skip
    return pd.DataFrame(rows)


def test_differences_pair_a_context_with_the_baseline_of_its_own_questions() -> None:
    table = synthetic(
        {BASELINE: [0.5, 0.3, 0.4, 0.0, 0.9], "Self-1C1W": [0.7, 0.4, 0.7, 0.8, np.nan]},
        ["", "", "", "extremely hard", ""],
    )
    found = context_accuracy(table).set_index("context")
    np.testing.assert_allclose(found.loc[BASELINE, "accuracy"], (0.5 + 0.3 + 0.4 + 0.9) / 4)
    np.testing.assert_allclose(found.loc["Self-1C1W", "difference"], (0.2 + 0.1 + 0.3) / 3)
    assert found.loc["Self-1C1W", "n"] == 3
    assert np.isnan(found.loc[BASELINE, "difference"])
    assert found.loc[BASELINE, "verdict"] == ""
    assert found.loc["Self-1C1W", "verdict"] == "not distinguishable"


def test_a_context_no_question_has_is_a_row_of_dashes() -> None:
    table = synthetic({BASELINE: [0.5, 0.3], "Self-3C": [np.nan, np.nan]}, ["", ""])
    row = context_accuracy(table).set_index("context").loc["Self-3C"]
    assert np.isnan(row.accuracy)
    assert row.n == 0


def test_the_verb_writes_the_tables(folder, tmp_path) -> None:
    out = tmp_path / "c"
    shutil.copytree(folder, out)
    fields = {"student": CONFIG.student, "task": "toy", "questions": CONFIG.questions, "large": CONFIG.large}
    Screen(**fields, rollouts=24, max_tokens=80, slots=64, out=str(out)).run(Console(quiet=True))
    text = (out / "screening" / "table8.md").read_text()
    assert "Self-Sum-1C1W" in text
    for table in screening_tables(RunFolder.existing(str(out))):
        assert len(pd.read_csv(out / "screening" / f"{table.name}.csv")) == len(table.numbers)


@pytest.mark.parametrize("teacher", ["T2=some/model", f"{BASELINE}=self:1c"])
def test_contexts_of_other_models_are_refused(teacher, tmp_path) -> None:
    name = teacher.partition("=")[0]
    config = DiagnoseConfig(student=CONFIG.student, teacher=(teacher,), task="toy", questions="all:1:1")
    with pytest.raises(InputError, match=f"--context {name}: found"):
        screen(config, str(tmp_path / "no"))
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("folders", "statistic", "message"),
    [(("one",), "global", "expected two or more"), (("one", "two"), "median", "expected one of mean")],
)
def test_compare_refuses_what_it_cannot_compare(folders, statistic, message) -> None:
    with pytest.raises(InputError, match=message):
        comparison_tables(folders, statistic, "reverse_kl", None)
