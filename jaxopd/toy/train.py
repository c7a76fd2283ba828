"""Trains the six toy models; `train_all` makes the folders that ship in jaxopd/toy/models."""

import itertools
import math
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxopd.errors import InputError
from jaxopd.models import Qwen, QwenConfig, init_model, linear, save_model
from jaxopd.toy import corpus
from jaxopd.toy.corpus import ROLES, Role
from jaxopd.toy.tokenizer import ID, WORDS, save_tokenizer

ROWS, WIDTH, BLOCK = 11, 224, 56
WARM_UP = 100
Report = Callable[[str], None]


def config_of(role: Role) -> QwenConfig:
    """The Qwen3 configuration of a role."""
    return QwenConfig(
        vocab_size=len(WORDS),
        hidden_size=role.width,
        intermediate_size=3 * role.width,
        num_layers=role.layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rope_theta=1e6,
        max_positions=512,
        initializer_range=0.06,
        eos_token_ids=(ID["<|im_end|>"],),
    )


def initial_model(role: Role, seed: int) -> Qwen:
    """Random weights, but for one induction head: layer 0 looks at the previous token, layer 1 matches and copies.

    Every solution looks words up ("red" in the facts, "four" among the options). From random weights these small
    models learn it for some words, late, or never; with a head that already does it, at once.
    """
    model = init_model(config_of(role), seed=seed)
    config, scale = model.config, model.config.initializer_range
    width, h = config.hidden_size, config.head_dim
    # Orthonormal directions; the first is shared by all embeddings, so that a head's query can be constant.
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))[0].T
    shared, name, position, copied = basis[0], basis[1:11], basis[11:21], basis[21 : 21 + h]
    model.embed_tokens.weight[...] += jnp.asarray(scale * np.sqrt(width) * shared, jnp.float32)[None]
    for layer in model.layers:
        layer.self_attn.o_proj.weight[...] *= 0.1
        layer.mlp.down_proj.weight[...] *= 0.1
    fast, slow = _rotary_directions(config)
    previous, match = model.layers[0].self_attn, model.layers[1].self_attn
    for attention, q, k, v, o in (
        (previous, fast[0][:, None] * shared, fast[1][:, None] * shared, _rows(name, h), _rows(position, h)),
        (match, slow @ name, slow @ position, copied, copied),
    ):
        for projection, rows in ((attention.q_proj, q), (attention.k_proj, k), (attention.v_proj, v)):
            projection.weight[...] = projection.weight[...].at[:h].set(jnp.asarray(rows, jnp.float32))
        out = attention.o_proj.weight
        out[...] = out[...].at[:, :h].set(jnp.asarray(2 * scale * o.T, jnp.float32))
        attention.q_norm.weight[...] *= 2.0
        attention.k_norm.weight[...] *= 2.0
    return model


def _rows(matrix: np.ndarray, count: int) -> np.ndarray:
    return np.pad(matrix, ((0, count - len(matrix)), (0, 0)))


def _rotary_directions(config: QwenConfig) -> tuple[np.ndarray, np.ndarray]:
    """A query and a key [2, h] whose rotary phases agree at distance 1; the dimensions [h, 10] that barely rotate."""
    half = config.head_dim // 2
    frequency, energy = config.inverse_frequencies()[0], np.zeros(half)
    energy[:2] = 0.55, 0.45
    amplitude = np.sqrt(energy)
    query = np.concatenate([amplitude, np.zeros(half)])
    key = np.concatenate([amplitude * np.cos(frequency), amplitude * np.sin(frequency)])
    still = [index for index in range(config.head_dim) if index % half >= 3]
    return np.stack([query, key]), np.eye(config.head_dim)[:, still]


def batches(role: Role, mix: dict[str, float], recall_steps: int, rng: random.Random) -> Iterator[corpus.Batch]:
    """Endless packed batches of a role's corpus; for `recall_steps` half of the rows are dictionary recall."""
    kinds, shares = list(mix), list(mix.values())

    def examples() -> Iterator[tuple[list[int], list[float]]]:
        while True:
            yield corpus.training_tokens(corpus.example(rng.choices(kinds, shares)[0], role, rng))

    def dictionaries() -> Iterator[tuple[list[int], list[float]]]:
        while True:
            yield corpus.recall(rng)

    half = ROWS // 2
    pairs = zip(corpus.packed_rows(examples(), ROWS - half, WIDTH), corpus.packed_rows(dictionaries(), half, WIDTH))
    for _, (text, recall) in zip(range(recall_steps), pairs):
        yield tuple(np.concatenate(parts) for parts in zip(text, recall))
    yield from corpus.packed_rows(examples(), ROWS, WIDTH)


def packed_loss(
    model: Qwen, tokens: Int[Array, "B T"], weights: Float[Array, "B T"], segments: Int[Array, "B T"]
) -> Float[Array, ""]:
    """Weighted mean of -log p(token | earlier tokens of its segment), in nats."""
    T = tokens.shape[1]
    same = (segments[:, :, None] == segments[:, None, :]) & jnp.tri(T, dtype=bool)[None]
    # Rotary positions are relative, so segments need not start at 0.
    positions = jnp.broadcast_to(jnp.arange(T)[None, :], tokens.shape)
    hidden = model(tokens, positions, lambda _, q, k, v: blocked_attention(q, k, v, same))
    logits_BTV = linear(hidden[:, :-1], model.head(), jnp.dtype("float32"))
    nll_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, tokens[:, 1:])
    return (nll_BT * weights[:, 1:]).sum() / weights.sum()


def blocked_attention(
    q: Float[Array, "B T H h"], k: Float[Array, "B T K h"], v: Float[Array, "B T K h"], mask: Bool[Array, "B T T"]
) -> Float[Array, "B T H h"]:
    """Causal attention under a mask, `BLOCK` queries at a time over the keys up to them.

    Half the scores of the whole square, in pieces that fit a core's cache: a training step takes half the time.
    """
    ends = range(BLOCK, q.shape[1] + BLOCK, BLOCK)
    blocks = [
        jax.nn.dot_product_attention(
            q[:, end - BLOCK : end], k[:, :end], v[:, :end], mask=mask[:, None, end - BLOCK : end, :end]
        )
        for end in ends
    ]
    return jnp.concatenate(blocks, 1)


def optimiser(peak: float, steps: int) -> optax.GradientTransformation:
    """AdamW with beta2 .98, decay .05 on matrices, clipping at 1, warm-up and cosine."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, min(WARM_UP, steps // 4), steps, 0.01 * peak)
    adamw = optax.adamw(schedule, b2=0.98, weight_decay=0.05, mask=partial(jax.tree.map, lambda x: x.ndim == 2))
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def train_role(name: str, *, seed: int = 0, scale: float = 1.0, report: Report = print) -> Qwen:
    """Train one role's model in float32; `scale` multiplies the number of steps.

    Two phases, each with a fresh optimiser; the second has no dictionaries and more plain questions.
    """
    role, rng, start = ROLES[name], random.Random(f"{name} {seed}"), time.perf_counter()
    graph, state = nnx.split(initial_model(role, seed))
    for phase, (steps, peak, mix) in enumerate(zip(role.steps, role.peaks, role.mixes, strict=True)):
        steps = math.ceil(steps * scale)
        stream = batches(role, mix, 0 if phase else int(role.recall_share * steps), rng)
        losses: list[Array] = []
        for stepped, loss in descend(graph, state, optimiser(peak, steps), itertools.islice(stream, steps)):
            state = stepped
            losses.append(loss)
            if len(losses) % 200 == 0 or len(losses) == steps:
                mean, seconds = float(np.mean([*map(float, losses[-100:])])), time.perf_counter() - start
                report(f"{name} phase {phase + 1} step {len(losses)}/{steps} loss {mean:.4f} {seconds:.0f} s")
    return nnx.merge(graph, state)


def descend(
    graph: nnx.GraphDef, state: nnx.State, transform: optax.GradientTransformation, stream: Iterator[corpus.Batch]
) -> Iterator[tuple[nnx.State, Array]]:
    """Yield the parameters after each batch and the loss before it."""

    @jax.jit
    def step(state, opt_state, batch):
        loss, grads = jax.value_and_grad(lambda s: packed_loss(nnx.merge(graph, s), *batch))(state)
        updates, opt_state = transform.update(grads, opt_state, state)
        return optax.apply_updates(state, updates), opt_state, loss

    opt_state = transform.init(state)
    for batch in stream:
        state, opt_state, loss = step(state, opt_state, batch)
        yield state, loss


def save_role(name: str, folder: str | Path, *, seed: int = 0, scale: float = 1.0, report: Report = print) -> None:
    """Train one role and write its Hugging Face folder, weights in bfloat16."""
    graph, state = nnx.split(train_role(name, seed=seed, scale=scale, report=report))
    model = nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state))
    save_model(model, Path(folder) / name)
    save_tokenizer(Path(folder) / name)


def train_all(
    out_dir: str | Path, *, roles: Sequence[str] = tuple(ROLES), seed: int = 0, scale: float = 1.0, processes: int = 2
) -> None:
    """Train the roles into `out_dir`/S, /M, ...: single-thread processes side by side, the largest roles first.

    Two processes of one thread each are faster than one of two: the matrices are too small to share.

    Raises:
        InputError: an unknown role.
    """
    unknown = [name for name in roles if name not in ROLES]
    if unknown:
        raise InputError(f"role: found {unknown[0]!r}, expected one of {', '.join(ROLES)}")
    ordered = sorted(roles, key=lambda name: -ROLES[name].width)
    context = multiprocessing.get_context("spawn")
    counter = context.Value("i", 0)
    with ProcessPoolExecutor(processes, context, _use_one_core, (counter,)) as pool:
        jobs = [pool.submit(save_role, name, out_dir, seed=seed, scale=scale, report=_report) for name in ordered]
        for job in jobs:
            job.result()


def _use_one_core(counter) -> None:
    """Pin a worker before its first computation, when XLA sizes its thread pool."""
    with counter.get_lock():
        index, counter.value = counter.value, counter.value + 1
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    jax.config.update("jax_platforms", "cpu")
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[index % len(cores)]})


def _report(line: str) -> None:
    print(line, flush=True)
