"""Models against transformers' numbers for two tiny checkpoints, and against a float64 forward pass in numpy."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxopd_kernels import cache_attention

from jaxopd.errors import InputError
from jaxopd.models import (
    QwenConfig,
    hidden_states,
    init_model,
    load_checkpoint,
    load_model,
    logits,
    save_checkpoint,
    save_model,
)
from jaxopd.models.attention import causal_attention, combine
from jaxopd.models.config import Yarn
from jaxopd.models.qwen import linear, rotary_tables, rotate
from jaxopd.models.weights import hf_name
from jaxopd.rollouts import rollout

GOLDENS = Path(__file__).parent / "goldens"
TINY = QwenConfig(
    vocab_size=37,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    rope_theta=1e4,
    max_positions=64,
    initializer_range=0.3,
    eos_token_ids=(3,),
)
VARIANTS = {
    "qwen3 tied": {},
    "qwen3 untied, one key head": {"tie_embeddings": False, "num_kv_heads": 1},
    "qwen3 yarn": {"yarn": Yarn(4.0, 8, 1.1386294361119891)},
    "qwen3 yarn, untruncated": {"yarn": Yarn(2.0, 16, 0.9, 16.0, 2.0, False)},
    "qwen2 untied": {"model_type": "qwen2", "tie_embeddings": False, "head_dim": 4},
    "qwen2 tied": {"model_type": "qwen2", "head_dim": 4, "rms_norm_eps": 1e-3},
}


def random_model(seed=0, dtype="float32", **fields):
    """A random model whose norms and biases are random too: at one and zero they would hide mistakes."""
    model = init_model(dataclasses.replace(TINY, **fields), seed=seed, dtype=dtype)
    rng = np.random.default_rng(seed)

    def shake(leaf):
        return leaf if leaf.ndim > 1 else (leaf + 0.3 * rng.standard_normal(leaf.shape)).astype(leaf.dtype)

    nnx.update(model, jax.tree.map(shake, nnx.state(model)))
    return model


def weights(model):
    return {hf_name(path): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model))}


def batch(rows, side):
    """Pads rows of tokens on a side with a token that is no padding token, so that a leak would show."""
    width = max(map(len, rows))
    ids, mask = np.full((len(rows), width), 5, np.int32), np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        here = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, here], mask[i, here] = row, True
    return ids, mask


# The independent route: one sequence, one head at a time, float64, nothing of jaxopd but the weights.


def reference_logits(config, w, tokens):
    w = {name: np.asarray(value, np.float64) for name, value in w.items()}
    rotary = reference_frequencies(config)
    x = w["model.embed_tokens.weight"][tokens]
    for layer in range(config.num_layers):
        at = f"model.layers.{layer}."
        x = x + reference_attention(config, w, at, norm(config, x, w[at + "input_layernorm.weight"]), *rotary)
        y = norm(config, x, w[at + "post_attention_layernorm.weight"])
        gate, up = y @ w[at + "mlp.gate_proj.weight"].T, y @ w[at + "mlp.up_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[at + "mlp.down_proj.weight"].T
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return norm(config, x, w["model.norm.weight"]) @ head.T


def norm(config, x, weight):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * weight


def reference_frequencies(config):
    frequencies = 1 / config.rope_theta ** (np.arange(config.head_dim // 2) * 2 / config.head_dim)
    yarn = config.yarn
    if yarn is None:
        return frequencies, 1.0
    # A frequency that turns more than beta_fast times over the original context stays, one under beta_slow is slowed.
    ends = [
        np.log(yarn.original_max_positions / (turns * 2 * np.pi)) / np.log(config.rope_theta) * config.head_dim / 2
        for turns in (yarn.beta_fast, yarn.beta_slow)
    ]
    low, high = (np.floor(ends[0]), np.ceil(ends[1])) if yarn.truncate else ends
    low, high = max(low, 0), min(high, config.head_dim - 1)
    slowed = np.clip((np.arange(len(frequencies)) - low) / (high - low), 0, 1)
    return frequencies * (1 - slowed) + frequencies / yarn.factor * slowed, yarn.attention_factor


def reference_attention(config, w, at, x, frequencies, factor):
    T, h = len(x), config.head_dim

    def project(name):
        y = x @ w[f"{at}self_attn.{name}_proj.weight"].T + w.get(f"{at}self_attn.{name}_proj.bias", 0.0)
        y = y.reshape(T, -1, h)
        if name != "v":
            if config.model_type == "qwen3":
                y = norm(config, y, w[f"{at}self_attn.{name}_norm.weight"])
            turn = factor * np.exp(1j * np.arange(T)[:, None] * frequencies)
            y = (y[..., : h // 2] + 1j * y[..., h // 2 :]) * turn[:, None]
            y = np.concatenate([y.real, y.imag], -1)
        return y

    q, k, v = project("q"), project("k"), project("v")
    out = np.zeros((T, config.num_heads, h))
    for head in range(config.num_heads):
        group = head // (config.num_heads // config.num_kv_heads)
        for t in range(T):
            scores = np.exp(k[: t + 1, group] @ q[t, head] / np.sqrt(h))
            out[t, head] = scores @ v[: t + 1, group] / scores.sum()
    return out.reshape(T, -1) @ w[f"{at}self_attn.o_proj.weight"].T


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_against_numpy(variant):
    model = random_model(**VARIANTS[variant])
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, TINY.vocab_size, length) for length in (21, 8, 1)]
    for side in ("left", "right"):
        ids, mask = batch(rows, side)
        found = np.asarray(logits(model, ids, mask))
        assert found.dtype == np.float32
        assert np.isfinite(found).all(), "padded positions too"
        for i, row in enumerate(rows):
            expected = reference_logits(model.config, weights(model), row)
            np.testing.assert_allclose(found[i, mask[i]], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3", "qwen2"])
def test_checkpoints_of_transformers(name):
    """qwen3 is untied, in shards, with YaRN over 8 of 32 positions; qwen2 is tied, in one file."""
    golden, model = np.load(GOLDENS / name / "golden.npz"), load_model(GOLDENS / name)
    rows = [golden[f"ids_{i}"] for i in range(3)]
    for side in ("left", "right"):
        ids, mask = batch(rows, side)
        found = np.asarray(logits(model, ids, mask))
        for i in range(3):
            np.testing.assert_allclose(found[i, mask[i]], golden[f"logits_{i}"], rtol=1e-5, atol=1e-5)
    rolled = rollout(model, rows, max_tokens=8, temperature=0.0, stop_ids=())
    np.testing.assert_array_equal(rolled.tokens, [golden[f"greedy_{i}"] for i in range(3)])


def test_head_of_hidden_states_gives_logits():
    model = random_model(tie_embeddings=False)
    ids = np.arange(10)[None]
    product = np.asarray(hidden_states(model, ids), np.float64) @ np.asarray(model.head(), np.float64).T
    np.testing.assert_allclose(product, np.asarray(logits(model, ids)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "ids, mask, said",
    [
        (np.array([[1, 37]]), None, "found id 37, expected 0 to 36"),
        (np.array([[-1, 2]]), None, "found id -1"),
        (np.array([1, 2]), None, "expected integers"),
        (np.array([[1.0, 2.0]]), None, "expected integers"),
        (np.array([[1, 2]]), np.ones((2, 2)), "mask: found shape"),
    ],
)
def test_wrong_tokens(ids, mask, said):
    with pytest.raises(InputError, match=said):
        logits(random_model(), ids, mask)


def test_padding_may_hold_any_id():
    model = random_model()
    ids, mask = np.array([[-100, 4, 9], [1, 2, 3]]), np.array([[False, True, True], [True, True, True]])
    found = np.asarray(logits(model, ids, mask))
    np.testing.assert_allclose(found[0, 1:], np.asarray(logits(model, ids[:1, 1:]))[0], rtol=1e-6, atol=1e-6)


def softmax_attention(q, k, v, mask):
    """Attention of one sequence in float64: output and log-sum-exp."""
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(mask, scores, -np.inf)
    lse = np.log(np.exp(scores).sum(-1))
    return np.einsum("hts,shd->thd", np.exp(scores - lse[..., None]), v), lse.T


def test_attention_in_blocks_and_in_parts():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 11, heads, 6)) for heads in (4, 2, 2))
    mask = rng.random((1, 11)) < 0.8
    mask[0, 0] = True
    arrays = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    causal = np.tril(np.ones((11, 11), bool)) & mask
    expected, lse = softmax_attention(q[0], k[0], v[0], causal)
    for block in (4, 512):
        found = causal_attention(*arrays, jnp.asarray(mask), block=block)
        np.testing.assert_allclose(np.asarray(found)[0], expected, rtol=1e-5, atol=1e-6)

    early = np.arange(11) < 5  # rows 0 to 4 have no key in the second part
    cached = arrays[0], *(x.swapaxes(1, 2) for x in arrays[1:])
    parts = [cache_attention(*cached, jnp.asarray(causal & side)[None]) for side in (early[None], ~early[None])]
    whole, whole_lse = combine(*parts)
    np.testing.assert_allclose(whole[0], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(whole_lse[0], lse, rtol=1e-5, atol=1e-5)
    assert not np.asarray(parts[1][0])[0, :5].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", ["qwen3 tied", "qwen3 yarn", "qwen2 untied"])
def test_saving_and_loading_keeps_every_bit(variant, dtype, tmp_path):
    model = random_model(dtype=dtype, **VARIANTS[variant])
    save_model(model, tmp_path / "hf")
    save_checkpoint(model, tmp_path / "orbax")
    before = weights(model)
    assert ("lm_head.weight" in before) is not model.config.tie_embeddings
    for loaded in (load_model(tmp_path / "hf", dtype=dtype), load_checkpoint(tmp_path / "orbax")):
        assert loaded.config == model.config
        after = weights(loaded)
        assert set(after) == set(before)
        for name, array in before.items():
            assert after[name].dtype == jnp.dtype(dtype)
            assert after[name].tobytes() == array.tobytes(), name
    assert sorted(p.name for p in (tmp_path / "hf").iterdir()) == ["config.json", "model.safetensors"]


def test_saved_folder_is_what_transformers_reads(tmp_path):
    """The header of the file and the fields of config.json, read by the formats' descriptions alone."""
    model = random_model(dtype="bfloat16", tie_embeddings=False)
    save_model(model, tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}
    transformers = json.loads((GOLDENS / "qwen3" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(header) == set(transformers)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["dtype"] == "bfloat16"
    theirs = json.loads((GOLDENS / "qwen3" / "config.json").read_text())
    assert set(config) <= set(theirs)


def test_widening_and_rounding(tmp_path):
    exact = random_model()
    save_model(exact, tmp_path)
    rounded = weights(load_model(tmp_path, dtype="bfloat16"))
    for name, array in weights(exact).items():
        np.testing.assert_array_equal(rounded[name], array.astype(jnp.bfloat16), err_msg=name)


def test_older_style_of_config(tmp_path):
    """transformers 4 kept rope_theta at the top, yarn in rope_scaling and called dtype torch_dtype."""
    folder = tmp_path / "older"
    shutil.copytree(GOLDENS / "qwen3", folder)
    raw = json.loads((folder / "config.json").read_text())
    rope = raw.pop("rope_parameters")
    raw["rope_theta"], raw["torch_dtype"] = rope.pop("rope_theta"), raw.pop("dtype")
    raw["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    (folder / "config.json").write_text(json.dumps(raw))
    newer = load_model(GOLDENS / "qwen3")
    assert load_model(folder).config == newer.config
    assert newer.config.yarn == Yarn(4.0, 8, 0.1 * np.log(4) + 1)


def test_end_tokens_come_from_the_generation_config(tmp_path):
    save_model(random_model(), tmp_path)
    assert QwenConfig.from_json(tmp_path / "config.json").eos_token_ids == (3,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 7]}')
    assert QwenConfig.from_json(tmp_path / "config.json").eos_token_ids == (3, 7)


@pytest.mark.parametrize("rows", [1, 15, 16, 32, 64, 65])
def test_linear_of_any_number_of_rows(rows):
    """A CPU takes another product for 16 to 64 rows; value and gradients must not tell which."""
    rng = np.random.default_rng(rows)
    x, weight, cotangent = (rng.normal(size=shape) for shape in ((rows, 96), (40, 96), (rows, 40)))
    x16, weight16 = jnp.asarray(x, jnp.bfloat16), jnp.asarray(weight, jnp.bfloat16)
    y, pullback = jax.vjp(lambda x, w: linear(x, w, jnp.dtype("float32")), x16, weight16)
    for platform, barred in (("cpu", 16 <= rows <= 64), ("cuda", False), ("tpu", False)):
        lowered = jax.jit(linear).trace(x16, weight16).lower(lowering_platforms=(platform,)).as_text()
        assert ("optimization_barrier" in lowered) == barred, platform
    x, weight = np.asarray(x16, np.float64), np.asarray(weight16, np.float64)
    np.testing.assert_allclose(y, x @ weight.T, rtol=1e-5, atol=1e-5)
    d_x, d_weight = pullback(jnp.asarray(cotangent, jnp.float32))
    np.testing.assert_allclose(d_x, cotangent @ weight, rtol=2**-7, atol=0.05)
    np.testing.assert_allclose(d_weight, cotangent.T @ x, rtol=2**-7, atol=0.05)


def test_the_gradient_of_a_rotation_is_rounded_once():
    """Of bfloat16: the transposed rotation of the cotangent, within half a unit in the last place of its own size."""
    rng = np.random.default_rng(0)
    positions = jnp.arange(64)[None]
    tables = rotary_tables(dataclasses.replace(TINY, head_dim=8), positions)
    x, cotangent = (jnp.asarray(rng.normal(size=(1, 64, 4, 8)), jnp.bfloat16) for _ in range(2))
    found = jax.jit(lambda x, ct: jax.vjp(lambda x: rotate(x, tables), x)[1](ct)[0])(x, cotangent)
    cos, sin = (np.asarray(table, np.float64)[..., 4:] for table in tables)
    a, b = np.split(np.asarray(cotangent, np.float64), 2, -1)
    exact = np.concatenate([a * cos + b * sin, b * cos - a * sin], -1)
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=2**-8, atol=1e-6)
