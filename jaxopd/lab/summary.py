"""Tables of a contest: errors per estimator, errors per token spent, what a form points at."""

from collections.abc import Iterable, Mapping

import jax
import numpy as np
import pandas as pd
from jaxtyping import Float

from jaxopd.alignment import node_alignment, summarize
from jaxopd.gradients import FORMS, Form, Position, gradient
from jaxopd.lab.contest import CLEANED, Errors
from jaxopd.lab.problems import Problem

MILLION = 1e6
CLOSE = 0.02  # teachers whose true aggregates differ by less are not asked to be ranked
ENTRY = ["allocation", "budget", "estimator"]


def success_table(errors: Errors) -> pd.DataFrame:
    """P_succ of the tokens compared: bias, mean |bias|, RMSE, coverage of 95 % intervals, the part known at all."""
    rows = []
    for key, group in errors.success.groupby(ENTRY, sort=False):
        rows.append(
            dict(zip(ENTRY, key, strict=True))
            | {
                "tokens": group.groupby("question")["tokens"].first().mean(),
                "bias": group["bias"].mean(),
                "abs_bias": group["bias"].abs().mean(),
                "rmse": np.sqrt(group["square"].mean()),
                "coverage": group["coverage"].mean(),
                "known": group["known"].mean(),
            }
        )
    return pd.DataFrame(rows)


def aggregate_table(errors: Errors) -> pd.DataFrame:
    """The summary of alignment: bias and spread per question, RMSE, RMSE of teacher differences, coverage, ranking.

    bias and sd are root mean squares over questions and teachers; the noise that a mean of few replicates has is taken
    out of bias. `at a million` is what a million tokens a question would leave, sqrt(bias^2 + sd^2 tokens / 10^6): bias
    does not fall with tokens.
    """
    rows = []
    keys = [*ENTRY, "form", "set"]
    for key, group in errors.aggregates.groupby(keys, sort=False):
        own, pairs = group[~group["difference"]], group[group["difference"]]
        tokens = float(own.groupby("question")["tokens"].mean().mean())
        bias, sd = _bias_and_sd(own)
        rows.append(
            dict(zip(keys, key, strict=True))
            | {
                "tokens": tokens,
                "bias": bias,
                "sd": sd,
                "rmse": _rmse(own),
                "at a million": np.sqrt(bias**2 + sd**2 * tokens / MILLION),
                "difference rmse": _rmse(pairs),
                "coverage": _coverage(own),
                "difference coverage": _coverage(pairs),
                "ranking": ranking(pairs["value"].to_numpy(), pairs["truth"].to_numpy()),
            }
        )
    return pd.DataFrame(rows)


def _bias_and_sd(rows: pd.DataFrame) -> tuple[float, float]:
    """Root mean squares, over questions and teachers, of the expected error and of the deviation from it."""
    error = (rows["value"] - rows["truth"]).groupby([rows["question"], rows["teacher"]])
    mean, variance, number = (np.asarray(x, float) for x in (error.mean(), error.var(ddof=1), error.count()))
    if not np.isfinite(variance).any():
        return np.nan, np.nan
    square = np.nanmean(np.square(mean) - variance / number)
    return float(np.sqrt(max(square, 0.0))), float(np.sqrt(np.nanmean(variance)))


def _rmse(rows: pd.DataFrame) -> float:
    """Root of the mean, over questions and teachers, of the mean squared error."""
    square = np.square(rows["value"] - rows["truth"]).groupby([rows["question"], rows["teacher"]]).mean()
    return float(np.sqrt(square.mean()))


def _coverage(rows: pd.DataFrame) -> float:
    rows = rows.dropna(subset="half")
    return float(((rows["value"] - rows["truth"]).abs() <= rows["half"]).mean()) if len(rows) else np.nan


def ranking(value: Float[np.ndarray, "*n"], truth: Float[np.ndarray, "*n"]) -> float:
    """How often two teachers that truly differ are put in the right order, from differences of their aggregates."""
    apart = (np.abs(truth) > CLOSE) & np.isfinite(value)
    return float((np.sign(value) == np.sign(truth))[apart].mean()) if apart.any() else np.nan


def saving_table(errors: Errors) -> pd.DataFrame:
    """Tokens at equal error: the paper's allocation against each other, by interpolating log error in log tokens.

    Over all questions (root mean square) and for the median question. Ours is always the error on the fixed set; theirs
    that on the set named. `at least`: our smallest budget errs less already. Where our largest errs more, the error is
    not reached: NaN, which the median counts as no saving.
    """
    curves = errors.aggregates[errors.aggregates["form"] == "reverse_kl"]
    theirs, ours = curves[curves["allocation"] == "paper"], curves[curves["estimator"] == CLEANED]
    rows = []
    for allocation in [name for name in ours["allocation"].unique() if name != "paper"]:
        curve = ours[ours["allocation"] == allocation]
        for (*place, difference), base in theirs.groupby(["budget", "estimator", "set", "difference"], sort=False):
            over = base, curve[curve["difference"] == difference]
            whole, tokens = _saving(*over), base["tokens"].mean()
            each = [_saving(*(x[x["question"] == question] for x in over)) for question in base["question"].unique()]
            median = np.quantile(np.nan_to_num(each, nan=0.0), 0.5, method="lower")
            rows.append(
                {
                    "allocation": allocation,
                    **dict(zip(("against", "estimator", "their set"), place, strict=True)),
                    "of": "difference" if difference else "cosine",
                    "their tokens": tokens,
                    "their rmse": _rmse(base),
                    "our tokens": tokens / whole,
                    "saving": whole,
                    "at least": _rmse(base) >= max(rmse for _, rmse in _curve(over[1])),
                    "median question": median if median > 0 else np.nan,
                }
            )
    return pd.DataFrame(rows)


def _curve(rows: pd.DataFrame) -> list[tuple[float, float]]:
    """Tokens and error of each budget."""
    return sorted((group["tokens"].mean(), _rmse(group)) for _, group in rows.groupby("budget"))


def _saving(base: pd.DataFrame, ours: pd.DataFrame) -> float:
    goal = np.log(_rmse(base))
    tokens, error = np.log(np.array(_curve(ours))).T
    if not (error <= goal).any():
        return np.nan
    reached = int(np.argmax(error <= goal))  # the first budget that errs no more
    if reached == 0:
        return float(base["tokens"].mean() / np.exp(tokens[0]))
    part = (error[reached - 1] - goal) / (error[reached - 1] - error[reached])
    needed = tokens[reached - 1] + part * (tokens[reached] - tokens[reached - 1])
    return float(base["tokens"].mean() / np.exp(needed))


def form_table(problems: Iterable[Problem], forms: Mapping[str, Form], tau: float) -> pd.DataFrame:
    """What each form's exact gradient points at: cosine to the ideal gradient and to full reverse KL's.

    Means over questions and teachers; `best teacher` is how often the form's global cosine names the teacher that
    reverse KL's does. A form of sampled tokens has no exact gradient: its row is NaN.
    """
    found = []
    for problem in problems:
        judged = problem.compared(tau)[None]
        for teacher in problem.log_q:
            positions = problem.positions(judged, problem.success[None], teacher)
            scores = node_alignment(positions, forms, ("renormalized",))
            reverse = gradients(FORMS["reverse_kl"], positions)
            for name, form in forms.items():
                cosine = scores[f"align_{name}"]
                summary = summarize(cosine, scores["ideal_norm"], scores["success_range"], np.isfinite(cosine))
                to_reverse = cosines(gradients(form, positions), reverse)
                found.append(
                    {
                        "form": name,
                        "question": problem.question,
                        "teacher": teacher,
                        "global cosine": float(summary["global"]),
                        "mean cosine": float(summary["mean"]),
                        "fraction positive": float(summary["fraction_positive"]),
                        "cosine to reverse_kl": np.nanmean(to_reverse) if np.isfinite(to_reverse).any() else np.nan,
                    }
                )
    table = pd.DataFrame(found)
    ranked = table.dropna(subset="global cosine").sort_values("global cosine")
    best = ranked.groupby(["form", "question"])["teacher"].last().unstack("form")
    same = best.eq(best["reverse_kl"], axis=0).mean().rename("best teacher as reverse_kl")
    means = table.drop(columns=["question", "teacher"]).groupby("form", sort=False).mean()
    return means.join(same).reset_index()


def gradients(form: Form, positions: Position) -> Float[np.ndarray, "N K"]:
    """The logit gradient of a form at every node, P and Q renormalised on S."""
    return np.asarray(jax.vmap(lambda position: gradient(form, position))(positions), np.float64)


def cosines(a: Float[np.ndarray, "N K"], b: Float[np.ndarray, "N K"]) -> Float[np.ndarray, " N"]:
    """Cosines of rows, NaN where one is zero."""
    size = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.divide((a * b).sum(1), size, out=np.full(len(a), np.nan), where=size > 0)
