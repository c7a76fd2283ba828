"""Reads config.json of Qwen3 and Qwen2 dense models, in the styles of transformers 4 and 5."""

import dataclasses
import json
import math
import reprlib
from pathlib import Path
from typing import Any

import numpy as np

from jaxopd.errors import InputError

ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "qwen2": "Qwen2ForCausalLM"}
# Larger numbers are a broken file: a module's shapes are traced layer by layer, whatever a config claims.
LARGEST_VOCABULARY = 1 << 24
LARGEST = {
    "vocab_size": LARGEST_VOCABULARY,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1 << 8,
    "num_attention_heads": 1 << 10,
    "num_key_value_heads": 1 << 10,
    "head_dim": 1 << 12,
}
LARGEST_POSITION = (1 << 31) - 1  # positions are int32
LARGEST_NUMBER = 1e30  # float32 arithmetic has room above it


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN rotary scaling (Peng et al. 2023), as transformers computes it."""

    factor: float
    original_max_positions: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclasses.dataclass(frozen=True)
class QwenConfig:
    """Shape of a dense Qwen decoder. Qwen3 normalises q and k per head; Qwen2 has q, k, v biases."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    model_type: str = "qwen3"
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = True
    max_positions: int = 32768
    yarn: Yarn | None = None
    initializer_range: float = 0.02
    eos_token_ids: tuple[int, ...] = ()

    @property
    def qk_norm(self) -> bool:
        return self.model_type == "qwen3"

    @property
    def qkv_bias(self) -> bool:
        return self.model_type == "qwen2"

    @classmethod
    def from_json(cls, path: str | Path) -> "QwenConfig":
        """Reads `path` (a config.json). Raises InputError on an unsupported or incomplete file."""
        path = Path(path)
        raw = read_json(path)
        model_type = raw.get("model_type")
        if model_type not in list(ARCHITECTURES):
            raise InputError(
                f"{path}: field model_type: found {shown(model_type)}, expected one of {', '.join(ARCHITECTURES)}"
            )
        for name, expected in (("use_sliding_window", False), ("attention_bias", False), ("hidden_act", "silu")):
            if raw.get(name, expected) != expected:
                raise InputError(
                    f"{path}: field {name}: found {shown(raw[name])}, expected {expected!r} (not supported)"
                )

        def integer(name: str) -> int:
            return _positive_integer(path, name, raw.get(name))

        heads, hidden, max_positions = (
            integer(name) for name in ("num_attention_heads", "hidden_size", "max_position_embeddings")
        )
        kv_heads = integer("num_key_value_heads")
        head_dim = integer("head_dim") if raw.get("head_dim") is not None else hidden // heads
        if heads % kv_heads or head_dim < 2 or head_dim % 2:
            raise InputError(
                f"{path}: found {heads} attention heads, {kv_heads} key-value heads and head_dim {head_dim}, "
                "expected a whole number of query heads per key-value head and an even head_dim"
            )
        rope_theta, yarn = _rotary(path, raw, max_positions)
        return cls(
            vocab_size=integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=integer("intermediate_size"),
            num_layers=integer("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            model_type=model_type,
            rope_theta=rope_theta,
            rms_norm_eps=_positive(path, "rms_norm_eps", raw.get("rms_norm_eps", 1e-6)),
            tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
            max_positions=max_positions,
            yarn=yarn,
            initializer_range=_positive(path, "initializer_range", raw.get("initializer_range", 0.02)),
            eos_token_ids=_eos_token_ids(path, raw),
        )._checked(path)

    def _checked(self, path: Path) -> "QwenConfig":
        """Gives itself, or InputError where its rotary frequencies are no finite numbers."""
        try:
            with np.errstate(all="ignore"):
                finite = np.isfinite(self.inverse_frequencies()[0]).all()
        except (ArithmeticError, ValueError):
            finite = False
        if not finite:
            found = f"rope_theta {self.rope_theta} and {shown(self.yarn)}"
            raise InputError(f"{path}: field rope_parameters: found {found}, expected finite frequencies")
        return self

    def to_json(self, dtype: str) -> dict[str, Any]:
        """Gives the config.json of this model in the style of transformers 5."""
        rope: dict[str, Any] = {"rope_theta": self.rope_theta, "rope_type": "default"}
        if self.yarn:
            rope |= {
                "rope_type": "yarn",
                "factor": self.yarn.factor,
                "original_max_position_embeddings": self.yarn.original_max_positions,
                "attention_factor": self.yarn.attention_factor,
                "beta_fast": self.yarn.beta_fast,
                "beta_slow": self.yarn.beta_slow,
                "truncate": self.yarn.truncate,
            }
        eos = self.eos_token_ids
        return {
            "architectures": [ARCHITECTURES[self.model_type]],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_positions,
            "initializer_range": self.initializer_range,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": rope,
            "tie_word_embeddings": self.tie_embeddings,
            "use_sliding_window": False,
            **({"attention_bias": False} if self.model_type == "qwen3" else {}),
            **({"eos_token_id": eos[0] if len(eos) == 1 else list(eos)} if eos else {}),
            "dtype": dtype,
        }

    def inverse_frequencies(self) -> tuple[np.ndarray, float]:
        """Gives the rotary frequencies [head_dim / 2] and the factor on cos and sin (1 without YaRN)."""
        dim, base = self.head_dim, self.rope_theta
        frequencies = base ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
        if self.yarn is None:
            return frequencies.astype(np.float32), 1.0

        def rotations_to_dim(rotations: float) -> float:
            assert self.yarn is not None
            return dim * math.log(self.yarn.original_max_positions / (rotations * 2 * math.pi)) / (2 * math.log(base))

        low, high = rotations_to_dim(self.yarn.beta_fast), rotations_to_dim(self.yarn.beta_slow)
        if self.yarn.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = np.clip((np.arange(dim // 2) - low) / (high - low if high > low else 0.001), 0, 1)
        blended = frequencies / self.yarn.factor * ramp + frequencies * (1 - ramp)
        return blended.astype(np.float32), self.yarn.attention_factor


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; raises InputError when the file is missing or is not one."""
    if not path.is_file():  # a pipe would be waited for
        raise InputError(f"{path}: found no such file, expected a JSON file there")
    try:
        raw = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: found no valid JSON ({error}), expected a JSON object") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: found a {type(raw).__name__}, expected a JSON object")
    return raw


def shown(value: Any) -> str:
    """Renders what a file holds in a few characters, however long or nested it is."""
    return reprlib.repr(value)


def _rotary(path: Path, raw: dict[str, Any], max_positions: int) -> tuple[float, Yarn | None]:
    # transformers 5 keeps everything in rope_parameters, transformers 4 in rope_theta and rope_scaling.
    rope: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        value = raw.get(name) or {}
        if not isinstance(value, dict):
            raise InputError(f"{path}: field {name}: found {shown(value)}, expected an object")
        rope |= value
    theta = _positive(path, "rope_theta", rope.get("rope_theta", raw.get("rope_theta")))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "yarn":
        raise InputError(f"{path}: field rope_type: found {shown(kind)}, expected 'default' or 'yarn'")

    def number(name: str, default: float | None = None) -> float:
        return _positive(path, name, default if rope.get(name) is None else rope[name])

    factor = number("factor")
    return theta, Yarn(
        factor,
        _positive_integer(
            path, "original_max_position_embeddings", rope.get("original_max_position_embeddings") or max_positions
        ),
        number("attention_factor", 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0),
        number("beta_fast", 32.0),
        number("beta_slow", 1.0),
        bool(rope.get("truncate", True)),
    )


def _positive(path: Path, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < LARGEST_NUMBER:
        raise InputError(f"{path}: field {name}: found {shown(value)}, expected a positive number")
    return float(value)


def _positive_integer(path: Path, name: str, value: Any) -> int:
    largest = LARGEST.get(name, LARGEST_POSITION)
    if type(value) is not int or not 0 < value <= largest:
        raise InputError(f"{path}: field {name}: found {shown(value)}, expected a positive integer up to {largest}")
    return value


def _eos_token_ids(path: Path, raw: dict[str, Any]) -> tuple[int, ...]:
    # generation_config.json lists every stop token of a chat model; config.json often only one.
    generation = path.with_name("generation_config.json")
    found = read_json(generation).get("eos_token_id") if generation.exists() else None
    found = raw.get("eos_token_id") if found is None else found
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if any(type(i) is not int or not 0 <= i < LARGEST_VOCABULARY for i in ids):
        raise InputError(f"{path}: field eos_token_id: found {shown(found)}, expected token ids")
    return tuple(ids)
