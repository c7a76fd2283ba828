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
from jaxopd.train.geometry import cosine, head_coherence, update_geometry
from jaxopd.train.loop import Trainer
from jaxopd.train.objectives import ObjectiveConfig

pytestmark = pytest.mark.slow  # minutes in all: they train


def models(seed: int = 0, T: int = 6):
    rng = np.random.default_rng(seed)
    shapes = (T, 5), (11, 5), (T, 7), (11, 7)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


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


def test_outcome_reward_is_its_own_ideal_and_distillation_is_not(tmp_path):
    """The probe of Dr. GRPO itself: the same responses, so the cosine is 1 up to the baselines of the halves."""
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
    assert found["geometry/alignment"] > 0.98
    assert -1 <= found["geometry/reliability"] < 1
    assert 0 < found["geometry/coherence"] < 1
    # Few rollouts leave the ideal noisy: distillation is another direction, and more than that cannot be asserted.
    distilled = Trainer(replace(config, objective=ObjectiveConfig("full")), tmp_path / "full", lambda _: None)
    assert abs(update_geometry(distilled)["geometry/alignment"]) < 0.9
