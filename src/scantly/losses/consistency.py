"""Losses between a network's prediction and another prediction of the same voxels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from scantly.ranks import mean_over_ranks, rows_of_all_ranks, sum_over_ranks

__all__ = [
    "IGNORED",
    "confident_cross_entropy",
    "entropy",
    "masked_cross_entropy",
    "masked_divergence",
    "masked_quantiles",
    "mutual_consistency",
    "pyramid_consistency",
    "sharpened",
]

#: Label of voxels that count nowhere.
IGNORED = -1


def entropy(probs: Tensor, *, epsilon: float = 1e-10) -> Tensor:
    """``-sum_c p log(p + epsilon)`` in nats, ``(B, C, *spatial)`` probabilities -> ``(B, *spatial)``.

    Example:
        >>> entropy(torch.tensor([[[0.9, 0.5], [0.1, 0.5]]]))
        tensor([[0.3251, 0.6931]])
    """
    probs = probs.float()
    return -(probs * (probs + epsilon).log()).sum(1)


def confident_cross_entropy(
    logits: Tensor, pseudo_labels: Tensor, confidence: Tensor, *, threshold: float
) -> tuple[Tensor, Tensor]:
    """Cross-entropy with pseudo-labels, each image weighted by its share of confident voxels.

    You et al., NeurIPS 2023 (ARCO), after U2PL (Wang et al., CVPR 2022): the mean over the batch's voxels whose
    cross-entropy is above 0 of ``w_b CE``. Voxels of images without any confident voxel count in the divisor;
    voxels that are fitted exactly and ignored ones do not. The batch is that of all ranks.

    Args:
        logits: ``(B, C, *spatial)``.
        pseudo_labels: ``(B, *spatial)``, integers in ``[0, C)``, or :data:`IGNORED`.
        confidence: Probability of each pseudo-label, ``(B, *spatial)``; 0 where ignored.
        threshold: From which a voxel is confident, in [0, 1].

    Returns:
        The loss, a scalar (0 where no voxel is confident), and the weights ``w``, ``(B,)`` in [0, 1].
    """
    counts = (pseudo_labels != IGNORED).flatten(1).sum(1)
    weights = (confidence >= threshold).flatten(1).sum(1) / counts.clamp(min=1)
    per_voxel = F.cross_entropy(logits.float(), pseudo_labels, ignore_index=IGNORED, reduction="none").flatten(1)
    total = sum_over_ranks((weights * per_voxel.sum(1)).sum())
    return total / sum_over_ranks((per_voxel.detach() > 0).sum()).clamp(min=1), weights


def masked_cross_entropy(
    logits: Tensor, targets: Tensor, mask: Tensor, *, normalize: Literal["all", "masked"] = "all"
) -> Tensor:
    """Cross-entropy with pseudo-labels over trusted voxels alone.

    ``sum_v m_v CE_v / Z``; Sohn et al., "FixMatch: Simplifying Semi-Supervised Learning with Consistency and
    Confidence", NeurIPS 2020, equation 4, voxel by voxel.

    Args:
        logits: ``(B, C, *spatial)``.
        targets: Pseudo-labels ``(B, *spatial)``, integers in ``[0, C)``, or probabilities ``(B, C, *spatial)``.
        mask: Which voxels are trusted, ``(B, *spatial)``, bool.
        normalize: ``all``: Z is the number of voxels (FixMatch); ``masked``: of the trusted ones, on all ranks.

    Returns:
        Scalar; 0, and no gradient, where no voxel is trusted. Float32 (float64 logits: float64).

    Example:
        >>> logits = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 0.0, 3.0]]])
        >>> mask = torch.tensor([[True, False, True]])
        >>> masked_cross_entropy(logits, torch.tensor([[0, 0, 1]]), mask)
        tensor(0.0585)
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    targets = targets.to(logits.dtype) if targets.is_floating_point() else targets
    per_voxel = F.cross_entropy(logits, targets, reduction="none")
    total = (per_voxel * mask).sum()
    if normalize == "all":
        return total / per_voxel.numel()
    return sum_over_ranks(total) / (sum_over_ranks(mask.sum()) + 1e-12)


def masked_divergence(logits: Tensor, target_logits: Tensor, mask: Tensor) -> Tensor:
    """Kullback-Leibler divergence of a prediction from a target, over the voxels of a soft mask.

    Equivariance term of MONA (You et al., "Mine Your Own Anatomy", 2022): per image
    ``sum_i m_i KL(softmax(target) || softmax(logits))_i / (sum_i m_i + 1e-7)``, then the mean over images.

    Args:
        logits: ``(B, C, *spatial)``.
        target_logits: ``(B, C, *spatial)``; takes no gradient.
        mask: ``(B, *spatial)``, in [0, 1].

    Returns:
        Scalar in nats, at least 0; an image with an empty mask costs 0.
    """
    log_probs = logits.float().log_softmax(1)
    log_target = target_logits.detach().float().log_softmax(1)
    divergence = (log_target.exp() * (log_target - log_probs)).sum(1)
    mask = mask.float()
    return ((mask * divergence).flatten(1).sum(1) / (mask.flatten(1).sum(1) + 1e-7)).mean()


def masked_quantiles(values: Tensor, mask: Tensor, shares: tuple[float, ...]) -> Tensor:
    """Quantiles of the values under a mask, on all ranks together, without a gradient or waiting for the device.

    Args:
        values: Any shape, finite.
        mask: Same shape, bool; which of them count.
        shares: Each in [0, 1].

    Returns:
        One value per share, linear between order statistics as NumPy's; infinite where the mask is empty.

    Example:
        >>> values = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 9.0])
        >>> masked_quantiles(values, values < 1, (0.2, 0.8))
        tensor([0.1800, 0.4200])
    """
    ordered = rows_of_all_ranks(torch.where(mask, values, torch.inf).flatten()).sort().values
    count = sum_over_ranks(mask.sum())
    last = (count - 1).clamp(min=0)
    # float64: with float32 the position is exact only below 2**24 values.
    positions = torch.stack([last.double() * share for share in shares])
    below = positions.floor()
    lower, upper = ordered[below.long()], ordered[torch.minimum(below.long() + 1, last)]
    found = torch.lerp(lower, upper, (positions - below).to(values.dtype))
    return torch.where(count > 0, found, torch.inf)


def sharpened(logits: Tensor, temperature: float, *, normalized: bool = False) -> Tensor:
    """Probabilities pushed towards 0 and 1, ``(B, C, *spatial)`` logits -> same shape.

    ``p^(1/T) / (p^(1/T) + (1 - p)^(1/T))``, each class against all others (Wu et al., "Semi-supervised Left Atrium
    Segmentation with Mutual Consistency Training", MICCAI 2021, equation 1). For more than two classes this does not
    sum to 1, and a voxel without a class above 1/2 goes to 0 in all.

    Args:
        logits: ``(B, C, *spatial)``.
        temperature: T in (0, 1]; 1 changes nothing.
        normalized: ``p^(1/T) / sum_c p^(1/T)`` instead, which does sum to 1.

    Example:
        >>> p = torch.tensor([0.55, 0.6, 0.7])
        >>> sharpened(torch.stack([p, 1 - p]).log()[None], 0.1)[0, 0]
        tensor([0.8815, 0.9830, 0.9998])
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if normalized:
        return (logits / temperature).softmax(1)
    # p^10 underflows; the odds do not.
    log_probs = logits.log_softmax(1)
    others = torch.log1p(-log_probs.exp().clamp(max=1 - torch.finfo(log_probs.dtype).eps))
    return torch.sigmoid((log_probs - others) / temperature)


def mutual_consistency(
    logits: Sequence[Tensor], *, temperature: float, normalized: bool = False, detached: bool = False
) -> Tensor:
    """Every prediction must match the sharpened one of every other.

    Wu et al., MICCAI 2021 and Medical Image Analysis 2022 (MC-Net and MC-Net+): the sum over ordered pairs of the mean
    over batch, classes and voxels of ``(p_i - sharpened(p_j))^2``.

    Args:
        logits: Of each decoder, ``(B, C, *spatial)``, two or more.
        temperature: Of the sharpening.
        normalized: See :func:`sharpened`.
        detached: Sharpened predictions take no gradient.
    """
    probs = [each.float().softmax(1) for each in logits]
    targets = [sharpened(each, temperature, normalized=normalized) for each in logits]
    targets = [target.detach() for target in targets] if detached else targets
    pairs = [(i, j) for i in range(len(probs)) for j in range(len(probs)) if i != j]
    return torch.stack([(probs[i] - targets[j]).square().mean() for i, j in pairs]).sum()


def pyramid_consistency(logits: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Predictions at several scales must match their mean, less where they diverge from it.

    Luo et al., "Efficient Semi-supervised Gross Target Volume of Nasopharyngeal Carcinoma Segmentation via Uncertainty
    Rectified Pyramid Consistency", MICCAI 2021 (URPC), public code: with ``D_s = KL(mean || p_s)`` and ``w_s =
    exp(-D_s)`` per voxel, the mean over scales of ``mean((mean - p_s)^2 w_s) / (mean(w_s) + 1e-8) + mean(D_s)``. All of
    it takes gradients, and means are those of all ranks' voxels. The paper's formula is usually quoted with the
    divergence the other way round.

    Args:
        logits: Of each scale, all of one size, ``(B, C, *spatial)``.

    Returns:
        The loss and the mean divergence in nats, scalars.
    """
    log_probs = [each.float().log_softmax(1) for each in logits]
    probs = [each.exp() for each in log_probs]
    mean = torch.stack(probs).mean(0)
    log_mean = mean.clamp(min=1e-8).log()
    losses, divergences = [], []
    for p, log_p in zip(probs, log_probs, strict=True):
        divergence = (mean * (log_mean - log_p)).sum(1, keepdim=True)
        weight = torch.exp(-divergence)
        rectified = mean_over_ranks(((mean - p).square() * weight).mean())
        rectified = rectified / (mean_over_ranks(weight.mean()) + 1e-8)
        losses.append(rectified + divergence.mean())
        divergences.append(divergence.mean())
    return torch.stack(losses).mean(), torch.stack(divergences).mean()
