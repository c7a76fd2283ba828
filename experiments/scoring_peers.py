"""What people score and train with today, on the same arrays: torch in chunks of rows, and Liger where it is installed.

Import it only where torch is. Logits come out of the matrix product in the inputs' dtype and are then made float32, as
trainers do. Every peer waits for its device before it returns.
"""

import math
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import torch
from torch import Tensor
from torch.nn.functional import log_softmax


class TorchModels:
    """Student and teacher arrays shared with JAX without a copy; `rows` at a time go through the heads."""

    def __init__(self, arrays: tuple[jax.Array, ...], ids: jax.Array, weights: jax.Array, rows: int):
        torch.set_num_threads(len(os.sched_getaffinity(0)))  # as many as JAX uses
        self.arrays = tuple(torch.from_dlpack(x) for x in arrays)
        self.ids, self.weights = torch.from_dlpack(ids).long(), torch.from_dlpack(weights)
        self.chunks = [slice(start, start + rows) for start in range(0, len(ids), rows)]

    def log_probabilities(self, chunk: slice) -> list[Tensor]:
        """Gives log P and, where there is a teacher, log Q of a chunk [rows, V] in float32."""
        pairs = zip(self.arrays[::2], self.arrays[1::2])
        return [log_softmax((hidden[chunk] @ head.T).float(), -1) for hidden, head in pairs]


def _finished(results: Any) -> Any:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return results


def _by_chunks(models: TorchModels, statistics: Callable[[slice], dict[str, Tensor]]) -> Callable[[], SimpleNamespace]:
    @torch.no_grad()
    def run() -> SimpleNamespace:
        parts = [statistics(chunk) for chunk in models.chunks]
        return _finished(SimpleNamespace(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]}))

    return run


def pair_kl(models: TorchModels) -> Callable[[], SimpleNamespace]:
    """Computes the reverse KL alone, the least anybody needs."""

    def statistics(chunk: slice) -> dict[str, Tensor]:
        log_p, log_q = models.log_probabilities(chunk)
        return {"reverse_kl": (log_p.exp() * (log_p - log_q)).sum(-1)}

    return _by_chunks(models, statistics)


def pair_statistics(models: TorchModels) -> Callable[[], SimpleNamespace]:
    """Computes what jaxopd_kernels.PairStatistics holds, forms aside, by the definitions."""

    def statistics(chunk: slice) -> dict[str, Tensor]:
        log_p, log_q = models.log_probabilities(chunk)
        p, q, f = log_p.exp(), log_q.exp(), log_q - log_p
        fbar = (p * f).sum(-1, keepdim=True)
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        gathered = [x.gather(-1, models.ids[chunk]) for x in (log_p, log_q)]
        return {
            "entropy_student": -(p * log_p).sum(-1),
            "entropy_teacher": -(q * log_q).sum(-1),
            "reverse_kl": -fbar[:, 0],
            "forward_kl": (q * f).sum(-1),
            "js": (p * (log_p - log_m) + q * (log_q - log_m)).sum(-1) / 2,
            "total_variation": (p - q).abs().sum(-1) / 2,
            "l2": (p - q).norm(dim=-1),
            "cosine": torch.cosine_similarity(p, q, dim=-1),
            "variance": (p * (f - fbar) ** 2).sum(-1),
            "gradient_norm": (p * (f - fbar)).norm(dim=-1),
            "log_p": gathered[0],
            "log_q": gathered[1],
        }

    return _by_chunks(models, statistics)


def head_statistics(models: TorchModels, k: int) -> Callable[[], SimpleNamespace]:
    """Computes what jaxopd_kernels.HeadStatistics holds: entropy, top k, log P at ids."""

    def statistics(chunk: slice) -> dict[str, Tensor]:
        log_p = models.log_probabilities(chunk)[0]
        top = log_p.topk(k, -1)
        gathered = log_p.gather(-1, models.ids[chunk])
        return {
            "entropy": -(log_p.exp() * log_p).sum(-1),
            "top_log_p": top.values,
            "top_ids": top.indices,
            "log_p": gathered,
        }

    return _by_chunks(models, statistics)


def reverse_kl_gradients(models: TorchModels) -> Callable[[], tuple[Tensor, Tensor]]:
    """Computes gradients of the weighted reverse KL in the student's hidden states and head, chunk by chunk."""
    hidden, head = (x.detach().clone().requires_grad_() for x in models.arrays[:2])
    teacher_hidden, teacher_head = models.arrays[2:]

    def run() -> tuple[Tensor, Tensor]:
        hidden.grad = head.grad = None
        for chunk in models.chunks:
            log_p = log_softmax((hidden[chunk] @ head.T).float(), -1)
            with torch.no_grad():
                log_q = log_softmax((teacher_hidden[chunk] @ teacher_head.T).float(), -1)
            ((log_p.exp() * (log_p - log_q)).sum(-1) @ models.weights[chunk]).backward()
        return _finished((hidden.grad, head.grad))

    return run


def liger_gradients(models: TorchModels) -> Callable[[], tuple[Tensor, Tensor]]:
    """Computes the same with Liger's fused linear JSD at beta 1, its reverse KL, averaged over the rows."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=1.0)
    hidden, head = (x.detach().clone().requires_grad_() for x in models.arrays[:2])
    teacher_hidden, teacher_head = models.arrays[2:]

    def run() -> tuple[Tensor, Tensor]:
        hidden.grad = head.grad = None
        loss(hidden, head, teacher_hidden, teacher_head).backward()
        return _finished((hidden.grad, head.grad))

    return run
