"""Can the teacher still save a response? Its accuracy from prefixes of the student's responses (paper B, Fig. 11b).

    python experiments/rethinking/continuation.py            # experiments/rethinking/results/continuation*
    python experiments/rethinking/continuation.py --smoke

Each of the student's responses is cut at several shares of its length; teacher and student go on from there. The
paper's claim: the teacher's advantage shrinks with the depth of the prefix.
"""

from dataclasses import replace

import numpy as np
import pandas as pd
from results import settings
from runs import Setting, flags, setting

from jaxopd import Engine, Requests, Sampling, load_model, load_tokenizer
from jaxopd.alignment import t_interval
from jaxopd.models import chat_tokens, stop_token_ids
from jaxopd.tasks import find_task

SHARES = (0.0, 0.2, 0.4, 0.6, 0.8)


def continued(chosen: Setting, seed: int) -> pd.DataFrame:
    """Gives a row a response and share: whether student and teacher end right from there."""
    config, tokenizer = chosen.config, load_tokenizer(chosen.config.student)
    task = find_task(config.task)
    questions = task.load(chosen.evaluation.questions)
    prompts = [chat_tokens(tokenizer, q.text) for q in questions]
    paths = {"student": config.student, "teacher": config.teacher[0].partition("=")[2]}
    engines = {name: Engine(load_model(path, dtype=config.dtype)) for name, path in paths.items()}
    stops = stop_token_ids(tokenizer, engines["student"].config)
    n = chosen.evaluation.samples // 4 or 1
    asked = chosen.evaluation
    sampling = Sampling(asked.max_tokens, stops, temperature=asked.temperature, top_p=asked.top_p, seed=2 * seed)
    drawn = engines["student"].run(prompts, Requests.continuations(prompts, n), sampling)
    owner = np.repeat(np.arange(len(prompts)), n)
    trunks = [[*prompts[q], *tokens[:length]] for q, tokens, length in zip(owner, drawn.tokens, drawn.length)]
    index, found = np.arange(len(trunks)), []
    for share in SHARES:
        kept = (share * drawn.length).astype(int)
        cut = np.array([len(prompts[q]) for q in owner]) + kept
        requests = Requests(index, cut, np.full(len(trunks), -1), index)
        rows = pd.DataFrame({"seed": seed, "share": share, "question": owner, "prefix_tokens": kept})
        for name, engine in engines.items():
            out = engine.run(trunks, requests, replace(sampling, seed=2 * seed + 1))
            texts = [
                tokenizer.decode([*prefix[:keep], *more[:length]], skip_special_tokens=True)
                for prefix, keep, more, length in zip(drawn.tokens, kept, out.tokens, out.length)
            ]
            rows[name] = [task.grade(text, questions[q].gold) is True for text, q in zip(texts, owner)]
        found.append(rows)
    return pd.concat(found, ignore_index=True)


def advantages(rows: pd.DataFrame) -> pd.DataFrame:
    """Averages over questions, each the mean of its responses; the advantage with its 95 % t interval over them."""
    found = []
    for share, part in rows.groupby("share"):
        each = part.groupby("question")[["prefix_tokens", "student", "teacher"]].mean().astype(float)
        interval = t_interval(each["teacher"].to_numpy() - each["student"].to_numpy())
        row = {"share": share, **each.mean(), "advantage": interval["mean"]}
        found.append(row | {end: interval[end] for end in ("low", "high")})
    return pd.DataFrame(found)


if __name__ == "__main__":
    chosen = setting(flags(__doc__).parse_args())
    found = advantages(pd.concat([continued(chosen, seed) for seed in range(chosen.seeds)]))
    print(found.to_string(index=False, float_format="{:.3f}".format))
    chosen.results.mkdir(parents=True, exist_ok=True)
    found.to_csv(chosen.results / "continuation.csv", index=False, float_format="%.4f")
    settings("continuation", chosen)
