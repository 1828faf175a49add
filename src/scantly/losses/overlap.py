"""Overlap losses: cross-entropy and soft Dice."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["cross_entropy", "cross_entropy_dice", "soft_dice"]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over all voxels of ``-log softmax(logits)[label]``, natural logarithm.

    Args:
        logits: ``(B, C, *spatial)``.
        labels: ``(B, *spatial)``, integers in ``[0, C)``.

    Returns:
        Scalar, float32 whatever the precision of the logits.
    """
    return F.cross_entropy(logits.float(), labels)


def soft_dice(probs: Tensor, labels: Tensor, *, smooth: float = 1e-5, include_background: bool = True) -> Tensor:
    """Soft Dice loss with squared denominators, sums over the whole batch (Milletari et al., 3DV 2016).

    Per class ``1 - (2 sum(p y) + s) / (sum(p^2) + sum(y^2) + s)``, then the mean over classes. The sums run
    over batch and voxels together, as the public code of the field does; this is not the mean of per-sample
    losses: an all-background sample then adds no constant term.

    Args:
        probs: Softmax probabilities, ``(B, C, *spatial)``.
        labels: ``(B, *spatial)``, integers in ``[0, C)``.
        smooth: ``s``; makes a class that is absent and not predicted cost 0.
        include_background: Count class 0.

    Returns:
        Scalar in [0, 1].

    Example:
        >>> import torch
        >>> probs = torch.tensor([[[[0.2, 0.6]], [[0.8, 0.4]]]])
        >>> labels = torch.tensor([[[1, 0]]])
        >>> round(soft_dice(probs, labels, include_background=False).item(), 5)
        0.11111
    """
    probs = probs.float()
    target = F.one_hot(labels, probs.shape[1]).movedim(-1, 1).to(probs.dtype)
    axes = [0, *range(2, probs.ndim)]
    intersection = (probs * target).sum(axes)
    total = (probs * probs).sum(axes) + target.sum(axes)  # y^2 = y
    dice = 1 - (2 * intersection + smooth) / (total + smooth)
    return dice.mean() if include_background else dice[1:].mean()


def cross_entropy_dice(logits: Tensor, labels: Tensor, *, include_background: bool = True) -> Tensor:
    """The field's supervised loss, ``(cross-entropy + soft Dice) / 2``.

    Args:
        logits: ``(B, C, *spatial)``.
        labels: ``(B, *spatial)``, integers in ``[0, C)``.
        include_background: Count class 0 in the soft Dice; the cross-entropy always does.
    """
    dice = soft_dice(logits.float().softmax(1), labels, include_background=include_background)
    return 0.5 * (cross_entropy(logits, labels) + dice)
