"""Elastic deformation of a batch by a coarse grid of displacements; in-plane, the same for all slices of a volume."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from scantly.views.draws import as_rows
from scantly.views.spatial import Interpolation, warp

__all__ = ["Elastic", "apply_elastic", "sample_elastic"]


@dataclass(frozen=True)
class Elastic:
    """Displacements of each row.

    Attributes:
        displacement: Of the grid's points, along H and W, in voxels, ``(B, 2, points, points)``. The points are
            spread evenly from the first to the last voxel of each side.
        active: Rows that are deformed, ``(B,)`` bool; the others pass bit-identical.
    """

    displacement: Tensor
    active: Tensor


def sample_elastic(
    batch: int,
    *,
    sigma: float = 5.0,
    points: int = 3,
    active: Tensor | None = None,
    generator: torch.Generator,
) -> Elastic:
    """Draw the displacements from N(0, sigma).

    Args:
        batch: Number of rows B.
        sigma: Standard deviation in voxels.
        points: Points of the grid along each side, at least 2.
        active: Rows that are deformed, ``(B,)`` bool; ``None``: all.
        generator: Source of the draws; its device is the parameters' device.
    """
    device = generator.device
    displacement = sigma * torch.randn((batch, 2, points, points), generator=generator, device=device)
    return Elastic(displacement, torch.ones(batch, dtype=torch.bool, device=device) if active is None else active)


def apply_elastic(x: Tensor, params: Elastic, *, interpolation: Interpolation | None = None) -> Tensor:
    """Deform each active row: the value at a voxel is read at that voxel plus the displacement there.

    The grid's displacements are interpolated to every voxel by cubic convolution (a = -0.75). Positions outside are
    moved to the border, so the border's values continue there.

    Args:
        x: ``(B, ..., H, W)`` of any type: images, one-hot labels, label maps.
        params: The displacements.
        interpolation: ``None``: linear for floating point, nearest for integers and booleans.

    Returns:
        Same shape and type; inactive rows bit-identical.

    Raises:
        ValueError: if integers or booleans are to be interpolated linearly.

    Example:
        >>> params = sample_elastic(2, generator=torch.Generator().manual_seed(0))
        >>> apply_elastic(torch.rand(2, 1, 4, 16, 16), params).shape
        torch.Size([2, 1, 4, 16, 16])
    """
    size = x.shape[-2:]
    field = functional.interpolate(params.displacement, size, mode="bicubic", align_corners=True)
    positions = []
    for axis, length in enumerate(size):
        voxel = torch.arange(length, device=field.device, dtype=field.dtype).view(-1, *[1] * (1 - axis))
        positions.append((voxel + field[:, axis]).clamp(0, length - 1))
    return torch.where(as_rows(params.active, x), warp(x, positions, interpolation=interpolation), x)
