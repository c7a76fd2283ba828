"""Checkpoints read by parts: the same bits on every mesh, each byte once a process, little host memory beside them."""

import gc
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from jaxopd import cli
from jaxopd.errors import InputError
from jaxopd.models import (
    Qwen,
    QwenConfig,
    check_model,
    init_model,
    load_checkpoint,
    load_model,
    load_tokenizer,
    save_checkpoint,
    save_model,
    weights,
)
from jaxopd.models.checkpoints import is_checkpoint
from jaxopd.models.sharding import device_mesh, parameter_shardings
from jaxopd.toy import MODELS

HERE = Path(__file__).parent
GOLDENS = HERE / "goldens"
CountedReads = runpy.run_path(str(HERE / "counted_reads.py"))["CountedReads"]
TOY = QwenConfig(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=40,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=4,
    model_type="qwen2",
    tie_embeddings=False,
    max_positions=64,
)
MESHES = {"8": (8, 1), "4x2": (8, 2), "2x4": (8, 4), "1x8": (8, 8), "2x2": (4, 2), "1": (1, 1)}  # devices, a model


def killed(*_, **__) -> None:
    raise KeyboardInterrupt


def mesh_named(name: str) -> jax.sharding.Mesh:
    devices, model = MESHES[name]
    return device_mesh(devices, model=model)


def assert_same(found: Qwen, expected: Qwen) -> None:
    after, before = (dict(nnx.to_flat_state(nnx.state(model))) for model in (found, expected))
    assert found.config == expected.config
    assert after.keys() == before.keys()
    for path, array in before.items():
        assert after[path][...].dtype == array[...].dtype
        assert np.asarray(after[path][...]).tobytes() == np.asarray(array[...]).tobytes(), path


def assert_placed(model: Qwen, mesh: jax.sharding.Mesh, fsdp: bool) -> None:
    state = nnx.state(model)
    places = parameter_shardings(state, model.config, mesh, fsdp=fsdp)
    jax.tree.map(lambda array, place: pytest.fail(str(place)) if array.sharding != place else None, state, places)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Three shards as transformers writes them, and Qwen2 with biases in bfloat16."""
    rounded = tmp_path_factory.mktemp("rounded")
    save_model(init_model(TOY, dtype="bfloat16"), rounded)
    return {"qwen3 in shards": GOLDENS / "qwen3", "qwen2 in bfloat16": rounded}


@pytest.mark.parametrize(
    "stored, dtype",
    [("qwen3 in shards", "float32"), ("qwen2 in bfloat16", "float32"), ("qwen2 in bfloat16", "bfloat16")],
)
@pytest.mark.parametrize("fsdp", [False, True])
@pytest.mark.parametrize("mesh", ["8", "2x4", "1x8", "2x2"])
def test_every_mesh_gets_the_same_bits(stored, mesh, fsdp, dtype, folders) -> None:
    loaded = load_model(folders[stored], dtype=dtype, mesh=mesh_named(mesh), fsdp=fsdp)
    assert_same(loaded, load_model(folders[stored], dtype=dtype))
    assert_placed(loaded, mesh_named(mesh), fsdp)


@pytest.mark.parametrize("mesh, fsdp", [(None, False), ("8", False), ("2x4", False), ("2x4", True), ("1x8", False)])
def test_each_element_is_read_once(mesh, fsdp, folders, monkeypatch) -> None:
    reads = CountedReads(weights.safe_open)
    monkeypatch.setattr(weights, "safe_open", reads)
    model = load_model(folders["qwen2 in bfloat16"], mesh=mesh and mesh_named(mesh), fsdp=fsdp)
    assert reads.elements == {weights.hf_name(path): x[...].size for path, x in nnx.to_flat_state(nnx.state(model))}


def test_truncated_shard(tmp_path) -> None:
    folder = tmp_path / "truncated"
    shutil.copytree(GOLDENS / "qwen3", folder)
    shard = folder / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(InputError, match=f"{shard}: found no valid safetensors file .* expected a complete one"):
        load_model(folder, mesh=device_mesh(model=4))


@pytest.fixture(scope="module")
def saved(tmp_path_factory, folders) -> Path:
    """A checkpoint saved from eight devices."""
    path = tmp_path_factory.mktemp("checkpoint") / "saved"
    save_checkpoint(load_model(folders["qwen2 in bfloat16"], dtype="bfloat16", mesh=mesh_named("2x4"), fsdp=True), path)
    return path


@pytest.mark.parametrize("mesh, fsdp", [("1", False), ("2x2", False), ("2x2", True), ("4x2", True), ("8", False)])
def test_checkpoint_of_eight_devices_on_others(mesh, fsdp, saved, folders) -> None:
    restored = load_checkpoint(saved, mesh=mesh_named(mesh), fsdp=fsdp)
    assert_same(restored, load_model(folders["qwen2 in bfloat16"], dtype="bfloat16"))
    assert_placed(restored, mesh_named(mesh), fsdp)


def test_checkpoint_stands_where_a_hugging_face_folder_does(saved, folders) -> None:
    assert check_model(saved) == check_model(folders["qwen2 in bfloat16"])
    assert_same(load_model(saved), load_model(folders["qwen2 in bfloat16"]))  # widened to float32


def test_converted_folder_stands_where_the_model_did(tmp_path, capsys, monkeypatch) -> None:
    converted = tmp_path / "converted"
    command = ["convert", "--model", str(MODELS / "S"), "--out", str(converted), "--dtype", "float32"]
    with monkeypatch.context() as patched:
        patched.setattr(ocp.StandardCheckpointer, "save", killed)
        assert cli.main(command) == cli.INTERRUPTED
    assert not converted.exists()
    assert cli.main(command) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted"]
    assert f"checkpoint: {converted}" in capsys.readouterr().out.replace("\n", "")
    assert_same(load_model(converted), load_model(MODELS / "S"))
    assert load_tokenizer(converted).get_vocab() == load_tokenizer(MODELS / "S").get_vocab()
    assert not list(converted.glob("*.safetensors*"))
    assert cli.main(command) == cli.BAD_INPUT
    assert capsys.readouterr().err == f"jaxopd: {converted}: found something there, expected a new folder\n"


@pytest.fixture
def broken(saved, tmp_path) -> Path:
    """A copy of the checkpoint, to be spoilt."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"hidden_size": 64}, r"state: tensor embed_tokens.weight: found \(48, 32\), expected \(48, 64\)"),
        ({"num_hidden_layers": 3}, r"state: tensor layers.2.input_layernorm.weight: found none, expected \(32,\)"),
        ({"tie_word_embeddings": True}, r"state: tensor lm_head.weight: found \(48, 32\), expected none"),
        ({"dtype": "int8"}, "config.json: field dtype: found 'int8', expected float32 or bfloat16"),
    ],
)
def test_checkpoint_of_another_model(fields, said, broken) -> None:
    config = broken / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    for look in (load_checkpoint, check_model):
        with pytest.raises(InputError, match=f"{broken}/{said}"):
            look(broken)


@pytest.mark.parametrize("part", ["d", "ocdbt.process_0/d"], ids=["descriptions", "arrays"])
def test_truncated_checkpoint(part, tmp_path) -> None:
    save_checkpoint(load_model(MODELS / "S"), tmp_path)  # arrays under 1 kB would be kept with the descriptions
    file = max((tmp_path / "state" / part).iterdir(), key=lambda file: file.stat().st_size)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(InputError, match=f"{tmp_path}/state: found no readable checkpoint .*, expected a whole one"):
        load_checkpoint(tmp_path, mesh=device_mesh())
    gc.collect()  # a read that orbax left behind would warn


def test_an_exception_without_text_is_named(saved, monkeypatch) -> None:
    """Memory that ran out is no fault of the checkpoint."""

    def fails(*_) -> None:
        raise error

    monkeypatch.setattr(ocp.StandardCheckpointer, "restore", fails)
    error = KeyError()
    with pytest.raises(InputError, match=r"found no readable checkpoint \(KeyError\), expected a whole one"):
        load_checkpoint(saved)
    error = MemoryError()
    with pytest.raises(MemoryError):
        load_checkpoint(saved)


def test_killed_while_saving_it_leaves_no_checkpoint(broken, folders, monkeypatch) -> None:
    """Neither a new one's half nor an older one with the new one's config.json."""
    model = load_model(folders["qwen2 in bfloat16"])
    monkeypatch.setattr(ocp.StandardCheckpointer, "save", killed)
    for path in (broken, broken / "new"):
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(model, path)
        assert json.loads((path / "config.json").read_text())["dtype"] == "float32"  # before orbax's commit
        assert not is_checkpoint(path)


def test_arrays_without_a_mesh_follow_those_of_one(saved) -> None:
    """As those of a Hugging Face folder do: they are not bound to their device."""
    head = load_checkpoint(saved).head()
    spread = jax.device_put(np.ones(head.shape[1], head.dtype), jax.NamedSharding(device_mesh(), jax.P()))
    assert len((head @ spread).sharding.device_set) == 8


def test_folder_without_a_checkpoint(broken) -> None:
    shutil.rmtree(broken / "state")
    with pytest.raises(InputError, match=f"{broken}/state: found no such folder, expected an orbax checkpoint there"):
        load_checkpoint(broken)


LOAD = """
import sys
from peak_memory import held, peak
import jax
from jaxopd import load_model
from jaxopd.models.sharding import device_mesh
mesh = device_mesh(model=int(sys.argv[2]))
jax.block_until_ready(jax.device_put(jax.numpy.zeros(8), jax.NamedSharding(mesh, jax.P())))
before = held()
model = load_model(sys.argv[1], dtype="bfloat16", mesh=mesh, fsdp=True)
print(peak() - before)
"""


@pytest.mark.slow
def test_loading_the_real_shape_on_eight_devices_takes_little_beside_the_arrays(tmp_path, capsys) -> None:
    """Peak resident memory of the process, less that before loading; the fake devices' arrays are part of it."""
    make = runpy.run_path(str(HERE / "make_checkpoint.py"))
    folder = make["make_checkpoint"](tmp_path / "real", make["QWEN3_0_6B"], dtype="bfloat16", files=4)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent / "experiments")}
    try:
        for devices in (8, 4):
            command = [sys.executable, "-c", LOAD, str(folder), str(devices)]
            taken = int(subprocess.run(command, capture_output=True, check=True, env=environment).stdout)
            with capsys.disabled():
                print(f"\nload on {8 // devices}x{devices} devices: {taken / size:.3f} times the {size / 1e6:.0f} MB")
            assert size < taken < 1.2 * size
    finally:
        shutil.rmtree(folder)  # pytest would keep its 1.2 GB


TWO = """
import runpy, sys
import jax, numpy as np
from flax import nnx
from jaxopd.distributed import Hosts, fetch
from jaxopd.models import load_checkpoint, load_model, save_checkpoint, weights
from jaxopd.models.sharding import device_mesh

flags = dict(zip(sys.argv[4::2], sys.argv[5::2]))
Hosts(True, flags["--coordinator"], int(flags["--processes"]), int(flags["--process"])).join()
stored, saved = sys.argv[1:3]
reads = weights.safe_open = runpy.run_path(sys.argv[3])["CountedReads"](weights.safe_open)
model = load_model(stored, dtype="bfloat16", mesh=device_mesh(model=4))
print("read", reads.elements.total())
save_checkpoint(model, saved)
again = load_checkpoint(saved, mesh=device_mesh(model=2), fsdp=True)
alone = nnx.state(load_model(stored, dtype="bfloat16"))
for other in (model, again):
    jax.tree.map(np.testing.assert_array_equal, fetch(nnx.state(other)), jax.device_get(alone))
"""


@pytest.mark.slow
def test_two_processes_read_half_each_and_save_together(folders, tmp_path) -> None:
    here = runpy.run_path(str(HERE / "processes.py"))
    stored, saved = folders["qwen2 in bfloat16"], tmp_path / "saved"
    with here["started"](
        here["joined"](["-c", TWO, str(stored), str(saved), str(HERE / "counted_reads.py")], 2)
    ) as running:
        ended = here["finish"](running)
    assert [code for code, _, _ in ended] == [0, 0], ended
    whole = sum(x.size for x in jax.tree.leaves(nnx.state(load_model(stored, dtype="bfloat16"))))
    for _, out, _ in ended:
        read = next(int(line.split()[1]) for line in out.splitlines() if line.startswith("read"))
        assert 0.5 * whole <= read < 0.55 * whole  # norms are read by both
    assert_same(load_checkpoint(saved), load_model(stored, dtype="bfloat16"))


@pytest.mark.slow
def test_two_processes_convert_together(tmp_path) -> None:
    here = runpy.run_path(str(HERE / "processes.py"))
    out = tmp_path / "converted"
    command = ["-m", "jaxopd.cli", "convert", "--model", str(MODELS / "S"), "--out", str(out), "--dtype", "float32"]
    with here["started"](here["joined"](command, 2)) as running:
        ended = here["finish"](running)
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert [path.name for path in tmp_path.iterdir()] == ["converted"]
    assert_same(load_model(out), load_model(MODELS / "S"))
