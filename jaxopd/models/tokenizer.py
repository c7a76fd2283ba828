"""Tokenizers and chat templates through transformers."""

from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer

from jaxopd.errors import InputError
from jaxopd.models.config import QwenConfig
from jaxopd.models.weights import resolve


def load_tokenizer(path: str | Path) -> Any:
    """Loads the tokenizer of a Hugging Face folder; never runs code from it. Raises InputError without one."""
    folder = resolve(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError or the Rust tokenizer's own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{folder}: found no readable tokenizer ({reason}), expected tokenizer.json") from None
    return tokenizer


def check_vocabulary(tokenizer: Any, config: QwenConfig, path: str | Path) -> None:
    """Raises InputError when the tokenizer can produce ids that the model does not have."""
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"{path}: found a tokenizer of {len(tokenizer)} tokens, expected at most the model's {config.vocab_size}"
        )


def chat_tokens(tokenizer: Any, message: str, *, thinking: bool | None = None) -> list[int]:
    """Applies the chat template to one user message and opens the assistant's turn.

    `thinking` None leaves the template's own default; True and False set `enable_thinking`. Raises InputError
    where the tokenizer has no template that can be filled.
    """
    options = {} if thinking is None else {"enable_thinking": thinking}
    messages = [{"role": "user", "content": message}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    except (ValueError, TemplateError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{tokenizer.name_or_path}: found no usable chat template ({reason}), expected one with the tokenizer"
        ) from None
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def stop_token_ids(tokenizer: Any, config: QwenConfig) -> tuple[int, ...]:
    """Gives the ids that end a response: the checkpoint's eos tokens and the tokenizer's."""
    ids = set(config.eos_token_ids)
    if tokenizer.eos_token_id is not None:
        ids.add(int(tokenizer.eos_token_id))
    if not ids:
        raise InputError("eos_token_id: found none in the checkpoint or tokenizer, expected at least one stop token")
    return tuple(sorted(ids))
