"""A trace of 30,000 tokens through targeting, enrichment, records, report and Figure 7, and the memory that takes."""

import json
import logging
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file, save_file

TRACE = 30_000
N_SIG = 40
BUDGETS = {
    "paper": {"by_gradient": 1, "by_difference": 1, "n_min": N_SIG + 5, "n_sig": N_SIG},
    "exits": {"exit_tokens": 2_000_000},
}
HERE = Path(__file__).resolve().parent
TOKENIZER = HERE.parent / "jaxopd" / "toy" / "models" / "S"
EXPERIMENTS = HERE.parent / "experiments"
memory = SimpleNamespace(**runpy.run_path(str(EXPERIMENTS / "peak_memory.py")))
# Bytes of compiled programs, tables of 120,000 rows and libraries; with exits three nodes in four are decision nodes,
# and the report bounds the numbers of each.
PROGRAMS = {"paper": 0.8e9, "exits": 1.1e9}
STYLE, STOP = ("so", "then", "thus", "hence"), "<|im_end|>"
DIGITS = tuple("0123456")
# How the model goes on after a token: {next token: log weight}. It would answer after some ten tokens.
CHAIN = {
    "assistant": dict.fromkeys(STYLE, 0.0),
    **{word: dict.fromkeys(STYLE, 0.0) | {"answer": -1.0} for word in STYLE},
    "answer": dict.fromkeys(DIGITS, 0.0),
    **{digit: {STOP: 0.0} for digit in DIGITS},
}


def chained_checkpoint(folder: Path, seed: int) -> Path:
    """Makes a random model of one layer whose odds follow CHAIN, moved by what it attends to."""
    from jaxopd.models import load_tokenizer

    make = runpy.run_path(str(HERE / "make_checkpoint.py"))
    shape = replace(
        make["SMALL"],
        vocab_size=71,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        max_positions=TRACE + 2048,
        tie_embeddings=False,
        eos_token_ids=(2,),
    )
    make["make_checkpoint"](folder, shape, tokenizer=TOKENIZER, seed=seed)
    number, weights = load_tokenizer(TOKENIZER).get_vocab(), load_file(folder / "model.safetensors")
    embedding, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    for direction, (token, following) in enumerate(CHAIN.items()):
        embedding[number[token]] = 0
        embedding[number[token], direction] = 1
        for after, log_weight in following.items():
            head[number[after], direction] = (10 + log_weight) / embedding.shape[1] ** 0.5
    for name in weights:
        if "o_proj" in name or "down_proj" in name:
            weights[name] *= 5
    save_file(weights, folder / "model.safetensors")
    return folder


def with_long_traces(session) -> None:
    """Puts two traces before a question's rollouts: a loop that ends right, and words that are cut off at the limit."""
    from jaxopd.diagnose.launches import roll_out
    from jaxopd.responses import response_log_probs

    roll_out(session)
    piece, number = "rollouts/00000", session.tokenizer.get_vocab()
    arrays, _ = session.run.load(piece)
    style, gold = np.array([number[word] for word in STYLE]), number[session.questions[0].gold]
    rng = np.random.default_rng(0)
    looping = np.resize(rng.choice(style, 12), TRACE)
    looping[-3:] = number["answer"], gold, number[STOP]
    long = np.stack([looping, rng.choice(style, TRACE)]).astype(np.int32)
    short = np.pad(arrays["tokens"], [(0, 0), (0, TRACE - arrays["tokens"].shape[1])], constant_values=-1)
    logp = response_log_probs(session.student, session.prompts[0], long)
    padded = {n: np.pad(arrays[n], [(0, 0), (0, TRACE - arrays[n].shape[1])]) for n in ("raw_logp", "sampling_logp")}
    arrays |= {name: np.concatenate([logp, array]) for name, array in padded.items()}
    tokens = np.concatenate([long, short])
    arrays |= {"tokens": tokens, "finish": np.concatenate([[0, 1], arrays["finish"]]).astype(arrays["finish"].dtype)}
    session.run.delete(f"pieces/{piece}/done.json")  # or the first commit would stand
    session.run.save(piece, arrays | {"grade": session.grades(tokens, session.questions[0].gold)})


class Plans(logging.Handler):
    """Collects the engine's memory plans."""

    def __init__(self):
        super().__init__()
        self.found = []

    def emit(self, record):
        from jaxopd.rollouts.plan import MemoryPlan

        self.found += [x for x in record.args or () if isinstance(x, MemoryPlan)]


def long_run(folder: Path, allocation: str) -> dict[str, float]:
    """Diagnoses the long trace; gives the peak memory of each stage over what was held before, and the plans'."""
    from jaxopd.diagnose import DiagnoseConfig, diagnose
    from jaxopd.diagnose.session import Session
    from jaxopd.report import write_report
    from jaxopd.runs import RunFolder
    from jaxopd.tree import allocation as spending

    models = [str(chained_checkpoint(folder / f"model-{seed}", seed)) for seed in (0, 1)]
    config = DiagnoseConfig(
        allocation=allocation,
        student=models[0],
        teacher=(f"T={models[1]}",),
        task="toy",
        questions="chain:1:1",
        rollouts=2,
        paths=1,
        max_tokens=TRACE,
        **BUDGETS[allocation],
    )
    spending.MOST_ROUNDS = 2  # each computes the traces' keys and values again, minutes for all twelve on a CPU
    log, plans = logging.getLogger("jaxopd"), Plans()
    log.addHandler(plans)
    log.setLevel(logging.INFO)
    out, before, peaks = str(folder / "run"), memory.held(), {}
    now = ["start"]

    def stage(name: str, done: int, total: int) -> None:
        if name != now[0]:
            peaks[now[0]] = memory.peak() - before
            memory.forget_peak()
            now[0] = name

    session = Session(config, out, stage)
    with_long_traces(session)
    del session
    diagnose(config, out, stage)
    stage("report", 0, 1)
    written = write_report(out)
    stage("figure 7", 0, 1)
    sys.path.insert(0, str(EXPERIMENTS / "unmasking"))
    from figure7 import make
    from study import Setting, Study

    cases, traces = make(Study((Setting("chain", Path(out)),), folder)).tables
    stage("end", 0, 1)
    largest = max(plans.found, key=lambda plan: plan.total)
    launched, _ = RunFolder.existing(out).load("enrichment/00000")
    return {
        "planned": largest.total,
        "plan": str(largest),
        "launched": sum(array.nbytes for array in launched.values()),
        "peaks": peaks,
        "page": written["html"].stat().st_size,
        "cases": cases.numbers.to_dict("records"),
        "traces": traces.numbers.to_dict("records"),
    }


@pytest.mark.slow
@pytest.mark.parametrize("allocation", list(BUDGETS))
@pytest.mark.skipif(not memory.CLEAR_REFS.exists(), reason="the peak of a process is read as Linux tells it")
def test_a_long_trace_is_diagnosed_and_reported(allocation, tmp_path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # one device, not eight
    command = [sys.executable, __file__, str(tmp_path), allocation]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(told.stdout.splitlines()[-1])
    print(found["plan"], {stage: f"{peak / 1e9:.2f} GB" for stage, peak in found["peaks"].items()})
    nodes = pd.read_parquet(tmp_path / "run" / "records" / "nodes.parquet", columns=["t", "decision", "support"])
    assert nodes.loc[nodes["decision"], "t"].max() > TRACE / 2, "late windows have decision nodes"
    assert nodes.loc[nodes["decision"], "support"].ge(2).all()
    # Beside the plan: what was launched, three times while a piece is made, and compiled programs.
    assert max(found["peaks"].values()) < found["planned"] + 3 * found["launched"] + PROGRAMS[allocation]
    assert found["page"] < 10e6
    (trace,) = found["traces"]
    assert trace["longest"] == TRACE
    assert trace["truncated"] == 1
    assert trace["repeated"] > 0.99
    assert [row["teacher"] for row in found["cases"]] == ["T"]


if __name__ == "__main__":
    print(json.dumps(long_run(Path(sys.argv[1]), sys.argv[2])))
