"""A step's rollouts as arrays: who answered what, how the rows are grouped into updates and micro-batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxopd.types import bucket

PROMPT_STEP = 16  # prompt widths are multiples of it, so that few shapes are compiled


@partial(jax.tree_util.register_dataclass, data_fields=("tokens", "mask", "start"), meta_fields=())
@dataclass(frozen=True)
class Sequences:
    """Prompt and response side by side, padded on the right.

    tokens, mask  [b, W];  start [b]: length of the prompt, the index of the response's first token
    """

    tokens: Int[Array, "b W"]
    mask: Bool[Array, "b W"]
    start: Int[Array, "b"]

    @classmethod
    def join(cls, prompts: Sequence[Sequence[int]], responses: Int[np.ndarray, "b S"], width: int) -> "Sequences":
        """Lay each response after its prompt; width is that of the widest prompt of the run."""
        b, S = responses.shape
        tokens, start = np.zeros((b, width + S), np.int32), np.array([len(p) for p in prompts], np.int32)
        mask = np.zeros((b, width + S), bool)
        for row, prompt in enumerate(prompts):
            here = slice(len(prompt), len(prompt) + S)
            tokens[row, : len(prompt)], mask[row, : len(prompt)] = prompt, True
            tokens[row, here], mask[row, here] = np.maximum(responses[row], 0), responses[row] >= 0
        return cls(tokens, mask, start)


@dataclass(frozen=True)
class Batch:
    """The rollouts of one step: B rows, grouped by prompt, G each.

    question   [B] index of the question            responses  [B, S] tokens, -1 after the end
    teacher    [B] index of the teacher             correct    [B] 1 right, 0 wrong, -1 no answer
    truncated  [B] True where the length limit, not a stop token, ended the response
    log_p      [B, S] log-probabilities as the engine that sampled them has them; None for responses from a file
    """

    question: Int[np.ndarray, "B"]
    teacher: Int[np.ndarray, "B"]
    responses: Int[np.ndarray, "B S"]
    correct: Int[np.ndarray, "B"]
    truncated: Bool[np.ndarray, "B"]
    log_p: Float[np.ndarray, "B S"] | None = None

    @property
    def mask(self) -> Bool[np.ndarray, "B S"]:
        return self.responses >= 0

    @property
    def length(self) -> Int[np.ndarray, "B"]:
        return self.mask.sum(-1)

    def updates(self, rows_per_update: int) -> list[Int[np.ndarray, "n"]]:
        """Split the rows, prompts together, into those of each optimiser update."""
        return [
            np.arange(low, min(low + rows_per_update, len(self.question)))
            for low in range(0, len(self.question), rows_per_update)
        ]

    def micro_batches(self, rows: Int[np.ndarray, "n"], size: int) -> Iterator[tuple[int, Int[np.ndarray, "size"]]]:
        """Yield (teacher, rows) of at most `size` rows with one teacher; -1 fills the last one up."""
        for teacher in np.unique(self.teacher[rows]):
            chosen = rows[self.teacher[rows] == teacher]
            for low in range(0, len(chosen), size):
                part = chosen[low : low + size]
                yield int(teacher), np.pad(part, (0, size - len(part)), constant_values=-1)


def padded(values: Float[np.ndarray, "B S"], most: int, filling: int) -> np.ndarray:
    """Widen an array over responses to one of a few lengths, at most `most`."""
    S = min(bucket(max(1, values.shape[1]), PROMPT_STEP), most)
    return np.pad(values, ((0, 0), (0, S - values.shape[1])), constant_values=filling)


def prompt_width(prompts: Sequence[Sequence[int]]) -> int:
    """Give the width that holds every prompt of a run."""
    return -(-max(map(len, prompts)) // PROMPT_STEP) * PROMPT_STEP


def taken(array: Float[np.ndarray, "B *rest"], rows: Int[np.ndarray, "b"]) -> np.ndarray:
    """Take rows, zeros where the row is -1."""
    out = np.asarray(array)[np.maximum(rows, 0)]
    return np.where((rows >= 0).reshape(-1, *(1,) * (out.ndim - 1)), out, np.zeros((), out.dtype))


def question_order(questions: int, first: int, count: int, seed: int) -> Int[np.ndarray, "count"]:
    """Give the questions number first to first + count of an endless stream of shuffled epochs."""
    stream = np.arange(first, first + count)
    epochs = {epoch: np.random.default_rng([seed, epoch]).permutation(questions) for epoch in set(stream // questions)}
    return np.array([epochs[n // questions][n % questions] for n in stream])
