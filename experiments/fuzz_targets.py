"""What is fuzzed: each loader and grader with valid inputs, ways to break them, and the use that follows.

A case is bytes: a file's content, or for graders JSON [text, gold]. A target may answer anything, or raise InputError.
"""

import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
from fuzz_mutation import Mutation, changed_bytes, changed_header, changed_json, changed_line, composed
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from jaxopd import toy
from jaxopd.models import QwenConfig, chat_tokens, check_model, load_model, load_tokenizer
from jaxopd.tasks import TASKS
from jaxopd.tasks.contexts import demonstrations_for, parse_teachers
from jaxopd.tasks.demonstrations import load_demonstrations

GOLDENS = Path(__file__).resolve().parents[1] / "tests" / "goldens"


@dataclass(frozen=True)
class Target:
    """A loader or grader. run(data, folder) writes the case into the folder and uses it as the program would."""

    seeds: Sequence[bytes]
    mutations: Sequence[Mutation]
    run: Callable[[bytes, Path], None]
    share: int = 1  # of the cases

    def case(self, rng: random.Random) -> bytes:
        return rng.choice(self.mutations)(rng, rng.choice(self.seeds))


def in_file(name: str, load: Callable[[Path], object], beside: Path | None = None) -> Callable[[bytes, Path], None]:
    """Makes a run that writes the case to a file, among the files of the folder `beside`, and loads it."""

    def run(data: bytes, folder: Path) -> None:
        if beside is not None and not (folder / "config.json").exists():
            shutil.copytree(beside, folder, dirs_exist_ok=True)
        (folder / name).write_bytes(data)
        load(folder / name)

    return run


def use_config(path: Path) -> None:
    QwenConfig.from_json(path.with_name("config.json")).to_json("float32")
    check_model(path.parent)


def use_tokenizer(path: Path) -> None:
    tokenizer = load_tokenizer(path.parent)
    tokens = chat_tokens(tokenizer, "chain x 3 y 5 start 4 a minus x \u202e\u0301 plus")
    tokenizer.decode(tokens[:1000], skip_special_tokens=True)
    tokenizer.get_vocab()


def use_questions(task: str) -> Callable[[Path], None]:
    def use(path: Path) -> None:
        for question in TASKS[task].load(path)[:50]:
            json.dumps(question.meta)
            "".join((question.id, question.text, question.gold)).encode()  # as parquet and tokenizers will
            TASKS[task].grade("answer 1", question.gold)

    return use


def use_demonstrations(path: Path) -> None:
    demonstrations = load_demonstrations(path)
    for spec in parse_teachers(["A=self:1c", "B=self:sum1c1w@large"]):
        demonstrations_for(spec, "q", demonstrations, seed=0)


def use_grader(task: str) -> Callable[[bytes, Path], None]:
    def run(data: bytes, folder: Path) -> None:
        text, gold = json.loads(data)
        assert TASKS[task].grade(text, gold) in (True, False, None)

    return run


def answers(golds: Sequence[str], parts: Sequence[str]) -> Mutation:
    """Composes responses; the gold answer is one of the task's, sometimes as hostile as the response."""
    compose = composed((*COMMON, *parts))

    def case(rng: random.Random, seed: bytes) -> bytes:
        gold = rng.choice(golds) if rng.random() < 0.9 else compose(rng)[:2000]
        return json.dumps([compose(rng), gold]).encode()

    return case


COMMON = (
    *("Answer: @", "the answer is @. ", "**@**", r"\boxed{@}", r"\boxed{", "{", "}", r"\fbox {@}", r"\text{@}", "\n"),
    *("<think>", "</think>", "<THINK>@</think>", "答案是@", " ", "'", "\u202e", "\u200b"),
    *("\ud83d", "\U0001f600", "\x00"),
    *("not ", "Answer", "answer is ", "is is is ", "* _ ", ":::", "is not true", "whether ", "? ", "$@$", "$", "\\"),
)
LOGIC = ("True", "False", "yes", "no", "not false", "true or false", "Yes, because @", "No.")
LETTERS = ("A", "(B) @", "C.", "option D", "A or B", "not A, it is B", "b", "I", "E")
NUMBERS = (
    *("0", "1", "-7", "1/3", "0.5", "1,000", "1e999", "1e-999", "9" * 300, "9" * 1001, ".5", "1e", "²", "١٢٣", "½"),
    *(r"\frac{@}{@}", r"\frac12", r"\dfrac{1}{0}", r"\sqrt{@}", r"\sqrt[@]{@}", "9^{@}", "@^{@^{@}}", "@^@^@", "(@)!"),
    *("@!", "@!!", r"\binom{@}{@}", r"\pi", "e^{@}", "i", "x", r"x^{@}+1", "x=@", r"\left(@\right)", "(@,@)", "[@, @)"),
    *(r"\sum_{i=1}^{@} @", r"\prod_{i=1}^{@} @", r"\int_{0}^{@} @ dx", r"\lim_{x\to @} @", r"\log_{@} @", r"\sin @"),
    *(r"\begin{pmatrix}@ & @ \\ @ & @\end{pmatrix}", r"\{@, @\}", r"\cup", r"\infty", r"\le", r"\pm @", "%"),
    *(r"\ldots", r"\overline{@}", r"@_{@}", r"|@|", r"\lfloor @\rfloor", r"\pmod{@}", "99999999", "@+@"),
    *("10^{10}", "10^{10^{10}}"),
)
GOLDS = ("7", r"\frac{1}{2}", r"2\sqrt{3}", "x+1", "yes")
TOY = ("answer ", "answer", "yes ", "no ", "zero C ", "three ", "A ", "6 ", "; ", "so 4 a plus 2 gives 6 ")
TEMPLATE = (
    *("{{ @ }}", "{% for message in messages %}@{% endfor %}", "{% if @ %}@{% endif %}", "{{ messages[0].content }}"),
    *("{% for a in range(99999) %}@{% endfor %}", "{% set ns = namespace(x='ab') %}", "{% set ns.x = ns.x ~ ns.x %}"),
    *("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% include 'a' %}", "{% import '/etc/passwd' as p %}"),
    *("9 ** 9 ** 9", "'a' * 9999999999", "10 ** 9", "messages", "loop", "''.__class__.__mro__", "@ + @", "@ ~ @"),
    *("range(10 ** 9)", "'%999999999d' % 1", "'{:>9999999999}'.format(1)", "messages|tojson", "messages|list|@"),
    *("raise_exception(@)", "strftime_now('%Y')", "''|center(9999999999)", "x|indent(@)", "1 / 0", "none.x.y"),
    *("{#", "{%", "<|im_start|> ", "user", "enable_thinking", "bos_token", "dict(@)", "joiner(@)", "cycler(@)"),
    *("lipsum(n=9999)", "1", "self._TemplateReference"),
)

MATH_ROW = {
    "id": "q1", "problem": "What is $1 + 1$?", "answer": "2", "prompt": [{"role": "user", "content": "What is 2?"}],
    "reward_model": {"ground_truth": "2"}, "extra_info": {"index": 3},
}  # fmt: skip
PROMPT_ROW = {name: MATH_ROW[name] for name in ("prompt", "reward_model", "extra_info")}
BOOLQ_ROW = {"question": "is it so", "passage": "It is so.", "answer": True, "title": "It"}
DEMONSTRATION = {"question": "q", "text": "so 1", "correct": True, "source": "student", "summary": None}
TOY_ROWS = [{"question": q.text, "answer": q.gold, "id": q.id} for q in TASKS["toy"].load("all:2:3")]
CSV = b'"What is ""1"", 2?",1,2,3,4,A\nWhy?,a,"b\nc",d,e,D\n'


def lines(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(*rows: dict, **options: object) -> bytes:
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(pa.Table.from_pylist(list(rows) * 20), sink, **options)
    return sink.getvalue().to_pybytes()


def byte_tokenizer() -> bytes:
    """A tokenizer with what Qwen's has: byte-level BPE with merges, a split by a regular expression, NFC."""
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "<|im_end|>": 3, "Ġ": 4}, [("a", "b")], unk_token=None))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("x", "b")])
    split = pre_tokenizers.Split(r"\p{L}+|\s+(?!\S)|[^\s]+", "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.add_special_tokens(["<|im_end|>"])
    return tokenizer.to_str().encode()


def read(folder: Path, name: str) -> bytes:
    return (folder / name).read_bytes()


def chat_template(path: Path) -> None:
    chat_tokens(load_tokenizer(path.parent), "plus 1")


def as_template(rng: random.Random, seed: bytes) -> bytes:
    return composed(TEMPLATE, longest=5)(rng).encode("utf-8", "replace")


S, QWEN2, QWEN3 = toy.MODELS / "S", GOLDENS / "qwen2", GOLDENS / "qwen3"
JSON = (changed_json, changed_json, changed_json, changed_bytes)
LINES = (changed_line, changed_line, changed_line, changed_bytes)
SHARD = "model-00003-of-00003.safetensors"
TOKENIZERS = (read(S, "tokenizer.json"), byte_tokenizer())
TARGETS = {
    "config": Target([read(QWEN2, "config.json")], JSON, in_file("config.json", use_config, QWEN2), 6),
    "generation_config": Target(
        [read(QWEN2, "generation_config.json")], JSON, in_file("generation_config.json", use_config, QWEN2), 1
    ),
    "safetensors": Target(
        [read(QWEN2, "model.safetensors")],
        (changed_header, changed_bytes),
        in_file("model.safetensors", lambda p: load_model(p.parent), QWEN2),
        6,
    ),
    "shard": Target(
        [read(QWEN3, SHARD)], (changed_header, changed_bytes), in_file(SHARD, lambda p: check_model(p.parent), QWEN3), 2
    ),
    "index": Target(
        [read(QWEN3, "model.safetensors.index.json")],
        JSON,
        in_file("model.safetensors.index.json", lambda p: check_model(p.parent), QWEN3),
        3,
    ),
    "tokenizer": Target(TOKENIZERS, JSON, in_file("tokenizer.json", use_tokenizer, S), 6),
    "tokenizer_config": Target(
        [read(S, "tokenizer_config.json")], JSON, in_file("tokenizer_config.json", use_tokenizer, S), 4
    ),
    "chat_template": Target([b"{{ messages }}"], [as_template], in_file("chat_template.jinja", chat_template, S), 3),
    "boolq_file": Target([lines(BOOLQ_ROW, BOOLQ_ROW)], LINES, in_file("q.jsonl", use_questions("boolq")), 8),
    "toy_file": Target([lines(*TOY_ROWS)], LINES, in_file("q.jsonl", use_questions("toy")), 8),
    "math_file": Target([lines(MATH_ROW, PROMPT_ROW)], LINES, in_file("q.jsonl", use_questions("math")), 8),
    "math_json": Target(
        [json.dumps([MATH_ROW, PROMPT_ROW]).encode()], JSON, in_file("q.json", use_questions("math")), 4
    ),
    "math_parquet": Target(
        [parquet(MATH_ROW), parquet(PROMPT_ROW, compression="zstd"), parquet(PROMPT_ROW, compression="none")],
        [changed_bytes],
        in_file("q.parquet", use_questions("math")),
        8,
    ),
    "mmlu_file": Target([CSV], [changed_bytes], in_file("q_test.csv", use_questions("mmlu")), 4),
    "demonstrations": Target(
        [lines(DEMONSTRATION, DEMONSTRATION | {"source": "large", "summary": "1"})],
        LINES,
        in_file("d.jsonl", use_demonstrations),
        6,
    ),
    "boolq_grade": Target([b"[]"], [answers(("True", "False"), LOGIC)], use_grader("boolq"), 8),
    "mmlu_grade": Target([b"[]"], [answers(("A", "d"), LETTERS)], use_grader("mmlu"), 8),
    "math_grade": Target([b"[]"], [answers(GOLDS, NUMBERS)], use_grader("math"), 8),
    "toy_grade": Target([b"[]"], [answers(("yes", "C", "6"), TOY)], use_grader("toy"), 4),
}  # fmt: skip
