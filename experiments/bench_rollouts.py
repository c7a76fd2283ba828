"""How many tokens a second do rollouts get, against transformers' generate, a Python loop, and the floor?

    PYTHONPATH=.:kernels python experiments/bench_rollouts.py [--smoke] [--minutes 5] [--only 512]

The decode phase of Qwen3's shapes in bfloat16 with random weights: sequences that continue one shared trunk, or a
prompt each. Contestants hold the same trunk, draw the same number of tokens at temperature 1, and start with their
caches filled. `unshared` is this engine with a copy of the trunk for every sequence, `no trunk kernel` with plain XLA
products over the one copy. On a CPU: 32 sequences of Qwen3-0.6B; on an accelerator 256 of 0.6B to 8B, and two public
workloads end to end. Cases start until the minutes are over, the most telling first; what does not fit in memory says
so.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from benchmarking import (
    STARTED,
    Floor,
    MachineFloor,
    Measurement,
    Result,
    arguments,
    interleaved,
    machine_floor,
    progress,
    with_floor,
    write,
)
from rollout_peers import generate, python_loop

from jaxopd.models import QwenConfig, init_model
from jaxopd.models.qwen import Qwen
from jaxopd.rollouts import Engine, Requests, Sampling
from jaxopd.rollouts.decode import Trunks
from jaxopd.rollouts.layout import Layout
from jaxopd.rollouts.wave import Wave

VOCABULARY = 151936
SHAPES = {  # hidden, inner, layers, query heads, tied head
    "0.6B": (1024, 3072, 28, 16, True),
    "1.7B": (2048, 6144, 28, 16, True),
    "4B": (2560, 9728, 36, 32, True),
    "8B": (4096, 12288, 36, 32, False),
}
TINY = QwenConfig(1031, 64, 192, 2, 4, 2, 16, max_positions=40960, tie_embeddings=True)


@dataclass(frozen=True)
class Case:
    """`sequences` rollouts of `new` tokens; of one trunk, or of a prompt each where `shared` is False."""

    model: str
    trunk: int
    sequences: int
    new: int
    shared: bool = True

    @property
    def name(self) -> str:
        what = "one trunk" if self.shared else "a prompt each"
        return f"{self.model}, {self.sequences} sequences, {what} of {self.trunk:,}, {self.new} new"


ON_CPU = (Case("0.6B", 512, 32, 16), Case("0.6B", 2000, 32, 6), Case("0.6B", 128, 32, 16, shared=False))
ON_GPU = (
    Case("0.6B", 2000, 256, 1024),  # mean suffix 512
    Case("0.6B", 200, 256, 128),
    Case("0.6B", 30000, 256, 128),
    Case("8B", 2000, 256, 128),
    Case("1.7B", 2000, 256, 128),
    Case("4B", 2000, 256, 128),
)
SMOKE = (Case("tiny", 64, 4, 8), Case("tiny", 32, 4, 8, shared=False))


def shape(name: str) -> QwenConfig:
    if name == "tiny":
        return TINY
    hidden, inner, layers, heads, tied = SHAPES[name]
    return QwenConfig(
        VOCABULARY, hidden, inner, layers, heads, 8, 128, max_positions=40960, rope_theta=1e6, tie_embeddings=tied
    )


def floor_of(case: Case, config: QwenConfig, machine: MachineFloor, *, shared: bool) -> Floor:
    """Bounds the decode phase: a step reads the weights, the trunk once (or once a sequence), half the suffix."""
    h, H, K = config.head_dim, config.num_heads, config.num_kv_heads
    layer = config.hidden_size * (2 * H * h + 2 * K * h + 3 * config.intermediate_size)
    weights = config.num_layers * layer + config.vocab_size * config.hidden_size
    cached = 4 * config.num_layers * K * h  # bytes a token, keys and values in bfloat16
    copies = 1 if shared else case.sequences
    read = 2 * weights + cached * (copies * case.trunk + case.sequences * case.new / 2)
    attended = case.sequences * (case.trunk + case.new / 2)
    flops = 2 * case.sequences * weights + 4 * attended * config.num_layers * H * h
    return machine.at_least(flops=case.new * flops, read=case.new * read)


def decode_phase(model: Qwen, case: Case, *, shared: bool, attention: str | None = None) -> Callable[[], int]:
    """The engine's blocks on a wave whose trunks are computed already: one, copied; content is no matter."""
    engine = Engine(model, slots=case.sequences, attention=attention)
    trunk = np.random.default_rng(0).integers(0, model.config.vocab_size, case.trunk)
    sampling = Sampling(case.new, seed=1)

    def wave(n: int, computed: Trunks | None = None) -> Wave:
        requests = Requests.continuations([trunk] * n, case.sequences // n)
        rows = list(np.arange(case.sequences).reshape(n, -1))
        layout = Layout(n, case.sequences // n, engine.mesh, attention)
        place = engine.graph, engine.state, engine.config, layout
        return Wave(*place, [trunk] * n, rows, requests, sampling, computed)

    ready = wave(1)
    if not shared:
        copies = jax.tree.map(lambda x: jnp.repeat(x, case.sequences, 0), ready.trunks)
        ready = wave(case.sequences, copies)
    start = jax.block_until_ready((ready.slots, ready.trunks))[0]

    def run() -> int:
        ready.slots = jax.tree.map(jnp.copy, start)
        drawn = sum(len(block.row) for block in ready.blocks())
        if drawn != case.sequences * case.new:
            raise RuntimeError(f"the engine drew {drawn} tokens")
        return drawn

    return run


def measured(case: Case, model: Qwen, machine: MachineFloor, repeats: int, against: str) -> list[Measurement]:
    """Times the contestants of one case whose name holds `against`; reference: the engine."""

    def lazily(make: Callable[[], Callable]) -> Callable[[], object]:
        """Builds a contestant at its first run, so that one that cannot be built is reported like one that fails."""
        held = []

        def run() -> object:
            if not held:
                held.append(make())
            return held[0]()

        return run

    size = (case.sequences, case.trunk, case.new)
    ours = {"jaxopd engine": lazily(lambda: decode_phase(model, case, shared=case.shared))}
    others = {
        f"transformers, {kind} cache": lazily(lambda kind=kind: generate(model.config, *size, kind))
        for kind in ("static", "dynamic")
    }
    if case.shared:
        others["jaxopd, unshared"] = lazily(lambda: decode_phase(model, case, shared=False))
        if jax.default_backend() != "cpu":  # there the engine itself has no trunk kernel
            others["jaxopd, no trunk kernel"] = lazily(lambda: decode_phase(model, case, shared=True, attention="xla"))
    others["jit step, Python loop"] = lazily(lambda: python_loop(model, *size))
    rows = []
    for name in [name for name in others if against in name]:
        pair = {**ours, name: others.pop(name)}
        found = interleaved(pair, case=case.name, repeats=repeats, work=case.sequences * case.new, unit="tok")
        shared = case.shared and name == "jaxopd, no trunk kernel"
        rows.append(with_floor(found[1], floor_of(case, model.config, machine, shared=shared)))
        engine = with_floor(found[0], floor_of(case, model.config, machine, shared=case.shared))
        progress(
            f"{name}: {rows[-1].ratio or rows[-1].note} times the engine's {engine.work / engine.seconds:.0f} tok/s"
        )
    return [engine, *rows]


def public_workloads(model: Qwen, machine: MachineFloor, smoke: bool) -> list[Measurement]:
    """Two shapes others publish, with prefill: nano-vllm's 256 sequences, and 64 prefixes with 16 samples each."""
    rng = np.random.default_rng(0)
    scale = 32 if smoke else 1
    lengths, outputs = (rng.integers(100, 1025, 256 // scale) for _ in range(2))
    vocabulary = model.config.vocab_size
    distinct = [rng.integers(0, vocabulary, n // scale + 1) for n in lengths]
    several = [rng.integers(0, vocabulary, 2176 // scale) for _ in range(64 // scale)]
    rows = []
    for name, trunks, n, limit in (
        ("256 prompts and outputs of 100-1,024", distinct, 1, outputs // scale + 1),
        ("64 trunks of 2,176 x 16 of 256", several, 16, np.full(16 * len(several), 256 // scale)),
    ):
        requests = replace(Requests.continuations(trunks, n), limit=limit)
        sampling = Sampling(int(limit.max()), temperature=0.6, seed=1)
        engine = Engine(model, slots=256)
        progress(f"{name}: {engine.plan(trunks, requests, sampling)}")
        runs = {"jaxopd engine": lambda e=engine, a=(trunks, requests, sampling): e.run(*a).length}
        rows += interleaved(runs, case=name, repeats=1 if smoke else 2, work=float(limit.sum()), unit="tok")
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="start no further case after these")
    parser.add_argument("--only", type=int, help="trunk length of the one case to run")
    parser.add_argument("--against", default="", help="only contestants whose name holds this")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    on_cpu = jax.default_backend() == "cpu"
    cases = SMOKE if options.smoke else ON_CPU if on_cpu else ON_GPU
    cases = [case for case in cases if options.only in (None, case.trunk)]
    machine = machine_floor(smoke=options.smoke)
    rows: list[Measurement] = []
    model, name = None, None

    def late() -> bool:
        return time.perf_counter() - STARTED > 60 * options.minutes

    for case in cases:
        if late():
            rows.append(Measurement(case.name, "jaxopd engine", note="not started: the minutes were over"))
            continue
        if case.model != name:
            model, name = None, case.model  # frees the model before
            model = init_model(shape(name), dtype="bfloat16")
        rows += measured(case, model, machine, options.repeats, options.against)
    if options.smoke or not (on_cpu or late()):
        rows += public_workloads(model, machine, options.smoke)
    named = {"smoke": options.smoke, "repeats": options.repeats, "against": options.against}
    settings = {**named, "threads": "all cores, torch and jax alike"}
    part = "" if options.only is None else f"_trunk_{options.only}"
    write(Result(f"bench_rollouts{part}", machine, rows, settings), options.folder)


if __name__ == "__main__":
    main()
