"""The run folder under bad storage and several jobs: what was written is read back, or named."""

import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from jaxopd import runs
from jaxopd.errors import InputError
from jaxopd.runs import RunFolder

CONFIG = {"seed": 1}
ARRAYS = {"tokens": np.arange(12, dtype=np.int32).reshape(3, 4), "right": np.array([True, False, True])}


@pytest.fixture
def run(tmp_path) -> RunFolder:
    return RunFolder.create(str(tmp_path / "run"), CONFIG)


def assert_whole(run: RunFolder, piece: str = "stage/00000") -> None:
    arrays, facts = run.load(piece)
    assert facts == {"n": 3}
    assert arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(arrays[name], array)


def test_the_first_commit_stands(run) -> None:
    other = RunFolder.create(run.path, CONFIG)
    run.save("stage/00000", ARRAYS, {"n": 3})
    other.save("stage/00000", {"tokens": np.zeros(2)}, {"n": 9})
    assert_whole(other)
    attempts = [path for path in Path(run.path, "pieces/stage/00000").iterdir() if any(path.rglob("zarr.json"))]
    assert len(attempts) == 1


def test_an_attempt_without_a_marker_is_no_piece(run, monkeypatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "write_if", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run.save("stage/00000", {"tokens": np.zeros(2)})
    assert not run.done("stage/00000")
    with pytest.raises(InputError, match=r"found no done\.json"):
        run.load("stage/00000")
    run.save("stage/00000", ARRAYS, {"n": 3})
    assert_whole(run)


@pytest.mark.parametrize(
    "damage", [lambda chunk: chunk.unlink(), lambda chunk: chunk.write_bytes(chunk.read_bytes()[:-9])]
)
def test_a_damaged_array_is_named(run, damage) -> None:
    run.save("stage/00000", ARRAYS, {"n": 3})
    chunk = next(path for path in Path(run.path, "pieces").rglob("tokens/c/**/*") if path.is_file())
    damage(chunk)
    with pytest.raises(InputError, match="tokens"):
        run.load("stage/00000")


def test_half_a_table_and_half_a_marker_are_named(run) -> None:
    run.write_table("records/nodes.parquet", pd.DataFrame({"t": np.arange(99)}))
    run.save("stage/00000", ARRAYS)
    for key, read in (("records/nodes.parquet", run.read_table), ("pieces/stage/00000/done.json", run.read_json)):
        path = Path(run.path, key)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(InputError, match=key):
            read(key)


def test_a_run_of_old_is_read(run) -> None:
    """Before attempts had names, arrays lay beside the marker, which held no checksums."""
    run.save("stage/00000", ARRAYS, {"n": 3})
    piece = Path(run.path, "pieces/stage/00000")
    marker = run.read_json("pieces/stage/00000/done.json")
    for array in (piece / marker.pop("attempt")).iterdir():
        array.rename(piece / array.name)
    del marker["checksums"]
    run.write_json("pieces/stage/00000/done.json", marker)
    assert_whole(run)


class Failing:
    """Calls a function, but fails at first with the given chance, as storage that is away for a moment."""

    def __init__(self, function, chance: float, seed: int = 0):
        self.function, self.chance, self.draw, self.failures = function, chance, random.Random(seed), 0

    def __call__(self, *arguments, **options):
        if self.draw.random() < self.chance:
            self.failures += 1
            raise ValueError("UNAVAILABLE: the storage is away [source locations='x']")
        return self.function(*arguments, **options)


class FailingStore:
    def __init__(self, store, chance: float):
        self.store, self.read, self.write = store, Failing(store.read, chance, 1), Failing(store.write, chance, 2)
        self.list = Failing(store.list, chance, 3)


def test_storage_that_fails_at_times_loses_nothing(run, monkeypatch) -> None:
    monkeypatch.setattr(runs, "PAUSES", (0.0,) * 40)
    monkeypatch.setattr(runs.ts, "open", Failing(runs.ts.open, 0.3))
    run.store = store = FailingStore(run.store, 0.3)
    for index in range(10):
        run.save(f"stage/{index:05d}", ARRAYS, {"n": 3})
        run.write_table(f"records/{index}.parquet", pd.DataFrame({"n": [index]}))
    failing = runs.ts.open, store.read, store.write, store.list
    for index in range(10):
        assert_whole(run, f"stage/{index:05d}")
        assert run.read_table(f"records/{index}.parquet").n.tolist() == [index]
    assert min(operation.failures for operation in failing) > 0


def test_storage_that_stays_away_is_named(run, monkeypatch) -> None:
    monkeypatch.setattr(runs, "PAUSES", (0.0, 0.0))
    run.store = FailingStore(run.store, 1.0)
    with pytest.raises(InputError, match=r"failed 3 times \(the storage is away\).*nothing is lost"):
        run.save("stage/00000", {})


def test_a_run_that_another_job_begins_meanwhile_is_joined(tmp_path, monkeypatch) -> None:
    """Both find an empty folder; the slower one takes the faster one's configuration as it stands."""
    path, write = str(tmp_path / "run"), RunFolder.write_if

    def late(self, key, value, generation):
        monkeypatch.setattr(RunFolder, "write_if", write)
        RunFolder.create(path, CONFIG)
        return write(self, key, value, generation)

    monkeypatch.setattr(RunFolder, "write_if", late)
    with pytest.raises(InputError, match="field seed: found 1, what the run here began with"):
        RunFolder.create(path, {"seed": 2})
    assert RunFolder.existing(path).config() == CONFIG


def test_another_run_s_settings_are_named_inside_objects(tmp_path):
    RunFolder.create(str(tmp_path), {"objective": {"name": "full", "k": 4, "clip": None}})
    with pytest.raises(InputError, match=r"field objective\.k: found 4, .* expected 8"):
        RunFolder.create(str(tmp_path), {"objective": {"name": "full", "k": 8, "clip": None}})
    with pytest.raises(InputError, match=r"field objective\.clip: found None, .* expected 'nothing'"):
        RunFolder.create(str(tmp_path), {"objective": {"name": "full", "k": 4}})
