"""What the wheel and the sdist hold, built here without a network, and what a run from the wheel alone can do."""

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from jaxopd.toy import MODELS

pytestmark = pytest.mark.slow  # the builds need hatchling, which the extra `test` brings

ROOT = Path(__file__).resolve().parents[1]
LARGEST_WHEEL = 12_000_000  # bytes
DATA = ("*.jinja", "*.js", "*.css", "*.json", "*.safetensors", "py.typed")
RUN = r"""
import pathlib, jaxopd, jaxopd_kernels
from importlib.resources import files
from jaxopd.tasks.prompts import render
from jaxopd.toy import MODELS
here = pathlib.Path(jaxopd.__file__).parents[1]
assert here == pathlib.Path(jaxopd_kernels.__file__).parents[1] and here in MODELS.parents, here
tokenizer = jaxopd.load_tokenizer(MODELS / "S")
prompt = jaxopd.models.chat_tokens(tokenizer, "chain x 3 y 5 start 4 a minus x")
assert jaxopd.rollout(jaxopd.load_model(MODELS / "S"), [prompt], n=2, max_tokens=4).tokens.shape[0] == 2
assert jaxopd.grade("math", r"\boxed{1 + x}", "x + 1") and "sum" in render("math", problem="a sum")
assert files("jaxopd.report").joinpath("templates", "explorer.js").read_text()
"""


def built(kind: str, folder: Path) -> Path:
    """Builds a wheel or an sdist from the checkout."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (file,) = folder.iterdir()
    return file


def sources() -> set[str]:
    """Every file of both packages, as a wheel names it."""
    found = set()
    for base, package in ((ROOT, "jaxopd"), (ROOT / "kernels", "jaxopd_kernels")):
        for pattern in ("*.py", *DATA):
            found |= {str(path.relative_to(base)) for path in (base / package).rglob(pattern)}
    return found


def test_the_wheel_holds_both_packages_their_data_and_the_licence(tmp_path):
    wheel = built("wheel", tmp_path)
    assert wheel.stat().st_size < LARGEST_WHEEL
    names = set(zipfile.ZipFile(wheel).namelist())
    information = {name for name in names if ".dist-info/" in name}
    assert names - information == sources()
    assert {"jaxopd/py.typed", "jaxopd_kernels/py.typed", "jaxopd/report/templates/report.html.jinja"} <= names
    assert {f"jaxopd/toy/models/{role.name}/model.safetensors" for role in MODELS.iterdir()} <= names
    assert {Path(name).name for name in information} == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "LICENSE"}


def test_the_sdist_builds_the_same_wheel(tmp_path):
    sdist = built("sdist", tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.glob("jaxopd-*")
    assert {"tests", "experiments", "CITATION.cff", "CHANGELOG.md"} <= {path.name for path in unpacked.iterdir()}
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "again")],
        cwd=unpacked, check=True, capture_output=True,
    )  # fmt: skip
    (again,) = (tmp_path / "again").iterdir()
    names = {name for name in zipfile.ZipFile(again).namelist() if ".dist-info/" not in name}
    assert names == sources()


def test_the_wheel_works_without_the_checkout(tmp_path):
    """Unpacked in an empty folder of a fresh environment, with this environment's other packages behind it."""
    wheel = built("wheel", tmp_path / "wheel")
    venv.create(tmp_path / "fresh", with_pip=False)
    packages = tmp_path / "packages"
    zipfile.ZipFile(wheel).extractall(packages)
    others = [path for path in sys.path if path.endswith("site-packages")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(packages), *others])}
    (tmp_path / "empty").mkdir()
    python = str(tmp_path / "fresh" / "bin" / "python")
    done = subprocess.run([python, "-c", RUN], cwd=tmp_path / "empty", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
