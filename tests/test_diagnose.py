"""The pipeline end to end on the toy suite: records recomputed by hand, resumption bit for bit."""

import dataclasses
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from jaxopd.diagnose import DiagnoseConfig, diagnose
from jaxopd.runs import RunFolder
from jaxopd.toy import MODELS

TABLES = ("questions", "paths", "nodes", "tokens")
EXITS = DiagnoseConfig(
    student=str(MODELS / "S"),
    teacher=("Self-1C=self:1c", f"T2={MODELS / 'T2'}"),
    task="toy",
    questions="all:1:3",
    rollouts=80,
    max_tokens=80,
    slots=64,
)
CONFIG = dataclasses.replace(EXITS, allocation="paper", n_min=30, n_sig=10, by_gradient=3, by_difference=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "a"
    diagnose(CONFIG, str(out))
    return out


@pytest.fixture(scope="module")
def tables(folder) -> dict[str, pd.DataFrame]:
    return {name: pd.read_parquet(folder / "records" / f"{name}.parquet") for name in TABLES}


def test_every_question_is_analysed_or_excluded_with_a_reason(tables) -> None:
    questions = tables["questions"]
    assert len(questions) == 3
    analysed = questions[questions.excluded == ""]
    assert len(analysed) > 0
    assert set(tables["nodes"].question) == set(analysed.question)
    assert set(questions.excluded) <= {"", "none correct", "none incorrect", "no demonstration", "prompt too long"}
    assert (analysed.n_targeted > 0).all()


def test_alignment_recomputed_from_the_token_table(tables) -> None:
    """Eq. 2.1, 2.3, 2.8 and 2.12 in float64 from P, Q, P_succ and visits alone."""
    nodes, tokens = tables["nodes"], tables["tokens"]
    compared = 0
    for (question, path, t, estimator), rows in nodes[nodes.teacher == "T2"].groupby(
        ["question", "path", "t", "estimator"]
    ):
        row = rows.iloc[0]
        here = tokens[(tokens.question == question) & (tokens.path == path) & (tokens.t == t)]
        success = here[f"p_succ_{estimator}"].to_numpy(float)
        visits = here.visits_on_policy if estimator == "on_policy" else here.visits
        kept = (visits.to_numpy() >= CONFIG.n_sig) & np.isfinite(success)
        assert row.support == kept.sum()
        if not row.decision:
            assert np.isnan(row.align_reverse_kl)
            continue
        p, q, success = here.p.to_numpy(float)[kept], here.q_T2.to_numpy(float)[kept], success[kept]
        p, q = p / p.sum(), q / q.sum()
        ideal = p * (success - p @ success)
        ratio = np.log(q) - np.log(p)
        teacher = p * (ratio - p @ ratio)
        np.testing.assert_allclose(row.advantage, (q - p) @ success, atol=1e-5)
        np.testing.assert_allclose(row.ideal_norm, np.linalg.norm(ideal), atol=1e-5)
        np.testing.assert_allclose(row.success_range, np.ptp(success), atol=1e-5)
        if np.linalg.norm(ideal) > 1e-3 and np.linalg.norm(teacher) > 1e-3:
            cosine = ideal @ teacher / np.linalg.norm(ideal) / np.linalg.norm(teacher)
            np.testing.assert_allclose(row.align_reverse_kl, cosine, atol=2e-3)
            compared += 1
    assert compared > 20


def test_sampled_forms_recomputed_from_the_token_table(tables) -> None:
    """(1/N) sum_i w_i (delta - P) over the tokens of S_u, in float64, for two kinds of weight w."""
    nodes, tokens = tables["nodes"], tables["tokens"]
    chosen = nodes[(nodes.teacher == "T2") & (nodes.estimator == "bellman") & nodes.decision]
    compared = 0
    for row in chosen.itertuples():
        here = tokens[(tokens.question == row.question) & (tokens.path == row.path) & (tokens.t == row.t)]
        here = here[(here.visits >= CONFIG.n_sig) & here.p_succ_bellman.notna()].astype({"samples": float})
        n, mass = here.samples.to_numpy(), (here.p.sum(), here.q_T2.sum())
        p = here.p.to_numpy(float) / mass[0]
        ideal = p * (here.p_succ_bellman - p @ here.p_succ_bellman)
        to_go = here.reward_to_go_T2 + np.log(mass[0] / mass[1]) - 1
        for form, w in (("minillm", to_go), ("dr_grpo", here.sample_advantage)):
            ascent = n * w - p * (n @ w)
            if np.linalg.norm(ideal) > 1e-3 and np.linalg.norm(ascent) > 1e-3:
                cosine = ideal @ ascent / np.linalg.norm(ideal) / np.linalg.norm(ascent)
                np.testing.assert_allclose(getattr(row, f"align_{form}"), cosine, atol=2e-3)
                compared += 1
    assert compared > 20


def test_launches_are_counted_where_they_went(tables) -> None:
    nodes, tokens = tables["nodes"], tables["tokens"]
    spine = nodes.drop_duplicates(["question", "path", "t"]).sort_values(["question", "path", "t"])
    before = {}
    for place, path in spine.groupby(["question", "path"]):
        taken = tuple(path.token)
        before |= {(*place, t): taken[:t] for t in range(len(taken))}
    prefix = [before[place] for place in zip(tokens.question, tokens.path, tokens.t, strict=True)]
    once = tokens.assign(prefix=prefix).drop_duplicates(
        ["question", "prefix", "token"]
    )  # paths share their first nodes
    targeted = tables["questions"].set_index("question").n_targeted
    assert once.groupby("question").launches.sum().to_dict() == targeted[targeted > 0].to_dict()


def test_values_are_in_their_ranges(tables) -> None:
    nodes = tables["nodes"]
    for name in (c for c in nodes if c.startswith("align_")):
        known = nodes[name].dropna()
        assert len(known) > 0
        assert known.between(-1, 1).all()
    assert nodes[["p", "q", "cosine"]].min().min() >= 0
    assert nodes[["p", "q", "cosine"]].max().max() <= 1 + 1e-5
    assert (nodes[["reverse_kl", "forward_kl", "js"]] > -1e-5).all().all()
    known = nodes.dropna(subset=["p_succ"])
    assert (known.p_succ_low <= known.p_succ + 1e-6).all()
    assert (known.p_succ <= known.p_succ_high + 1e-6).all()


def test_a_teacher_that_is_the_student_says_nothing(tmp_path) -> None:
    config = dataclasses.replace(CONFIG, teacher=(f"Same={MODELS / 'S'}",), limit=1, rollouts=40)
    run = diagnose(config, str(tmp_path / "same"))
    nodes = run.read_table("records/nodes.parquet")
    assert (nodes.reverse_kl.abs() < 1e-6).all()
    assert (nodes.advantage.dropna().abs() < 1e-5).all()


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / "records" / f"{name}.parquet").read_bytes() for name in TABLES}


def test_lost_pieces_come_back_the_same(folder, tmp_path) -> None:
    """What a kill leaves behind: a piece without its marker, and no merged records."""
    again = tmp_path / "b"
    shutil.copytree(folder, again)
    shutil.rmtree(again / "records")
    for stage in ("rollouts", "enrichment", "records"):
        for marker in sorted((again / "pieces" / stage).rglob("done.json"))[-1:]:
            marker.unlink()
    diagnose(CONFIG, str(again))
    assert contents(again) == contents(folder)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param(
            {"low_discrepancy": True, "teacher_agnostic": True, "decide": ("Self-1C", "T2")},
            id="even, agnostic, decided",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_exits_take_fewer_rollouts_and_none_on_a_path(folder, tmp_path, options) -> None:
    config = dataclasses.replace(EXITS, exit_tokens=4000, target_se=0.02, limit=2, **options)
    run = diagnose(config, str(tmp_path / "exits"))
    questions, cosines = (run.read_table(f"records/{name}.parquet") for name in ("questions", "cosines"))
    paper = pd.read_parquet(folder / "records" / "questions.parquet")
    assert (questions.n_initial <= CONFIG.rollouts).all()
    assert (questions.n_initial % 20 == 0).all()
    # An initial rollout is the same one however many are asked for.
    few, many = (RunFolder.existing(str(path)).load("rollouts/00000")[0] for path in (tmp_path / "exits", folder))
    width = min(few["tokens"].shape[1], many["tokens"].shape[1])
    np.testing.assert_array_equal(few["tokens"][:, :width], many["tokens"][: len(few["tokens"]), :width])
    analysed = questions[questions.excluded == ""]
    assert len(analysed) > 0
    assert set(cosines.question) == set(analysed.question)
    assert (cosines.se > 0).all()
    assert ((cosines.low < cosines.global_cosine) & (cosines.global_cosine < cosines.high)).all()
    assert analysed.n_targeted.sum() < paper.n_targeted.sum()
    for index in np.flatnonzero(questions.excluded == ""):
        launched = run.load(f"enrichment/{index:05d}")[0]
        paths = [row[row >= 0] for row in _paths_of(run, index)]
        for path, given, first in zip(launched["path"], launched["launch"], launched["tokens"][:, 0], strict=True):
            start = [*paths[path][: given - 1], first]
            assert not any(np.array_equal(start, other[:given]) for other in paths)


def _paths_of(run: RunFolder, index: int) -> list[np.ndarray]:
    """The first distinct correct and incorrect rollouts of a question, straight from its rollouts."""
    rolled, _ = run.load(f"rollouts/{index:05d}")
    found: dict[bool, list[np.ndarray]] = {True: [], False: []}
    for row, grade in zip(rolled["tokens"], rolled["grade"], strict=True):
        same = found[bool(grade == 1)]
        if len(same) < CONFIG.paths and not any(np.array_equal(row, other) for other in same):
            same.append(row)
    return found[True] + found[False]


@pytest.mark.slow
def test_kill_at_five_random_moments(folder, tmp_path) -> None:
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "jaxopd.cli", "diagnose", "--out", str(out)]
    for field in dataclasses.fields(CONFIG):
        value = getattr(CONFIG, field.name)
        if value != field.default and field.name != "teacher":
            command += [f"--{field.name.replace('_', '-')}", str(value)]
    for teacher in CONFIG.teacher:
        command += ["--teacher", teacher]
    whole = len(list((folder / "pieces").rglob("done.json")))
    for finished in sorted(random.Random(0).sample(range(1, whole), 5)):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(list((out / "pieces").rglob("done.json"))) < finished:
            assert process.poll() is None, "the run ended before it was killed"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert contents(out) == contents(folder)
