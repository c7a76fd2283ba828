"""jaxopd diagnose and jaxopd report."""

import dataclasses

import tyro
from rich.console import Console

from jaxopd.diagnose import DiagnoseConfig, diagnose
from jaxopd.distributed import Hosts
from jaxopd.verbs.console import bars, show_report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diagnose(DiagnoseConfig):
    """Measures, per token and per teacher, whether distillation would point toward success; resumes a killed run."""

    teacher: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    out: str = "runs/diagnose"
    """Folder of the run; the same command with the same folder resumes it."""
    hosts: tyro.conf.OmitArgPrefixes[Hosts] = dataclasses.field(default_factory=Hosts)

    def __post_init__(self) -> None:
        pass  # `run` checks: an error raised while parsing would be tyro's to show

    def run(self, console: Console) -> None:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(DiagnoseConfig)}
        with bars(console) as report:
            diagnose(DiagnoseConfig(**fields), self.out, report)
        show_report(console, self.out)


@dataclasses.dataclass(frozen=True)
class MakeReport:
    """Writes tables, plots and one self-contained report.html from a finished run."""

    run_folder: tyro.conf.Positional[str]
    """Folder of the run."""

    def run(self, console: Console) -> None:
        show_report(console, self.run_folder)
