"""Off-policy cold start: fine-tuning on the teacher's responses before OPD, against OPD alone (paper B, Fig. 8, 21).

    python experiments/rethinking/cold_start.py            # 9 runs of 60 steps; experiments/rethinking/results/
    python experiments/rethinking/cold_start.py --smoke    # a minute

Responses of the teacher at temperature .7, top-p .95, without truncated and repetitive ones; SFT with a cosine; then
OPD for the same number of steps as without. The paper's claim: higher overlap from the start, and a better end.
"""

from dataclasses import replace

from runs import Arm, compare, setting, write

from jaxopd.train.corpus import CorpusConfig, write_corpus

if __name__ == "__main__":
    chosen = setting("cold_start", __doc__)
    teacher, corpus = chosen.config.teacher[0].partition("=")[2], chosen.folder / "corpus.jsonl"
    if not corpus.exists():
        drawn = CorpusConfig(teacher, chosen.config.task, chosen.config.questions, max_tokens=chosen.config.max_tokens)
        print(write_corpus(drawn, corpus))
    warm = {"corpus": str(corpus), "schedule": "cosine", "warmup": 3, "batch": 4 * chosen.config.batch}
    warm["mini_batch"] = warm["batch"]
    sft = Arm("sft", {"teacher": (), **warm}, {"objective": "sft"})
    one_seed = replace(chosen, seeds=1)
    compare(one_seed, [sft])
    start = str(chosen.folder / "sft" / "0" / "student")
    form = {"objective": "topk_thunlp"}
    arms = [Arm("opd", objective=form), Arm("cold_start_then_opd", objective=form, student=start)]
    write("cold_start", chosen, arms, compare(chosen, arms))
