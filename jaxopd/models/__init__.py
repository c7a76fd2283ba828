"""Language models: Qwen3 and Qwen2 in Flax NNX, their weights and tokenizers."""

from jaxopd.models.checkpoints import load_checkpoint, save_checkpoint
from jaxopd.models.config import QwenConfig
from jaxopd.models.qwen import Qwen, forward, hidden_states, init_model, linear, logits
from jaxopd.models.tokenizer import chat_tokens, check_vocabulary, load_tokenizer, stop_token_ids
from jaxopd.models.weights import check_model, load_model, save_model

__all__ = [
    "Qwen",
    "QwenConfig",
    "chat_tokens",
    "check_model",
    "check_vocabulary",
    "forward",
    "hidden_states",
    "init_model",
    "linear",
    "load_checkpoint",
    "load_model",
    "load_tokenizer",
    "logits",
    "save_checkpoint",
    "save_model",
    "stop_token_ids",
]
