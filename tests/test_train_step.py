"""The pure parts of a step: no logits of all rows, padding that changes nothing, parameters spread over devices."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import jaxopd_kernels.loss
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal

from jaxopd.models import QwenConfig, init_model, logits
from jaxopd.models.attention import causal_attention
from jaxopd.models.qwen import embedded
from jaxopd.models.sharding import device_mesh, parameter_shardings
from jaxopd.train import vocabulary
from jaxopd.train.batch import Batch, Sequences, taken
from jaxopd.train.objectives import ObjectiveConfig, make_objective
from jaxopd.train.step import LossSettings, Sums, Targets, add_gradients, micro_loss, response_states, score, spread
from jaxopd.train.vocabulary import token_log_probs, top_tokens

SMALL = QwenConfig(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8
)


def rows(config: QwenConfig, b: int = 4, S: int = 6) -> tuple[list[list[int]], np.ndarray]:
    """Prompts of 3 to 6 tokens and responses of 1 to S."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, config.vocab_size, 3 + row % 4).tolist() for row in range(b)]
    responses = rng.integers(0, config.vocab_size, (b, S))
    responses[np.arange(S)[None] >= (1 + rng.integers(0, S, b))[:, None]] = -1
    return prompts, responses.astype(np.int32)


def targets_of(responses: np.ndarray, K: int, vocabulary_size: int) -> Targets:
    rng, shape = np.random.default_rng(1), responses.shape
    ids = np.stack([rng.permutation(vocabulary_size)[:K] for _ in range(responses.size)]).reshape(*shape, K)
    log_q, log_p_old = -rng.uniform(1, 4, (2, *shape, K)).astype(np.float32)
    mask = (responses >= 0).astype(np.float32)
    pair = (rng.normal(size=(*shape, K)).astype(np.float32), mask / mask.sum())
    one = -rng.uniform(1, 4, shape).astype(np.float32)
    return Targets(ids.astype(np.int32), np.ones(ids.shape, bool), log_q, log_p_old, *pair, one, one, pair[1])


def settings(name: str, **changes) -> LossSettings:
    config = ObjectiveConfig(name, k=4, **changes)
    return LossSettings(make_objective(config), config, bool(config.outcome), "float32", False)


def test_response_states_predict_the_responses_tokens():
    model, (prompts, responses) = init_model(SMALL), rows(SMALL)
    sequences = Sequences.join(prompts, responses, 8)
    states = response_states(model, jax.tree.map(jnp.asarray, sequences), 6)
    for row, (prompt, response) in enumerate(zip(prompts, responses)):
        whole = [*prompt, *response[response >= 0]]
        alone = logits(model, np.array([whole]))[0, len(prompt) - 1 : -1]
        found = states[row, : len(alone)] @ model.head().T
        assert_allclose(found, alone, atol=1e-4)


def test_attention_in_blocks_has_the_gradients_of_the_whole():
    """21 positions in blocks of 8: the last block is partly filled, and one row is padded."""
    rng = np.random.default_rng(0)
    shapes = (2, 21, 4, 8), (2, 21, 2, 8), (2, 21, 2, 8), (2, 21, 4, 8)
    *qkv, cotangent = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    mask = jnp.arange(21)[None] < jnp.array([21, 13])[:, None]

    def gradients(block):
        return jax.grad(lambda *x: jnp.vdot(cotangent, causal_attention(*x, mask, block=block)), (0, 1, 2))(*qkv)

    for whole, blocks in zip(gradients(21), gradients(8), strict=True):
        assert_allclose(blocks, whole, atol=5e-6)


@pytest.mark.parametrize("name", ["full", "topk_paper", "topk_thunlp", "sft"])
def test_padding_rows_and_columns_change_nothing(name):
    graph, state = nnx.split(init_model(SMALL))
    teacher = jnp.asarray(np.random.default_rng(2).normal(size=(40, 12)), jnp.float32)
    prompts, responses = rows(SMALL)
    targets = targets_of(responses, 3, 40)
    states = np.random.default_rng(3).normal(size=(4, 6, 12)).astype(np.float32)

    def gradient(responses, targets, states, width):
        sequences = Sequences.join([*prompts, *[[1]] * (len(responses) - 4)], responses, width)
        given = jax.tree.map(jnp.asarray, (sequences, targets, responses, states))
        return jax.value_and_grad(lambda s: micro_loss(graph, s, settings(name), *given, teacher)[0])(state)

    loss, exact = gradient(responses, targets, states, 8)
    more = np.array([0, 1, 2, 3, -1, -1])
    wide = jax.tree.map(lambda x: np.pad(taken(x, more), [(0, 0), (0, 5)] + [(0, 0)] * (x.ndim - 2)), (targets, states))
    padded = np.pad(responses, ((0, 2), (0, 5)), constant_values=-1)
    loss_too, found = gradient(padded, *wide, 11)
    assert_allclose(loss_too, loss, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("name", ["full", "topk_paper", "sampled"])
def test_logits_of_all_rows_never_exist(name, monkeypatch):
    """The compiled step's temporaries stay far under the [T, V] that a plain loss would hold several times."""
    monkeypatch.setattr(vocabulary, "WAVE_BYTES", 1 << 20)
    monkeypatch.setattr(jaxopd_kernels.loss, "WAVE_BYTES_CPU", 1 << 20)
    config = replace(SMALL, vocab_size=20_000, num_layers=1)
    graph, state = nnx.split(nnx.eval_shape(lambda: init_model(config)))
    b, S = 8, 128
    shaped = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, _whole_batch(b, S, config.vocab_size)))
    so_far = jax.eval_shape(lambda: Sums.zeros(state))
    sequences, targets, responses, states, head = shaped
    lowered = add_gradients.lower(
        graph, settings(name), so_far, state, sequences, targets, responses, states, head, mesh=device_mesh(1)
    )
    memory = lowered.compile().memory_analysis().temp_size_in_bytes
    assert memory < 0.5 * 4 * b * S * config.vocab_size


def _whole_batch(b: int, S: int, V: int) -> tuple:
    responses = np.ones((b, S), np.int32)
    sequences = Sequences.join([[1, 2]] * b, responses, 8)
    return (
        sequences,
        targets_of(responses, 2, 50),
        responses,
        np.ones((b, S, 12), np.float32),
        np.ones((V, 12), np.float32),
    )


def test_token_log_probs_and_top_tokens(monkeypatch):
    monkeypatch.setattr(vocabulary, "WAVE_BYTES", 4 * 90 * 3)  # three rows at a time, the last wave padded
    rng = np.random.default_rng(0)
    hidden, head = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((7, 5), (90, 5)))
    ids = jnp.asarray(rng.integers(0, 90, (7, 3)))

    def plain(hidden, head):
        return jnp.take_along_axis(jax.nn.log_softmax(hidden @ head.T), ids, -1)

    assert_allclose(token_log_probs(hidden, head, ids), plain(hidden, head), atol=1e-5)
    cotangent = jnp.asarray(rng.normal(size=(7, 3)), jnp.float32)
    found, expected = (
        jax.grad(lambda h, w, f=f: jnp.sum(f(h, w) * cotangent), (0, 1))(hidden, head)
        for f in (lambda h, w: token_log_probs(h, w, ids), plain)
    )
    for a, b in zip(found, expected):
        assert_allclose(a, b, atol=1e-5)
    order = np.argsort(-np.asarray(hidden @ head.T), -1)
    for k in (4, 80):
        assert_array_equal(top_tokens(hidden, head, k), order[:, :k])
    split = partial(top_tokens, k=80, vocab_size=88, axis="model")
    found = jax.shard_map(
        split, mesh=device_mesh(2, model=2), in_specs=(P(), P("model")), out_specs=P(), check_vma=False
    )
    order = np.argsort(-np.asarray(hidden @ head[:88].T), -1)
    assert_array_equal(jax.jit(found)(hidden, head), order[:, :80])


def relative_error(found, exact):
    return np.linalg.norm(np.asarray(found, np.float64) - exact) / np.linalg.norm(exact)


def test_bfloat16_gradients_of_frequent_tokens_are_summed_in_float32(monkeypatch):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 3, 8192)
    cotangent = jnp.asarray(rng.normal(0.1, 1, (8192, 6)), jnp.bfloat16)
    table = jnp.zeros((4, 6), jnp.bfloat16)
    found = jax.vjp(lambda table: embedded(table, tokens), table)[1](cotangent)[0]
    exact = np.eye(4)[tokens].T @ np.asarray(cotangent, np.float64)
    assert relative_error(found, exact) < 4e-3  # half a unit in the last place

    monkeypatch.setattr(vocabulary, "WAVE_BYTES", 4 * 5 * 2)  # 600 waves of two rows
    hidden = jnp.asarray(rng.normal(0.5, 1, (1200, 6)), jnp.bfloat16)
    ids = jnp.zeros((1200, 1), int)
    found = jax.grad(lambda head: token_log_probs(hidden, head, ids).sum())(jnp.zeros((5, 6), jnp.bfloat16))
    exact = (np.eye(5)[0] - 0.2)[:, None] * np.asarray(hidden, np.float64).sum(0)
    assert relative_error(found, exact) < 4e-3


def test_scores_are_the_same_on_one_and_eight_devices():
    models = [nnx.split(init_model(SMALL, seed=seed)) for seed in (0, 1)]
    prompts, responses = rows(SMALL, b=8)
    sequences = Sequences.join(prompts, responses, 8)
    given = *models[0], *models[1], sequences, sequences, responses
    one, eight = (score(*given, mesh=device_mesh(n), k=3, dtype="float32") for n in (1, 8))
    for name in one:
        assert_allclose(one[name], eight[name], atol=1e-5, err_msg=name)
    log_p, log_q = (
        jax.nn.log_softmax(
            response_states(nnx.merge(*m), jax.tree.map(jnp.asarray, sequences), 6)
            @ m[1]["embed_tokens"]["weight"][...].T
        )
        for m in models
    )
    mask = responses >= 0
    expected = np.sum(np.exp(log_p) * (log_p - log_q), -1)
    assert_allclose(np.asarray(one["reverse_kl"])[mask], expected[mask], atol=1e-5)
    sampled = np.take_along_axis(np.asarray(log_q), np.maximum(responses, 0)[..., None], -1)[..., 0]
    assert_allclose(np.asarray(one["sampled_log_q"])[mask], sampled[mask], atol=1e-5)


def test_scores_under_a_split_teacher_are_those_of_a_whole_one():
    """A vocabulary of 150 in four shares, of which the teacher has six tokens more; two heads of keys stay whole."""
    student = nnx.split(init_model(replace(SMALL, vocab_size=150)))
    config = replace(SMALL, vocab_size=156, hidden_size=24, num_heads=4, num_kv_heads=2, tie_embeddings=False)
    graph, state = nnx.split(init_model(config, seed=1))
    prompts, responses = rows(SMALL, b=8)
    sequences = Sequences.join(prompts, responses, 8)
    given, settings = (sequences, sequences, responses), {"k": 3, "dtype": "float32"}
    whole = score(*student, graph, state, *given, mesh=device_mesh(1), **settings)
    mesh = device_mesh(model=4)
    spread_out = student[0], spread(student[1], mesh)
    split = jax.device_put(state, parameter_shardings(state, config, mesh, fsdp=True))
    found = score(*spread_out, graph, split, *given, mesh=mesh, split=True, **settings)
    assert found["teacher_states"].addressable_shards[0].data.shape == (1, 6, 24)
    for name in whole:
        assert_allclose(found[name], whole[name], atol=1e-5, err_msg=name)


def test_spread_splits_the_largest_axis_that_divides():
    placed = spread({"a": jnp.zeros((24, 16)), "b": jnp.zeros((3, 5)), "c": jnp.zeros(())}, device_mesh(8))
    assert placed["a"].addressable_shards[0].data.shape == (3, 16)
    assert placed["b"].addressable_shards[0].data.shape == (3, 5)


def test_micro_batches_hold_one_teacher_and_every_row_once():
    B = 11
    batch = Batch(np.arange(B), np.arange(B) % 3, np.ones((B, 2), int), np.ones(B), np.zeros(B, bool))
    for update in batch.updates(6):
        parts = list(batch.micro_batches(update, 2))
        assert all(len(part) == 2 for _, part in parts)
        assert all((batch.teacher[part[part >= 0]] == teacher).all() for teacher, part in parts)
        assert sorted(row for _, part in parts for row in part if row >= 0) == update.tolist()
    assert [len(update) for update in batch.updates(6)] == [6, 5]
