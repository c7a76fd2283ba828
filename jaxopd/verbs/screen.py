"""jaxopd screen."""

import dataclasses
from pathlib import Path

import tyro
from rich.console import Console

from jaxopd.analysis.screening import BINS, accuracy_by_difficulty, availability, context_accuracy
from jaxopd.diagnose import DiagnoseConfig
from jaxopd.diagnose.screen import CONTEXTS, ROLLOUTS, screen
from jaxopd.distributed import Hosts, decided
from jaxopd.errors import InputError
from jaxopd.report.arranged import arranged, write_tables
from jaxopd.report.tables import Table
from jaxopd.runs import RunFolder
from jaxopd.verbs.console import as_table, bars


@dataclasses.dataclass(frozen=True, kw_only=True)
class Screen:
    """Measures what each context does to the student's pass rate (Tables 7 to 9); resumes a killed run."""

    student: str
    """Hugging Face folder or hub id of the student."""
    task: str
    """boolq, mmlu, math or toy."""
    questions: str
    """File (or MMLU folder) of questions."""
    large: str | None = None
    """The larger model: writes summaries and @large demonstrations; the default contexts need one."""
    context: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=self:KIND[@large] as in `jaxopd diagnose --teacher`; by default the paper's six beside the baseline."""
    demonstrations: str | None = None
    """JSONL file of demonstrations; sampled and graded where absent."""
    limit: int | None = None
    """Number of questions, from the start of the file; all by default."""
    rollouts: int = ROLLOUTS
    """Rollouts a question and context."""
    max_tokens: int = 512
    """Response length limit, tokens."""
    demonstration_trials: int = 60
    """Samples tried for demonstrations, a question and model."""
    demonstration_temperature: float = 0.7
    """Sampling temperature of demonstrations."""
    thinking: bool | None = None
    """enable_thinking of the chat template; None leaves its default."""
    dtype: str = "float32"
    """Parameters and activations: float32 or bfloat16."""
    slots: int = 256
    """Sequences decoded at once."""
    seed: int = 0
    """Seed of every draw."""
    out: str = "runs/screen"
    """Folder of the run; the same command with the same folder resumes it."""
    hosts: tyro.conf.OmitArgPrefixes[Hosts] = dataclasses.field(default_factory=Hosts)

    def run(self, console: Console) -> None:
        shared = {f.name for f in dataclasses.fields(DiagnoseConfig)} & {f.name for f in dataclasses.fields(self)}
        fields = {name: getattr(self, name) for name in shared}
        if "://" in self.out:
            raise InputError(f"{self.out}: found a remote folder, expected a local one: tables are written into it")
        with bars(console) as report:
            run = screen(DiagnoseConfig(**fields, teacher=self.context or CONTEXTS), self.out, report)
        tables = screening_tables(run)
        for table in tables:
            console.print(as_table(table.title, table.cells))
        folder = Path(self.out) / "screening"
        decided(lambda: [str(file) for file in write_tables(tables, folder)])
        console.print(f"tables: {folder}")


def screening_tables(run: RunFolder) -> list[Table]:
    """Builds Tables 7, 8 and 9 of a screening run."""
    screening = run.read_table("records/screening.parquet")
    counts = availability(screening, run.read_table("records/demonstrations.parquet"))
    accuracy, binned = context_accuracy(screening), accuracy_by_difficulty(screening)
    name = f"{(run.config() or {}).get('rollouts')} rollouts a question and context at temperature 1"
    rule = (
        "Kept: questions with a correct demonstration from every source that a context uses, and a baseline above 0. "
        "A context that also needs a wrong demonstration lacks the questions for which none was sampled: see its n."
    )
    difference = "difference", "difference_low", "difference_high"
    shown = {"context": "context", "accuracy": ("accuracy", "low", "high"), "difference to baseline": difference}
    shown |= {"Wilcoxon p": "wilcoxon_p", "Holm p": "holm_p", "against baseline": "verdict", "questions": "n"}
    bins = {"context": "context"}
    for part in (*BINS, "all"):
        bins |= {f"{part}, accuracy": f"accuracy_{part}", f"{part}, n": f"n_{part}"}
    return [
        arranged(
            "table7", "Table 7: questions by availability", rule, counts, {"what": "what", "questions": "questions"}
        ),
        arranged(
            "table8",
            "Table 8: accuracy under each context",
            f"{name}. Means over kept questions \u00b1 half the 95 % t interval; differences and tests (Wilcoxon's "
            "signed-rank, Holm over the contexts) pair each question with its own baseline.",
            accuracy,
            shown,
        ),
        arranged("table9", "Table 9: accuracy by difficulty of the baseline", rule, binned, bins),
    ]
