"""Losses: pure functions of tensors."""

from scantly.losses.overlap import cross_entropy, cross_entropy_dice, soft_dice

__all__ = ["cross_entropy", "cross_entropy_dice", "soft_dice"]
