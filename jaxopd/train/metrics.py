"""What is logged about student-visited states: how far the two models look at the same tokens, and agree on them.

Three definitions live in the field, and they differ; the last part of a key says whose it is. `paper`: Eq. 6 to 10 of
paper B, a mean over positions of a quantity per position, probabilities renormalised on the overlap. `thunlp`: its
authors' code, pooled over (position, token) pairs or over the positions that have an overlap, raw probabilities.
`verl`: weighted by the teacher, raw probabilities. A metric without values (no overlap anywhere) is left out.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy import stats

from jaxopd.train.supports import top_masks

POSITION_BINS = 8


@dataclass(frozen=True)
class Scored:
    """Student P and teacher Q at B x S positions of the responses of a batch; full vocabulary, nats.

    student_ids, teacher_ids  [B, S, k] their k most probable tokens
    log_p, log_q              [B, S, 2k] at [student_ids, teacher_ids]
    sampled_log_p, sampled_log_q, entropy_student, entropy_teacher, reverse_kl, mask  [B, S]
    """

    student_ids: Int[np.ndarray, "B S k"]
    teacher_ids: Int[np.ndarray, "B S k"]
    log_p: Float[np.ndarray, "B S 2k"]
    log_q: Float[np.ndarray, "B S 2k"]
    sampled_log_p: Float[np.ndarray, "B S"]
    sampled_log_q: Float[np.ndarray, "B S"]
    entropy_student: Float[np.ndarray, "B S"]
    entropy_teacher: Float[np.ndarray, "B S"]
    reverse_kl: Float[np.ndarray, "B S"]
    mask: Bool[np.ndarray, "B S"]

    @property
    def k(self) -> int:
        return self.student_ids.shape[-1]

    @property
    def reward(self) -> Float[np.ndarray, "B S"]:
        """log q - log p at the sampled token."""
        return self.sampled_log_q - self.sampled_log_p


def undefined(scored: Scored) -> dict[str, float]:
    """Name every array with a NaN at a response token: the forms would take it for an impossible token, silently."""
    arrays = {name: getattr(scored, name) for name in Scored.__dataclass_fields__ if name != "mask"}
    return {f"score/{name}": float("nan") for name, array in arrays.items() if np.isnan(array[scored.mask]).any()}


def mean_over(values: Float[Array, "*B"], mask: Bool[Array, "*B"]) -> float:
    """Average the kept entries; NaN without any."""
    kept = np.asarray(values)[np.asarray(mask, bool)]
    return float(kept.mean(dtype=np.float64)) if kept.size else float("nan")


def overlap_metrics(scored: Scored, advantage: Float[np.ndarray, "B S 2k"] | None = None) -> dict[str, float]:
    """Compute overlap ratio, overlap-token advantage and overlap mass, by every definition.

    advantage: what the training objective gives each candidate, 0 outside its support, which is what thunlp averages;
    by default that of topk_thunlp on the student's top k.
    """
    k, mask = scored.k, scored.mask
    both = np.concatenate(top_masks(scored.student_ids, scored.teacher_ids), -1) & mask[..., None]
    shared = both[..., :k]
    log_p, log_q = scored.log_p[..., :k].astype(np.float64), scored.log_q[..., :k].astype(np.float64)
    p, q = np.where(shared, np.exp(log_p), 0.0), np.where(shared, np.exp(log_q), 0.0)
    count, some = shared.sum(-1), shared.any(-1)
    inside = _renormalized_advantage(log_p, log_q, p, q, shared) / np.maximum(count, 1)
    if advantage is None:
        advantage = np.concatenate([direct_advantage(log_p, log_q), np.zeros_like(log_p)], -1)
    verl = np.where(shared, -np.exp(log_q) * (log_q - log_p), 0.0).sum(-1) / np.maximum(count, 1)
    found = {
        "overlap/ratio": mean_over(count / k, mask),
        "overlap/advantage_paper": mean_over(inside, some),
        # A shared token is a candidate twice, once in each half, and at most one of them is in the support.
        "overlap/advantage_thunlp": 2 * mean_over(advantage, both),
        "overlap/advantage_verl": mean_over(verl, some),
        "overlap/mass_student_paper": mean_over(p.sum(-1), mask),
        "overlap/mass_teacher_paper": mean_over(q.sum(-1), mask),
        "overlap/mass_student_thunlp": mean_over(p.sum(-1), some),
        "overlap/mass_teacher_thunlp": mean_over(q.sum(-1), some),
        "overlap/top_mass_student_verl": mean_over(np.exp(scored.log_p[..., k:]).sum(-1), mask),
        "overlap/top_mass_teacher_verl": mean_over(np.exp(scored.log_q[..., k:]).sum(-1), mask),
    }
    return _present(found)


def direct_advantage(log_p: Float[np.ndarray, "*B k"], log_q: Float[np.ndarray, "*B k"]) -> Float[np.ndarray, "*B k"]:
    """Compute pbar (log q - log p), pbar renormalised over the last axis: what thunlp's code trains on."""
    weight = np.exp(log_p - np.logaddexp.reduce(log_p, -1, keepdims=True))
    return weight * (log_q - log_p)


def _renormalized_advantage(log_p: np.ndarray, log_q: np.ndarray, p: np.ndarray, q: np.ndarray, kept: np.ndarray):
    """Sum over the overlap of pbar (log qbar - log pbar), which is -KL(pbar || qbar)."""
    mass_p, mass_q = (np.maximum(x.sum(-1, keepdims=True), 1e-300) for x in (p, q))
    ratio = np.where(kept, log_q - log_p, 0.0) - np.log(mass_q) + np.log(mass_p)
    return np.where(kept, p / mass_p * ratio, 0.0).sum(-1)


def largest_advantage_gap(scored: Scored, advantage: Float[np.ndarray, "B S 2k"]) -> float:
    """Average P - Q at the student's token with the largest |A| (paper B, Fig. 19, right)."""
    k = scored.k
    at = np.argmax(np.abs(advantage[..., :k]), -1)[..., None]
    gap = np.exp(scored.log_p[..., :k]) - np.exp(scored.log_q[..., :k])
    return mean_over(np.take_along_axis(gap, at, -1)[..., 0], scored.mask)


def entropy_metrics(scored: Scored) -> dict[str, float]:
    """Average both entropies; their gap per position (Eq. 8) and between the two averages."""
    student, teacher = scored.entropy_student, scored.entropy_teacher
    means = mean_over(student, scored.mask), mean_over(teacher, scored.mask)
    return _present(
        {
            "entropy/student": means[0],
            "entropy/teacher": means[1],
            "entropy/gap_paper": mean_over(np.abs(teacher - student), scored.mask),
            "entropy/gap_thunlp": abs(means[1] - means[0]),
        }
    )


def auroc(scores: Float[np.ndarray, "B"], correct: Bool[np.ndarray, "B"]) -> float:
    """Compute the chance that a correct response scores above a wrong one, ties counting half; NaN without both."""
    correct = np.asarray(correct, bool)
    n_correct, n_wrong = int(correct.sum()), int((~correct).sum())
    if not n_correct or not n_wrong:
        return float("nan")
    ranks = stats.rankdata(scores)
    return float((ranks[correct].sum() - n_correct * (n_correct + 1) / 2) / (n_correct * n_wrong))


def reward_metrics(scored: Scored, correct: Bool[np.ndarray, "B"]) -> dict[str, float]:
    """Summarise the sequence-mean reward of right and wrong responses and its AUROC (paper B, section 6.2)."""
    length = scored.mask.sum(-1)
    mean = np.where(scored.mask, scored.reward, 0.0).sum(-1) / np.maximum(length, 1)
    correct = np.asarray(correct, bool)
    return _present(
        {
            "reward/sequence_mean": mean_over(mean, length > 0),
            "reward/sequence_mean_correct": mean_over(mean, correct),
            "reward/sequence_mean_wrong": mean_over(mean, ~correct),
            "reward/auroc": auroc(mean, correct),
        }
    )


def engine_mismatch(scored: Scored, log_p: Float[np.ndarray, "B S"]) -> dict[str, float]:
    """Compare the log-probs of the sampled tokens with those of the engine that drew them: mean and largest |gap|."""
    gap = np.where(scored.mask, np.abs(scored.sampled_log_p - log_p), 0.0)
    return {"rollout/mismatch_mean": mean_over(gap, scored.mask), "rollout/mismatch_max": float(gap.max(initial=0.0))}


def auroc_by_position(
    scored: Scored, correct: Bool[np.ndarray, "B"], starts: list[float], width: int
) -> list[float | None]:
    """Compute the AUROC of the mean reward inside each window, among the responses that reach it; None without both."""
    found = []
    for low in map(int, starts):
        inside = scored.mask[:, low : low + width]
        reach = inside.any(-1)
        mean = np.where(inside, scored.reward[:, low : low + width], 0.0).sum(-1) / np.maximum(inside.sum(-1), 1)
        value = auroc(mean[reach], np.asarray(correct, bool)[reach])
        found.append(value if np.isfinite(value) else None)
    return found


def by_position(
    scored: Scored, correct: Bool[np.ndarray, "B"], width: int | None = None
) -> dict[str, list[float | None]]:
    """Average entropy, overlap and reward in windows of positions (default: eighths of S).

    And how well the reward of each window tells right from wrong responses.
    """
    S = scored.mask.shape[1]
    width = width or max(1, -(-S // POSITION_BINS))
    shared = np.asarray(top_masks(scored.student_ids, scored.teacher_ids)[0]).sum(-1) / scored.k
    values = {
        "entropy_student": scored.entropy_student,
        "entropy_teacher": scored.entropy_teacher,
        "overlap": shared,
        "reward": scored.reward,
        "reverse_kl": scored.reverse_kl,
    }
    starts = [low for low in range(0, S, width) if scored.mask[:, low : low + width].any()]
    found: dict[str, list[float | None]] = {"position/start": [float(low) for low in starts]}
    found["position/auroc"] = auroc_by_position(scored, correct, found["position/start"], width)
    return found | {
        f"position/{name}": [mean_over(x[:, low : low + width], scored.mask[:, low : low + width]) for low in starts]
        for name, x in values.items()
    }


def _present(found: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in found.items() if np.isfinite(value)}
