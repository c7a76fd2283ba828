"""Scoring with the vocabulary split over devices: what one device finds, whatever the mesh; and against float64."""

from dataclasses import dataclass, fields
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxopd_kernels import IMPLEMENTATIONS, head_statistics, one_pass, pair_statistics, streaming

from jaxopd import scoring
from jaxopd.models.sharding import device_mesh
from jaxopd.scoring import AnalyticForm, score_pair, score_tokens, topk

MESHES = [(1, 8), (2, 4), (8, 1)]  # (data, model)
FORMS = {"gap": AnalyticForm(lambda log_p, log_q: log_q - log_p, lambda known: -known.reverse_kl)}
T, V, DS, DT = 37, 101, 8, 12  # neither rows nor vocabulary are divided by a mesh


@dataclass(frozen=True)
class Head:
    """The least that scoring asks of a model."""

    weight: jax.Array

    def head(self):
        return self.weight


def on_mesh(head, data: int, model: int) -> Head:
    """Puts a head onto data x model devices, its rows split over "model" where that divides them."""
    mesh = device_mesh(data * model, model=model)
    return Head(jax.device_put(head, NamedSharding(mesh, P("model") if len(head) % model == 0 else P())))


def make_case(dtype=jnp.float32, teacher_vocabulary=V, seed=0):
    """Two heads, their hidden states and ids, among them the first, the last and padding."""
    rng = np.random.default_rng(seed)
    hidden = [np.asarray(jnp.asarray(rng.standard_normal((T, D)), dtype)) for D in (DS, DT)]
    sizes = ((V, DS), (teacher_vocabulary, DT))
    heads = [jnp.asarray(rng.standard_normal(size) / 2, dtype) for size in sizes]
    ids = rng.integers(0, V, (T, 4))
    ids[:, 0], ids[::2, 1], ids[:, 2] = V - 1, -1, 0
    return *heads, *hidden, ids


def check_same(got, expected, atol=1e-6) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for field in fields(expected):
        value, wanted = getattr(got, field.name), getattr(expected, field.name)
        assert isinstance(value, np.ndarray), field.name
        np.testing.assert_allclose(value, wanted, rtol=2e-6, atol=atol, err_msg=field.name)


@pytest.mark.parametrize(
    "data, model, dtype", [*((*mesh, jnp.float32) for mesh in MESHES), (2, 4, jnp.bfloat16)], ids=str
)
def test_pairs_are_scored_as_on_one_device(data, model, dtype) -> None:
    head_s, head_t, *rows = make_case(dtype, teacher_vocabulary=112)  # eight shards of which would begin elsewhere
    expected = score_pair(Head(head_s), Head(head_t), *rows, FORMS)
    student, teacher = on_mesh(head_s, data, model), on_mesh(head_t, data, model)
    got = score_pair(student, teacher, *rows, FORMS)
    check_same(got.statistics, expected.statistics)
    for one, other in zip(got.known["gap"], expected.known["gap"]):
        np.testing.assert_allclose(one, other, atol=5e-6)


@pytest.mark.parametrize("student_split, teacher_split", [(1, 4), (4, 1), (8, 4)])
def test_models_may_be_split_differently_on_the_same_devices(student_split, teacher_split) -> None:
    rng = np.random.default_rng(1)
    head_s, head_t = (jnp.asarray(rng.standard_normal((104, D)), jnp.float32) for D in (DS, DT))
    *_, hidden_s, hidden_t, ids = make_case()
    expected = score_pair(Head(head_s), Head(head_t), hidden_s, hidden_t, ids).statistics
    student = on_mesh(head_s, 8 // student_split, student_split)
    teacher = on_mesh(head_t, 8 // teacher_split, teacher_split)
    check_same(score_pair(student, teacher, hidden_s, hidden_t, ids).statistics, expected)


def test_a_split_pair_against_float64_with_shards_past_the_vocabulary() -> None:
    head_s, head_t, hidden_s, hidden_t, ids = make_case(teacher_vocabulary=112)
    common = 70  # of 104 columns, 13 a device: the sixth device has five, the last two have none
    ids %= common
    student, teacher = on_mesh(head_s, 1, 8), on_mesh(head_t, 1, 8)
    got = score_pair(student, teacher, hidden_s, hidden_t, ids, vocab_size=common).statistics
    log_p, log_q = (
        z - np.logaddexp.reduce(z, -1, keepdims=True)
        for z in (np.float64(x) @ np.float64(w)[:common].T for x, w in ((hidden_s, head_s), (hidden_t, head_t)))
    )
    p, q, f = np.exp(log_p), np.exp(log_q), log_q - log_p
    log_m, centred = np.logaddexp(log_p, log_q) - np.log(2), f - (p * f).sum(-1, keepdims=True)
    for name, expected in {
        "entropy_student": -(p * log_p).sum(-1),
        "reverse_kl": -(p * f).sum(-1),
        "forward_kl": (q * f).sum(-1),
        "js": (p * (log_p - log_m) + q * (log_q - log_m)).sum(-1) / 2,
        "total_variation": np.abs(p - q).sum(-1) / 2,
        "l2": np.linalg.norm(p - q, axis=-1),
        "variance": (p * centred**2).sum(-1),
        "gradient_norm": np.linalg.norm(p * centred, axis=-1),
        "log_q": np.take_along_axis(log_q, ids, -1),
    }.items():
        np.testing.assert_allclose(getattr(got, name), expected, rtol=2e-6, atol=2e-6, err_msg=name)


def test_a_student_that_is_its_teacher_has_no_divergence() -> None:
    head, _, hidden, _, ids = make_case()
    same = score_pair(on_mesh(head, 2, 4), on_mesh(head, 2, 4), hidden, hidden, ids).statistics
    for name in ("reverse_kl", "forward_kl", "js", "total_variation", "l2", "variance", "gradient_norm"):
        np.testing.assert_allclose(getattr(same, name), 0, atol=0 if name.endswith("kl") else 5e-8, err_msg=name)
    np.testing.assert_array_equal(same.log_p, same.log_q)


def test_small_divergences_keep_their_digits() -> None:
    head, _, hidden, _, ids = make_case()
    near = head + 1e-4 * jnp.asarray(np.random.default_rng(2).standard_normal(head.shape), jnp.float32)
    got = score_pair(on_mesh(head, 1, 8), on_mesh(near, 1, 8), hidden, hidden, ids).statistics
    z_s, z_t = (np.float64(hidden) @ np.float64(w).T for w in (head, near))
    log_p, log_q = (z - np.logaddexp.reduce(z, -1, keepdims=True) for z in (z_s, z_t))
    expected = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    assert expected.max() < 1e-6
    np.testing.assert_allclose(got.reverse_kl, expected, rtol=1e-2)


@pytest.mark.parametrize("data, model", MESHES)
@pytest.mark.parametrize("k", [1, 20])  # more than the 13 columns of an eighth
def test_ties_go_to_the_lower_id_across_shards(data, model, k) -> None:
    rng = np.random.default_rng(3)
    z = rng.integers(0, 4, (T, V)).astype(np.float32)
    z[0] = 0.0
    head = jnp.asarray(z.T)  # hidden states that pick its columns: the logits are z exactly
    ids, log_p = topk(on_mesh(head, data, model), np.eye(T, dtype=np.float32), k)
    best = np.argsort(-z, axis=-1, kind="stable")[:, :k]
    np.testing.assert_array_equal(ids, best)
    exact = z - np.log(np.exp(z).sum(-1, keepdims=True))
    np.testing.assert_allclose(log_p, np.take_along_axis(exact, best, -1), atol=2e-6)


def test_blocks_and_hidden_states_on_the_mesh(monkeypatch) -> None:
    head, _, hidden, _, ids = make_case()
    expected = score_tokens(Head(head), hidden, ids, k=7)
    monkeypatch.setattr(scoring, "BLOCK", 16)  # 32 rows of two devices, then 5
    model = on_mesh(head, 2, 4)
    check_same(score_tokens(model, hidden, ids, k=7), expected)
    check_same(score_tokens(model, hidden), score_tokens(Head(head), hidden))  # neither ids nor a top k
    spread = jax.device_put(hidden[:32], NamedSharding(device_mesh(model=4), P("data")))
    part = score_tokens(model, spread, ids[:32], k=7)
    check_same(part, jax.tree.map(lambda x: x[:32], expected))


def test_no_device_holds_a_whole_head() -> None:
    rows, vocabulary, width = 64, 1024, 48
    mesh = device_mesh(model=8)

    def array(*shape, spec, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    heads = [array(vocabulary, width, spec=P("model"))] * 2
    hidden = [array(rows, width, spec=P("data"))] * 2
    ids = array(rows, 4, spec=P("data"), dtype=jnp.int32)
    settings = {"vocab_size": 1000, "second_pass": True, "implementation": "xla"}
    text = scoring._pair.lower(*heads, *hidden, ids, forms=(), mesh=mesh, **settings).compile().as_text()
    assert f"f32[{vocabulary // 8},{width}]" in text
    assert f"f32[{vocabulary},{width}]" not in text
    assert f"f32[{rows},{vocabulary}]" not in text


def plain_launch(work, hidden, heads, vocab_size, given=(), maxima=False) -> one_pass.Streamed:
    """Does what a kernel does with a tile of all its columns; the maxima are of groups that end past the vocabulary."""
    columns = -(-vocab_size // 128) * 128
    padding = ((0, 0), (0, columns - vocab_size))
    logits = [
        jnp.pad(jnp.float32(x) @ jnp.float32(w)[:vocab_size].T, padding, constant_values=streaming.EXCLUDED)
        for x, w in zip(hidden, heads)
    ]
    over_columns = streaming.Columns(lambda x: x.sum(-1), lambda x: x.max(-1), lambda row: row[:, None])
    sums = work.update(work.nothing(len(hidden[0])), *logits, *given, over_columns)
    ids = jnp.arange(columns)
    ids = jnp.where(ids < vocab_size, ids, -1).reshape(-1, one_pass.GROUP)
    groups = logits[0].reshape(len(logits[0]), -1, one_pass.GROUP).max(-1).T
    return one_pass.Streamed(sums, groups, ids) if maxima else one_pass.Streamed(sums)


@pytest.mark.parametrize("vocab_size", [104, 70])
def test_the_sums_of_kernels_merge_across_devices(vocab_size) -> None:
    pair, head = one_pass.ops(plain_launch)
    head_s, head_t, hidden_s, hidden_t, ids = make_case(teacher_vocabulary=104)
    head_s = jnp.pad(head_s, ((0, 3), (0, 0)), constant_values=9.0)
    head_s = head_s.at[52:56].set(head_s[50:54])  # equal logits on both sides of a border

    def both(head_s, head_t, axis=None):
        models = (hidden_s, head_s, hidden_t, head_t)
        return pair(*models, ids, vocab_size, True, axis), head(hidden_s, head_s, ids, 20, vocab_size, axis)

    def in_xla(head_s, head_t):
        models, row = (hidden_s, head_s, hidden_t, head_t), IMPLEMENTATIONS["xla"]
        return row.pair_statistics(*models, ids, vocab_size), row.head_statistics(hidden_s, head_s, ids, 20, vocab_size)

    split = partial(jax.shard_map, mesh=device_mesh(model=8), in_specs=P("model"), out_specs=P(), check_vma=False)
    got = jax.device_get(jax.jit(split(partial(both, axis="model")))(head_s, head_t))
    expected = jax.device_get(jax.jit(in_xla)(head_s, head_t))
    for one, other in zip(got, expected):
        check_same(one, other, atol=5e-6)


def test_the_materialized_row_gathers_the_logits() -> None:
    head_s, head_t, hidden_s, hidden_t, ids = make_case(teacher_vocabulary=104)
    head_s = jnp.pad(head_s, ((0, 3), (0, 0)), constant_values=9.0)

    def op(hidden_s, head_s, hidden_t, head_t, ids, axis=None):
        row = {"implementation": "xla_materialized", "axis": axis, "vocab_size": 70}
        statistics = pair_statistics(hidden_s, head_s, hidden_t, head_t, ids, **row)
        return statistics, head_statistics(hidden_s, head_s, ids=ids, k=20, **row)

    arrays, specs = (hidden_s, head_s, hidden_t, head_t, ids), (P(), P("model"), P(), P("model"), P())
    mesh = device_mesh(model=8)
    split = jax.shard_map(partial(op, axis="model"), mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    for one, other in zip(*jax.device_get((jax.jit(split)(*arrays), jax.jit(op)(*arrays)))):
        check_same(one, other)


def test_shards_of_different_size_are_refused() -> None:
    def op(x, w, y, u, ids):
        return pair_statistics(x, w, y, u, ids, axis="model").reverse_kl

    mesh, x = device_mesh(model=8), jnp.ones((3, 4))
    split = jax.shard_map(op, mesh=mesh, in_specs=(P(), P("model"), P(), P("model"), P()), out_specs=P())
    with pytest.raises(ValueError, match="head_s, head_t: found 2 and 3 rows, expected equal shards along 'model'"):
        split(x, jnp.ones((16, 4)), x, jnp.ones((24, 4)), jnp.zeros((3, 1), jnp.int32))
