"""Every table and figure of paper A, with one command.

    python experiments/unmasking/all.py                               # toy scale
    python experiments/unmasking/all.py --smoke                       # does everything run?
    python experiments/unmasking/all.py --scale paper --data DATA     # accelerators
    python experiments/unmasking/all.py --runs runs/boolq runs/mmlu   # finished runs of your own

Makes the runs that are missing, then runs each script of this folder on them and writes OUT/results/index.md, with all
tables in order: what was analysed, the findings, then the paper's.
"""

import importlib
import time

from study import Study, study

SCRIPTS = (
    "settings",
    "findings",
    *("table1", "table2", "table3", "table4", "table5", "table6", "tables7to9"),
    *("figure3", "figure4", "figure7", "figureE1", "figureE2", "robustness"),
)


def run(chosen: Study) -> None:
    """Runs every script on one study and writes the index."""
    lines = ["# Unmasking on-policy distillation: all tables and figures\n"]
    for name in SCRIPTS:
        began = time.perf_counter()
        result = importlib.import_module(name).make(chosen)
        chosen.write(result)
        lines += [table.markdown() for table in result.tables]
        lines += [f"![{figure}]({figure}.svg)\n" for figure in result.figures]
        print(f"{name:12} {time.perf_counter() - began:6.1f} s", flush=True)
    index = chosen.out / "results" / "index.md"
    index.write_text("\n".join(lines), encoding="utf-8")
    print(index)


if __name__ == "__main__":
    started = time.perf_counter()
    made = study(description=__doc__)
    print(f"{'runs':12} {time.perf_counter() - started:6.1f} s", flush=True)
    run(made)
