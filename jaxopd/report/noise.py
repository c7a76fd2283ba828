"""What the noise of P_succ leaves of a node's numbers: their 95 % intervals, and the gradients they rest on.

DRAWS times, P_succ of every token of S_u is drawn from a normal around its estimate, with its standard error, cut to
[0, 1]: tokens of one node have rollouts of their own, so the draws are independent. An interval spans the 2.5 to
97.5 % quantiles of a number over the draws, and the number itself. P, Q and the forms' gradients are held fixed: the
sampling noise of the forms that average rollouts is not in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Array, Bool, Float, Int

from jaxopd.gradients import FORMS, SAMPLED, Position, gradient
from jaxopd.report.trees import QuestionTree

DRAWS = 200
TAILS = 0.025, 0.975
LEAST_Q = 1e-38  # stands for probabilities that float32 rounds to 0
ROWS = 512  # positions in one call: a fixed number, so that few shapes are compiled

Triple = Float[np.ndarray, "... 3"]  # a number, the low and the high end of its interval


@dataclass(frozen=True)
class KnownTokens:
    """S_u at the D decision nodes of one estimator: indices of edges, padded with -1 to K."""

    nodes: Int[np.ndarray, " D"]
    edges: Int[np.ndarray, "D K"]

    def __getitem__(self, rows: slice) -> "KnownTokens":
        return KnownTokens(self.nodes[rows], self.edges[rows])

    @property
    def mask(self) -> Bool[np.ndarray, "D K"]:
        """True where there is a token."""
        return self.edges >= 0

    def spread(self, column: pd.Series, fill: float = 0.0) -> Float[np.ndarray, "D K"]:
        """Give an edge column at S_u, `fill` where there is no token."""
        return np.append(column.to_numpy(float), fill)[self.edges]

    def renormalized(self, column: pd.Series) -> Float[np.ndarray, "D K"]:
        """Give a probability column conditioned on S_u."""
        p = self.spread(column)
        mass = p.sum(1, keepdims=True)
        return np.divide(p, mass, out=np.zeros_like(p), where=mass > 0)


def known_tokens(tree: QuestionTree, estimator: str, index: int) -> KnownTokens:
    """Find S_u at decision nodes: as many of the most visited candidates of known success as `support` counts."""
    nodes = np.flatnonzero(tree.scores["decision"][index, 0] == 1)
    edges = tree.edges
    if not len(nodes):
        return KnownTokens(nodes, np.zeros((0, 8), int))
    visits = "visits_on_policy" if estimator == "on_policy" and "visits_on_policy" in edges else "visits"
    judged = edges[edges[f"p_succ_{estimator}"].notna() & edges["node"].isin(nodes)]
    rank = judged.groupby("node")[visits].rank("first", ascending=False)
    inside = judged[rank <= tree.scores["support"][index, 0, judged["node"]]]
    slot = inside.groupby("node").cumcount().to_numpy()
    table = np.full((len(nodes), -(-(slot.max(initial=0) + 1) // 8) * 8), -1)
    table[np.searchsorted(nodes, inside["node"]), slot] = inside.index
    return KnownTokens(nodes, table)


def ideal_gradient(p: Float[np.ndarray, "D K"], success: Float[np.ndarray, "D K ..."]) -> Float[np.ndarray, "D K ..."]:
    """Return P (P_succ - mean) with P renormalised on S_u (paper A, Eq. 2.3); `success` may hold draws behind."""
    return np.einsum("dk,dk...->dk...", p, success - np.einsum("dk,dk...->d...", p, success)[:, None])


def form_gradients(
    tree: QuestionTree, known: KnownTokens, estimator: str, teacher: str, forms: Sequence[str]
) -> dict[str, Float[np.ndarray, "D K"]]:
    """Return each form's logit gradient at S_u (renormalised reading), for the forms whose inputs are recorded."""
    edges, n = tree.edges, len(known.nodes)
    wanted = tuple(form for form in forms if form in FORMS and ("samples" in edges or form not in SAMPLED))
    with np.errstate(divide="ignore"):
        fields = {"log_p": np.log(known.spread(edges["p"])), "support": known.mask}
        fields |= {"log_q": np.log(known.spread(edges[f"q_{teacher}"].clip(LEAST_Q)))}
    fields |= {"success": known.spread(edges[f"p_succ_{estimator}"])}
    if "samples" in edges:
        fields |= {"counts": known.spread(edges["samples"]), "advantage": known.spread(edges["sample_advantage"])}
        fields |= {"reward_to_go": known.spread(edges[f"reward_to_go_{teacher}"])}
        fields |= {"advantage_std": np.ones(n)}  # one factor for the whole question: it turns no gradient
    fields = {name: np.pad(x, [(0, -n % ROWS)] + [(0, 0)] * (x.ndim - 1)) for name, x in fields.items()}
    found = [np.zeros((0, len(wanted), known.edges.shape[1]))]
    for low in range(0, n, ROWS):
        rows = Position.create(**{name: x[low : low + ROWS] for name, x in fields.items()})
        found.append(np.asarray(_gradients(rows, wanted)))
    stacked = np.concatenate(found)[:n]
    return {form: stacked[:, i] for i, form in enumerate(wanted)}


@partial(jax.jit, static_argnames="forms")
def _gradients(positions: Position, forms: tuple[str, ...]) -> Float[Array, "R F K"]:
    return jax.vmap(lambda at: jnp.stack([gradient(FORMS[form], at) for form in forms]))(positions)


class Noise:
    """Draws of P_succ at S_u, and what they make of each number that rests on it."""

    def __init__(self, tree: QuestionTree, known: KnownTokens, estimator: str, seed: int = 0):
        edges = tree.edges
        self.known, self.p = known, known.renormalized(edges["p"])
        self.success = known.spread(edges[f"p_succ_{estimator}"])
        se = np.nan_to_num(known.spread(edges[f"se_{estimator}"]))
        normal = np.random.default_rng(seed).standard_normal((*se.shape, DRAWS), dtype=np.float32)
        self.draws = np.clip(self.success[..., None] + se[..., None] * normal, 0, 1).astype(np.float32)
        self.ideal_draws = ideal_gradient(self.p.astype(np.float32), self.draws)

    def value(self, estimate: Float[np.ndarray, " D"]) -> Triple:
        """Bound the expected success over S_u."""
        return _bounded(estimate, np.einsum("dk,dkn->dn", self.p, self.draws))

    def success_range(self, estimate: Float[np.ndarray, " D"]) -> Triple:
        """Bound the success of the best token minus that of the worst; which two, the estimate says."""
        best = np.where(self.known.mask, self.success, -np.inf).argmax(1)
        worst = np.where(self.known.mask, self.success, np.inf).argmin(1)
        row = np.arange(len(best))
        return _bounded(estimate, np.maximum(self.draws[row, best] - self.draws[row, worst], 0))

    def advantage(self, estimate: Float[np.ndarray, " D"], q: pd.Series) -> Triple:
        """Bound the teacher advantage sum (Q - P) P_succ (Eq. 2.1)."""
        return _bounded(estimate, np.einsum("dk,dkn->dn", self.known.renormalized(q) - self.p, self.draws))

    def ideal(self) -> Triple:
        """Give the ideal gradient at each token of S_u, [D, K, 3]."""
        return _bounded(ideal_gradient(self.p, self.success), self.ideal_draws)

    def alignment(self, estimate: Float[np.ndarray, " D"], ascent: Float[np.ndarray, "D K"]) -> Triple:
        """Bound the cosine of the ideal gradient and a form's; a draw without an ideal gradient counts as 0."""
        size = np.linalg.norm(self.ideal_draws, axis=1) * np.linalg.norm(ascent, axis=1)[:, None]
        dot = np.einsum("dk,dkn->dn", ascent, self.ideal_draws)
        return _bounded(estimate, np.divide(dot, size, out=np.zeros_like(dot), where=size > 0))


def _bounded(estimate: np.ndarray, draws: np.ndarray) -> Triple:
    low, high = np.quantile(draws, TAILS, axis=-1)
    return np.stack([estimate, np.minimum(low, estimate), np.maximum(high, estimate)], -1)
