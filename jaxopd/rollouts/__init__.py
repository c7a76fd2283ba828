"""Rollouts: one engine for initial, targeted and demonstration sampling and for evaluation."""

from jaxopd.rollouts.decode import LENGTH, STOP
from jaxopd.rollouts.engine import Engine, Rollouts, rollout
from jaxopd.rollouts.sampling import Sampling
from jaxopd.rollouts.wave import Requests

__all__ = ["LENGTH", "STOP", "Engine", "Requests", "Rollouts", "Sampling", "rollout"]
