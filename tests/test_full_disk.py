"""A full disk: exit code 2, one sentence, and the same command finishes the run once there is room."""

import errno
import json
import runpy
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from safetensors import SafetensorError

from jaxopd import cli
from jaxopd.models import QwenConfig
from jaxopd.runs import RunFolder
from jaxopd.toy.tokenizer import ID, WORDS, save_tokenizer

make_checkpoint = runpy.run_path(str(Path(__file__).with_name("make_checkpoint.py")))["make_checkpoint"]
CONFIG = QwenConfig(len(WORDS), 8, 8, 1, 2, 1, 4, max_positions=128, eos_token_ids=(ID["<|im_end|>"],))
QUESTION = json.dumps({"question": "is it so", "passage": "it is so", "answer": True}) + "\n"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_tokenizer(make_checkpoint(folder / "model", CONFIG))
    (folder / "questions.jsonl").write_text(2 * QUESTION)
    return folder


def diagnose(inputs, out):
    arguments = f"--student {inputs}/model --teacher T={inputs}/model --task boolq --questions {inputs}/questions.jsonl"
    return cli.main(["diagnose", *arguments.split(), "--rollouts", "4", "--max-tokens", "8", "--out", str(out)])


FULL = "found no free disk space, expected room for the run; free some and give the same command again"


NO_SPACE = 'RESOURCE_EXHAUSTED: Failed writing: "k.__lock": Failed to write 9 bytes: No space left on device'


@pytest.mark.parametrize("refused", ["config.json", "env.json", "pieces/rollouts/00001/done.json", "records/"])
def test_as_the_storage_reports_it(refused, inputs, tmp_path, capsys, monkeypatch):
    """A disk that fills at a known write; the same command finishes the run once there is room."""

    class Filling:
        def __init__(self, store):
            self.store = store

        def write(self, key, value, **condition):
            if key.startswith(refused):
                raise ValueError(NO_SPACE)
            return self.store.write(key, value, **condition)

        def __getattr__(self, name):
            return getattr(self.store, name)

    create = RunFolder.__init__

    def filling(self, path):
        create(self, path)
        self.store = Filling(self.store)

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "__init__", filling)
        assert diagnose(inputs, tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert error == f"jaxopd: {tmp_path / 'run'}: {FULL}\n"
    assert diagnose(inputs, tmp_path / "run") == 0


@pytest.mark.parametrize(
    "error, where",
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/report.html"), "a/report.html"),
        (OSError(errno.ENOSPC, "No space left on device"), "output"),  # a write to an open file names none
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "output"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "output"),
    ],
)
def test_as_files_report_it(error, where, capsys, monkeypatch):
    def full(out):
        raise error

    monkeypatch.setattr("jaxopd.report.write_report", full)
    assert cli.main(["report", "run"]) == 2
    assert capsys.readouterr().err == f"jaxopd: {where}: found no free disk space, expected room for it\n"


def test_other_failures_are_not_hidden(monkeypatch):
    def broken(out):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("jaxopd.report.write_report", broken)
    with pytest.raises(OSError, match="Input/output"):
        cli.main(["report", "run"])


@pytest.fixture
def disk(tmp_path):
    """A file system of its own, of a size that can be changed."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def resize(pages, *remount):
        options = ",".join([*remount, f"size={4 * pages}k"])
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a file system of its own can be mounted by root alone: {done.stderr.strip()}")

    resize(1)
    yield folder, lambda pages: resize(pages, "remount")
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills(inputs, tmp_path, disk, capsys):
    """The disk grows a little whenever the run fills it, so that the run is cut in many places and ends the same."""
    assert diagnose(inputs, tmp_path / "run") == 0
    capsys.readouterr()
    folder, resize = disk
    pages, cut = 1, 0
    while diagnose(inputs, folder / "run") == 2:
        error = capsys.readouterr().err
        assert error.startswith("jaxopd: ")
        assert error.count("\n") == 1
        assert "found no free disk space" in error
        pages, cut = pages + 1 + pages // 4, cut + 1
        assert pages < 10_000
        resize(pages)
    assert cut > 5
    whole, resumed = (RunFolder.existing(str(run)) for run in (tmp_path / "run", folder / "run"))
    for table in ("questions", "paths", "nodes", "tokens"):
        pd.testing.assert_frame_equal(
            resumed.read_table(f"records/{table}.parquet"), whole.read_table(f"records/{table}.parquet")
        )
    assert not [p for p in folder.rglob("*") if "lock" in p.name or p.name.startswith(".report")]
