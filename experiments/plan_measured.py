"""How far are the memory and the time that `jaxopd plan` computes from those measured on this machine?

    python experiments/plan_measured.py [--smoke]

Rollouts from one trunk, for three models with random weights; no rollout stops early, so that lengths are known. Each
case runs in a process of its own: once to compile, then REPEATS times, of which the fastest counts, and the machine's
rates are measured before and after, of which the faster counts; seconds are of processor time, so start it on one core
(taskset -c 0) when other programs run. Memory is what the operating system counts as resident: the peak of a run with
top-p above what was held before it, and the weights; without top-p most of the memory planned for logits is never
touched. What is planned knows the config, the work and the rates alone. About a minute a case.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import peak_memory

from jaxopd.models import QwenConfig, init_model
from jaxopd.models.sharding import device_mesh
from jaxopd.plan import DiagnosisWork
from jaxopd.plan.diagnosis import rollout_memory
from jaxopd.plan.hardware import measured
from jaxopd.plan.roofline import decoding, reading
from jaxopd.rollouts import Engine, Requests, Sampling

REPEATS = 3
SETTLE_SECONDS = 1.0  # XLA gives the memory of a program back a moment after its results are there
RESULTS = Path(__file__).parent / "results" / "plan_measured_cpu.json"


@dataclass(frozen=True)
class Case:
    """`rollouts` of `tokens` tokens each, after a trunk, all in flight at once."""

    name: str
    config: QwenConfig
    dtype: str
    trunk: int
    rollouts: int
    tokens: int


def shape(vocabulary: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, head_dim: int):
    return QwenConfig(vocabulary, hidden, inner, layers, heads, kv_heads, head_dim, max_positions=40960)


CASES = {
    case.name: case
    for case in (
        Case("small, wide vocabulary", shape(65536, 384, 1024, 6, 6, 2, 64), "float32", 512, 64, 24),
        Case("long trunk", shape(8192, 256, 768, 4, 8, 8, 64), "float32", 8192, 32, 32),
        Case("Qwen3-0.6B's shape", shape(151936, 1024, 3072, 28, 16, 8, 128), "bfloat16", 256, 16, 16),
        Case("smoke", shape(512, 64, 128, 2, 4, 2, 16), "float32", 64, 8, 8),
    )
}


def compared(case: Case) -> dict[str, float]:
    """Runs a case in this process; gives bytes and seconds, measured and planned."""
    engine = Engine(init_model(case.config, dtype=case.dtype), slots=case.rollouts, mesh=device_mesh(1))
    trunks = [np.arange(case.trunk) % case.config.vocab_size]
    requests, sampling = Requests.continuations(trunks, case.rollouts), Sampling(case.tokens, seed=0)
    rates = [measured(case.config, case.dtype, case.rollouts, time.process_time)]
    engine.run(trunks, requests, sampling)  # compiles
    time.sleep(SETTLE_SECONDS)
    before, seconds = peak_memory.held(), []
    peak_memory.forget_peak()
    engine.run(trunks, requests, replace(sampling, top_p=0.95))  # the plan provides for it
    held = peak_memory.peak() - before + engine.weights
    for _ in range(REPEATS):
        began = time.process_time()
        engine.run(trunks, requests, sampling)
        seconds.append(time.process_time() - began)
    rates.append(measured(case.config, case.dtype, case.rollouts, time.process_time))
    fastest = {name: max(getattr(rate, name) for rate in rates) for name in ("flops", "step_flops", "bandwidth")}
    hardware = replace(rates[0], **fastest)
    place = case.config, hardware, case.dtype
    stages = [
        reading("prefill", *place, tokens=case.trunk, length=case.trunk, devices=1),
        decoding(
            "rollouts", *place, tokens=case.rollouts * case.tokens, length=case.tokens, trunk=case.trunk, trunks=1,
            slots=case.rollouts, devices=1, max_tokens=case.tokens,
        ),
    ]  # fmt: skip
    work = DiagnosisWork(max_tokens=case.tokens, slots=case.rollouts, dtype=case.dtype)
    planned = rollout_memory(case.config, work, hardware, 1, 1, case.trunk)
    return {
        "bytes measured": held,
        "bytes planned": planned.total,
        "seconds measured": min(seconds),
        "seconds planned": sum(stage.seconds for stage in stages),
        "of it prefill": stages[0].seconds,
        **{f"measured {name}": rate for name, rate in fastest.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one tiny case, nothing written")
    parser.add_argument("--case", help="one case, in this process")
    given = parser.parse_args()
    if given.case:
        print(json.dumps(compared(CASES[given.case])))
        return
    rows = {}
    for name in ["smoke"] if given.smoke else [name for name in CASES if name != "smoke"]:
        # so that memory is given back at once, and what a process holds is what it uses
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        command = [sys.executable, __file__, "--case", name]
        told = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        found = rows[name] = json.loads(told.stdout.splitlines()[-1])
        memory, seconds = (found[f"{what} planned"] / found[f"{what} measured"] for what in ("bytes", "seconds"))
        found |= {"memory, planned / measured": memory, "time, planned / measured": seconds}
        print(
            f"{name}: {found['bytes planned'] / 1e6:.0f} of {found['bytes measured'] / 1e6:.0f} MB ({memory:.2f}), "
            f"{found['seconds planned']:.2f} of {found['seconds measured']:.2f} s ({seconds:.2f})",
            flush=True,
        )
    if not given.smoke:
        versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")}
        facts = {"command": "python experiments/plan_measured.py", "device": jax.devices()[0].device_kind, **versions}
        RESULTS.write_text(
            json.dumps({"environment": facts | {"cores": os.cpu_count()}, "cases": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
