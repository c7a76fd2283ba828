"""Does a training signal point toward success? Scores per node, and their summaries per path, question and teacher.

A decision node has at least two tokens of known success (S_u) whose success rates differ. Anything else has no ideal
gradient and its alignment is NaN, as it is where the signal's own gradient is zero: `_cosine` decides that once.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Array, Bool, Float
from scipy import stats

from jaxopd.errors import InputError
from jaxopd.gradients import FORMS, READINGS, Form, Position, Reading, gradient, ideal, on_support
from jaxopd.types import bucket

STATISTICS = ("mean", "sr_weighted", "filtered", "global", "fraction_positive")
MIN_IDEAL_NORM = 0.01  # nodes with a smaller |g_ideal| are mostly noise
SMALLEST_BUCKET = 64


def _cosine(a: Float[Array, "K"], b: Float[Array, "K"]) -> Float[Array, ""]:
    """Cosine of two vectors, NaN if either is zero. Scaled first: squares of tiny gradients would underflow."""
    size_a, size_b = jnp.max(jnp.abs(a)), jnp.max(jnp.abs(b))
    defined = (size_a > 0) & (size_b > 0)
    a, b = a / jnp.where(defined, size_a, 1.0), b / jnp.where(defined, size_b, 1.0)
    norms = jnp.where(defined, jnp.sqrt(jnp.sum(a * a)) * jnp.sqrt(jnp.sum(b * b)), 1.0)
    return jnp.where(defined, jnp.clip(jnp.sum(a * b) / norms, -1.0, 1.0), jnp.nan)


def _success_range(position: Position) -> Float[Array, ""]:
    """Largest minus smallest success on S_u, NaN where S_u is empty."""
    support, success = position.support, position.success
    spread = jnp.max(jnp.where(support, success, -jnp.inf)) - jnp.min(jnp.where(support, success, jnp.inf))
    return jnp.where(jnp.any(support), spread, jnp.nan)


def alignment(
    position: Position,
    form: Form,
    reading: Reading = "renormalized",
    known: tuple[Float[Array, "K"], Float[Array, ""]] | None = None,
) -> Float[Array, ""]:
    """Return the cosine of the ideal gradient and a form's gradient over S_u (paper A, Eq. 2.12).

    One position; jax.vmap it for many, or use `node_alignment`. NaN unless this is a decision node and both
    gradients are non-zero. `known` = (f, fbar) over the full vocabulary, as in `gradient`.
    """
    score = _cosine(gradient(ideal, position, reading), gradient(form, position, reading, known))
    return jnp.where(_success_range(position) > 0, score, jnp.nan)


def teacher_advantage(position: Position) -> Float[Array, ""]:
    """Return sum_{S_u} (Q - P) P_succ with P and Q renormalised on S_u (paper A, Eq. 2.1); NaN where S_u is empty."""
    inside = on_support(position)
    gain = jnp.sum((jnp.exp(inside.log_q) - jnp.exp(inside.log_p)) * ideal(position))
    return jnp.where(jnp.any(position.support), gain, jnp.nan)


def _one_node(position: Position, known: dict, forms: tuple, readings: tuple) -> dict[str, Array]:
    scores = {
        "advantage": teacher_advantage(position),
        "success_range": _success_range(position),
        "value": jnp.where(
            jnp.any(position.support), jnp.sum(jnp.exp(on_support(position).log_p) * ideal(position)), jnp.nan
        ),
    }
    for reading in readings:
        suffix = _suffix(reading)
        scores[f"ideal_norm{suffix}"] = jnp.linalg.norm(gradient(ideal, position, reading))
        for name, form in forms:
            given = known.get(name) if reading == "restricted" else None
            scores[f"align_{name}{suffix}"] = alignment(position, form, reading, given)
    return scores


def _suffix(reading: str) -> str:
    return "" if reading == "renormalized" else f"_{reading}"


@partial(jax.jit, static_argnames=("forms", "readings"))
def _all_nodes(positions: Position, known: dict, forms: tuple, readings: tuple) -> dict[str, Array]:
    return jax.vmap(lambda position, given: _one_node(position, given, forms, readings))(positions, known)


def node_alignment(
    positions: Position,
    forms: Mapping[str, Form] | None = None,
    readings: Sequence[Reading] = READINGS,
    known: Mapping[str, tuple[Float[np.ndarray, "N K"], Float[np.ndarray, "N"]]] | None = None,
) -> dict[str, Float[np.ndarray, "N"]]:
    """Score every node in one jitted call; positions carry a leading axis N.

    Returns align_FORM and align_FORM_restricted (cosines, all of FORMS but the ideal by default), advantage
    (Eq. 2.1), success_range, value (expected success over S_u), ideal_norm and ideal_norm_restricted. `known` maps a
    form to (f [N, K], fbar [N]) computed over the full vocabulary, for the restricted reading when K < V. Nodes are
    padded to a power of two, so that the number of compilations stays small.
    """
    forms = {name: form for name, form in FORMS.items() if name != "ideal"} if forms is None else forms
    if unknown := [name for name in known or {} if name not in forms]:
        raise InputError(f"known: found the form {unknown[0]!r}, expected some of {', '.join(forms)}")
    n = positions.log_p.shape[0]
    size = bucket(n, SMALLEST_BUCKET)

    def pad(array: Array) -> np.ndarray:
        return np.pad(np.asarray(array), [(0, size - n)] + [(0, 0)] * (np.ndim(array) - 1))

    padded, known = jax.tree.map(pad, (positions, dict(known or {})))
    scores = jax.device_get(_all_nodes(padded, known, tuple(forms.items()), tuple(readings)))
    return {name: values[:n] for name, values in scores.items()}


def summarize(
    cosine: Float[np.ndarray, "*batch N"],
    ideal_norm: Float[np.ndarray, "*batch N"],
    success_range: Float[np.ndarray, "*batch N"],
    decision_mask: Bool[np.ndarray, "*batch N"],
    min_ideal_norm: float = MIN_IDEAL_NORM,
) -> dict[str, Float[np.ndarray, "*batch"]]:
    """Summarise the alignment of nodes (last axis) in five numbers; NaN where no node counts.

    mean; sr_weighted, weighted by the success range; filtered, over |g_ideal| > min_ideal_norm; global =
    sum g_ideal.u / sqrt(n sum |g_ideal|^2), u the signal's unit gradient; fraction_positive. n counts the
    decision nodes with a defined cosine.
    """
    keep = np.asarray(decision_mask, bool) & np.isfinite(cosine)
    cosine, norm, weight = (np.where(keep, x, 0.0).astype(float) for x in (cosine, ideal_norm, success_range))
    strong = norm > min_ideal_norm
    n = keep.sum(-1)

    def ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
        return np.divide(top, bottom, out=np.full(np.shape(top), np.nan), where=np.asarray(bottom) > 0)

    return {
        "mean": ratio(cosine.sum(-1), n),
        "sr_weighted": ratio((weight * cosine).sum(-1), weight.sum(-1)),
        "filtered": ratio((strong * cosine).sum(-1), strong.sum(-1)),
        "global": ratio((norm * cosine).sum(-1), np.sqrt(n * (norm**2).sum(-1))),
        "fraction_positive": ratio((cosine > 0).sum(-1).astype(float), n),
        "n": n,
    }


def _groups(table: pd.DataFrame, by: Sequence[str]) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    keys: Any
    for keys, group in table.groupby(list(by), sort=True, observed=True):
        yield dict(zip(by, keys, strict=True)), group


def aggregate(
    nodes: pd.DataFrame,
    form: str,
    by: Sequence[str] = ("question", "teacher", "estimator"),
    reading: Reading = "renormalized",
) -> pd.DataFrame:
    """Summarise a run's node table per group of `by`: one row a group, the columns of `summarize`.

    Groups without a decision node are kept, with n = 0. A node shared by two paths of a group counts once a path.
    """
    suffix = _suffix(reading)
    score, norm = f"align_{form}{suffix}", f"ideal_norm{suffix}"
    if missing := [c for c in (score, norm, "success_range", "decision", *by) if c not in nodes.columns]:
        raise InputError(f"nodes: found no column {missing[0]!r}, expected {', '.join([score, norm, *by])}")
    groups = nodes.groupby(list(by), sort=True, observed=True)
    cell = groups.ngroup().to_numpy(), groups.cumcount().to_numpy()
    shape = [int(place.max(initial=-1)) + 1 for place in cell]
    tables = np.zeros((4, *shape))  # one row a group, padded: no decision node there
    tables[:, *cell] = nodes[[score, norm, "success_range", "decision"]].to_numpy(float).T
    summary = summarize(*tables[:3], tables[3] > 0)
    keys = groups.size().reset_index()[list(by)]
    return keys.assign(**{name: summary[name] for name in (*STATISTICS, "n")})


def t_interval(values: Float[np.ndarray, "n"]) -> dict[str, float]:
    """Mean with its 95 % Student t interval; NaN limits below two values."""
    values = values[np.isfinite(values)]
    n, mean = len(values), float(np.mean(values)) if len(values) else np.nan
    half = stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n) if n > 1 else np.nan
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def across_questions(
    nodes: pd.DataFrame, form: str, by: Sequence[str] = ("teacher", "estimator"), reading: Reading = "renormalized"
) -> pd.DataFrame:
    """Average the questions' summaries: one row per group of `by` and statistic, with mean, low, high and n.

    low and high bound the 95 % t interval across questions; n counts the questions that have the statistic.
    """
    questions = aggregate(nodes, form, ("question", *by), reading)
    rows = [
        key | {"statistic": name} | t_interval(group[name].to_numpy(float))
        for key, group in _groups(questions, by)
        for name in STATISTICS
    ]
    return pd.DataFrame(rows, columns=[*by, "statistic", "mean", "low", "high", "n"])


def paired_difference(difference: Float[np.ndarray, "n"]) -> dict[str, float]:
    """Test that paired differences centre on 0: mean, 95 % t interval, two-sided Wilcoxon p, Cohen's d_z, pairs n."""
    difference = difference[np.isfinite(difference)]
    summary = t_interval(difference)
    moved = difference[difference != 0]  # Wilcoxon's own rule: pairs without a difference are dropped
    test: Any = stats.wilcoxon(moved) if len(moved) else None
    spread = float(np.std(difference, ddof=1)) if summary["n"] > 1 else 0.0
    return {
        "difference": summary["mean"],
        "low": summary["low"],
        "high": summary["high"],
        "wilcoxon_p": float(test.pvalue) if test else np.nan,
        "cohens_dz": summary["mean"] / spread if spread > 0 else np.nan,
        "n": summary["n"],
    }


def _paired(correct: Float[np.ndarray, "n"], incorrect: Float[np.ndarray, "n"]) -> dict[str, float]:
    both = np.isfinite(correct) & np.isfinite(incorrect)
    means = {
        name: float(np.mean(side[both])) if both.any() else np.nan
        for name, side in (("correct", correct), ("incorrect", incorrect))
    }
    return means | paired_difference(incorrect[both] - correct[both])


def correct_vs_incorrect(
    nodes: pd.DataFrame, form: str, by: Sequence[str] = ("teacher", "estimator"), reading: Reading = "renormalized"
) -> pd.DataFrame:
    """Compare incorrect with correct paths over the questions that have both (paper A, section 4.1).

    One row per group of `by` and statistic: the means correct and incorrect, difference = incorrect - correct with
    its 95 % t interval low..high, wilcoxon_p (two-sided Wilcoxon signed-rank test), cohens_dz (mean difference over
    its standard deviation) and n, the number of paired questions (0 with NaN elsewhere if there is none).
    """
    sides = aggregate(nodes, form, ("question", "path_correct", *by), reading)
    rows = []
    for key, group in _groups(sides, by):
        for name in STATISTICS:
            pairs = group.pivot(index="question", columns="path_correct", values=name).reindex(columns=[True, False])
            rows.append(key | {"statistic": name} | _paired(*pairs.to_numpy(float).T))
    columns = ["correct", "incorrect", "difference", "low", "high", "wilcoxon_p", "cohens_dz", "n"]
    return pd.DataFrame(rows, columns=[*by, "statistic", *columns])
