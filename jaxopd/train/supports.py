"""Which tokens of a position an objective looks at, and what becomes of the probability outside them.

A position lists the student's top k, then the teacher's: 2k candidates, of which the second half may repeat the first.
Every support is a mask over that list, so one scoring pass serves all of them and the metrics.
"""

from dataclasses import replace
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxopd.errors import InputError
from jaxopd.gradients import Position, on_support

Support = Literal["student", "teacher", "overlap", "union", "non_overlap"]
Mass = Literal["renormalized", "tail", "raw"]
SUPPORTS: tuple[Support, ...] = get_args(Support)
MASSES: tuple[Mass, ...] = get_args(Mass)
LARGEST_LOG_MASS = -1e-7  # of a support that holds everything: its tail keeps a finite logarithm


def top_masks(
    student_ids: Int[Array, "*batch k"], teacher_ids: Int[Array, "*batch k"]
) -> tuple[Bool[Array, "*batch k"], Bool[Array, "*batch k"]]:
    """Mark the student's tokens that the teacher has too, and the teacher's that the student has."""
    same = student_ids[..., :, None] == teacher_ids[..., None, :]
    return same.any(-1), same.any(-2)


def support_mask(
    student_ids: Int[Array, "*batch k"], teacher_ids: Int[Array, "*batch k"], support: Support
) -> Bool[Array, "*batch 2k"]:
    """Mark the candidates [student's top k, teacher's top k] that a support keeps, each token once.

    overlap: in both; union: in any; non_overlap: in exactly one. Raises InputError on another name.
    """
    if support not in SUPPORTS:
        raise InputError(f"support: found {support!r}, expected one of {', '.join(SUPPORTS)}")
    shared, known = top_masks(student_ids, teacher_ids)
    everything, nothing = jnp.ones_like(shared), jnp.zeros_like(shared)
    halves = {
        "student": (everything, nothing),
        "teacher": (nothing, everything),
        "overlap": (shared, nothing),
        "union": (everything, ~known),
        "non_overlap": (~shared, ~known),
    }
    return jnp.concatenate(halves[support], -1)


def with_mass(position: Position, mass: Mass) -> Position:
    """Give what is outside the support: `renormalized` away, one more token (`tail`), or left out (`raw`).

    In a raw position the probabilities of the support do not sum to one and those outside count as zero.
    Raises InputError on another name.
    """
    if mass == "renormalized":
        return on_support(position)
    if mass == "raw":
        return replace(position, log_p=_only(position, position.log_p), log_q=_only(position, position.log_q))
    if mass == "tail":
        log_p, log_q = (_with_tail(_only(position, x)) for x in (position.log_p, position.log_q))
        return Position.create(log_p, log_q, support=jnp.append(position.support, True))
    raise InputError(f"mass: found {mass!r}, expected one of {', '.join(MASSES)}")


def _only(position: Position, log_p: Float[Array, "K"]) -> Float[Array, "K"]:
    return jnp.where(position.support, log_p, -jnp.inf)


def _with_tail(log_p: Float[Array, "K"]) -> Float[Array, "K+1"]:
    kept = jnp.isfinite(log_p)
    # Twice where: the derivative of a logarithm of nothing would be NaN, and NaN times zero too.
    total = jax.nn.logsumexp(jnp.where(kept, log_p, -1e4))
    tail = jnp.log(-jnp.expm1(jnp.minimum(total, LARGEST_LOG_MASS)))
    return jnp.append(log_p, tail)
