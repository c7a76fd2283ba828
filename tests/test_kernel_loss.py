"""Losses over the vocabulary and their gradients, against float64 numpy and autodiff of the materialised loss."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxopd_kernels import divergence_loss, entropy_loss, weighted_divergence_loss
from jaxopd_kernels.loss import wave_shape

from jaxopd.gradients import forward_kl_loss, jsd_loss, reverse_kl_loss

KINDS = [("reverse_kl", 0.5), ("forward_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1)]
STATIC = ("kind", "beta", "vocab_size", "wave_bytes")


def squared(log_p, log_q):
    """A loss that the package does not know: ||P - Q||^2."""
    return (jnp.exp(log_p) - jnp.exp(log_q)) ** 2


@partial(jax.jit, static_argnames=STATIC)
def by_rows(cotangent, *models, **options):
    """The loss per row, and the gradients of its weighted sum in the student's hidden states and head."""
    loss, pullback = jax.vjp(lambda x, w: divergence_loss(x, w, *models[2:], **options), *models[:2])
    return loss, *pullback(cotangent)


@partial(jax.jit, static_argnames=STATIC)
def in_one_pass(cotangent, *models, **options):
    """The same from weighted_divergence_loss, whose gradients are made in the forward pass."""
    (_, rows), gradients = jax.value_and_grad(
        lambda x, w: weighted_divergence_loss(x, w, *models[2:], cotangent, **options), (0, 1), has_aux=True
    )(*models[:2])
    return rows, *gradients


ROUTES = pytest.mark.parametrize("route", [by_rows, in_one_pass])


def log_softmax64(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def expected(cotangent, hidden_s, head_s, hidden_t, head_t, kind, beta, V):
    """Loss and gradients in float64, the logit gradients written out by hand for each divergence."""
    hidden_s, head_s, hidden_t, head_t = (np.asarray(x, np.float64) for x in (hidden_s, head_s, hidden_t, head_t))
    log_p, log_q = log_softmax64(hidden_s @ head_s[:V].T), log_softmax64(hidden_t @ head_t[:V].T)
    p, q = np.exp(log_p), np.exp(log_q)
    log_m = np.logaddexp(np.log(beta) + log_q, np.log1p(-beta) + log_p)
    reverse, forward = (p * (log_p - log_q)).sum(-1), (q * (log_q - log_p)).sum(-1)
    over_m = (p * (log_p - log_m)).sum(-1)
    loss, in_logits = {
        "reverse_kl": (reverse, p * (log_p - log_q - reverse[:, None])),
        "forward_kl": (forward, p - q),
        "jsd": (
            beta * (q * (log_q - log_m)).sum(-1) + (1 - beta) * over_m,
            (1 - beta) * p * (log_p - log_m - over_m[:, None]),
        ),
        squared: (((p - q) ** 2).sum(-1), 2 * p * (p - q - (p * (p - q)).sum(-1, keepdims=True))),
    }[kind]
    in_logits = np.asarray(cotangent, np.float64)[:, None] * in_logits
    in_head = np.zeros_like(head_s)
    in_head[:V] = in_logits.T @ hidden_s
    return loss, in_logits @ head_s[:V], in_head


def close(found, wanted, rtol=1e-4, atol_loss=1e-5):
    """Losses to 1e-5 nats; gradients relative to their largest entry, so that cancelled entries count for nothing."""
    np.testing.assert_allclose(found[0], wanted[0], rtol=rtol, atol=atol_loss)
    for name, a, b in zip(("hidden", "head"), found[1:], wanted[1:], strict=True):
        a = np.asarray(a, np.float64)
        assert np.abs(a - b).max() <= rtol * np.abs(b).max(), name
        assert np.linalg.norm(a - b) <= rtol * np.linalg.norm(b), name


def models(rng, T, Vs, Vt=None, widths=(24, 40), scale=2.0, dtype=jnp.float32):
    """Hidden states and heads of a student and a teacher of different widths."""
    arrays = []
    for V, D in ((Vs, widths[0]), (Vt or Vs, widths[1])):
        hidden, head = rng.standard_normal((T, D)), rng.standard_normal((V, D)) * scale / np.sqrt(D)
        arrays += [jnp.asarray(hidden, dtype), jnp.asarray(head, dtype)]
    return arrays


def waves_of(rows, V):
    """The budget that makes waves of that many rows of two models."""
    return 2 * 4 * V * rows


@ROUTES
@pytest.mark.parametrize("T, V", [(1, 127), (63, 512), (128, 1031), (129, 127), (129, 1031), (63, 1031)])
@pytest.mark.parametrize("kind, beta", [*KINDS, (squared, 0.5)])
def test_gradients_against_float64(kind, beta, T, V, route):
    rng = np.random.default_rng(T + V)
    arrays, cotangent = models(rng, T, V), jnp.asarray(rng.standard_normal(T), jnp.float32)
    found = route(cotangent, *arrays, kind=kind, beta=beta, wave_bytes=waves_of(40, V))
    close(found, expected(cotangent, *arrays, kind, beta, V))


@ROUTES
@pytest.mark.parametrize("kind, beta", [("reverse_kl", 0.5), ("forward_kl", 0.5), ("jsd", 0.3)])
def test_gradients_against_autodiff_of_the_materialised_loss(kind, beta, route):
    """The package's per-position losses, written and tested apart, differentiated through [T, V] log-softmaxes."""
    loss = {"reverse_kl": reverse_kl_loss, "forward_kl": forward_kl_loss, "jsd": partial(jsd_loss, beta=beta)}[kind]
    rng = np.random.default_rng(0)
    arrays, cotangent = models(rng, 129, 512), jnp.asarray(rng.standard_normal(129), jnp.float32)

    def materialised(hidden_s, head_s):
        log_p = jax.nn.log_softmax(jnp.dot(hidden_s, head_s.T, precision="highest"))
        log_q = jax.nn.log_softmax(jnp.dot(arrays[2], arrays[3].T, precision="highest"))
        return loss(log_p, log_q)

    rows, pullback = jax.vjp(materialised, *arrays[:2])
    found = route(cotangent, *arrays, kind=kind, beta=beta, wave_bytes=waves_of(64, 512))
    close(found, (rows, *pullback(cotangent)))


@ROUTES
@pytest.mark.parametrize("kind, beta", [("reverse_kl", 0.5), ("forward_kl", 0.5), ("jsd", 0.5)])
def test_the_vocabulary_of_qwen3(kind, beta, route):
    V, T, rng = 151_936, 9, np.random.default_rng(1)
    arrays, cotangent = models(rng, T, V, widths=(8, 12), scale=4.0), jnp.asarray(rng.standard_normal(T), jnp.float32)
    found = route(cotangent, *arrays, kind=kind, beta=beta, wave_bytes=waves_of(5, V))
    close(found, expected(cotangent, *arrays, kind, beta, V))


@ROUTES
@pytest.mark.parametrize("Vs, Vt, vocab_size", [(512, 512, 500), (512, 640, None), (640, 512, 505)])
def test_rows_past_the_common_vocabulary_do_not_count(Vs, Vt, vocab_size, route):
    rng, common = np.random.default_rng(2), vocab_size or min(Vs, Vt)
    arrays, cotangent = models(rng, 63, Vs, Vt), jnp.asarray(rng.standard_normal(63), jnp.float32)
    arrays[1], arrays[3] = (head.at[common:].mul(50) for head in arrays[1::2])  # would dominate if they counted
    found = route(cotangent, *arrays, kind="jsd", vocab_size=vocab_size)
    close(found, expected(cotangent, *arrays, "jsd", 0.5, common))
    assert not np.any(found[2][common:])


@ROUTES
@pytest.mark.parametrize("kind, beta", [*KINDS, (squared, 0.5)])
def test_a_student_that_is_its_teacher_learns_nothing(kind, beta, route):
    hidden, head, *_ = models(np.random.default_rng(3), 63, 1031)
    for found in route(jnp.ones(63), hidden, head, hidden, head, kind=kind, beta=beta):
        assert np.abs(found).max() <= 1e-7


@ROUTES
@pytest.mark.parametrize("kind, beta", [*KINDS, (squared, 0.5)])
def test_rows_of_certainty_stay_finite(kind, beta, route):
    """One-hot against flat and against another one-hot: Q / P leaves float32 by far."""
    V = 127
    z_s, z_t = np.zeros((2, 4, V), np.float32)
    z_s[[0, 2, 3], [5, 6, 7]] = 150
    z_t[[1, 2, 3], [5, 8, 7]] = 150
    eye, cotangent = np.eye(4, dtype=np.float32), jnp.ones(4)
    arrays = [eye, np.ascontiguousarray(z_s.T), eye, np.ascontiguousarray(z_t.T)]
    close(route(cotangent, *arrays, kind=kind, beta=beta), expected(cotangent, *arrays, kind, beta, V))


@ROUTES
@pytest.mark.parametrize("scale", [1e-1, 1e-2, 1e-3])
def test_gradients_near_the_teacher_keep_their_digits(scale, route):
    rng = np.random.default_rng(4)
    hidden, head, *_ = models(rng, 63, 1031)
    near = hidden + scale * jnp.asarray(rng.standard_normal(hidden.shape), jnp.float32)
    arrays, cotangent = [near, head, hidden, head], jnp.ones(63)
    for kind in ("reverse_kl", "forward_kl", "jsd"):
        found = route(cotangent, *arrays, kind=kind)
        close(found, expected(cotangent, *arrays, kind, 0.5, 1031), rtol=max(1e-4, 1e-6 / scale))
        assert found[0].min() >= 0


@ROUTES
def test_wave_size_changes_rounding_only(route):
    rng, V = np.random.default_rng(5), 512
    arrays, cotangent = models(rng, 129, V), jnp.asarray(rng.standard_normal(129), jnp.float32)
    whole = route(cotangent, *arrays, kind="reverse_kl")
    for rows in (1, 8, 17, 128):
        close(route(cotangent, *arrays, kind="reverse_kl", wave_bytes=waves_of(rows, V)), whole, rtol=2e-6)


@pytest.mark.parametrize("T, most, waves, rows", [(0, 8, 1, 0), (7, 8, 1, 7), (129, 128, 2, 72), (129, 5, 26, 5)])
def test_waves_are_few_and_even(T, most, waves, rows):
    assert wave_shape(T, 10, 10 * most + 9) == (waves, rows)


@ROUTES
def test_weight_zero_leaves_rows_out(route):
    rng = np.random.default_rng(6)
    arrays, kept = models(rng, 63, 512), np.arange(63) % 3 > 0
    weights = jnp.asarray(kept / kept.sum(), jnp.float32)
    _, in_hidden, in_head = route(weights, *arrays, kind="forward_kl", wave_bytes=waves_of(16, 512))
    shorter = [x[kept] if x.shape[0] == 63 else x for x in arrays]
    _, in_kept, in_head_kept = expected(weights[kept], *shorter, "forward_kl", 0.5, 512)
    assert not np.any(np.asarray(in_hidden)[~kept])
    close((0.0, in_hidden[kept], in_head), (0.0, in_kept, in_head_kept))


def test_the_weighted_sum_and_its_weights():
    rng = np.random.default_rng(7)
    arrays, weights = models(rng, 63, 512), jnp.asarray(rng.standard_normal(63), jnp.float32)
    rows = divergence_loss(*arrays)

    def scaled(weights):
        total, rows = weighted_divergence_loss(*arrays, weights)
        return 3 * total + jnp.sum(rows)  # no gradient comes through the rows

    np.testing.assert_allclose(scaled(weights), 3 * weights @ rows + rows.sum(), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(scaled)(weights), 3 * rows, rtol=1e-6)


@ROUTES
def test_bfloat16_rounds_logit_gradients_only(route):
    """Logits and sums stay float32: rounded to bfloat16, they would miss the loss by 1e-2."""
    rng = np.random.default_rng(8)
    arrays = models(rng, 128, 1031, widths=(64, 96), dtype=jnp.bfloat16)
    cotangent = jnp.asarray(rng.standard_normal(128), jnp.float32)
    found = route(cotangent, *arrays, kind="reverse_kl", wave_bytes=waves_of(16, 1031))
    assert [x.dtype for x in found] == [jnp.float32, jnp.bfloat16, jnp.bfloat16]
    loss, *gradients = expected(cotangent, *arrays, "reverse_kl", 0.5, 1031)
    np.testing.assert_allclose(found[0], loss, atol=1e-5)
    close((0.0, *found[1:]), (0.0, *gradients), rtol=6e-3)


def test_entropy():
    rng, V = np.random.default_rng(9), 1031
    hidden, head, *_ = models(rng, 129, V)
    cotangent = jnp.asarray(rng.standard_normal(129), jnp.float32)
    log_p = log_softmax64(np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)[:1000].T)
    loss = -(np.exp(log_p) * log_p).sum(-1)
    in_logits = -np.asarray(cotangent, np.float64)[:, None] * np.exp(log_p) * (log_p + loss[:, None])
    in_head = np.concatenate([in_logits.T @ np.asarray(hidden, np.float64), np.zeros((31, 24))])
    found, pullback = jax.vjp(partial(entropy_loss, vocab_size=1000, wave_bytes=4 * V * 40), hidden, head)
    close((found, *pullback(cotangent)), (loss, in_logits @ np.asarray(head, np.float64)[:1000], in_head))


def test_the_teacher_gets_no_gradient():
    arrays = models(np.random.default_rng(10), 8, 127)
    gradients = jax.grad(lambda *arrays: divergence_loss(*arrays).sum(), (2, 3))(*arrays)
    assert not any(np.any(gradient) for gradient in gradients)


@ROUTES
def test_the_logits_are_never_in_memory(route):
    """T = 8,192 at Qwen3's vocabulary and two of its widths: compiled, not run."""
    T, V, widths = 8192, 151_936, (1024, 4096)
    shapes = [shape for D in widths for shape in ((T, D), (V, D))]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    compiled = route.lower(jax.ShapeDtypeStruct((T,), jnp.float32), *arrays, kind="reverse_kl").compile()
    assert f"[{T},{V}]" not in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * T * V / 2


@pytest.mark.parametrize("op", [weighted_divergence_loss, divergence_loss])
def test_rows_spread_over_devices(op):
    """Each device takes its rows in its own waves; the head's gradient is summed over devices."""
    rng = np.random.default_rng(12)
    arrays, weights = models(rng, 64, 127), jnp.asarray(rng.standard_normal(64), jnp.float32)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = jax.P("data"), jax.P()

    def local(*arrays):
        *models, weights = arrays
        if op is weighted_divergence_loss:
            total, _ = op(*models, weights, wave_bytes=waves_of(3, 127))
        else:
            total = jnp.vdot(weights, op(*models, wave_bytes=waves_of(3, 127)))
        return jax.lax.psum(total, "data")

    loss = jax.shard_map(local, mesh=mesh, in_specs=(rows, whole) * 2 + (rows,), out_specs=whole, check_vma=False)
    gradients = jax.jit(jax.grad(loss, (0, 1)))(*arrays, weights)
    close((0.0, *gradients), (0.0, *expected(weights, *arrays, "reverse_kl", 0.5, 127)[1:]))


@pytest.mark.parametrize("beta, same", [(0.0, "forward_kl"), (1.0, "reverse_kl")])
def test_jsd_ends_in_the_two_kls(beta, same):
    arrays = models(np.random.default_rng(11), 8, 127)
    np.testing.assert_array_equal(divergence_loss(*arrays, "jsd", beta=beta), divergence_loss(*arrays, same))


def test_bad_arguments_are_named():
    hidden, head = jnp.ones((3, 4)), jnp.ones((7, 4))
    loss = partial(divergence_loss, hidden, head, hidden, head)
    for call, message in [
        (
            lambda: divergence_loss(hidden, head, hidden[:2], head),
            r"found shapes \(2, 4\) and \(7, 4\), expected \[3, D\]",
        ),
        (lambda: divergence_loss(hidden, head[:, :3], hidden, head), r"head_s: found shapes .* \(7, 3\)"),
        (lambda: loss("kl"), "kind: found 'kl', expected one of reverse_kl, forward_kl, jsd or a density"),
        (lambda: loss("jsd", beta=1.5), "beta: found 1.5, expected a number from 0 to 1"),
        (lambda: loss(vocab_size=8), "vocab_size: found 8, expected 1 to 7"),
        (
            lambda: weighted_divergence_loss(hidden, head, hidden, head, jnp.ones(2)),
            r"weights: found shape \(2,\), expected \(3,\)",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
