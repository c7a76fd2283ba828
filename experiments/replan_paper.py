"""What would paper A's suite, 72 A100-days in its section 3, take with this engine?

    python experiments/replan_paper.py        # seconds, no accelerator; writes results/replan_paper.md

The paper prints models, teachers, 200 initial rollouts and "45K to 200K" targeted rollouts a question, and traces of
about 200 tokens (BoolQ) to 30K (AIME). Everything else is an assumption, listed in the table below it.
"""

from pathlib import Path

import pandas as pd

from jaxopd.models import QwenConfig
from jaxopd.plan import HARDWARE, DiagnosisWork, plan_diagnosis

RESULT = Path(__file__).parent / "results" / "replan_paper.md"
EXITS = 600  # mean responses that exits take at most, the default of `jaxopd diagnose`


def qwen3(hidden: int, inner: int, layers: int, heads: int, tied: bool) -> QwenConfig:
    return QwenConfig(151936, hidden, inner, layers, heads, 8, 128, max_positions=40960, tie_embeddings=tied)


STUDENTS = {"0.6B": qwen3(1024, 3072, 28, 16, True), "1.7B": qwen3(2048, 6144, 28, 16, True)}
TEACHERS = {
    "4B": qwen3(2560, 9728, 36, 32, True),
    "8B": qwen3(4096, 12288, 36, 32, False),
    "14B": qwen3(5120, 17408, 40, 40, False),
}
LARGE = qwen3(5120, 25600, 64, 64, False)
# task: questions a student, tokens of prompt, mean response and limit, targeted rollouts a question
TASKS = {
    "BoolQ": (40, 250, 200, 1024, 45_000),
    "MMLU": (40, 250, 500, 2048, 100_000),
    "AIME": (2, 250, 12_000, 32_768, 200_000),
}
ASSUMED = """
Assumptions: 40 questions a student for BoolQ and MMLU (the paper's number is not printed), 2 for AIME (printed); mean
responses of 200, 500 and 12,000 tokens; 45K, 100K and 200K targeted rollouts; a targeted rollout draws half a mean
response; 60 trials a question for demonstrations, by the student and by Qwen3-32B; bfloat16; 256 slots; programs reach
half of the published FLOP/s and bytes/s, which was not measured. Exits spend 600 mean responses a question, and 20 of
the 200 initial rollouts where both outcomes are common. What the paper's own 72 A100-days consist of is not known.
"""


def planned(device: str, student: str, task: str, exits: bool) -> float:
    """Gives the device-days of a setting."""
    questions, prompt, response, limit, launched = TASKS[task]
    targeted = EXITS * response if exits else launched * response // 2
    rollouts = 20 if exits else 200
    work = DiagnosisWork(
        questions, prompt, response, limit, rollouts, targeted, context_tokens=response, dtype="bfloat16"
    )
    plan = plan_diagnosis(STUDENTS[student], TEACHERS, LARGE, work, HARDWARE[device], 1)
    phase, held = plan.largest
    if held > plan.budget:
        raise RuntimeError(f"{device}, {student}, {task}: {held / 1e9:.0f} GB in {phase} do not fit")
    return plan.seconds / 86400


def main() -> None:
    rows = []
    for student in STUDENTS:
        for task in TASKS:
            days = {
                f"{device}, {name}": planned(device, student, task, exits)
                for device in ("a100", "h200")
                for name, exits in (("paper's rollouts", False), ("exits", True))
            }
            rows.append({"student": student, "task": task} | days)
    table = pd.DataFrame(rows)
    total = {"student": "all", "task": "all"} | table.iloc[:, 2:].sum().to_dict()
    table = pd.concat([table, pd.DataFrame([total])], ignore_index=True)
    lines = ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
    for row in table.itertuples(index=False):
        lines.append("| " + " | ".join(f"{x:.3f}" if isinstance(x, float) else str(x) for x in row) + " |")
    head = "Device-days, planned and not measured: `python experiments/replan_paper.py`\n\n"
    RESULT.write_text(head + "\n".join(lines) + "\n" + ASSUMED)
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
