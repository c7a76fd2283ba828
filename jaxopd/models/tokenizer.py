"""Tokenizers and chat templates through transformers."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from jaxopd.confined import Confined
from jaxopd.errors import InputError, first_line
from jaxopd.models.config import LARGEST_VOCABULARY, QwenConfig
from jaxopd.models.weights import resolve

CHAT = Confined(Path(__file__).with_name("chat_worker.py"))


def load_tokenizer(path: str | Path) -> Any:
    """Loads the tokenizer of a Hugging Face folder; never runs code from it. Raises InputError without one."""
    folder = resolve(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        largest = max(tokenizer.get_vocab().values(), default=-1)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # transformers raises OSError, ValueError, KeyError; a panic in Rust is no Exception
        reason = first_line(error)
        raise InputError(f"{folder}: found no readable tokenizer ({reason}), expected tokenizer.json") from None
    if largest >= LARGEST_VOCABULARY:
        raise InputError(f"{folder}: found token id {largest}, expected ids under {LARGEST_VOCABULARY}")
    return tokenizer


def check_vocabulary(tokenizer: Any, config: QwenConfig, path: str | Path) -> None:
    """Raises InputError when the tokenizer can produce ids that the model does not have."""
    count = max(tokenizer.get_vocab().values(), default=-1) + 1  # ids may have gaps
    if count > config.vocab_size:
        raise InputError(
            f"{path}: found a tokenizer of {count} tokens, expected at most the model's {config.vocab_size}"
        )


def chat_tokens(tokenizer: Any, message: str, *, thinking: bool | None = None) -> list[int]:
    """Applies the chat template to one user message and opens the assistant's turn.

    `thinking` None leaves the template's own default; True and False set `enable_thinking`. Raises InputError
    where the tokenizer has no template that can be filled.
    """
    text = _filled_template(tokenizer, message, {} if thinking is None else {"enable_thinking": thinking})
    try:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # as in `load_tokenizer`
        found = f"a message of {len(message)} characters that it cannot read ({first_line(error)})"
        raise InputError(f"{tokenizer.name_or_path}: found {found}, expected text") from None


def _filled_template(tokenizer: Any, message: str, options: dict[str, bool]) -> str:
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        filled = {"error": first_line(error)}
    else:
        variables = tokenizer.special_tokens_map | options
        messages = [{"role": "user", "content": message}]
        filled = CHAT.ask({"template": template, "messages": messages, "variables": variables})
        filled = {"error": "it used up its time or memory"} if filled is None else filled
    if "error" in filled:
        raise InputError(
            f"{tokenizer.name_or_path}: found no usable chat template ({filled['error']}), "
            "expected one with the tokenizer"
        )
    return filled["text"]


def stop_token_ids(tokenizer: Any, config: QwenConfig) -> tuple[int, ...]:
    """Gives the ids that end a response: the checkpoint's eos tokens and the tokenizer's."""
    ids = set(config.eos_token_ids)
    if tokenizer.eos_token_id is not None:
        ids.add(int(tokenizer.eos_token_id))
    if not ids:
        raise InputError("eos_token_id: found none in the checkpoint or tokenizer, expected at least one stop token")
    return tuple(sorted(ids))
