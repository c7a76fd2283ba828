"""Writes a run folder with made-up records that follow their schema: deterministic, in well under a second.

Every question has four paths that part from the first one at some token, so that nodes are shared as in a real run.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd

HOSTILE = "<script>alert('x')</script>"
TEACHERS = {"T3": 0.5, "T2": 0.3, "self-1C": 0.15, "self <b>1C1W</b>": -0.05}  # name -> how often it points right
ESTIMATORS = {"pooled": 0.5, "on_policy": 0.25, "bellman": 0.12, "truth": 0.0}  # name -> chance that a sign is wrong
FORMS = ("reverse_kl", "forward_kl", "jsd", "single_sample", "minillm", "dr_grpo", "dr_grpo_std")
WORDS = "so 4 a minus 3 gives 1 ; so 1 b plus 6 gives 0 . thus 0 c times 5 = 0 ; wait 4 a plus 2 gives 6 . answer C"
NASTY = [
    "So ", "the ", HOSTILE, "\n", "</script", "><!--", ' "quoted" ', "it's", " &amp;", "\u202egnp.exe", "\u2067",
    "\u2069", "\u05e9\u05dc\u05d5\u05dd", "\U0001f642", "\ufffd", "\x00", "", "`md`", "|", "{{ 7*7 }}",
    "onclick=alert(1)", "\u2028", "\t", " answer", ": ", "{", "D", "}",
]  # fmt: skip
EXCLUDED = ("none correct", "none incorrect")
CANDIDATES = 4


def synthetic_run(folder, *, questions=9, teachers=TEACHERS, estimators=tuple(ESTIMATORS), decisions=0.4, seed=0):
    """Write a run; the first question's text is hostile, the last two questions are excluded."""
    rng = np.random.default_rng(seed)
    folder = Path(folder)
    (folder / "records").mkdir(parents=True, exist_ok=True)
    tables = {"questions": [], "paths": [], "nodes": [], "tokens": []}
    for index in range(questions):
        name = f"chain-{index:03d}" if index else f"chain-{HOSTILE}|000"
        excluded = EXCLUDED[index - questions] if index >= questions - len(EXCLUDED) else ""
        pass_rate = {"none correct": 0.0, "none incorrect": 1.0, "": rng.uniform(0.15, 0.95)}[excluded]
        tables["questions"].append({
            "question": name, "task": "toy/chain", "gold": "zero", "pass_rate": pass_rate, "excluded": excluded,
            "prompt": "a is 4 ; b is a minus 3 ; what is b modulo 7 ?" + (HOSTILE if index == 0 else ""),
            "difficulty": "medium", "n_initial": 200, "n_targeted": 0 if excluded else 1000 + index,
        })  # fmt: skip
        if not excluded:
            made = _Question(rng, decisions, teachers, estimators, _paths(rng, NASTY if index == 0 else WORDS.split()))
            for table, rows in made.tables(name, " " if index else "").items():
                tables[table] += rows
    for table, rows in tables.items():
        pd.DataFrame(rows).to_parquet(folder / "records" / f"{table}.parquet")
    config = {"student": "toy/S", "task": "toy/chain", "teacher": [f"{name}=toy/X" for name in teachers], "seed": seed}
    config |= {"budget": {"n_min": 100, "n_sig": 20, "tau": 0.02}, "note": HOSTILE}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _paths(rng, words):
    """Four word lists: the first, and three that leave it at different places and go on."""
    forks = rng.choice(np.arange(2, len(words) - 3), 3, replace=False)
    left = [[*words[:fork], f"fork{fork}", *words[fork + 1 : -int(rng.integers(1, 3))]] for fork in forks]
    return [words, *left]


class _Question:
    """The nodes of four paths, each made once although paths share it."""

    def __init__(self, rng, decisions, teachers, estimators, paths):
        self.paths, self.teachers, self.estimators = paths, teachers, estimators
        vocabulary = {word: i for i, word in enumerate(dict.fromkeys(word for path in paths for word in path))}
        self.ids = vocabulary | {f"alt{k}": len(vocabulary) + k for k in range(CANDIDATES)}
        prefixes = {tuple(path[:t]): a < 2 for a, path in reversed(list(enumerate(paths))) for t in range(len(path))}
        self.nodes = {prefix: self._node(rng, decisions, prefix, right) for prefix, right in sorted(prefixes.items())}

    def _node(self, rng, decisions, prefix, correct):
        """What is known at a node: rows of teachers and estimators, and its candidates by word."""
        decision, visits = rng.random() < decisions, int(rng.integers(60, 900))
        words = dict.fromkeys(path[len(prefix)] for path in self.paths if tuple(path[: len(prefix)]) == prefix)
        words = [*words, *(f"alt{k}" for k in range(CANDIDATES - len(words)))]
        candidates = {
            word: {"token": self.ids[word], "text": word, "p": p, "visits": int(visits * p) + 20 + k}
            for k, (word, p) in enumerate(zip(words, rng.dirichlet(np.full(len(words), 0.5)), strict=True))
        }
        for candidate in candidates.values():
            candidate["visits_on_policy"] = candidate["visits"] - 5
            candidate["launches"], candidate["samples"] = int(rng.integers(0, 9)), int(rng.integers(1, 50))
            candidate["sample_advantage"] = rng.uniform(-0.5, 0.5)
            for estimator in self.estimators:
                success = rng.uniform(0.1, 0.9) if decision else np.nan
                candidate |= {f"p_succ_{estimator}": success, f"se_{estimator}": 0.04}
                candidate |= {f"low_{estimator}": success - 0.07, f"high_{estimator}": success + 0.09}
        for teacher in self.teachers:
            for candidate, q in zip(candidates.values(), rng.dirichlet(np.full(len(words), 0.5)), strict=True):
                candidate |= {f"q_{teacher}": q, f"reward_to_go_{teacher}": rng.normal()}
        rows = [
            row for name, skill in self.teachers.items() for row in self._scores(rng, name, skill, decision, correct)
        ]
        span = min(rng.exponential(0.12), 0.9) if decision else 0.0
        value, norm = rng.uniform(0.2, 0.8), span * rng.uniform(0.1, 0.5)
        shared = {"decision": decision, "support": 3 if decision else 1, "visits": visits, "value": value}
        shared |= {"success_range": span, "ideal_norm": norm, "ideal_norm_restricted": norm * 0.8}
        shared |= {"entropy_student": rng.exponential(0.5)}
        for row in rows:
            row |= shared | {"advantage": row["advantage"] * span}
        return rows, candidates

    def _scores(self, rng, teacher, skill, decision, correct):
        hit = rng.random() < 0.5 + skill * (0.3 if correct else 0.6)
        magnitude = 1.0 if rng.random() < 0.6 else rng.uniform(0.1, 1)
        exact = {"reverse_kl": rng.exponential(0.3), "js": rng.uniform(0, 0.3), "entropy_teacher": rng.exponential(0.5)}
        for estimator in self.estimators:
            wrong = rng.random() < ESTIMATORS[estimator]
            align = magnitude * (1 if hit != wrong else -1) if decision else np.nan
            row = {"teacher": teacher, "estimator": estimator, "advantage": 0.1 * (1 - 2 * wrong), **exact}
            for f, form in enumerate(FORMS):
                row |= {f"align_{form}": align * (1 - 0.1 * f), f"align_{form}_restricted": align * 0.8}
            yield row

    def tables(self, question, gap):
        """Rows of paths, nodes and tokens; those of a shared node repeat under every path."""
        made = {"paths": [], "nodes": [], "tokens": []}
        for a, path in enumerate(self.paths):
            place = {"question": question, "path": a}
            finish = "stop" if a else "length"
            made["paths"].append(
                place | {"correct": a < 2, "length": len(path), "finish": finish, "text": gap.join(path)}
            )
            for t, word in enumerate(path):
                rows, candidates = self.nodes[tuple(path[:t])]
                here, taken = place | {"t": t}, candidates[word]
                for row in rows:
                    ends = {"": "p_succ", "_low": "low", "_high": "high"}
                    known = {f"p_succ{end}": taken[f"{column}_{row['estimator']}"] for end, column in ends.items()}
                    own = {"path_correct": a < 2, "token": taken["token"], "text": word, "p": taken["p"]}
                    made["nodes"].append(here | own | row | known | {"q": taken[f"q_{row['teacher']}"]})
                made["tokens"] += [here | candidate for candidate in candidates.values()]
        return made
