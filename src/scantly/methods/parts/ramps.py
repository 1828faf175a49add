"""Ramp-up of loss weights."""

from __future__ import annotations

import math

__all__ = ["gaussian_rampup"]


def gaussian_rampup(step: float, length: float) -> float:
    """``exp(-5 (1 - min(step, length) / length)^2)``: 0.0067 at 0, 1 from ``length`` on.

    Laine and Aila, "Temporal Ensembling for Semi-Supervised Learning", ICLR 2017, section 2.

    Args:
        step: Position on the ramp, at least 0.
        length: Where the ramp ends, same unit; 0 means no ramp (1 everywhere).
    """
    if length <= 0:
        return 1.0
    return math.exp(-5.0 * (1.0 - min(step, length) / length) ** 2)
