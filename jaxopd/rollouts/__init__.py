"""Rollouts: one engine for initial, targeted and demonstration sampling and for evaluation."""

from jaxopd.rollouts.engine import LENGTH, STOP, Engine, Requests, Rollouts, rollout
from jaxopd.rollouts.sampling import Sampling

__all__ = ["LENGTH", "STOP", "Engine", "Requests", "Rollouts", "Sampling", "rollout"]
