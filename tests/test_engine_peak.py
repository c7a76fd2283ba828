"""The memory a run really takes, measured by the operating system in a process of its own, against the plan."""

import gc
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
memory = SimpleNamespace(**runpy.run_path(str(EXPERIMENTS / "peak_memory.py")))
TOLERANCE = 0.1


def peak_of_a_run(trunk: int, slots: int, tokens: int) -> dict[str, int]:
    """Gives a run's peak over what the process held before it, and its plan; the programs are compiled before."""
    from jaxopd.models import QwenConfig, init_model
    from jaxopd.models.sharding import device_mesh
    from jaxopd.rollouts import Engine, Requests, Sampling

    config = QwenConfig(1031, 64, 128, 2, 4, 4, 64, max_positions=40960, initializer_range=0.05)
    mesh = device_mesh(1)
    engine = Engine(init_model(config), slots=slots, mesh=mesh)
    trunks, sampling = [np.arange(trunk) % config.vocab_size], Sampling(tokens, seed=0)
    requests = Requests.continuations(trunks, slots)
    engine.run(trunks, requests, sampling)
    gc.collect()  # JAX lets go of what its own threads held last
    before = memory.held()
    memory.forget_peak()
    engine.run(trunks, requests, sampling)
    plan = engine.plan(trunks, requests, sampling)
    return {"held": memory.peak() - before + plan.weights, "planned": plan.total}


@pytest.mark.slow
@pytest.mark.skipif(not memory.CLEAR_REFS.exists(), reason="the peak of a process is read as Linux tells it")
@pytest.mark.parametrize("slots", [64, 256], ids=["prefill", "decoding"])
def test_the_peak_at_a_long_trunk_is_the_planned_one(slots) -> None:
    """Of 64 slots the prefill takes most, of 256 a decoding step."""
    told = subprocess.run(
        [sys.executable, __file__, str(slots)], env=os.environ, capture_output=True, text=True, check=True
    )
    found = json.loads(told.stdout.splitlines()[-1])
    assert found["planned"] > 250e6  # large beside what an allocator rounds and keeps
    assert abs(found["held"] / found["planned"] - 1) < TOLERANCE, found


if __name__ == "__main__":
    print(json.dumps(peak_of_a_run(trunk=30000, slots=int(sys.argv[1]), tokens=32)))
