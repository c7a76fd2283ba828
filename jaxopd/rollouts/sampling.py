"""Draws tokens: temperature, top-k, top-p, greedy; every setting is a traced scalar, so none recompiles."""

import zlib
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key

from jaxopd.errors import check_fields

BELOW_ONE = 1 - 2.0**-24  # the largest float32 under 1
SPREAD_BITS = 10.0  # of a rollout's choices that a spread number makes; a float has few more


def seed_of(*names: object) -> int:
    """Makes a 32-bit seed of names: a draw depends on what it is for, never on what was drawn before."""
    return zlib.crc32("/".join(map(str, names)).encode())


@dataclass(frozen=True)
class Sampling:
    """How rollouts are drawn. Temperature 0 is greedy; top_p 1 and top_k 0 truncate nothing."""

    max_tokens: int
    stop_ids: tuple[int, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        usable = self.temperature == 0 or 1e-6 <= self.temperature < float("inf")
        check_fields(
            self,
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", usable, "0, or a number from 1e-6"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k >= 0, "0 or more"),
        )


def warp(
    logits: Float[Array, "B V"], temperature: Float[Array, ""], top_p: Float[Array, ""], top_k: Int[Array, ""]
) -> Float[Array, "B V"]:
    """Scales logits by 1/temperature, then removes (-inf) what top-k and top-p leave out.

    top-k keeps the k largest and everything tied with the k-th; top-p then keeps the smallest set of largest
    tokens whose renormalised mass reaches p, with ties of its last token. Temperature 0 keeps the argmax alone.
    """
    greedy = temperature == 0
    inverse = 1 / jnp.where(greedy, 1.0, temperature)  # XLA on a CPU stores quotients, and products it makes anew

    def everything(z: Array) -> tuple[Array, Array]:
        return jnp.full(z.shape[0], -jnp.inf), jnp.full(z.shape[0], -1, jnp.int32)

    def truncated(z: Array) -> tuple[Array, Array]:
        z = z * inverse
        least = jnp.where(top_k > 0, _top_k_threshold(z, top_k), -jnp.inf)
        kept = jnp.where(z >= least[:, None], z, -jnp.inf)
        least = jnp.where(top_p < 1, jnp.maximum(least, _top_p_threshold(kept, top_p)), least)
        return least, jnp.where(greedy, jnp.argmax(z, -1).astype(jnp.int32), -1)

    # A branch takes the logits as they are and hands back a number a row: plain sampling pays neither the searches nor
    # a copy of the logits.
    plain = (top_k <= 0) & (top_p >= 1) & ~greedy
    least, only = lax.cond(plain, everything, truncated, logits)
    scaled = logits * inverse
    token = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None]
    kept = (scaled >= least[:, None]) & ((only[:, None] < 0) | (token == only[:, None]))
    return jnp.where(kept, scaled, -jnp.inf)


def tile_width(vocabulary: int) -> int:
    """Gives a power of two of at most sqrt(V), so that choosing a tile and choosing inside it cost about the same.

    One that divides V is preferred: padding would copy the logits (12 ms instead of 2 for 32 rows of 151,936).
    """
    most = 1 << ((vocabulary.bit_length() - 1) // 2)
    dividing = min(most, vocabulary & -vocabulary)
    return dividing if 2 * dividing >= most else most


def _tiled(logits: Float[Array, "B V"]) -> Float[Array, "B tiles width"]:
    B, V = logits.shape
    width = tile_width(V)
    tiles = -(-V // width)
    return jnp.pad(logits, ((0, 0), (0, tiles * width - V)), constant_values=-jnp.inf).reshape(B, tiles, width)


def draw_scored(keys: Key[Array, " B"], logits: Float[Array, "B V"]) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Draws one token a row, each with its key, from softmax(logits), and gives its log-probability.

    First a tile by its mass, then a token in it.

    P(token) = P(tile) P(token | tile), so it is exact, for about 2 sqrt(V) random numbers a row instead of V.
    mode="high" spends two words a number: the default biases events under 1e-7.
    """
    tiled = _tiled(logits)

    def choose(key: Array, row: Array) -> Array:
        return jax.random.categorical(key, row, mode="high")

    tile_keys, token_keys = jnp.unstack(jax.vmap(jax.random.split)(keys), axis=1)
    mass = jax.nn.logsumexp(tiled, -1)
    tile = jax.vmap(choose)(tile_keys, mass)
    inside = jnp.take_along_axis(tiled, tile[:, None, None], 1)[:, 0]
    place = jax.vmap(choose)(token_keys, inside)
    log_prob = jnp.take_along_axis(inside, place[:, None], 1)[:, 0] - jax.nn.logsumexp(mass, -1)
    return (tile * tiled.shape[-1] + place).astype(jnp.int32), log_prob


def draw_spread(
    spread: Float[Array, " B"], bits: Float[Array, " B"], keys: Key[Array, " B"], logits: Float[Array, "B V"]
) -> tuple[Int[Array, " B"], Float[Array, " B"], Float[Array, " B"]]:
    """Draws one token a row by inverting the distribution at `spread` in [0, 1); gives it, its log-prob, what is left.

    What is left of a uniform number is uniform again and independent of the token (arithmetic decoding), so the same
    number goes on to choose the next token. The inversion goes over tiles, then in one. `bits` have been used up so
    far, -log2 P of the tokens before; `keys` make new ones in the place below a float's 24 that they leave empty.
    """
    V = logits.shape[1]
    tiled = _tiled(logits)
    mass = jax.nn.logsumexp(tiled, -1)
    fresh = jax.vmap(jax.random.uniform)(keys) * 2.0 ** (bits - 24)
    tile, left = _inverted(spread + fresh, jax.nn.softmax(mass, -1))
    inside = jnp.take_along_axis(tiled, tile[:, None, None], 1)[:, 0]
    place, left = _inverted(left, jax.nn.softmax(inside, -1))
    log_prob = jnp.take_along_axis(inside, place[:, None], 1)[:, 0] - jax.nn.logsumexp(mass, -1)
    return jnp.minimum(tile * tiled.shape[-1] + place, V - 1).astype(jnp.int32), log_prob, left


def _inverted(u: Float[Array, " B"], p: Float[Array, "B K"]) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Finds the event k with sum_{<k} p <= u < sum_{<=k} p, and u's place in it."""
    # XLA adds in blocks: these sums may rise at an event of probability 0, or fall, and end next to 1.
    upper = jnp.where(p > 0, jnp.cumsum(p, -1), 0.0)
    u = jnp.minimum(u, BELOW_ONE) * upper.max(-1)
    event = jnp.argmax(upper > u[:, None], -1)
    high, width = (jnp.take_along_axis(x, event[:, None], 1)[:, 0] for x in (upper, p))
    return event, jnp.clip((u - high + width) / width, 0.0, BELOW_ONE)


def log_prob(logits: Float[Array, "B V"], token: Int[Array, " B"]) -> Float[Array, " B"]:
    """Gives the log-probability of each row's token under softmax(logits)."""
    return jnp.take_along_axis(logits, token[:, None], 1)[:, 0] - jax.nn.logsumexp(logits, -1)


def request_keys(seed: Int[Array, ""], request: Int[Array, " B"], step: Int[Array, " B"]) -> Key[Array, " B"]:
    """Gives the key of draw `step` of `request`: a function of (seed, request, step) and of nothing else."""
    root = jax.random.key(seed)
    return jax.vmap(lambda r, t: jax.random.fold_in(jax.random.fold_in(root, r), t))(request, step)


def _ordered_bits(x: Float[Array, "B V"]) -> Int[Array, "B V"]:
    """Maps float32 to uint32 so that the order of the values is the order of the bits."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32) + 0.0, jnp.uint32)  # + 0.0 makes -0 and 0 one value
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _threshold(logits: Array, weight: Array, enough: Array) -> Array:
    """Finds the largest value of each row such that the weights of the values at or above it reach `enough`."""
    bits = _ordered_bits(logits)

    def bisect(i: Array, threshold: Array) -> Array:
        raised = threshold | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        reached = jnp.where(bits >= raised[:, None], weight, 0).sum(-1) >= enough
        return jnp.where(reached, raised, threshold)

    found = lax.fori_loop(0, 32, bisect, jnp.zeros(logits.shape[0], jnp.uint32))
    return jnp.where(bits >= found[:, None], logits, jnp.inf).min(-1)


def _top_k_threshold(logits: Array, top_k: Array) -> Array:
    return _threshold(logits, jnp.ones(logits.shape, jnp.int32), top_k)


def _top_p_threshold(logits: Array, top_p: Array) -> Array:
    return _threshold(logits, jax.nn.softmax(logits, -1), top_p)
