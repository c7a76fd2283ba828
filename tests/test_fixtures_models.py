"""Models, engine, samplers and tokenizer against numbers that transformers and float64 autograd computed."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open

from jaxopd.models import chat_tokens, forward, hidden_states, linear, load_model, load_tokenizer, logits
from jaxopd.models.weights import hf_name
from jaxopd.rollouts import Engine, Requests, Sampling
from jaxopd.rollouts.sampling import warp

pytestmark = pytest.mark.fixtures
FIXTURES = Path(__file__).resolve().parents[2] / "shared" / "fixtures"
CASES = (
    "a_tied_gqa4to2_hd24_s0",
    "b_untied_bf16_vocab1031_s0",
    "c0_theta1e6_plain_s0",
    "c1_theta1e6_yarn4_s0",
    "d_qwen2_qkvbias_untied_s0",
)
ALL_TIED = 3  # row of warpers.npz whose logits are all equal
LOGITS, LOG_PROBS, GRADIENT_NORM = 3e-5, 1e-5, 1e-4


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """A checkpoint: its folder, its model in float32 and its golden arrays."""
    folder = FIXTURES / "qwen3" / request.param
    return folder, load_model(folder), dict(np.load(folder / "golden.npz"))


def padded(golden, side):
    return golden[f"{side}_input_ids"], golden[f"{side}_attention_mask"].astype(bool)


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits(case, side):
    _, model, golden = case
    ids, mask = padded(golden, side)
    error = np.abs(np.asarray(logits(model, ids, mask)) - golden[f"{side}_logits"])
    assert error[mask].max() < LOGITS


def test_logits_without_a_mask(case):
    _, model, golden = case
    ids, mask = padded(golden, "left")
    row = int(mask.sum(1).argmax())
    assert mask[row].all()
    error = np.abs(np.asarray(logits(model, ids[row : row + 1])) - golden["left_logits"][row])
    assert error.max() < LOGITS


def test_hidden_states(case):
    _, model, golden = case
    ids, mask = padded(golden, "left")
    expected = golden["hidden_states_row2"][-1]  # after the final norm
    found = np.asarray(hidden_states(model, ids[2][mask[2]][None]))[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=LOGITS)


def test_greedy_tokens_and_log_probs(case):
    _, model, golden = case
    ids, mask = padded(golden, "left")
    trunks = [row[kept] for row, kept in zip(ids, mask, strict=True)]
    steps = golden["gen_tokens"].shape[1]
    engine, requests = Engine(model, slots=8), Requests.continuations(trunks, 1)
    rolled = engine.run(trunks, requests, Sampling(steps, temperature=0.0))
    np.testing.assert_array_equal(rolled.tokens, golden["gen_tokens"])
    assert np.abs(rolled.raw_logp - golden["gen_logprobs_teacherforced_f64"]).max() < LOG_PROBS
    assert np.abs(rolled.raw_logp - golden["gen_logprobs"]).max() < LOG_PROBS
    np.testing.assert_array_equal(rolled.sampling_logp, 0)

    eos = int(golden["eos_id"])
    stopped = engine.run(trunks, requests, Sampling(steps, stop_ids=(eos,), temperature=0.0))
    expected = golden["gen_tokens_eos"]
    ends = (expected == eos).argmax(1)
    lengths = np.where((expected == eos).any(1), ends + 1, steps)
    np.testing.assert_array_equal(stopped.length, lengths)
    assert len(set(lengths)) > 1, "some row stops early"
    for row, length in enumerate(lengths):
        np.testing.assert_array_equal(stopped.tokens[row, :length], expected[row, :length])
        assert (stopped.tokens[row, length:] == -1).all()


def test_cross_entropy_gradients(case):
    """The mean runs over every pair of neighbouring real tokens of the batch."""
    folder, model, golden = case
    expected = dict(np.load(folder / "grads_f64.npz"))
    ids, mask = padded(golden, "left")
    real = jnp.asarray(mask[:, 1:] & mask[:, :-1])
    ids, mask = jnp.asarray(ids), jnp.asarray(mask)

    @nnx.jit
    @nnx.value_and_grad
    def loss(model):
        hidden = forward(model, ids, mask)[:, :-1]
        log_p = nnx.log_softmax(linear(hidden, model.head(), jnp.dtype("float32")), -1)
        picked = jnp.take_along_axis(log_p, ids[:, 1:, None], -1)[..., 0]
        return -jnp.where(real, picked, 0).sum() / real.sum()

    value, gradients = loss(model)
    assert float(value) == pytest.approx(float(expected["loss"]), rel=1e-6)
    found = {hf_name(path): np.asarray(leaf[...], np.float64) for path, leaf in nnx.to_flat_state(gradients)}
    norms = {name.removeprefix("norm/"): float(norm) for name, norm in expected.items() if name.startswith("norm/")}
    assert set(found) == set(norms)
    for name, norm in norms.items():
        assert np.linalg.norm(found[name]) == pytest.approx(norm, rel=GRADIENT_NORM), name
    for key, gradient in expected.items():
        if key.startswith("grad"):
            name, _, rows = key.partition("/")[2].partition("[:")
            part = found[name][: int(rows[:-1])] if rows else found[name]
            assert np.linalg.norm(part - gradient) < GRADIENT_NORM * norms[name], key


def test_both_styles_of_config(case, tmp_path):
    folder, model, golden = case
    shutil.copy(folder / "model.safetensors", tmp_path)
    shutil.copy(folder / "config_hub_v4_style.json", tmp_path / "config.json")
    older = load_model(tmp_path)
    # generation_config.json is not beside it: the end token comes from config.json
    assert older.config == model.config
    ids, mask = padded(golden, "right")
    np.testing.assert_array_equal(np.asarray(logits(older, ids, mask)), np.asarray(logits(model, ids, mask)))


@pytest.mark.parametrize("name", [name for name in CASES if name[0] in "ab"])
def test_shards(name):
    folder = FIXTURES / "qwen3" / name
    whole, sharded = weights(load_model(folder)), weights(load_model(folder / "sharded"))
    assert set(whole) == set(sharded)
    for key, array in whole.items():
        np.testing.assert_array_equal(array, sharded[key], err_msg=key)


def test_redundant_head_of_a_tied_model(tmp_path):
    folder = FIXTURES / "qwen3" / CASES[0]
    shutil.copy(folder / "config.json", tmp_path)
    shutil.copy(folder / "model_with_redundant_lm_head.safetensors", tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "numpy") as file:
        assert "lm_head.weight" in file.keys()  # noqa: SIM118  (safe_open is no mapping)
    plain, redundant = weights(load_model(folder)), weights(load_model(tmp_path))
    assert set(plain) == set(redundant)
    for key, array in plain.items():
        np.testing.assert_array_equal(array, redundant[key], err_msg=key)


def test_bfloat16_keeps_the_bits_of_the_file():
    folder = FIXTURES / "qwen3" / CASES[1]
    raw = stored_bits(folder / "model.safetensors")
    found = weights(load_model(folder, dtype="bfloat16"))
    assert set(found) == set(raw)
    for key, bits in raw.items():
        np.testing.assert_array_equal(found[key].view(np.uint16).reshape(-1), bits, err_msg=key)
    for key, array in weights(load_model(folder)).items():
        widened = (raw[key].astype(np.uint32) << 16).view(np.float32)
        np.testing.assert_array_equal(array.reshape(-1), widened, err_msg=key)


def test_bfloat16_logits_are_as_near_as_the_peers():
    """Rounding each activation moves logits by about .1 here; the peer's own bfloat16 run measures that scale."""
    folder = FIXTURES / "qwen3" / CASES[1]
    golden = dict(np.load(folder / "golden.npz"))
    ids, mask = padded(golden, "left")
    found = np.asarray(logits(load_model(folder, dtype="bfloat16"), ids, mask))[mask]
    exact, peer = golden["left_logits"][mask], golden["left_logits_bf16_compute"][mask].astype(np.float32)

    def rms(x):
        return float(np.sqrt(np.mean(np.square(x))))

    assert 0 < rms(found - exact) < 1.2 * rms(peer - exact)


@pytest.mark.parametrize(
    "key, temperature, top_p, top_k",
    [
        ("T0.7_p0.95", 0.7, 0.95, 0),
        ("T0.6_k20_p0.95", 0.6, 0.95, 20),
        ("T1.0", 1.0, 1.0, 0),
        ("T2.0", 2.0, 1.0, 0),
        ("k1", 1.0, 1.0, 1),
        ("k10", 1.0, 1.0, 10),
        ("k200_gt_vocab", 1.0, 1.0, 200),
        ("p0.5", 1.0, 0.5, 0),
        ("p0.999", 1.0, 0.999, 0),
        ("p1e-6", 1.0, 1e-6, 0),
    ],
)
def test_warpers(key, temperature, top_p, top_k):
    golden = np.load(FIXTURES / "qwen3" / "warpers.npz")
    found = np.asarray(
        warp(jnp.asarray(golden["logits"]), jnp.float32(temperature), jnp.float32(top_p), jnp.int32(top_k))
    )
    expected, probs = golden[f"out/{key}"], golden[f"probs/{key}"]
    for row, kept in enumerate(np.isfinite(expected)):
        ours = np.isfinite(found[row])
        np.testing.assert_allclose(found[row, kept], expected[row, kept], rtol=1e-6)
        if row == ALL_TIED and top_p < 1:
            # The peer cuts a tie at top-p by the order of its sort; jaxopd keeps the tied tokens together.
            assert ours.all()
            assert np.ptp(golden["logits"][row]) == 0
            continue
        np.testing.assert_array_equal(ours, kept)
        assert ours.sum() == golden[f"kept/{key}"][row]
        np.testing.assert_allclose(np.asarray(nnx.softmax(found[row])), probs[row], rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(FIXTURES.parent / "tokenizer" / "qwen3_hf")


def read(name):
    return json.loads((FIXTURES / "tokenizer" / name).read_text())


def test_tokenizer_encodes_and_decodes(tokenizer):
    golden = read("golden_encode.json")
    special = golden["special"]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (special["eos"], special["pad"])
    assert len(tokenizer) == special["vocab_len"]
    for case in golden["cases"]:
        ids = tokenizer(case["text"], add_special_tokens=False)["input_ids"]
        assert ids == case["ids"], case["text"]
        assert tokenizer.decode(ids, skip_special_tokens=False) == case["decode_keep_special"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == case["decode_skip_special"]


def test_chat_template(tokenizer):
    rows, through_us = read("golden_chat.json")["rows"], set()
    for row in rows:
        thinking, messages = row["enable_thinking"], row["messages"]
        options = {} if thinking is None else {"enable_thinking": thinking}
        text = tokenizer.apply_chat_template(
            messages, tools=row["tools"], add_generation_prompt=row["add_generation_prompt"], tokenize=False, **options
        )
        assert text == row["text"], row["name"]
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == row["ids"], row["name"]
        if [m["role"] for m in messages] == ["user"] and row["add_generation_prompt"] and not row["tools"]:
            assert chat_tokens(tokenizer, messages[0]["content"], thinking=thinking) == row["ids"], row["name"]
            through_us.add(thinking)
    assert {True, False} <= through_us


def test_thinking_left_open_is_thinking_on(tokenizer):
    """A single user message with thinking unset, on and off: only off closes the block for the model."""
    unset, on, off = (chat_tokens(tokenizer, "What is 2+2?", thinking=t) for t in (None, True, False))
    assert unset == on
    assert off == on + tokenizer("<think>\n\n</think>\n\n", add_special_tokens=False)["input_ids"]


def weights(model):
    return {hf_name(path): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model))}


def stored_bits(path):
    """Reads the tensors of a bfloat16 safetensors file as flat uint16, by the format's description alone."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}
    body = data[8 + size :]
    return {name: np.frombuffer(body[slice(*entry["data_offsets"])], "<u2") for name, entry in header.items()}
