"""Reading a run's records: the four parquet tables and the configuration that `diagnose` wrote."""

from dataclasses import dataclass, field
from functools import cached_property
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import pandas as pd

from jaxopd.errors import InputError
from jaxopd.gradients import FORMS
from jaxopd.runs import RunFolder

# What each estimator of P_succ is, in one line; an estimator absent here is still reported.
ESTIMATORS = {
    "pooled": "every rollout that passes a node counts there, as in the paper; biased above launch points: those "
    "rollouts were forced through chosen tokens",
    "on_policy": "only rollouts launched at or above an edge count for it; unbiased but noisier: fewer rollouts",
    "bellman": "values are combined backward along each path with the student's own probabilities; nearly unbiased, "
    "with the least noise",
    "truth": "the oracle: bellman on many rollouts of its own, launched at every exit (tiny models only)",
}
DEFAULT_ESTIMATORS = ("bellman", "on_policy", "pooled")
COLUMNS = {
    "questions": [
        "question",
        "task",
        "prompt",
        "gold",
        "pass_rate",
        "difficulty",
        "n_initial",
        "n_targeted",
        "excluded",
    ],
    "paths": ["question", "path", "correct", "length", "finish", "text"],
    "nodes": [
        *("question", "path", "path_correct", "t", "token", "text", "teacher", "estimator", "decision", "support"),
        *("visits", "reverse_kl", "js", "entropy_student", "entropy_teacher"),
        *(
            "p",
            "q",
            "p_succ",
            "p_succ_low",
            "p_succ_high",
            "value",
            "success_range",
            "ideal_norm",
            "advantage",
            "align_reverse_kl",
        ),
    ],
    "tokens": ["question", "path", "t", "token", "text", "p", "visits"],
}


@dataclass(frozen=True)
class Records:
    """The tables of one run, as the report reads them."""

    name: str
    config: dict[str, Any]
    questions: pd.DataFrame
    paths: pd.DataFrame
    nodes: pd.DataFrame
    tokens: pd.DataFrame
    cosines: pd.DataFrame = field(default_factory=pd.DataFrame)  # where exits were launched

    @cached_property
    def teachers(self) -> list[str]:
        """Names of the teachers, in the order of the configuration."""
        declared = [
            str(spec).partition("=")[0] for spec in self.config.get("teacher") or self.config.get("teachers") or ()
        ]
        return _ordered(self.nodes["teacher"], declared)

    @cached_property
    def estimators(self) -> list[str]:
        """Names of the estimators present, biased first and truth last."""
        return estimators_of(self.nodes)

    @cached_property
    def estimator(self) -> str:
        """The estimator that stands in front: the least noisy of those present."""
        return default_estimator(self.nodes)

    @cached_property
    def forms(self) -> list[str]:
        """Gradient forms, named by the columns align_FORM (renormalised reading)."""
        names = pd.Series(
            [c.removeprefix("align_") for c in self.nodes.columns if c.startswith("align_")], dtype=object
        )
        return _ordered(names[~names.str.endswith("_restricted")], list(FORMS))


def estimators_of(nodes: pd.DataFrame) -> list[str]:
    """List the estimators present, biased first and truth last."""
    return _ordered(nodes["estimator"], list(ESTIMATORS))


def is_excluded(questions: pd.DataFrame) -> pd.Series:
    """Mark the questions that have a reason for exclusion."""
    return questions["excluded"].fillna("").astype(str).ne("")


def default_estimator(nodes: pd.DataFrame) -> str:
    """Choose the estimator to show first: bellman, else the next best present."""
    present = list(nodes["estimator"].unique())
    return next(
        (name for name in DEFAULT_ESTIMATORS if name in present), present[0] if present else DEFAULT_ESTIMATORS[0]
    )


def read_records(run_dir: str | Path) -> Records:
    """Read RUN/config.json and RUN/records/*.parquet; raise InputError where one is missing or incomplete."""
    try:
        run = RunFolder.existing(str(run_dir), "diagnose")
        config = run.read_json("config.json")
    except (JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{run_dir}/config.json: found invalid JSON ({error}), expected an object") from None
    if not isinstance(config, dict):
        raise InputError(f"{run_dir}/config.json: found a {type(config).__name__}, expected an object")
    if run.has("records/screening.parquet") and not run.has("records/questions.parquet"):
        raise InputError(f"{run_dir}: found a run of jaxopd screen, expected one of jaxopd diagnose")
    tables = {name: _read_table(run, f"records/{name}.parquet", columns) for name, columns in COLUMNS.items()}
    if config.get("allocation") == "exits":
        tables["cosines"] = _read_table(run, "records/cosines.parquet", ["question", "teacher", "global_cosine", "se"])
    return Records(name=Path(run_dir).resolve().name, config=config, **tables)


def _read_table(run: RunFolder, key: str, columns: list[str]) -> pd.DataFrame:
    frame = run.read_table(key)
    missing = [c for c in columns if c not in frame.columns]
    if missing and len(frame):
        raise InputError(f"{run.path}/{key}: found no column {missing[0]!r}, expected {', '.join(columns)}")
    # A run whose questions were all excluded may hold a table without rows and without columns.
    return frame.reset_index(drop=True) if len(frame) else frame.reindex(columns=[*frame.columns, *missing])


def _ordered(column: pd.Series, preferred: list[str]) -> list[str]:
    present = set(column.dropna())
    return [name for name in dict.fromkeys(preferred) if name in present] + sorted(present - set(preferred))
