"""experiments/rethinking: every script runs with --smoke, and what the tables say of planted differences."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "experiments" / "rethinking"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("runs", "results"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """One folder for all scripts, so that they share runs as users' do."""
    return tmp_path_factory.mktemp("rethinking")


@pytest.mark.slow  # half a minute each
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_runs_and_leaves_its_results(script, runs):
    command = [sys.executable, str(FOLDER / f"{script}.py"), "--smoke", "--folder", str(runs / "runs")]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(runs / "compiled")
    environment.pop("JAX_ENABLE_COMPILATION_CACHE", None)
    subprocess.run(command, check=True, env=environment)
    results = runs / "runs-smoke" / "results"
    (about,) = results.glob(f"{script}*.json")
    tables = list(results.glob(f"{script}*.csv"))
    assert f"experiments/rethinking/{script}.py --smoke" in about.read_text()
    assert tables
    assert all(len(pd.read_csv(table)) for table in tables)


def test_every_script_is_in_the_readme():
    readme = (FOLDER / "README.md").read_text()
    for script in SCRIPTS:
        assert f"`{script}.py`" in readme
        assert f"python experiments/rethinking/{script}.py" in (FOLDER / f"{script}.py").read_text()


@pytest.fixture
def results(monkeypatch):
    """The module of that name in the folder; its neighbours leave with it, as their names are common words."""
    monkeypatch.syspath_prepend(str(FOLDER))
    known = [path.stem for path in FOLDER.glob("*.py")]
    for name in known:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("results")
    for name in known:
        sys.modules.pop(name, None)


def planted(gains: dict[str, float]) -> pd.DataFrame:
    """Shares of right responses [run, question] of five seeds an arm."""
    rng = np.random.default_rng(0)
    question = rng.uniform(0.4, 0.9, 90)
    rows = {(arm, seed): question + gain + rng.normal(0, 0.05, 90) for arm, gain in gains.items() for seed in range(5)}
    return pd.DataFrame(rows).T


def test_contrasts_find_what_was_planted(results):
    gains = {"plain": 0.0, "better": 0.05, "worse": -0.05, "same": 0.0}
    found = results.contrasts(planted(gains), "plain").set_index("arm")
    assert found["verdict"].to_dict() == {"better": "higher", "worse": "lower", "same": "not distinguishable"}
    np.testing.assert_allclose(found["difference"], [0.05, -0.05, 0.0], atol=0.01)
    assert (found["seeds_low"] < found["difference"]).all()
    assert (found["difference"] < found["questions_high"]).all()


def test_a_gain_that_differs_from_seed_to_seed_is_not_told_from_none(results):
    correct = planted({"plain": 0.0, "better": 0.05})
    for seed in range(5):
        correct.loc[("better", seed)] += 0.08 * (seed - 2)
    (row,) = results.contrasts(correct, "plain").to_dict("records")
    assert row["questions_low"] > 0, "over questions alone it looks sure"
    assert row["seeds_low"] < 0
    assert row["verdict"] == "not distinguishable"
