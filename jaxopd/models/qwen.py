"""Qwen3 and Qwen2 dense decoders in Flax NNX.

Attributes carry Hugging Face's parameter names and arrays keep its [out, in] layout, so that loading and saving
are a rename and the LM head stays vocabulary-major. What a token attends to is not the model's business: it hands
q, k, v of each layer to an `Attend` function, so that scoring, prefill and decoding share this one forward pass.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxopd_kernels import product
from jaxtyping import Array, Bool, Float, Int

from jaxopd.models.attention import causal_attention
from jaxopd.models.config import QwenConfig

# (layer, q [B, T, H, h], k [B, T, K, h], v [B, T, K, h]) -> [B, T, H, h]
Attend = Callable[[int, Array, Array, Array], Array]

FEW_ROWS = range(16, 65)  # a decoding step's; with 4 rows a CPU is slower that way, with 128 as fast


class Linear(nnx.Module):
    """x W^T + b with W [out, in]."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, scale: float, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.weight = nnx.Param((jax.random.normal(rngs.params(), (outputs, inputs)) * scale).astype(dtype))
        self.bias = nnx.Param(jnp.zeros(outputs, dtype)) if bias else None

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        y = linear(x, self.weight[...])
        return y if self.bias is None else (y + self.bias[...].reshape((1,) * (y.ndim - 1) + (-1,))).astype(x.dtype)


def linear(x: Float[Array, "*B I"], weight: Float[Array, "O I"], out: jnp.dtype | None = None) -> Float[Array, "*B O"]:
    """Multiplies x by weight^T, accumulating in float32, and returns `out` (default: x's dtype)."""
    rows = x.reshape(-1, x.shape[-1])  # of a product of more than two dimensions XLA on a CPU copies the weight
    plain = partial(product, "ni,oi->no")
    if len(rows) in FEW_ROWS and x.dtype == weight.dtype == jnp.bfloat16:
        y = lax.platform_dependent(rows, weight, cpu=_weight_first, default=plain)
    else:
        y = plain(rows, weight)
    return y.astype(out or x.dtype).reshape(*x.shape[:-1], -1)


def _weight_first(rows: Float[Array, "N I"], weight: Float[Array, "O I"]) -> Float[Array, "N O"]:
    """Makes the rows the right operand, which XLA on a CPU rearranges in every product."""
    # The barrier keeps XLA from folding the transposition back into the product.
    return lax.optimization_barrier(product("oi,ni->on", weight, rows)).T


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32."""

    def __init__(self, width: int, eps: float, dtype: jnp.dtype):
        self.weight = nnx.Param(jnp.ones(width, dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        x32 = x.astype(jnp.float32)
        x32 = x32 * lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + self.eps)
        weight = self.weight[...].reshape((1,) * (x.ndim - 1) + (-1,))
        return (x32.astype(x.dtype) * weight).astype(x.dtype)


class SelfAttention(nnx.Module):
    def __init__(self, config: QwenConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, h = config.hidden_size, config.head_dim

        def projection(inputs: int, outputs: int, bias: bool) -> Linear:
            return Linear(inputs, outputs, bias=bias, scale=config.initializer_range, dtype=dtype, rngs=rngs)

        self.q_proj = projection(width, config.num_heads * h, config.qkv_bias)
        self.k_proj = projection(width, config.num_kv_heads * h, config.qkv_bias)
        self.v_proj = projection(width, config.num_kv_heads * h, config.qkv_bias)
        self.o_proj = projection(config.num_heads * h, width, False)
        self.q_norm = RMSNorm(h, config.rms_norm_eps, dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(h, config.rms_norm_eps, dtype) if config.qk_norm else None
        self.head_dim = h

    def __call__(self, x: Array, rotary: tuple[Array, Array], attend: Callable[[Array, Array, Array], Array]) -> Array:
        B, T, _ = x.shape
        q, k, v = (p(x).reshape(B, T, -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        out = attend(rotate(q, rotary), rotate(k, rotary), v)
        return self.o_proj(out.astype(x.dtype).reshape(B, T, -1))


class MLP(nnx.Module):
    def __init__(self, config: QwenConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        def projection(inputs: int, outputs: int) -> Linear:
            return Linear(inputs, outputs, bias=False, scale=config.initializer_range, dtype=dtype, rngs=rngs)

        self.gate_proj = projection(config.hidden_size, config.intermediate_size)
        self.up_proj = projection(config.hidden_size, config.intermediate_size)
        self.down_proj = projection(config.intermediate_size, config.hidden_size)

    def __call__(self, x: Array) -> Array:
        # In float32: a CPU would round every step of a bfloat16 sigmoid.
        gate, up = (p(x).astype(jnp.float32) for p in (self.gate_proj, self.up_proj))
        return self.down_proj((jax.nn.silu(gate) * up).astype(x.dtype))


class DecoderLayer(nnx.Module):
    def __init__(self, config: QwenConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.self_attn = SelfAttention(config, dtype, rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp = MLP(config, dtype, rngs)

    def __call__(self, x: Array, rotary: tuple[Array, Array], attend: Callable[[Array, Array, Array], Array]) -> Array:
        x = x + self.self_attn(self.input_layernorm(x), rotary, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


@jax.custom_vjp
def embedded(table: Float[Array, "V D"], tokens: Int[Array, "*B"]) -> Float[Array, "*B D"]:
    """Gives each token's row; the gradient of a row is summed in float32."""
    # XLA on a CPU gathers from bfloat16 as from float32. Were the table alone invariant, a loop of decoding steps would
    # hold, and make anew each time it is entered, a float32 copy of it all.
    table, tokens = lax.optimization_barrier((table, tokens))
    return table[tokens]


def _embedded_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, None]:
    table, tokens = saved
    # A sum of 8,192 bfloat16 gradients of one frequent token, in bfloat16, is wrong by a quarter.
    total = jnp.zeros(table.shape, jnp.float32).at[tokens].add(gradient.astype(jnp.float32))
    return total.astype(table.dtype), None


embedded.defvjp(lambda table, tokens: (embedded(table, tokens), (table, tokens)), _embedded_backward)


class Embedding(nnx.Module):
    def __init__(self, config: QwenConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        table = jax.random.normal(rngs.params(), (config.vocab_size, config.hidden_size)) * config.initializer_range
        self.weight = nnx.Param(table.astype(dtype))


class Qwen(nnx.Module):
    """A dense Qwen decoder; parameters follow `config`, activations follow their dtype."""

    def __init__(self, config: QwenConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config = config
        self.embed_tokens = Embedding(config, dtype, rngs)
        self.layers = nnx.List([DecoderLayer(config, dtype, rngs) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.lm_head = None if config.tie_embeddings else Embedding(config, dtype, rngs)

    def __call__(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], attend: Attend, remat: bool = False
    ) -> Float[Array, "B T D"]:
        """Computes the hidden states after the final norm; remat: layers keep their inputs only, for training."""
        x = embedded(self.embed_tokens.weight[...], tokens)
        rotary = rotary_tables(self.config, positions)
        for index, layer in enumerate(self.layers):
            step = partial(layer, rotary=rotary, attend=partial(attend, index))
            x = jax.checkpoint(step)(x) if remat else step(x)
        return self.norm(x)

    def head(self) -> Float[Array, "V D"]:
        """Gives the LM head, tied or not, one row a vocabulary entry."""
        return (self.embed_tokens if self.lm_head is None else self.lm_head).weight[...]

    @property
    def dtype(self) -> jnp.dtype:
        return self.embed_tokens.weight[...].dtype


def rotary_tables(config: QwenConfig, positions: Int[Array, "B T"]) -> tuple[Array, Array]:
    """Gives [cos, cos] and [-sin, sin] of position * frequency, [B, T, 1, h] in float32."""
    frequencies, factor = config.inverse_frequencies()
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies)[None, None]
    cos, sin = jnp.cos(angles)[:, :, None] * factor, jnp.sin(angles)[:, :, None] * factor
    # As halves, XLA on a CPU would compute them again in every layer; it fuses nothing across a concatenation.
    return jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1)


def rotate(x: Float[Array, "B T H h"], rotary: tuple[Array, Array]) -> Float[Array, "B T H h"]:
    """Rotates the pairs (i, i + h/2) by the tables' angles."""
    cos, sin = rotary
    x32 = x.astype(jnp.float32)  # before the split, so that gradients of both halves meet in float32
    a, b = jnp.split(x32, 2, -1)
    return (x32 * cos + jnp.concatenate([b, a], -1) * sin).astype(x.dtype)


def init_model(config: QwenConfig, *, seed: int = 0, dtype: str = "float32") -> Qwen:
    """Makes a model with random weights, normal(0, initializer_range), norms at one."""
    return Qwen(config, jnp.dtype(dtype), nnx.Rngs(seed))


def positions_of(mask: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Counts real tokens from the left, so that padding on either side leaves positions unchanged."""
    return jnp.maximum(jnp.cumsum(mask, -1) - 1, 0)


def forward(
    model: Qwen, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"], *, remat: bool = False
) -> Float[Array, "B T D"]:
    """Computes hidden states of full sequences under causal attention; traceable."""
    return model(tokens, positions_of(mask), lambda _, q, k, v: causal_attention(q, k, v, mask), remat)


compiled_forward = nnx.jit(forward)


@nnx.jit
def _logits(model: Qwen, tokens: Array, mask: Array) -> Array:
    return linear(forward(model, tokens, mask), model.head(), jnp.dtype("float32"))


def hidden_states(
    model: Qwen, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"] | None = None
) -> Float[Array, "B T D"]:
    """Computes the hidden states after the final norm; `mask` is True at real tokens, padding on either side."""
    tokens, mask = _checked(model, tokens, mask)
    return compiled_forward(model, tokens, mask)


def logits(model: Qwen, token_ids: Int[Array, "B T"], mask: Bool[Array, "B T"] | None = None) -> Float[Array, "B T V"]:
    """Computes next-token logits in float32; `mask` is True at real tokens, padding on either side.

    Rows at padded positions are finite and meaningless. Raises InputError on ids outside the vocabulary.
    """
    token_ids, mask = _checked(model, token_ids, mask)
    return _logits(model, token_ids, mask)


def _checked(model: Qwen, tokens: Array, mask: Array | None) -> tuple[Array, Array]:
    import numpy as np

    from jaxopd.errors import InputError

    ids = np.asarray(tokens)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise InputError(f"token_ids: found shape {ids.shape} of {ids.dtype}, expected integers [B, T]")
    kept = np.ones(ids.shape, bool) if mask is None else np.asarray(mask, bool)
    if kept.shape != ids.shape:
        raise InputError(f"mask: found shape {kept.shape}, expected that of token_ids, {ids.shape}")
    inside = (ids >= 0) & (ids < model.config.vocab_size)
    if not inside[kept].all():
        worst = ids[kept & ~inside][0]
        raise InputError(f"token_ids: found id {worst}, expected 0 to {model.config.vocab_size - 1}")
    return jnp.asarray(np.where(kept, ids, 0).astype(np.int32)), jnp.asarray(kept)
