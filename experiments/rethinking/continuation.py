"""Can the teacher still save a response? Its accuracy from prefixes of the student's responses (paper B, Fig. 11b).

    python experiments/rethinking/continuation.py            # 2 minutes; experiments/rethinking/results/
    python experiments/rethinking/continuation.py --smoke    # seconds

Each of the student's responses is cut at several shares of its length; teacher and student go on from there. The
paper's claim: the teacher's advantage shrinks with the depth of the prefix.
"""

import json

import numpy as np
import pandas as pd
from runs import RESULTS, setting

from jaxopd import Engine, Requests, Sampling, load_model, load_tokenizer
from jaxopd.models import chat_tokens, stop_token_ids
from jaxopd.tasks import find_task

SHARES = (0.0, 0.2, 0.4, 0.6, 0.8)

if __name__ == "__main__":
    chosen = setting("continuation", __doc__)
    config, tokenizer = chosen.config, load_tokenizer(chosen.config.student)
    task = find_task(config.task)
    questions = task.load(chosen.evaluation.questions)
    prompts = [chat_tokens(tokenizer, q.text) for q in questions]
    models = {"student": load_model(config.student), "teacher": load_model(config.teacher[0].partition("=")[2])}
    sampling = Sampling(config.max_tokens, stop_token_ids(tokenizer, models["student"].config))
    n = 2 if chosen.smoke else 4
    drawn = Engine(models["student"]).run(prompts, Requests.continuations(prompts, n), sampling)
    owner = np.repeat(np.arange(len(prompts)), n)
    trunks = [[*prompts[q], *tokens[:length]] for q, tokens, length in zip(owner, drawn.tokens, drawn.length)]
    index, rows = np.arange(len(trunks)), []
    for share in SHARES:
        kept = (share * drawn.length).astype(int)
        cut = np.array([len(prompts[q]) for q in owner]) + kept
        requests = Requests(index, cut, np.full(len(trunks), -1), index)
        row = {"share": share, "prefix_tokens": kept.mean()}
        for name, model in models.items():
            out = Engine(model).run(trunks, requests, sampling)
            texts = [
                tokenizer.decode([*prefix[:keep], *more[:length]], skip_special_tokens=True)
                for prefix, keep, more, length in zip(drawn.tokens, kept, out.tokens, out.length)
            ]
            row[name] = np.mean([task.grade(text, questions[q].gold) is True for text, q in zip(texts, owner)])
        rows.append(row | {"advantage": row["teacher"] - row["student"]})
    found = pd.DataFrame(rows)
    print(found.to_string(index=False, float_format="{:.3f}".format))
    folder = chosen.folder if chosen.smoke else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "continuation.json").write_text(json.dumps(found.to_dict("records"), indent=1) + "\n")
