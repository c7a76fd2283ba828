"""Questions whose every success probability is exact: finite decision processes, of recorded runs or at random."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxopd.diagnose.config import DiagnoseConfig
from jaxopd.diagnose.demonstrations import teacher_prompt
from jaxopd.diagnose.launches import response_parts
from jaxopd.diagnose.nodes import included, representative_paths, teacher_model
from jaxopd.diagnose.session import Progress, Session
from jaxopd.errors import InputError
from jaxopd.gradients import Position
from jaxopd.responses import response_hidden, response_log_probs, token_log_probs
from jaxopd.runs import RunFolder
from jaxopd.tree import PathTree, Walks, build_tree, walk
from jaxopd.tree.allocation import ExitProblem
from jaxopd.tree.oracle import FiniteMDP

PATHS = 2  # of each outcome, in a random problem
SPREAD = 0.7  # of a random teacher's log-ratio to the student, nats
HINT = 1.5  # its share along the success that follows, nats


@dataclass(frozen=True)
class Problem:
    """A question as a finite decision process, seen from its paths."""

    question: str
    process: FiniteMDP
    tree: PathTree
    after: Int[np.ndarray, "N K"]  # the process's node after each candidate, -1 for none
    p: Float[np.ndarray, "N K"]
    log_q: dict[str, Float[np.ndarray, "N K"]]
    walks: Walks  # of the process's sequences

    @cached_property
    def success(self) -> Float[np.ndarray, "N K"]:
        """The exact success probability after each candidate."""
        return np.where(self.after >= 0, self.process.value[self.after], np.nan)

    @cached_property
    def q(self) -> Float[np.ndarray, "M N K"]:
        """The teachers' probabilities, in their order."""
        return np.exp(np.stack(list(self.log_q.values())), dtype=np.float64)

    @cached_property
    def log_p(self) -> Float[np.ndarray, "N K"]:
        """log P, -inf where the process has no such token."""
        with np.errstate(divide="ignore"):
            return np.log(self.p)

    @cached_property
    def lengths(self) -> Int[np.ndarray, " G"]:
        """Tokens of each of the process's sequences."""
        return (self.process.sequences >= 0).sum(1)

    @cached_property
    def others(self) -> list[Int[np.ndarray, " _"]]:
        """Per path node, the process's nodes after the tokens that are no candidates."""
        at, _ = self.process.along(self.tree)
        low, many = self.process.first_child[at], self.process.children[at]
        children = [low[n] + np.arange(many[n]) for n in range(len(at))]
        return [found[~np.isin(found, after)] for found, after in zip(children, self.after, strict=True)]

    def compared(self, tau: float) -> Bool[np.ndarray, "N K"]:
        """Tokens to which the student or a teacher gives more than tau."""
        return self.exits(tau).compared

    def exits(self, tau: float) -> ExitProblem:
        """The allocation's view of it."""
        return ExitProblem.create(self.tree, self.p, self.q, tau)

    def positions(
        self,
        judged: Bool[np.ndarray, "R N K"],
        success: Float[np.ndarray, "R N K"],
        teacher: str,
        samples: Mapping[str, Float[np.ndarray, "R N *K"]] = MappingProxyType({}),
    ) -> Position:
        """Lays out every node of R replicates, [R * N], with S_u = `judged`; unknown success counts as 0.

        `samples` are what forms of sampled tokens need, by the field of Position. K is padded to a multiple of 8, so
        that few programs are compiled.
        """
        R, _, K = judged.shape

        def flat(x: np.ndarray, fill: float = 0.0) -> np.ndarray:
            rows = x.reshape(-1, *x.shape[2:])
            wide = np.pad(rows, ((0, 0), (0, -K % 8)), constant_values=fill) if rows.ndim == 2 else rows
            return wide if x.dtype == bool else wide.astype(np.float32)

        policies = (flat(np.tile(x, (R, 1, 1)), -np.inf) for x in (self.log_p, self.log_q[teacher]))
        known = {"support": judged, "success": np.nan_to_num(success), **samples}
        return Position.create(*policies, **{name: flat(x) for name, x in known.items()})

    def watching(self, tau: float) -> "Problem":
        """The same question with the tokens of `compared` as candidates, as a diagnosis sees it; the rest is pooled."""
        kept = np.where(self.compared(tau), self.tree.candidates, -1)
        paths = [self.tree.tokens[a, :n] for a, n in enumerate(self.tree.length)]
        tree = build_tree(paths, list(self.tree.correct), kept)
        same = tree.candidates[:, :, None] == self.tree.candidates[:, None, :]
        known, slot = (tree.candidates >= 0) & same.any(-1), same.argmax(-1)

        def at(x: np.ndarray, otherwise: float) -> np.ndarray:
            return np.where(known, np.take_along_axis(x, slot, 1), otherwise)

        log_q = {name: at(x, -np.inf) for name, x in self.log_q.items()}
        seen = {"tree": tree, "after": at(self.after, -1), "p": at(self.p, 0.0), "log_q": log_q}
        return replace(self, **seen, walks=walk(tree, self.process.sequences))


def run_config(run: str) -> DiagnoseConfig:
    """Reads the configuration of a run; raises InputError where there is none."""
    known = RunFolder.existing(run, "diagnose").config() or {}
    fields = {f.name: known[f.name] for f in dataclasses.fields(DiagnoseConfig) if f.name in known}
    if "teacher" not in fields:
        raise InputError(f"{run}/config.json: found no field teacher, expected a run of jaxopd diagnose")
    tuples = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    return DiagnoseConfig(**fields | tuples)


def recorded_problems(run: str, progress: Progress = lambda stage, done, total: None) -> list[Problem]:
    """Makes the questions of a finished run exact, with the candidates its diagnosis had.

    Raises InputError where there is no such run, or no question of it has paths of both outcomes.
    """
    session = Session(run_config(run), run, progress)
    chosen, problems = included(session), []
    for index in chosen:
        progress("problems", len(problems), len(chosen))
        problem = recorded_problem(session, index).watching(session.config.tau)
        problems.append(replace(problem, question=f"{Path(run).name}/{problem.question}"))
    progress("problems", len(problems), len(chosen))
    if not problems:
        raise InputError(f"{run}: found no question with paths of both outcomes, expected at least one")
    return problems


def recorded_problem(session: Session, index: int) -> Problem:
    """Makes a question of a run exact: its rollouts' prefixes, the student's probabilities renormalised over them."""
    parts = response_parts(session, index)
    width = max(tokens.shape[1] for tokens, _ in parts)
    tokens = np.concatenate([np.pad(t, ((0, 0), (0, width - t.shape[1])), constant_values=-1) for t, _ in parts])
    grade = np.concatenate([grade for _, grade in parts])
    tokens, first = np.unique(tokens, axis=0, return_index=True)
    logp = response_log_probs(session.student, session.prompts[index], tokens)
    process = FiniteMDP.from_rollouts(tokens, logp, grade[first] == 1)
    plain = representative_paths(session, index).tree
    assert plain is not None
    tree = _all_children(process, [plain.tokens[a, :n] for a, n in enumerate(plain.length)], list(plain.correct))
    log_q = {}
    for name, spec in session.teachers.items():
        teacher = teacher_model(session, spec)
        hidden = response_hidden(teacher, teacher_prompt(session, spec, index), tree.tokens)
        log_q[name] = token_log_probs(teacher, hidden[tree.owner, tree.depth], tree.candidates)
    return _seen_from(session.questions[index].id, process, tree, log_q)


def random_problem(
    name: str, rng: np.random.Generator, *, teachers: int = 3, vocabulary: int = 4, depth: int = 6
) -> Problem:
    """Draws a process with every sequence of `vocabulary` tokens in it, and teachers that know more or less of it.

    Student: P ~ Dirichlet(1). Success of a leaf: Bernoulli, its log-odds a random walk along the sequence.
    Teacher m: log Q = log P + (HINT m / M) (V - Vbar) / sd + SPREAD noise, normalised.
    """
    G = vocabulary**depth
    sequences = np.stack(np.unravel_index(np.arange(G), (vocabulary,) * depth), 1)
    logp, odds = np.zeros((G, depth)), np.zeros(G)
    for t in range(depth):
        prefix = np.arange(G) // vocabulary ** (depth - t)
        policy = rng.dirichlet(np.ones(vocabulary), vocabulary**t)
        logp[:, t] = np.log(policy[prefix, sequences[:, t]])
        odds += rng.normal(size=(vocabulary**t, vocabulary))[prefix, sequences[:, t]]
    success = rng.random(G) < 1 / (1 + np.exp(-odds))
    process = FiniteMDP.from_rollouts(sequences, logp, success)
    rows = [row for outcome in (True, False) for row in rng.choice(np.flatnonzero(success == outcome), PATHS, False)]
    tree = _all_children(process, [sequences[row] for row in rows], list(success[rows]))
    problem = _seen_from(name, process, tree, {})
    value, known = problem.success, problem.after >= 0
    centred = value - np.nanmean(value, 1, keepdims=True)
    scaled = centred / np.maximum(np.nanstd(value, 1, keepdims=True), 1e-9)
    log_q = {}
    for m in range(teachers):
        tilt = HINT * m / max(1, teachers - 1) * scaled + SPREAD * rng.normal(size=value.shape)
        z = np.where(known, problem.log_p + tilt, -np.inf)
        log_q[f"teacher-{m}"] = z - np.logaddexp.reduce(z, 1, keepdims=True)
    return replace(problem, log_q=log_q)


def _all_children(process: FiniteMDP, paths: list[np.ndarray], correct: list[bool]) -> PathTree:
    """Merges paths, with every child that the process has at their nodes as a candidate."""
    plain = build_tree(paths, correct)
    at, _ = process.along(plain)
    candidates = np.full((len(at), int(process.children[at].max())), -1, np.int64)
    for n, node in enumerate(at):
        low, many = process.first_child[node], process.children[node]
        candidates[n, :many] = process.token[low : low + many]
    return build_tree(paths, correct, candidates)


def _seen_from(name: str, process: FiniteMDP, tree: PathTree, log_q: dict[str, np.ndarray]) -> Problem:
    _, after = process.along(tree)
    p = np.where(after >= 0, process.p[after], 0.0)
    return Problem(name, process, tree, after, p, log_q, walk(tree, process.sequences))
