"""Where does the time of `jaxopd demo` go, and what does the engine gain over a Python loop on a toy model?

    PYTHONPATH=.:kernels python experiments/bench_demo.py [--smoke] [--questions 3]

The demo's whole run, split by stage. Of each stage: seconds inside jitted computation (from the call to the moment its
arrays are ready), seconds of tracing and compiling (once for each program; a cache on disk keeps them), and the rest,
which is Python: grading, trees, files. Waiting for each result takes away what usually overlaps with Python, and
operations outside any jit count as Python, so the share of jitted computation is a lower bound. Expected: at least 70 %
of what is not compiling. Then 256 sequences of the student on one shared prompt: the engine against a jitted step
called from Python.
"""

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from benchmarking import Measurement, Result, arguments, interleaved, machine_floor, progress, write


@dataclass
class Stage:
    """Seconds of one stage; `jitted` holds no compiling."""

    seconds: float = 0.0
    jitted: float = 0.0
    compiling: float = 0.0


@dataclass
class Clock:
    """Charges seconds to the stage that runs."""

    stages: dict[str, Stage] = field(default_factory=lambda: defaultdict(Stage))
    stage: str = "loading"
    since: float = field(default_factory=time.perf_counter)

    def enter(self, stage: str) -> None:
        """Charges the time since the last entry to the stage before."""
        now = time.perf_counter()
        self.stages[self.stage].seconds += now - self.since
        self.stage, self.since = stage, now

    def compiled(self, event: str, seconds: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            self.stages[self.stage].compiling += seconds


class Timed:
    """A jitted function whose calls from Python wait for their result and charge the clock; calls in a trace do not."""

    def __init__(self, function: Callable, clock: Clock):
        self.function, self.clock = function, clock

    def __call__(self, *args: Any, **options: Any) -> Any:
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((args, options))):
            return self.function(*args, **options)
        stage = self.clock.stages[self.clock.stage]
        began, compiling = time.perf_counter(), stage.compiling
        result = jax.block_until_ready(self.function(*args, **options))
        stage.jitted += time.perf_counter() - began - (stage.compiling - compiling)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self.function, name)


def timed_jit(clock: Clock) -> None:
    """Makes every later jax.jit a Timed one; call it before the modules that use it are imported."""
    jit = jax.jit
    jax.jit = lambda function, **options: Timed(jit(function, **options), clock)  # type: ignore[assignment]
    jax.monitoring.register_event_duration_secs_listener(clock.compiled)


def demo(clock: Clock, questions: int, truth_rollouts: int) -> list[Measurement]:
    """Runs the demo as the verb does, into a folder that is thrown away."""
    from jaxopd.diagnose import diagnose
    from jaxopd.report import write_report
    from jaxopd.verbs.demo import toy_config

    config = toy_config("S", questions, 0, truth_rollouts=truth_rollouts)
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "demo")
        clock.since = time.perf_counter()
        diagnose(config, out, lambda stage, *_: clock.enter(stage))
        clock.enter("report")
        write_report(out)
        clock.enter("after")
    stages = {name: stage for name, stage in clock.stages.items() if name != "after"}
    whole = Stage(*(sum(getattr(s, f) for s in stages.values()) for f in ("seconds", "jitted", "compiling")))
    return [_row(f"{3 * questions} questions", name, stage) for name, stage in {**stages, "in all": whole}.items()]


def _row(case: str, name: str, stage: Stage) -> Measurement:
    running = max(stage.seconds - stage.compiling, 1e-9)
    figures = {"jitted s": stage.jitted, "compiling s": stage.compiling, "jitted share": stage.jitted / running}
    return Measurement(f"demo, {case}", name, stage.seconds, 0.0, extra=figures)


def engine_against_loop(smoke: bool) -> list[Measurement]:
    """Times the decode phase of the toy student, caches filled, both contestants drawing the same number of tokens."""
    from bench_rollouts import Case, decode_phase
    from rollout_peers import python_loop

    from jaxopd import toy
    from jaxopd.models import load_model

    model = load_model(str(toy.MODELS / "S"))
    case = Case("toy S", 64, 16 if smoke else 256, 8 if smoke else 64)
    contestants = {
        "jaxopd engine": decode_phase(model, case, shared=True),
        "jit step, Python loop": python_loop(model, case.sequences, case.trunk, case.new),
    }
    work = case.sequences * case.new
    return interleaved(contestants, case=case.name, repeats=2 if smoke else 7, work=work, unit="tok")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--questions", type=int, default=3, help="questions of each of the three flavours")
    options = parser.parse_args()
    clock, jit = Clock(), jax.jit
    timed_jit(clock)
    progress("the demo")
    rows = demo(clock, 1 if options.smoke else options.questions, 20 if options.smoke else 300)
    jax.monitoring.unregister_event_duration_listener(clock.compiled)
    jax.jit = jit
    rows += engine_against_loop(options.smoke)
    settings = {"smoke": options.smoke, "questions": options.questions}
    write(Result("bench_demo", machine_floor(smoke=options.smoke), rows, settings), options.folder)


if __name__ == "__main__":
    main()
