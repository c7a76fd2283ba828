"""The toy suite: questions, grader, contexts, tokenizer, corpus, training step and the shipped models."""

import json
import random

import numpy as np
import pytest

from jaxopd.errors import InputError
from jaxopd.models import chat_tokens, load_model, load_tokenizer, logits
from jaxopd.tasks import toy
from jaxopd.toy import MODELS, corpus, train
from jaxopd.toy.tokenizer import WORDS, encode, save_tokenizer

TASK = toy.Toy()
NAMES = ["zero", "one", "two", "three", "four", "five", "six"]


def independent_answer(text: str) -> str:
    """Evaluates a question's words by Python's own arithmetic, reading the line from left to right."""
    words = text.split()
    known = dict(zip(words[1 : words.index("start") : 2], words[2::2], strict=False))

    def as_number(word):
        return {"yes": True, "no": False}.get(word) if word in ("yes", "no") else int(word)

    value = as_number(words[words.index("start") + 1])
    steps = words[words.index("start") + 2 :]
    for op, operand in zip(steps[1::3], steps[2::3], strict=False):
        if op not in ["plus", "minus", "times", "and", "or", "xor", "nor", "implies"]:
            break
        other = as_number(known[operand] if operand.isalpha() else operand)
        value = {
            "plus": lambda a, b: (a + b) % 7, "minus": lambda a, b: (a - b) % 7, "times": lambda a, b: a * b % 7,
            "and": lambda a, b: a and b, "or": lambda a, b: a or b, "xor": lambda a, b: a != b,
            "nor": lambda a, b: not (a or b), "implies": lambda a, b: b if a else True,
        }[op](value, other)  # fmt: skip
    if words[0] == "boolean":
        return "yes" if value else "no"
    return words[words.index(NAMES[value]) + 1] if words[0] == "choice" else str(value)


@pytest.mark.parametrize("flavour", toy.FLAVOURS)
def test_generated_questions(flavour):
    questions = toy.generate(flavour, 150, seed=3)
    assert questions == toy.generate(flavour, 150, seed=3)
    assert questions != toy.generate(flavour, 150, seed=4)
    assert len({q.text for q in questions}) == 150
    for question in questions:
        assert question.gold == independent_answer(question.text)
        assert toy.parse(question.text).text == question.text
        assert toy.is_held_out(question.text)
        assert 18 <= len(encode(question.text)) + 5 <= 40
    golds = [q.gold for q in questions]
    assert all(golds.count(gold) >= 5 for gold in set(golds))
    assert len(set(golds)) == {"boolean": 2, "choice": 4}.get(flavour, 7)


def test_load_specification_and_file(tmp_path):
    generated = TASK.load("all:4:9")
    assert [q.meta["flavour"] for q in generated] == [flavour for flavour in toy.FLAVOURS for _ in range(4)]
    file = tmp_path / "mine.jsonl"
    file.write_text(
        "\n".join(json.dumps({"id": q.id, "question": q.text, "answer": q.gold}) for q in generated) + "\n\n"
    )
    assert TASK.load(file) == generated


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "7", '{"question": "choice"}', '{"question": 3, "answer": "4"}', '{"question": "", "answer": "4"}',
     '{"question": "chain start 3 a plus 9 b plus 1 c plus 1", "answer": "4"}',
     '{"question": "chain start 3 a plus red b plus 1 c plus 1", "answer": "4"}',
     '{"question": "chain start 3 a plus 1 c plus 1 b plus 1", "answer": "6"}',
     '{"question": "chain start 3 a plus 1 b plus 1 c plus 1", "answer": "5"}'],
)  # fmt: skip
def test_bad_lines_are_named(tmp_path, line):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"question": "chain start 3 a plus 1 b plus 1 c plus 1", "answer": "6"}\n' + line)
    with pytest.raises(InputError, match=r"bad\.jsonl: line 2: found .*, expected "):
        TASK.load(file)


@pytest.mark.parametrize("path", ["nowhere.jsonl", "choice:4", "choice:x:1", "poem:4:1"])
def test_bad_specification(path):
    with pytest.raises(InputError, match="expected a JSONL file or flavour:n:seed"):
        TASK.load(path)


@pytest.mark.parametrize(
    ("text", "gold", "expected"),
    [
        ("so 4 a minus 3 gives 1 ; answer one C", "C", True),
        ("answer one B", "C", False),
        ("answer C", "C", True),
        ("answer one", "C", None),
        ("answer", "C", None),
        ("", "C", None),
        ("answer A ; wait answer C", "C", True),
        ("so 1 a plus 1 = 2 . answer 2", "2", True),
        ("so 1 a plus 1 = 2 . answer 3", "2", False),
        ("so 1 a plus 1 = 2 .", "2", None),
        ("answer yes", "yes", True),
        ("answer no", "yes", False),
        ("answer red", "yes", None),
    ],
)
def test_grader(text, gold, expected):
    assert TASK.grade(text, gold) is expected


def test_contexts():
    assert toy.render_context("1C1W", ["answer 1"], ["answer 2"]) == "correct answer 1 wrong answer 2 question "
    assert toy.render_context("Sum1C", ["a 1 answer 1"], []) == "correct a 1 answer 1 question "
    for kind, correct, wrong in (("2C", ["x"], []), ("1C", [], []), ("1C1W", ["x"], [])):
        with pytest.raises(InputError, match="expected"):
            toy.render_context(kind, correct, wrong)


def test_tokenizer(tmp_path):
    save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer) == len(WORDS) == len(set(WORDS))
    rng = random.Random(0)
    for kind in ("plain", "summarize", *toy.CONTEXTS):
        example = corpus.example(kind, corpus.ROLES["S"], rng)
        for text in (example.message, example.response):
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
        tokens, weights = corpus.training_tokens(example)
        prompt = chat_tokens(tokenizer, example.message)
        response = tokenizer(example.response + " <|im_end|>")["input_ids"]
        drill = list(example.drill)
        assert tokens == prompt + response + encode(" ".join(drill))
        assert weights[len(prompt) + len(response) :] == [0, 0, 3] * (len(drill) // 3)
        assert all(f"{word} {letter}" in example.message for word, letter in zip(drill[1::3], drill[2::3]))
        weights = weights[: len(prompt) + len(response)]
        assert weights[: len(prompt)] == [0] * len(prompt)
        assert min(weights[len(prompt) :]) == 1
        assert weights[-2:] == [6, 1]
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.convert_tokens_to_ids("unheard") == tokenizer.unk_token_id


def test_solutions_follow_the_question():
    rng, writer = random.Random(1), corpus.Writer(0.0)
    for question in TASK.load("all:40:5"):
        problem = toy.parse(question.text)
        solution = writer.write(problem, rng)
        assert solution.correct
        assert TASK.grade(solution.text, question.gold) is True
        assert TASK.grade(solution.summary, question.gold) is True
        assert 17 <= len(encode(solution.text)) + 1 <= 66
        careless = corpus.Writer(1.0).write(problem, rng)
        assert careless.correct is TASK.grade(careless.text, question.gold)


def test_errors_are_fixed_and_scaled():
    rng = random.Random(2)
    problem = next(p for p in iter(lambda: toy.sample_problem("chain", rng), None) if len(p.steps) == 3)
    rate, wrong = corpus.error_of("chain", "plus", "3", "4")
    assert (rate, wrong) == corpus.error_of("chain", "plus", "3", "4")
    assert wrong in "16"
    assert 0.005 <= rate <= 0.65
    accuracy = [
        np.mean([corpus.Writer(scale).write(problem, rng).correct for _ in range(400)]) for scale in (1.5, 0.7, 0.0)
    ]
    assert accuracy == sorted(accuracy)
    assert accuracy[-1] == 1


def test_hints_are_repeated():
    rng = random.Random(3)
    problem = toy.sample_problem("chain", rng)
    demonstration = corpus.Writer(0.0, nonsense=1.0).write(problem, rng)
    assert corpus.Writer(0.0).write(problem, rng, [(1.0, demonstration)]).results == demonstration.results


def test_packing_keeps_every_example():
    rng = random.Random(4)
    examples = [corpus.training_tokens(corpus.example("plain", corpus.ROLES["M"], rng)) for _ in range(60)]
    rows = corpus.packed_rows(iter(examples), 3, 128)
    seen = []
    for tokens, weights, segments in (next(rows) for _ in range(5)):
        for segment in range(1, segments.max() + 1):
            seen.append((tokens[segments == segment].tolist(), weights[segments == segment].tolist()))
    assert seen == examples[: len(seen)]
    assert len(seen) > 15


def test_packed_loss_is_the_loss_of_each_example():
    rng = random.Random(5)
    model = train.init_model(train.config_of(corpus.ROLES["S"]), seed=1)
    examples = [corpus.training_tokens(corpus.example("plain", corpus.ROLES["S"], rng)) for _ in range(12)]
    tokens, weights, segments = next(corpus.packed_rows(iter(examples), 2, 192))
    total = 0.0
    for ids, loss_weights in examples[: segments.max()]:
        scores = np.asarray(logits(model, np.array([ids])), np.float64)[0, :-1]
        logp = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
        total -= (logp[np.arange(len(ids) - 1), ids[1:]] * loss_weights[1:]).sum()
    loss = train.packed_loss(model, tokens, weights, segments)
    np.testing.assert_allclose(loss, total / weights.sum(), rtol=1e-5)


def test_initial_model_already_looks_words_up():
    rng = random.Random(6)
    model = train.initial_model(corpus.ROLES["M"], 0)
    rows = [rng.sample(corpus.CONTENT, 12) for _ in range(200)]
    queries = [rng.randrange(6) for _ in rows]
    tokens = [encode(" ".join([*row, row[2 * query]])) for row, query in zip(rows, queries, strict=True)]
    scores = np.asarray(logits(model, np.array(tokens)))[:, -1]
    found = [score[encode(" ".join(row[1::2]))].argmax() for row, score in zip(rows, scores, strict=True)]
    assert np.mean(np.equal(found, queries)) > 0.25  # 1 in 6 by chance, with a standard error of .026


def test_shipped_models():
    files = [file for file in MODELS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 6_000_000
    assert {folder.name for folder in MODELS.iterdir()} == set(corpus.ROLES)
    question = TASK.load("choice:1:2")[0]
    for name, role in corpus.ROLES.items():
        model, tokenizer = load_model(MODELS / name), load_tokenizer(MODELS / name)
        assert (model.config.hidden_size, model.config.num_layers) == (role.width, role.layers)
        assert len(tokenizer) == model.config.vocab_size
        prompt = chat_tokens(tokenizer, TASK.prompt(question))
        echo = tokenizer("so " + question.text.split()[2])["input_ids"]
        scores = np.asarray(logits(model, np.array([prompt + echo])))[0]
        assert tokenizer.decode([scores[len(prompt) - 1].argmax()]) in ("so", "then", "thus", "hence")
        assert tokenizer.decode([scores[len(prompt)].argmax()]) == question.text.split()[2]
        assert tokenizer.decode([scores[-1].argmax()]) == "a"
