"""How far two label maps agree, for the log."""

from __future__ import annotations

from torch import Tensor

__all__ = ["foreground_dice"]


def foreground_dice(first: Tensor, second: Tensor) -> Tensor:
    """Dice of the voxels to which both give the same structure, over the batch; 1 where neither finds any.

    Args:
        first: Class indices, any shape.
        second: Class indices, same shape.

    Returns:
        Scalar in [0, 1]; nothing waits for the device.
    """
    both = ((first == second) & (first > 0)).sum()
    return (2 * both + 1e-5) / ((first > 0).sum() + (second > 0).sum() + 1e-5)
