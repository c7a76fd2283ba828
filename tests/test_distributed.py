"""Several processes give the tokens, records and parameters of one."""

import functools
import json
import random
import re
import runpy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.flax import load_file

from jaxopd import load_model, rollout
from jaxopd.distributed import Hosts, decided, fetch, place
from jaxopd.errors import InputError
from jaxopd.models.sharding import device_mesh
from jaxopd.toy import MODELS

here = runpy.run_path(str(Path(__file__).with_name("processes.py")))
started, joined, finish = here["started"], here["joined"], here["finish"]

DIAGNOSE = (
    f"-m jaxopd.cli diagnose --student {MODELS / 'S'} --teacher Self-1C=self:1c --teacher T2={MODELS / 'T2'} "
    "--task toy --questions chain:1:3 --rollouts 40 --max-tokens 80 --slots 16 --exit-tokens 300"
).split()
TRAIN = (
    f"-m jaxopd.cli train --student {MODELS / 'S'} --teacher T2={MODELS / 'T2'} --task toy --questions chain:2:3 "
    "--batch 2 --rollouts 2 --mini-batch 2 --micro-batch 8 --max-tokens 40 --slots 16 --steps 1 --warmup 0 "
    "--learning-rate 1e-5"
).split()
SPLIT = ["--model-parallel", "4", "--fsdp"]  # the larger teacher lies across both processes
COMMANDS = {"diagnose": DIAGNOSE, "train": TRAIN}
COMMANDS |= {f"{name}, split": [*command, *SPLIT] for name, command in COMMANDS.items()}
TABLES = ("questions", "paths", "nodes", "tokens", "cosines")


ROLL_OUT = """
import json, sys
from jaxopd import load_model, rollout
from jaxopd.distributed import Hosts, fetch, is_first, place
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxopd.models.sharding import device_mesh

flags = dict(zip(sys.argv[2::2], sys.argv[3::2]))
Hosts(True, flags["--coordinator"], int(flags["--processes"]), int(flags["--process"])).join()
mesh = device_mesh()
assert mesh.size == 2 * jax.process_count()
there = place(np.arange(24.0).reshape(8, 3), NamedSharding(mesh, PartitionSpec("data")))
assert fetch({"x": there + 1})["x"].tolist() == (np.arange(24.0).reshape(8, 3) + 1).tolist()
rolled = rollout(load_model(sys.argv[1]), [[5, 6, 7, 8], [9, 10]], n=20, max_tokens=40, seed=3, stop_ids=(2,), slots=8)
if is_first():
    print(json.dumps({name: getattr(rolled, name).tolist() for name in ("tokens", "raw_logp", "finish")}))
"""


@pytest.mark.slow
def test_rollouts_of_two_processes_are_those_of_one() -> None:
    with started(joined(["-c", ROLL_OUT, str(MODELS / "S")], 2)) as running:
        ended = finish(running)
    assert [code for code, _, _ in ended] == [0, 0], ended
    together = json.loads(ended[0][1].splitlines()[-1])
    alone = rollout(
        load_model(MODELS / "S"), [[5, 6, 7, 8], [9, 10]], n=20, max_tokens=40, seed=3, stop_ids=(2,), slots=8
    )
    np.testing.assert_array_equal(together["tokens"], alone.tokens)
    np.testing.assert_array_equal(together["finish"], alone.finish)
    np.testing.assert_allclose(together["raw_logp"], alone.raw_logp, rtol=1e-5, atol=1e-5)


SLURM = """
import os, sys
number = sys.argv[2]
os.environ |= {"SLURM_JOB_ID": sys.argv[1], "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2"}
os.environ |= {"SLURM_PROCID": number, "SLURM_LOCALID": number}
from jaxopd.distributed import Hosts, decided
Hosts(distributed=True).join()
print("told", decided(lambda: "by " + number))
"""


@pytest.mark.slow
def test_slurm_names_the_processes() -> None:
    job = str(random.randrange(1 << 30))  # JAX takes the port from it
    with started([["-c", SLURM, job, number] for number in "01"]) as running:
        ended = finish(running)
    assert [(code, "told by 0" in out) for code, out, _ in ended] == [(0, True)] * 2, ended


@pytest.mark.parametrize(
    "hosts, variable, found",
    [
        (Hosts(coordinator="here", processes=2, process=0), "", "--coordinator: found 'here'"),
        (Hosts(coordinator="here:80", processes=2, process=2), "", "--process: found 2, expected 0 to 1"),
        (Hosts(coordinator="here:80", processes=2), "one", "JAX_PROCESS_ID: found 'one'"),
    ],
)
def test_bad_addresses(hosts, variable, found, monkeypatch) -> None:
    monkeypatch.setenv("JAX_PROCESS_ID", variable)
    with pytest.raises(InputError, match=re.escape(found)):
        hosts.join()


def test_a_single_process_decides_and_fetches_for_itself() -> None:
    Hosts().join()
    there = place({"x": np.arange(16.0)}, NamedSharding(device_mesh(), PartitionSpec("data")))
    assert len(there["x"].addressable_shards) == device_mesh().size
    assert fetch(there)["x"].tolist() == list(range(16))
    kept = object()
    assert decided(lambda: kept) is kept


@pytest.fixture(scope="module")
def outs(tmp_path_factory) -> Callable[[str, int], Path]:
    """A function from a name of COMMANDS and a number of processes to the folder of such a run, made when asked for."""
    folder = tmp_path_factory.mktemp("runs")

    @functools.cache
    def made(name: str, processes: int) -> Path:
        out = folder / f"{name}-{processes}"
        with started(joined([*COMMANDS[name], "--out", str(out)], processes)) as running:
            ended = finish(running)
        assert [code for code, _, _ in ended] == [0] * processes, ended
        printed = [line for _, out, _ in ended[1:] for line in out.splitlines() if not line.startswith("[Gloo]")]
        assert not printed, "process 0 alone prints"
        return out

    return made


@pytest.mark.slow
@pytest.mark.parametrize("run", [("diagnose", 2), ("diagnose", 4), ("diagnose, split", 2)], ids=str)
@pytest.mark.parametrize("table", TABLES)
def test_records_of_several_processes_are_those_of_one(outs, table, run) -> None:
    alone, together = (pd.read_parquet(outs(*key) / "records" / f"{table}.parquet") for key in (("diagnose", 1), run))
    assert len(alone) > 0
    floats = alone.select_dtypes("floating").columns
    pd.testing.assert_frame_equal(together.drop(columns=floats), alone.drop(columns=floats))
    cosines = floats[floats.str.startswith("align_")]
    if len(cosines):  # a rounding of 1e-6 turns a gradient of norm n by 1e-6 / n
        bound = 1e-5 + 1e-6 / np.minimum(alone["l2"], alone["ideal_norm"]).clip(lower=1e-30)
        pd.testing.assert_frame_equal(together[cosines].isna(), alone[cosines].isna())
        assert (together[cosines] - alone[cosines]).abs().max(axis=1).fillna(0).le(bound).all()
    ends = pd.Index(["low", "high"] if table == "cosines" else [])  # cosine -+ 1.96 se, each of which is within 1e-5
    np.testing.assert_allclose(together[ends], alone[ends], rtol=0, atol=2.96e-5)
    rest = floats.difference(cosines).difference(ends)
    np.testing.assert_allclose(together[rest], alone[rest], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("run", [("train", 2), ("train", 4), ("train, split", 2)], ids=str)
def test_parameters_of_several_processes_are_those_of_one(outs, run) -> None:
    """To a tenth of what the step changed, which is less than 1e-5."""
    folders = MODELS / "S", outs("train", 1) / "student", outs(*run) / "student"
    before, alone, together = (load_file(folder / "model.safetensors") for folder in folders)
    moved = {name: np.asarray(x, np.float32) - np.asarray(before[name], np.float32) for name, x in alone.items()}
    most = max(np.abs(change).max() for change in moved.values())
    assert 5e-6 < most < 1e-4
    assert together.keys() == alone.keys()
    for name, x in alone.items():
        np.testing.assert_allclose(together[name], x, rtol=0, atol=most / 10)
