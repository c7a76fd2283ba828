"""What bench_rollouts.py compares with: transformers' generate, and the usual way to write decoding in JAX."""

import gc
import os
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxopd_kernels import cache_attention

from jaxopd.models import QwenConfig
from jaxopd.models.qwen import Qwen, linear


def python_loop(model: Qwen, sequences: int, trunk: int, new: int) -> Callable[[], object]:
    """Decodes with a jitted step, each row its own cache, and a look at the tokens from Python after every step."""
    config = model.config
    graph, state = nnx.split(model)
    shape = (sequences, config.num_kv_heads, trunk + new, config.head_dim)
    caches = [[jnp.zeros(shape, model.dtype) for _ in range(config.num_layers)] for _ in "kv"]

    def step(state: nnx.State, caches: list, token: jax.Array, place: jax.Array, key: jax.Array) -> tuple:
        keys, values = (list(cache) for cache in caches)
        model = nnx.merge(graph, state)
        mask = jnp.broadcast_to(jnp.arange(trunk + new)[None, None] <= place, (sequences, 1, trunk + new))

        def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            for cache, fresh in ((keys, k), (values, v)):
                cache[layer] = jax.lax.dynamic_update_slice_in_dim(cache[layer], fresh.swapaxes(1, 2), place, 2)
            return cache_attention(q, keys[layer], values[layer], mask)[0]

        hidden = model(token[:, None], jnp.broadcast_to(place, (sequences, 1)), attend)[:, 0]
        logits = linear(hidden, model.head(), jnp.dtype("float32"))
        return jax.random.categorical(key, logits, mode="high"), [keys, values]

    compiled = jax.jit(step, donate_argnums=1)
    held = {"caches": caches}

    def run() -> np.ndarray:
        token = jnp.zeros(sequences, jnp.int32)
        for i in range(new):
            key = jax.random.fold_in(jax.random.key(0), i)
            token, held["caches"] = compiled(state, held["caches"], token, jnp.int32(trunk + i), key)
            drawn = np.asarray(token)
        return drawn

    return run


def generate(config: QwenConfig, sequences: int, trunk: int, new: int, cache_kind: str) -> Callable[[], object]:
    """transformers' generate on torch, same shape and dtype, random weights: the decode phase alone.

    The cache starts with the trunk's length of random keys in every row, as generate holds it. cache_kind: "dynamic" or
    "static" (filled in place; not compiled by torch). Raises ImportError where torch or transformers are missing.
    """
    import torch
    from transformers import DynamicCache, StaticCache

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = _torch_model(config, device)
    made = {"dynamic": lambda: DynamicCache(config=model.config)}
    made["static"] = lambda: StaticCache(model.config, max_cache_len=trunk + new + 1)
    cache = made[cache_kind]()
    shape = (sequences, config.num_kv_heads, trunk, config.head_dim)
    for layer in range(config.num_layers):
        cache.update(*(torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in "kv"), layer)
    tokens = torch.randint(0, config.vocab_size, (sequences, trunk + 1), device=device)

    def run() -> None:
        if cache_kind == "dynamic":
            drawn = cache.get_seq_length() - trunk
            if drawn:
                cache.crop(-drawn)
        else:
            for layer in cache.layers:
                layer.cumulative_length.fill_(trunk)
        with torch.inference_mode():
            out = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                past_key_values=cache,
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                pad_token_id=0,
                disable_compile=True,
            )
        if out.shape != (sequences, trunk + 1 + new):
            raise RuntimeError(f"generate gave {tuple(out.shape)}")

    return run


def give_back() -> None:
    """Hands the device memory of dropped torch contestants back, which torch keeps for itself until told."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _torch_model(config: QwenConfig, device: str) -> object:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                num_key_value_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                max_position_embeddings=config.max_positions,
                tie_word_embeddings=config.tie_embeddings,
            )
        )
    torch.set_default_dtype(torch.float32)
    return model.eval()
