"""The update's geometry: coherence against every token's own gradient, alignment where it is known."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxopd import toy
from jaxopd.gradients import reverse_kl_loss
from jaxopd.train.config import TrainConfig
from jaxopd.train.geometry import Probe, cosine, head_coherence, update_geometry
from jaxopd.train.loop import Trainer
from jaxopd.train.objectives import ObjectiveConfig

slow = pytest.mark.slow  # a minute each, most of it compiling


def models(seed: int = 0, T: int = 6):
    rng = np.random.default_rng(seed)
    shapes = (T, 5), (11, 5), (T, 7), (11, 7)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


@slow
def test_coherence_is_that_of_the_tokens_own_gradients():
    hidden_s, head_s, hidden_t, head_t = models()
    weights = np.array([1.0, 0.5, 0, 2, 1, 1], np.float32)

    def loss(head, t):
        log_p, log_q = jax.nn.log_softmax(hidden_s[t] @ head.T), jax.nn.log_softmax(hidden_t[t] @ head_t.T)
        return weights[t] * reverse_kl_loss(log_p, log_q)

    each = np.stack([jax.grad(loss)(head_s, t) for t in range(6)])
    sizes = np.linalg.norm(each, axis=(1, 2))
    found = head_coherence(hidden_s, head_s, hidden_t, head_t, weights)
    assert_allclose(found["coherence"], np.linalg.norm(each.sum(0)) / sizes.sum(), rtol=1e-5)
    assert_allclose(found["independent"], np.linalg.norm(sizes) / sizes.sum(), rtol=1e-5)


@slow
def test_equal_tokens_are_coherent():
    hidden_s, head_s, hidden_t, head_t = models(T=1)
    repeated = jnp.tile(hidden_s, (4, 1)), head_s, jnp.tile(hidden_t, (4, 1)), head_t
    found = head_coherence(*repeated, jnp.ones(4))
    assert_allclose(found["coherence"], 1.0, rtol=1e-5)
    assert_allclose(found["independent"], 0.5, rtol=1e-5)


def test_cosine():
    a, b = {"x": jnp.array([3.0, 0]), "y": jnp.array([4.0])}, {"x": jnp.array([0.0, 2]), "y": jnp.array([2.0])}
    assert cosine(a, b) == pytest.approx(8 / (5 * 8**0.5))
    assert np.isnan(cosine(a, jax.tree.map(jnp.zeros_like, b)))


def noisy_probe(rng, u, g, noise: float) -> Probe:
    """Two halves; the gradients of one half share a part of their noise, as those of the same responses do."""
    halves = []
    for _ in range(2):
        shared, own = rng.normal(size=(2, *u.shape))
        halves.append(({"w": jnp.asarray(u + noise * shared)}, {"w": jnp.asarray(g + noise * (shared + own) / 2**0.5)}))
    (u0, g0), (u1, g1) = halves
    return Probe((u0, u1), (g0, g1))


@pytest.mark.parametrize("truth", [-0.5, 0.0])
def test_alignment_is_free_of_the_noise_that_moves_the_cosine(truth):
    rng = np.random.default_rng(0)
    a, b = np.linalg.qr(rng.normal(size=(60, 2)))[0].T
    u, g = a, truth * a + (1 - truth**2) ** 0.5 * b
    probes = [noisy_probe(rng, u, g, noise=0.08) for _ in range(200)]
    assert np.mean([probe.alignment for probe in probes]) == pytest.approx(truth, abs=0.05)
    plain = np.mean([probe.metrics()["geometry/cosine"] for probe in probes])
    assert plain - truth > 0.07, "the noise that both gradients share looks like agreement"
    exact = noisy_probe(rng, u, g, noise=0.0)
    assert exact.alignment == pytest.approx(truth, abs=1e-6)


def test_alignment_of_noise_is_undefined():
    one = {"w": jnp.array([1.0, 0.0])}
    assert np.isnan(Probe((one, one), (one, {"w": jnp.array([-1.0, 0.2])})).alignment)


@slow
def test_outcome_reward_is_its_own_ideal_and_distillation_is_not(tmp_path):
    """The probe of Dr. GRPO itself: update and ideal are the same estimates, so the alignment is 1 by construction."""
    config = TrainConfig(
        student=str(toy.MODELS / "S"),
        teacher=(f"T2={toy.MODELS / 'T2'}",),
        task="toy",
        questions="all:4:7",
        objective=ObjectiveConfig("dr_grpo", importance="none"),
        reduction="sequence_sum",
        batch=4,
        mini_batch=4,
        micro_batch=96,
        max_tokens=80,
        max_prompt=64,
        probe_every=1,
        probe_questions=12,
        probe_rollouts=16,
        show_every=0,
    )
    trainer = Trainer(config, tmp_path / "run", lambda _: None)
    found = update_geometry(trainer)
    assert found["geometry/alignment"] == pytest.approx(1, rel=1e-4)
    assert found["geometry/cosine"] == pytest.approx(1, rel=1e-4)
    assert 0 < found["geometry/reliability"] < 1
    assert 0 < found["geometry/coherence"] < 1
    distilled = Trainer(replace(config, objective=ObjectiveConfig("full")), tmp_path / "full", lambda _: None)
    assert abs(update_geometry(distilled)["geometry/cosine"]) < 0.9
