"""How many tokens a second do rollouts get, against transformers' generate, a Python loop, and the floor?

    PYTHONPATH=.:kernels python experiments/bench_rollouts.py [--smoke] [--minutes 5] [--only 512] [--against static]

The decode phase of Qwen3's shapes in bfloat16 with random weights: sequences that continue one shared trunk, or a
prompt each. Contestants hold the same trunk, draw the same number of tokens at temperature 1, and start with their
caches filled. `unshared` is this engine with a copy of the trunk for every sequence, `no trunk kernel` with plain XLA
products over the one copy. On a CPU: 32 sequences of Qwen3-0.6B; on an accelerator 256 of 0.6B to 8B, and two public
workloads end to end. Contestants start until the minutes are over, the most telling first; what does not fit in memory
says so.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import groupby

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch shares the device

import jax
import jax.numpy as jnp
import numpy as np
from benchmarking import (
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
from rollout_peers import generate, give_back, python_loop

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
Build = Callable[[Qwen], Callable[[], object]]  # makes a contestant from the model
TINY = QwenConfig(1031, 64, 192, 2, 4, 2, 16, max_positions=40960, tie_embeddings=True)


@dataclass(frozen=True)
class Case:
    """`sequences` rollouts of `new` tokens; of one trunk, or of a prompt each where `shared` is False."""

    model: str
    trunk: int
    sequences: int
    new: int
    shared: bool = True
    against: str = ""  # only contestants whose name holds this: transformers and the Python loop can take minutes

    @property
    def name(self) -> str:
        what = "one trunk" if self.shared else "a prompt each"
        return f"{self.model}, {self.sequences} sequences, {what} of {self.trunk:,}, {self.new} new"


ON_CPU = (Case("0.6B", 512, 32, 16), Case("0.6B", 2000, 32, 6), Case("0.6B", 128, 32, 16, shared=False))
ON_GPU = (  # transformers before whatever makes JAX's memory large, as that does not shrink again
    Case("0.6B", 2000, 256, 1024, against="no trunk kernel"),  # mean suffix 512
    Case("0.6B", 200, 256, 128),
    Case("0.6B", 2000, 256, 128),
    Case("0.6B", 30000, 256, 128, against="jaxopd"),
    Case("8B", 2000, 256, 128, against="jaxopd"),
    Case("1.7B", 2000, 256, 128, against="jaxopd"),
    Case("4B", 2000, 256, 128, against="jaxopd"),
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


def contestants(case: Case) -> dict[str, Build]:
    """Those the engine is timed against, the ones that need little of JAX's memory first."""
    size = (case.sequences, case.trunk, case.new)
    found: dict[str, Build] = {
        "transformers, static cache": lambda model: generate(model.config, *size, "static"),
        "transformers, dynamic cache": lambda model: generate(model.config, *size, "dynamic"),
    }
    if case.shared:
        if jax.default_backend() != "cpu":  # there the engine itself has no trunk kernel
            found["jaxopd, no trunk kernel"] = lambda model: decode_phase(model, case, shared=True, attention="xla")
        found["jaxopd, unshared"] = lambda model: decode_phase(model, case, shared=False)
    found["jit step, Python loop"] = lambda model: python_loop(model, *size)
    return {name: build for name, build in found.items() if case.against in name}


def lazily(build: Build, model: Callable[[], Qwen]) -> Callable[[], object]:
    """Builds a contestant at its first run, so that one that cannot be built is reported like one that fails."""
    built = cache(lambda: build(model()))
    return lambda: built()()


def measured(
    case: Case,
    others: Mapping[str, Build],
    model: Callable[[], Qwen],
    machine: MachineFloor,
    repeats: int,
    limit: float,
) -> list[Measurement]:
    """Times the engine, the reference, against each of the others."""
    ours = lazily(partial(decode_phase, case=case, shared=case.shared), model)
    config, work = shape(case.model), case.sequences * case.new
    engine, rows = Measurement(case.name, "jaxopd engine"), []
    for name, build in others.items():
        give_back()
        pair = {"jaxopd engine": ours, name: lazily(build, model)}
        found, row = interleaved(pair, case=case.name, repeats=repeats, work=work, unit="tok", limit=limit)
        del pair  # or the next give_back would find the contestant held
        if engine.seconds is None or found.seconds is not None:
            engine = found
        shared = case.shared and name == "jaxopd, no trunk kernel"
        rows.append(with_floor(row, floor_of(case, config, machine, shared=shared)))
        progress(f"{name}: {row.note or found.note or f'{row.ratio:.2f} times as long as the engine'}")
    return [with_floor(engine, floor_of(case, config, machine, shared=case.shared)), *rows]


def end_to_end(
    model: Qwen, trunks: list[np.ndarray], requests: Requests, sampling: Sampling
) -> Callable[[], np.ndarray]:
    """The engine's whole run, prefill included."""
    engine = Engine(model, slots=256)
    progress(str(engine.plan(trunks, requests, sampling)))
    return lambda: engine.run(trunks, requests, sampling).length


def public_workloads(name: str, model: Callable[[], Qwen], smoke: bool, limit: float) -> list[Measurement]:
    """Two shapes others publish, with prefill: nano-vllm's 256 sequences, and 64 prefixes with 16 samples each."""
    rng = np.random.default_rng(0)
    scale = 32 if smoke else 1
    lengths, outputs = (rng.integers(100, 1025, 256 // scale) for _ in range(2))
    vocabulary = shape(name).vocab_size
    distinct = [rng.integers(0, vocabulary, n // scale + 1) for n in lengths]
    several = [rng.integers(0, vocabulary, 2176 // scale) for _ in range(64 // scale)]
    rows = []
    for what, trunks, n, tokens in (
        ("256 prompts and outputs of 100-1,024", distinct, 1, outputs // scale + 1),
        ("64 trunks of 2,176 x 16 of 256", several, 16, np.full(16 * len(several), 256 // scale)),
    ):
        requests = replace(Requests.continuations(trunks, n), limit=tokens)
        sampling = Sampling(int(tokens.max()), temperature=0.6, seed=1)
        run = partial(end_to_end, trunks=trunks, requests=requests, sampling=sampling)
        rows += interleaved(
            {"jaxopd engine": lazily(run, model)},
            case=f"{name}, {what}",
            repeats=1 if smoke else 2,
            work=float(tokens.sum()),
            unit="tok",
            limit=limit,
        )
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="start no further contestant after these")
    parser.add_argument("--only", type=int, help="only cases of this trunk length, no public workloads")
    parser.add_argument("--against", default="", help="only contestants whose name holds this, no public workloads")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    on_cpu = jax.default_backend() == "cpu"
    cases = SMOKE if options.smoke else ON_CPU if on_cpu else ON_GPU
    others = {
        case: {name: build for name, build in contestants(case).items() if options.against in name}
        for case in cases
        if options.only in (None, case.trunk)
    }
    todo = [case for case in others if others[case]]
    if not todo:
        parser.error("no case has that trunk length and, in it, a contestant whose name holds that")
    whole = options.only is None and not options.against
    settings = {"smoke": options.smoke, "repeats": options.repeats, "against": options.against}
    settings["threads"] = "all cores, torch and jax alike"
    part = "" if options.only is None else f"_trunk_{options.only}"
    part += f"_against_{re.sub(r'[^a-z0-9.]+', '-', options.against.lower())}" if options.against else ""
    machine, limit = machine_floor(smoke=options.smoke), 60 * options.minutes
    rows: list[Measurement] = []

    def save(*, table: bool) -> None:
        write(Result(f"bench_rollouts{part}", machine, rows, settings), options.folder, table=table)

    for name, group in groupby(todo, lambda case: case.model):
        model = cache(partial(init_model, shape(name), dtype="bfloat16"))  # at first use, when the one before is gone
        for case in group:
            rows += measured(case, others[case], model, machine, options.repeats, limit)
            save(table=False)
        if whole and (options.smoke or (name == "0.6B" and not on_cpu)):
            rows += public_workloads(name, model, options.smoke, limit)
            save(table=False)
    save(table=True)


if __name__ == "__main__":
    main()
