"""What a diagnosis measures and with which budgets."""

import dataclasses
from typing import Literal

from jaxopd.errors import InputError, check_fields

RESPONSES = 600  # in tokens of the mean one, that exits may take at most
WATCHED = 64  # tokens a model can watch at a node; above tau = .02 there are at most 50
ALONE = {  # options that one allocation alone looks at
    "paper": ("by_gradient", "by_difference", "window", "n_min", "n_sig"),
    "exits": ("target_se", "exit_tokens", "teacher_agnostic", "decide", "low_discrepancy"),
}


@dataclasses.dataclass(frozen=True)
class DiagnoseConfig:
    """What is measured, and with which budgets; with `allocation="paper"` the defaults are paper A's."""

    student: str
    """Hugging Face folder or hub id of the student."""
    teacher: tuple[str, ...]
    """NAME=path/to/model, or NAME=self:KIND with KIND of 1c, 3c, 1c1w, sum1c, sum1c1w, and @large where the
    demonstration comes from the larger model."""
    task: str
    """boolq, mmlu, math or toy."""
    questions: str
    """File (or MMLU folder) of questions; of toy, FLAVOUR:NUMBER:SEED, as in all:2:7, two of each flavour."""
    large: str | None = None
    """The larger model: writes summaries and @large demonstrations."""
    demonstrations: str | None = None
    """JSONL file of demonstrations; sampled and graded where absent."""
    limit: int | None = None
    """Number of questions, from the start of the file; all by default."""
    rollouts: int = 200
    """G, initial rollouts a question; exits stop sooner, once there are paths of both outcomes."""
    paths: int = 2
    """Representative paths of each outcome, correct and incorrect."""
    allocation: Literal["paper", "exits"] = "exits"
    """Where targeted rollouts go: the exits that lower the error most, or paper A's windows and budgets."""
    target_se: float = 0.04
    """Exits: standard error of each teacher's global cosine (records/cosines.parquet) at which a question is done."""
    exit_tokens: int | None = None
    """Exits: tokens spent about at most on a question's targeted rollouts; by default those of 600 mean responses."""
    teacher_agnostic: bool = False
    """Exits: spend them for any teacher that may be added, not for the given ones."""
    decide: tuple[str, str] | None = None
    """Exits: two teachers; a question is also done when it is sure which has the larger global cosine."""
    low_discrepancy: bool = False
    """Exits: rollouts of an exit share their first random bits evenly; less noise, intervals too wide."""
    tau: float = 0.02
    """Probability from which student or teacher makes a token a candidate."""
    by_gradient: int = 20
    """Paper: targets a path, depth window and teacher by |P (l - lbar)|; the paper does not print its number."""
    by_difference: int = 20
    """Paper: targets a path, depth window and teacher by |Q - P|."""
    window: int = 50
    """Paper: positions in the first depth window of targeting; each next one is twice as long."""
    n_min: int = 100
    """Paper: visits to which targets are raised."""
    n_sig: int = 20
    """Paper: visits from which a token counts; with exits every token above tau does."""
    max_tokens: int = 512
    """Response length limit, tokens."""
    demonstration_trials: int = 60
    """Samples tried for demonstrations, a question and model."""
    demonstration_temperature: float = 0.7
    """Sampling temperature of demonstrations."""
    truth_rollouts: int = 0
    """Launches a node and a token for the oracle (small models only); 0 for none."""
    thinking: bool | None = None
    """enable_thinking of the chat template; None leaves its default."""
    dtype: str = "float32"
    """Parameters and activations: float32 or bfloat16."""
    slots: int = 256
    """Sequences decoded at once."""
    model_parallel: int = 1
    """Devices that share one copy of a teacher, or of the larger model: its vocabulary, heads and FFN are split."""
    fsdp: bool = False
    """Split over the other devices what --model-parallel leaves of these models' matrices; gathered when used.

    The writer of demonstrations decodes from all layers gathered, or, with --model-parallel 1, from a whole copy.
    """
    split_student: bool = False
    """Split the student as the teachers are; by default each device holds a copy."""
    seed: int = 0
    """Seed of every draw."""

    def exit_budget(self, mean_length: float) -> float:
        """Tokens that exits may take, where a response has `mean_length` of them."""
        return RESPONSES * mean_length if self.exit_tokens is None else self.exit_tokens

    def check_options(self) -> None:
        """Raises InputError on an option that was set and that the allocation does not look at."""
        for other in ALONE.keys() - {self.allocation}:
            for field in dataclasses.fields(DiagnoseConfig):
                if field.name in ALONE[other] and getattr(self, field.name) != field.default:
                    flag = "--" + field.name.replace("_", "-")
                    found = f"{flag} with --allocation {self.allocation}, which does not look at it"
                    raise InputError(f"{flag}: found {found}, expected --allocation {other}")

    @property
    def targeting(self) -> dict[str, float | int]:
        """The budgets of `paper_targets`."""
        return {name: getattr(self, name) for name in ("tau", "by_gradient", "by_difference", "n_min", "window")}

    def __post_init__(self) -> None:
        counts = ("rollouts", "paths", "n_min", "n_sig", "max_tokens", "demonstration_trials", "slots", "window")
        check_fields(self, *((name, getattr(self, name) >= 1, "at least 1") for name in counts))
        if self.allocation not in ("paper", "exits"):
            raise InputError(f"allocation: found {self.allocation!r}, expected paper or exits")
        if not 0 < self.target_se < float("inf"):
            raise InputError(f"target_se: found {self.target_se}, expected a number above 0")
        for name in ("by_gradient", "by_difference", "truth_rollouts", "exit_tokens"):
            if (getattr(self, name) or 0) < 0:
                raise InputError(f"{name}: found {getattr(self, name)}, expected 0 or more")
        if self.limit is not None and self.limit < 1:
            raise InputError(f"limit: found {self.limit}, expected at least 1")
        if not 0 <= self.demonstration_temperature < float("inf"):
            found = self.demonstration_temperature
            raise InputError(f"demonstration_temperature: found {found}, expected a finite number, 0 or more")
        if not 0.02 <= self.tau < 1:
            raise InputError(f"tau: found {self.tau}, expected .02 to 1 (a model can watch {WATCHED} tokens a node)")
        if not self.teacher:
            raise InputError("--teacher: found none, expected at least one NAME=path/to/model or NAME=self:KIND")
