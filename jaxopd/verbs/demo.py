"""jaxopd demo and jaxopd truth: the instrument on the toy suite, beside what is exact."""

import dataclasses

import tyro
from rich.console import Console

from jaxopd import toy
from jaxopd.diagnose import DiagnoseConfig, collect, diagnose
from jaxopd.diagnose.session import Session
from jaxopd.distributed import Hosts
from jaxopd.verbs.console import as_table, bars, show_report

TOY_TEACHERS = (
    "Self-1C=self:1c",
    "Self-1C-X=self:1c@large",
    "Self-Sum-1C=self:sum1c",
    "Self-Sum-1C1W=self:sum1c1w",
    "Self-1C1W=self:1c1w",
    *(f"{name}={toy.MODELS / name}" for name in ("T1", "T2", "T3")),
)


@dataclasses.dataclass(frozen=True)
class Demo:
    """Runs the whole instrument on the toy suite and prints the teacher ranking beside the truth."""

    out: str = "runs/demo"
    """Folder of the run; the same command resumes it."""
    student: str = "S"
    """Toy student: S or M."""
    questions: int = 3
    """Questions of each of the three flavours."""
    truth_rollouts: int = 300
    """Rollouts a node for the near-exact truth."""
    seed: int = 0
    """Seed of every draw."""
    hosts: tyro.conf.OmitArgPrefixes[Hosts] = dataclasses.field(default_factory=Hosts)

    def run(self, console: Console) -> None:
        config = toy_config(self.student, self.questions, self.seed, truth_rollouts=self.truth_rollouts)
        with bars(console) as report:
            diagnose(config, self.out, report)
        show_report(console, self.out)


@dataclasses.dataclass(frozen=True)
class Truth:
    """Replays the whole procedure on exact decision processes and prints how wrong each estimator is."""

    out: str = "runs/truth"
    """Folder of the run whose questions become decision processes; made when absent."""
    student: str = "S"
    """Toy student: S or M."""
    questions: int = 10
    """Questions of each of the three flavours."""
    replicates: int = 60
    """Replicates of the procedure, a question."""
    seed: int = 0
    """Seed of every draw."""

    def run(self, console: Console) -> None:
        from jaxopd.truth import truth

        config = toy_config(self.student, self.questions, self.seed, truth_rollouts=100)
        with bars(console) as report:
            session = Session(config, self.out, report)
            collect(session)
            tables = truth(session, report, self.replicates, self.seed)
        console.print(
            f"{tables.questions} questions, {tables.replicates} replicates, "
            f"{tables.rollouts:,.0f} targeted rollouts a question and replicate"
        )
        console.print(as_table("Success probability of the tokens of S_u against the exact one", tables.success))
        console.print(as_table("Alignment of reverse KL against the exact one on the same S_u", tables.aggregates))
        gap = (tables.policies["process"] - tables.policies["raw"]).abs()
        console.print(
            f"Success of a question under its finite process and under the raw student: {gap.mean():.4f} apart in the "
            f"mean (standard error of the raw one {tables.policies['raw_se'].mean():.4f}, mass left to sampling "
            f"{tables.policies['sampled_mass'].mean():.3f})"
        )
        session.run.write_table("truth/policies.parquet", tables.policies)
        session.run.write_table("truth/success.parquet", tables.success)
        session.run.write_table("truth/aggregates.parquet", tables.aggregates)


def toy_config(student: str, questions: int, seed: int, *, truth_rollouts: int) -> DiagnoseConfig:
    """Gives the diagnosis of a toy student with all eight teacher configurations."""
    return DiagnoseConfig(
        student=str(toy.MODELS / student),
        teacher=TOY_TEACHERS,
        task="toy",
        questions=f"all:{questions}:{seed + 1}",
        large=str(toy.MODELS / "X"),
        allocation="paper",
        max_tokens=80,
        truth_rollouts=truth_rollouts,
        seed=seed,
    )
