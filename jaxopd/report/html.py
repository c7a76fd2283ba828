"""The self-contained page: records, tables and plots in one file that asks nothing of the network.

Everything a model wrote is untrusted. Jinja escapes it, JSON for the script has its angle brackets escaped, control and
bidirectional characters are shown as code points, and the content security policy lets only this page's own script run,
and the scripts beside it where it has any.
"""

import base64
import hashlib
import json
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from jaxopd.report.explorer import Explorer
from jaxopd.report.plots import adaptive
from jaxopd.report.records import ESTIMATORS, Records, is_excluded
from jaxopd.report.tables import Table
from jaxopd.report.text import script_json, visible

# Ours: they enter the page unescaped.
STYLE, SCRIPTS = "report.css", ("explorer.js", "node.js", "tree.js", "table.js", "hands.js")


def render(records: Records, tables: list[Table], plots: dict[str, str], explorer: Explorer) -> str:
    """Render report.html from the records, the tables, the plots (SVG text by name) and the explorer's data."""
    env = Environment(
        loader=PackageLoader("jaxopd.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters["visible"] = visible
    style, *scripts = (
        files("jaxopd.report").joinpath("templates", name).read_text("utf-8") for name in (STYLE, *SCRIPTS)
    )
    script = "\n".join(scripts)
    return env.get_template("report.html.jinja").render(
        style=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        name=records.name,
        facts=_facts(records),
        tables={table.name: table for table in tables},
        by_estimator=[table for table in tables if table.name.startswith("ranking_")],
        plots={name: _data_uri(adaptive(svg)) for name, svg in plots.items()},
        config=_flatten(records.config),
        estimators=[
            (name, ESTIMATORS.get(name, "an estimator without a description here")) for name in records.estimators
        ],
        estimator=records.estimator,
        head=script_json(explorer.head),
        explorer=explorer,
        reasons=records.questions.loc[is_excluded(records.questions), "excluded"].value_counts().to_dict(),
    )


def _facts(records: Records) -> dict[str, Any]:
    """The few numbers the page opens with."""
    questions, nodes, config = records.questions, records.nodes, records.config
    decisions = nodes[(nodes["estimator"] == records.estimator) & nodes["decision"].eq(True)]
    return {
        "student": config.get("student", "unnamed student"),
        "task": config.get("task") or ", ".join(map(str, questions["task"].unique())) or "unnamed task",
        "questions": len(questions),
        "analysed": int((~is_excluded(questions)).sum()),
        "paths": len(records.paths),
        "correct": int(records.paths["correct"].eq(True).sum()),
        "teachers": len(records.teachers),
        "decisions": len(decisions.drop_duplicates(["question", "path", "t"])),
        "rollouts": int(questions["n_initial"].sum() + questions["n_targeted"].sum()),
        "targeted": int(questions["n_targeted"].sum()),
    }


def _flatten(config: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Dotted keys and printable values of a nested configuration."""
    if isinstance(config, list) and all(isinstance(item, str) for item in config):
        config = ", ".join(config)
    if not isinstance(config, dict) or (prefix and not config):
        return [(prefix, config if isinstance(config, str) else json.dumps(config, ensure_ascii=False))]
    return [
        pair for key, value in config.items() for pair in _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    ]


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
