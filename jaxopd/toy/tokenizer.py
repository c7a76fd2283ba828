"""The word-level tokenizer of the toy models, in Hugging Face format."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from jaxopd.tasks import toy

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>")
OPENINGS = ("so", "then", "thus", "hence")
EQUALS = ("gives", "=")
STOPS = (";", ".")
SPEAKERS = ("system", "user", "assistant")
FRAME = ("start", "options", "answer", "wait", "question", "correct", "wrong", "summarize", "solution")
WORDS = (
    *SPECIAL, *SPEAKERS, *toy.FLAVOURS, *toy.DIGITS, *toy.NUMBER_WORDS, *toy.TRUTHS, *toy.LETTERS, *toy.LABELS,
    *toy.COLOURS, *toy.VARIABLES, *toy.LOGIC, *toy.ARITHMETIC, *OPENINGS, *EQUALS, *STOPS, *FRAME,
)  # fmt: skip
ID = {word: index for index, word in enumerate(WORDS)}

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message.role }} {{ message.content }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def encode(text: str) -> list[int]:
    """Token ids of words separated by spaces; the same ids as the saved tokenizer's, without loading it."""
    return [ID[word] for word in text.split()]


def save_tokenizer(folder: str | Path) -> None:
    """Write tokenizer.json and tokenizer_config.json; `transformers.AutoTokenizer` reads them."""
    tokenizer = Tokenizer(WordLevel(ID, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    # Spaces beside a special token belong to it, else "<|im_end|> <|im_start|>" would hold an empty word.
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
