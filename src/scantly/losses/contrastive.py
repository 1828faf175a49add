"""Contrastive losses on vectors, whatever they stand for: voxels, crops, patches, images.

Similarities are cosines, norms floored at 1e-8; all is computed in float32, autocast or not (float64 stays).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "cosine_similarities",
    "info_nce",
    "label_propagation",
    "nearest_neighbor_loss",
    "sampled_similarities",
    "similarity_divergence",
    "unit",
]

NORM_FLOOR = 1e-8
#: Numbers gathered at once. A GPU wants large blocks; fresh memory costs a CPU more than the reading.
_CPU_BLOCK, _BLOCK = 2**20, 2**25


def unit(vectors: Tensor, *, in_place: bool = False) -> Tensor:
    """Vectors divided by their norm (at least 1e-8), ``(..., D)``; float32, or float64 if they are.

    Args:
        vectors: ``(..., D)``.
        in_place: Overwrite them, where they take no gradient and have the result's precision.
    """
    vectors = vectors if vectors.dtype == torch.float64 else vectors.float()
    return F.normalize(vectors, dim=-1, eps=NORM_FLOOR, out=vectors if in_place else None)


def cosine_similarities(vectors: Tensor, units: Tensor) -> Tensor:
    """Cosine of each vector with each of a set of unit vectors.

    Args:
        vectors: ``(..., n, D)``, of any norm.
        units: ``(..., m, D)``, as :func:`unit` gives them.

    Returns:
        ``(..., n, m)`` in [-1, 1].

    Example:
        >>> keys = unit(torch.tensor([[1.0, 1.0], [0.0, 1.0], [-1.0, 0.0]]))
        >>> cosine_similarities(torch.tensor([[2.0, 0.0]]), keys)
        tensor([[ 0.7071,  0.0000, -1.0000]])
    """
    with torch.autocast(vectors.device.type, enabled=False):
        return unit(vectors) @ units.transpose(-1, -2)


def sampled_similarities(vectors: Tensor, units: Tensor, index: Tensor) -> Tensor:
    """Cosine of each vector with rows of its own, drawn from a table of unit vectors.

    The rows are gathered block by block, in the backward pass again, so ``(n, m, D)`` numbers are never held.

    Args:
        vectors: ``(n, D)``, of any norm.
        units: ``(N, D)``, as :func:`unit` gives them; takes no gradient.
        index: Rows for each vector, ``(n, m)`` int64.

    Returns:
        ``(n, m)`` in [-1, 1].

    Example:
        >>> table = unit(torch.tensor([[1.0, 1.0], [0.0, 1.0], [-1.0, 0.0]]))
        >>> sampled_similarities(torch.tensor([[2.0, 0.0]]), table, torch.tensor([[0, 2]]))
        tensor([[ 0.7071, -1.0000]])
    """
    similarities: Tensor = _Sampled.apply(unit(vectors), units, index)  # type: ignore[no-untyped-call]
    return similarities


class _Sampled(torch.autograd.Function):
    """Products of vectors ``(n, D)`` with rows ``index`` ``(n, m)`` of a table ``(N, D)``."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, table: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(table, index)
        return torch.cat(
            [(block[:, None] @ rows.transpose(1, 2))[:, 0] for block, rows in _gathered(vectors, table, index)]
        )

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        table, index = ctx.saved_tensors
        return (
            torch.cat([(block[:, None] @ rows)[:, 0] for block, rows in _gathered(gradient, table, index)]),
            None,
            None,
        )


def _gathered(values: Tensor, table: Tensor, index: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of ``values`` with their rows of the table, ``(block, m, D)``."""
    size = _CPU_BLOCK if values.device.type == "cpu" else _BLOCK
    block = max(1, size // (index.shape[1] * table.shape[1]))
    with torch.autocast(values.device.type, enabled=False):
        for part, places in zip(torch.split(values, block), torch.split(index, block), strict=True):
            yield part, table.index_select(0, places.flatten()).view(*places.shape, -1)


def info_nce(positive: Tensor, negatives: Tensor, *, temperature: float) -> Tensor:
    """``-log(e^(s+/t) / (e^(s+/t) + sum_j e^(s-_j/t)))``, the mean over anchors (InfoNCE).

    Van den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018, equation 4.

    Args:
        positive: Similarity of each anchor with its positive, ``(n,)``.
        negatives: Similarities with its negatives, ``(n, m)``.
        temperature: ``t``, above 0.

    Returns:
        Scalar, at least 0; ``ln(1 + m)`` where all similarities are equal.

    Example:
        >>> info_nce(torch.tensor([0.70711]), torch.tensor([[0.0, -1.0]]), temperature=0.5)
        tensor(0.2437)
    """
    logits = torch.cat([positive[:, None], negatives], dim=1) / temperature
    return (logits.logsumexp(1) - logits[:, 0]).mean()


def similarity_divergence(
    student: Tensor,
    teacher: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """Kullback-Leibler divergence of the student's similarity distribution from the teacher's.

    Relational distillation (Tejankar et al., "ISD: Self-Supervised Learning by Iterative Similarity Distillation",
    ICCV 2021): both compare their view of one image with the same K stored vectors; ``sum_k Pt (log Pt - log Ps)``
    with ``P = softmax(similarity / temperature)``.

    Args:
        student: Similarities ``(..., K)``.
        teacher: Similarities ``(..., K)``; takes no gradient.
        student_temperature: Above 0.
        teacher_temperature: Above 0; smaller than the student's makes the target sharper.

    Returns:
        Mean over all leading axes, in nats, at least 0; 0 where the similarities over temperatures are equal.
    """
    log_student = (student / student_temperature).log_softmax(-1)
    log_teacher = (teacher.detach() / teacher_temperature).log_softmax(-1)
    return (log_teacher.exp() * (log_teacher - log_student)).sum(-1).mean()


def nearest_neighbor_loss(student: Tensor, teacher: Tensor, pool: Tensor, *, neighbors: int) -> Tensor:
    """Mean squared distance of the student's unit vectors to the teacher's nearest neighbors in a pool.

    You et al., "Rethinking Semi-Supervised Medical Image Segmentation", NeurIPS 2023 (there after MONA). The teacher's
    vector chooses the neighbors, the distance is the student's. The published code takes them the other way round,
    and then no gradient is left, since the teacher has none.

    Args:
        student: ``(B, F)``, of any norm.
        teacher: ``(B, F)``, of any norm; takes no gradient.
        pool: Stored unit vectors, ``(K, F)``; takes no gradient.
        neighbors: How many, at most K.

    Returns:
        ``mean_b mean_k (2 - 2 z_b q_k)``, in [0, 4].
    """
    nearest = cosine_similarities(teacher.detach(), pool).topk(neighbors, dim=1).indices
    return (2 - 2 * cosine_similarities(student, pool).gather(1, nearest)).mean()


def label_propagation(
    anchors: Tensor,
    candidates: Tensor,
    used: Tensor,
    *,
    positives: int,
    negatives: int,
    temperature: float,
    level: Literal["class", "anchor"] = "class",
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pull the unlabeled voxels most similar to a class's labeled ones to them, push the least similar ones away.

    Inter-sample contrast of X. Guo et al., "Diff-CL: A Novel Cross Pseudo-Supervision Method for Semi-supervised
    Medical Image Segmentation", arXiv 2503.09408, 2025. That pairs are chosen by cosine distance to features of
    labeled voxels, class by class, is from the paper; the form, InfoNCE of every positive against all negatives, is
    our choice:

        mean over classes, anchors a, positives p of -log(e^(a p / t) / (e^(a p / t) + sum_n e^(a n / t)))

    Args:
        anchors: Unit features of labeled voxels, ``(G, n_a, D)``, no gradient.
        candidates: Unit features of unlabeled voxels, ``(n_b, D)``.
        used: Which classes count, ``(G,)`` bool.
        positives: The so many most similar candidates; with ``negatives`` at most n_b.
        negatives: The so many least similar ones.
        temperature: ``t``, above 0.
        level: ``class``: candidates are ranked by the mean similarity to the class's anchors; ``anchor``: by each
            anchor on its own. The ranking takes no gradient.
        allowed: Which candidates may be a class's negatives, ``(G, n_b)`` bool; a class with fewer than ``negatives``
            of them has all, one without any does not count. ``None``: all.

    Returns:
        The loss, a scalar, 0 where no class counts; and, for the log, the mean similarity of anchors with positives
        and with negatives over the classes that count, without gradient.

    Example:
        >>> labeled = torch.tensor([[[1.0, 0.0], [0.8, 0.6]]])
        >>> voxels = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-1.0, 0.0]])
        >>> label_propagation(labeled, voxels, torch.tensor([True]), positives=1, negatives=2, temperature=0.1)[0]
        tensor(0.0635)
    """
    similarities = cosine_similarities(anchors, candidates)
    order = similarities.detach().mean(1, keepdim=True) if level == "class" else similarities.detach()
    nearest = order.topk(positives, dim=2).indices
    if allowed is not None:  # those that may not be negatives come last, and are left out where they are reached
        order = order.masked_fill(~allowed[:, None], torch.inf)
        used = used & allowed.any(1)
    limits, farthest = order.topk(negatives, dim=2, largest=False)
    near, far = (similarities.gather(2, index.expand(-1, similarities.shape[1], -1)) for index in (nearest, farthest))
    counts = limits.isfinite().expand_as(far)
    # A finite floor: a class without any negative has a finite gradient too, which the shares make 0.
    floor = torch.finfo(far.dtype).min
    against = (far / temperature).masked_fill(~counts, floor).logsumexp(2, keepdim=True)
    per_class = F.softplus(against - near / temperature).mean((1, 2))
    shares = used.to(per_class.dtype) / used.sum().clamp(min=1)
    with torch.no_grad():
        similar = near.mean((1, 2))
        different = (far * counts).sum((1, 2)) / counts.sum((1, 2)).clamp(min=1)
        watched = [(values * shares).sum() for values in (similar, different)]
    return (per_class * shares).sum(), watched[0], watched[1]
