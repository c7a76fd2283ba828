"""Makes a checkpoint with random weights in Hugging Face format, one tensor in memory at a time.

python tests/make_checkpoint.py FOLDER --tokenizer path/to/qwen3 [--real-shape] [--seed 0]

Small: hidden 64, 2 layers, float32, with the vocabulary of Qwen3. --real-shape: Qwen3-0.6B's shape in bfloat16.
"""

import argparse
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from jaxopd.models import Qwen, QwenConfig
from jaxopd.models.weights import hf_name

SMALL = QwenConfig(
    vocab_size=151936,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_positions=4096,
    eos_token_ids=(151645, 151643),
)
QWEN3_0_6B = QwenConfig(
    vocab_size=151936,
    hidden_size=1024,
    intermediate_size=3072,
    num_layers=28,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    max_positions=40960,
    eos_token_ids=(151645, 151643),
)
DTYPES = {"float32": ("F32", np.dtype("<f4")), "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16))}


def make_checkpoint(folder, config=SMALL, *, dtype="float32", tokenizer=None, seed=0, files=1):
    """Writes config.json and the tensors in so many files, and copies the tokenizer's from the folder `tokenizer`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_json(dtype), indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json") if tokenizer else ():
        shutil.copyfile(Path(tokenizer) / name, folder / name)
    abstract = nnx.eval_shape(lambda: Qwen(config, jnp.dtype(dtype), nnx.Rngs(0)))
    shapes = {hf_name(path): leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(abstract))}
    if files == 1:
        write_safetensors(folder / "model.safetensors", shapes, dtype, config.initializer_range, seed)
        return folder
    weight_map = {}
    for number, names in enumerate(np.array_split(list(shapes), files), 1):
        file = f"model-{number:05}-of-{files:05}.safetensors"
        part = {str(name): shapes[name] for name in names}
        write_safetensors(folder / file, part, dtype, config.initializer_range, seed + number)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def write_safetensors(path, shapes, dtype, scale, seed):
    """Writes the format by hand: 8 bytes of header length, the header, then the tensors end to end."""
    code, kind = DTYPES[dtype]
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        start, end = end, end + kind.itemsize * int(np.prod(shape))
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(seed)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            is_norm = len(shape) == 1 and not name.endswith("bias")
            for rows in np.array_split(np.arange(shape[0]), -(-shape[0] // 4096)):
                part = rng.standard_normal((len(rows), *shape[1:]), np.float32) * np.float32(scale)
                file.write((part + 1 if is_norm else part).astype(kind).tobytes())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="folder of Qwen3's tokenizer")
    parser.add_argument("--real-shape", action="store_true", help="Qwen3-0.6B's shape, in bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    config, dtype = (QWEN3_0_6B, "bfloat16") if given.real_shape else (SMALL, "float32")
    print(make_checkpoint(given.folder, config, dtype=dtype, tokenizer=given.tokenizer, seed=given.seed))
