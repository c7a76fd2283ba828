"""The command line around the verbs: its version, whose options go where, and folders of another verb."""

from importlib.metadata import version

import pandas as pd
import pytest

from jaxopd import cli
from jaxopd.errors import InputError
from jaxopd.runs import RunFolder

SEVERAL = {"convert", "demo", "diagnose", "screen", "train"}
ALONE = {"report", "compare", "truth", "lab", "plan", "preflight", "evaluate", "corpus"}


def test_the_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"jaxopd {version('jaxopd')}\n"


@pytest.mark.parametrize("verb", sorted(SEVERAL | ALONE))
def test_help_names_hosts_where_several_can_work(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([verb, "--help"])
    assert ended.value.code == 0
    assert ("--coordinator" in capsys.readouterr().out) == (verb in SEVERAL)


@pytest.mark.parametrize("arguments", [["report"], ["compare", "another"], ["lab"]])
def test_a_folder_of_another_verb(arguments, tmp_path, capsys):
    RunFolder.create(str(tmp_path), {"objective": {}})
    verb, *others = arguments
    assert cli.main([verb, str(tmp_path), *others]) == cli.BAD_INPUT
    said = f"jaxopd: {tmp_path}: found a run of jaxopd train, expected one of jaxopd diagnose\n"
    assert capsys.readouterr().err == said


def test_a_report_of_a_screening(tmp_path, capsys):
    run = RunFolder.create(str(tmp_path), {"allocation": "exits"})
    run.write_table("records/screening.parquet", pd.DataFrame({"question": [1]}))
    assert cli.main(["report", str(tmp_path)]) == cli.BAD_INPUT
    assert "found a run of jaxopd screen, expected one of jaxopd diagnose" in capsys.readouterr().err


def test_a_run_into_the_folder_of_another_verb(tmp_path):
    RunFolder.create(str(tmp_path), {"allocation": "exits", "seed": 0})
    with pytest.raises(InputError, match="found a run of jaxopd diagnose, expected a new folder, or one of jaxopd tra"):
        RunFolder.create(str(tmp_path), {"objective": {}, "seed": 0})
