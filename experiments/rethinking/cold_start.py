"""Off-policy cold start: fine-tuning on the teacher's responses before OPD, against OPD alone (paper B, Fig. 8, 21).

    python experiments/rethinking/cold_start.py            # experiments/rethinking/results/cold_start*
    python experiments/rethinking/cold_start.py --smoke

Responses of the teacher at temperature .7, top-p .95, without truncated and repetitive ones; SFT with warm-up and
cosine (Table 3); then OPD for the same number of steps as without. The paper's claims: higher overlap from the start,
and a better end. What the cold start alone gives is an arm too.
"""

from dataclasses import asdict

from results import write
from runs import Arm, compare, digest, flags, setting

from jaxopd.train.corpus import CorpusConfig, write_corpus

if __name__ == "__main__":
    chosen = setting(flags(__doc__).parse_args())
    config, teacher = chosen.config, chosen.config.teacher[0].partition("=")[2]
    drawn = CorpusConfig(teacher, config.task, config.questions, max_tokens=config.max_tokens, dtype=config.dtype)
    corpus = chosen.folder / f"corpus-{digest(asdict(drawn))}.jsonl"
    if not corpus.exists():
        print(write_corpus(drawn, corpus))
    batch = {"batch": config.batch * config.rollouts, "mini_batch": config.batch * config.rollouts}
    warm = {"teacher": (), "corpus": str(corpus), "schedule": "cosine", "warmup": max(1, config.steps // 20)}
    sft = Arm("sft", warm | batch, {"objective": "sft"})
    form = {"objective": "topk_thunlp"}
    arms = [Arm("opd", objective=form), sft, Arm("sft_then_opd", objective=form, after=sft)]
    write("cold_start", chosen, compare(chosen, arms), reference="opd")
