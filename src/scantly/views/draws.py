"""Random numbers and small tensor helpers that every view shares.

All draws live on the generator's device and their number depends on the batch size and the settings alone,
never on the images, so that a restored generator continues exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["as_rows", "chance", "uniform", "working_dtype"]


def uniform(shape: int | Sequence[int], low: float, high: float, *, generator: torch.Generator) -> Tensor:
    """Draw from U[low, high), float32, on the generator's device."""
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    return low + (high - low) * torch.rand(shape, generator=generator, device=generator.device)


def chance(batch: int, probability: float, *, generator: torch.Generator) -> Tensor:
    """Draw ``(batch,)`` booleans that are true with the given probability; 0 and 1 are certain."""
    return uniform(batch, 0.0, 1.0, generator=generator) < probability


def as_rows(values: Tensor, like: Tensor) -> Tensor:
    """View ``(B,)`` values so that they broadcast over the rows of ``like``, ``(B, ...)``."""
    return values.view(-1, *[1] * (like.ndim - 1))


def working_dtype(x: Tensor) -> torch.dtype:
    """Precision in which the values of ``x`` are computed: float64 stays, all else is float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
