"""Overlap losses: cross-entropy and soft Dice."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from scantly.ranks import sums_over_ranks

__all__ = ["cross_entropy", "cross_entropy_dice", "soft_dice", "soft_dice_per_image", "weighted_cross_entropy"]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over all voxels of ``-log softmax(logits)[label]``, natural logarithm.

    Args:
        logits: ``(B, C, *spatial)``.
        labels: ``(B, *spatial)``, integers in ``[0, C)``.

    Returns:
        Scalar, float32 whatever the precision of the logits.
    """
    return F.cross_entropy(logits.float(), labels)


def soft_dice(
    probs: Tensor,
    labels: Tensor,
    *,
    smooth: float = 1e-5,
    include_background: bool = True,
    mask: Tensor | None = None,
    squared: bool = True,
    smooth_numerator: bool = True,
) -> Tensor:
    """Soft Dice loss with squared denominators, sums over the whole batch (Milletari et al., 3DV 2016).

    Per class ``1 - (2 sum(p y) + s) / (sum(p^2) + sum(y^2) + s)``, then the mean over classes. The sums run
    over batch and voxels together, as the public code of the field does; this is not the mean of per-sample
    losses: an all-background sample then adds no constant term. In a training of several ranks the batch is that of
    all of them.

    Args:
        probs: Softmax probabilities, ``(B, C, *spatial)``.
        labels: ``(B, *spatial)``, integers in ``[0, C)``; or soft targets in [0, 1], ``(B, C, *spatial)``.
        smooth: ``s``; makes a class that is absent and not predicted cost 0.
        include_background: Count class 0.
        mask: Voxels that count, ``(B, *spatial)``, bool or weights from 0 on, by which each product in the sums is
            multiplied; ``None``: all. An empty mask gives 0, and no gradient.
        squared: ``sum(p) + sum(y)`` in the denominator where this is false.
        smooth_numerator: Where this is false ``s`` is in the denominator alone, and a class that is absent costs 1,
            whatever is predicted, and gives no gradient.

    Returns:
        Scalar in [0, 1].

    Example:
        >>> import torch
        >>> probs = torch.tensor([[[[0.2, 0.6]], [[0.8, 0.4]]]])
        >>> labels = torch.tensor([[[1, 0]]])
        >>> round(soft_dice(probs, labels, include_background=False).item(), 5)
        0.11111
    """
    probs = probs if probs.dtype == torch.float64 else probs.float()
    hard = labels.ndim < probs.ndim
    target = (F.one_hot(labels, probs.shape[1]).movedim(-1, 1) if hard else labels).to(probs.dtype)
    axes = [0, *range(2, probs.ndim)]
    # The mask goes with one factor of each product; y^2 = y for hard labels.
    shown, marked = (probs, target) if mask is None else (probs * mask[:, None], target * mask[:, None])
    intersection = (shown * target).sum(axes)
    if squared:
        total = (shown * probs).sum(axes) + (marked if hard else marked * target).sum(axes)
    else:
        total = shown.sum(axes) + marked.sum(axes)
    intersection, total = sums_over_ranks(intersection, total)
    dice = 1 - (2 * intersection + (smooth if smooth_numerator else 0)) / (total + smooth)
    return dice.mean() if include_background else dice[1:].mean()


def soft_dice_per_image(
    probs: Tensor, target: Tensor, *, epsilon: float = 1e-10, include_background: bool = True
) -> Tensor:
    """Soft Dice loss of every image and class on its own, plain denominators, then the mean.

    ``1 - mean over images and classes of 2 sum(p y) / (sum(p) + sum(y) + epsilon)``, as the public code of
    Chaitanya et al., Medical Image Analysis 2023, has it. Without a smoothing term in the numerator a class that an
    image does not hold costs its full share, whatever is predicted, and gives no gradient.

    Args:
        probs: Softmax probabilities, ``(B, C, *spatial)``.
        target: One-hot labels, or soft ones in [0, 1], ``(B, C, *spatial)``.
        epsilon: Keeps the denominator of an absent class above 0.
        include_background: Count class 0.

    Returns:
        Scalar in [0, 1], float32 whatever the precision of the probabilities.

    Example:
        >>> import torch
        >>> probs = torch.tensor([[[0.9, 0.8, 0.3, 0.2], [0.1, 0.2, 0.7, 0.8]]])
        >>> target = torch.tensor([[[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]])
        >>> round(soft_dice_per_image(probs, target).item(), 6)
        0.200501
    """
    first = 0 if include_background else 1
    probs, target = (x[:, first:].float().flatten(2) for x in (probs, target))
    return 1 - (2 * (probs * target).sum(2) / (probs.sum(2) + target.sum(2) + epsilon)).mean()


def weighted_cross_entropy(logits: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Mean over all voxels of ``-sum over classes of weight * target * log softmax(logits)``.

    Args:
        logits: ``(B, C, *spatial)``.
        target: One-hot labels, or soft ones in [0, 1], ``(B, C, *spatial)``.
        weights: One per class, ``(C,)``.

    Returns:
        Scalar, float32 whatever the precision of the logits.
    """
    return F.cross_entropy(logits.float(), target.float(), weight=weights)


def cross_entropy_dice(logits: Tensor, labels: Tensor, *, include_background: bool = True) -> Tensor:
    """The field's supervised loss, ``(cross-entropy + soft Dice) / 2``.

    Args:
        logits: ``(B, C, *spatial)``.
        labels: ``(B, *spatial)``, integers in ``[0, C)``.
        include_background: Count class 0 in the soft Dice; the cross-entropy always does.
    """
    dice = soft_dice(logits.float().softmax(1), labels, include_background=include_background)
    return 0.5 * (cross_entropy(logits, labels) + dice)
