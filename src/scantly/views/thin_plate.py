"""Thin-plate warp of a batch: a random similarity and a smooth deformation; in-plane, the same for all slices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from scantly.views.draws import as_rows, chance, uniform
from scantly.views.spatial import Interpolation, warp

__all__ = ["ThinPlate", "apply_thin_plate", "sample_thin_plate"]


@dataclass(frozen=True)
class ThinPlate:
    """Where each output position of the last two axes, H and W, is read.

    Attributes:
        to_input: Output position -> input position in voxels from the center ``(size - 1) / 2``, ``(B, 2, 3)``:
            matrix, then offset.
        displacement: Added to that, along H and W, in voxels, at the control points, ``(B, 2, points, points)``. The
            points are spread evenly over the output, from the first to the last voxel of each side.
        active: Rows that are warped, ``(B,)`` bool; the others pass bit-identical.
    """

    to_input: Tensor
    displacement: Tensor
    active: Tensor


def sample_thin_plate(
    batch: int,
    size: Sequence[int],
    *,
    rotate_degrees: float = 60.0,
    scale: tuple[float, float] = (0.8, 1.2),
    translate: float = 0.1,
    mirror: float = 0.5,
    jitter: float = 0.01,
    points: int = 5,
    generator: torch.Generator,
) -> ThinPlate:
    """Draw the warp of the equivariance loss of MONA.

    You et al., "Mine Your Own Anatomy: Revisiting Medical Image Segmentation with Extremely Limited Labels"
    (arXiv 2209.13476), which the public code of ARCO uses too. Positions are target to source: rotation, scale factor
    and translation of the source, plus a thin-plate spline through the jittered control points. In volumes one warp is
    applied to all slices. The published warp is stated in coordinates of [-1, 1] along both sides; here a turn stays a
    turn where the sides differ, which makes no difference for square images.

    Args:
        batch: Number of rows B.
        size: ``(H, W)`` or ``(D, H, W)``.
        rotate_degrees: In-plane angle from U[-a, a).
        scale: Bounds of the magnification; its reciprocal is drawn uniformly.
        translate: Shift of what is read, along each side, from U[-t, t) in units of half the side.
        mirror: Probability with which W is mirrored, decided once for all rows.
        jitter: Displacement of each control point along each side, from U[-s, s) in units of half the side.
        points: Control points along each side, at least 2.
        generator: Source of the draws; its device is the parameters' device.
    """
    half = [(side - 1) / 2 for side in size[-2:]]
    radians = uniform(batch, -rotate_degrees, rotate_degrees, generator=generator) * (math.pi / 180)
    factor = uniform(batch, 1 / scale[1], 1 / scale[0], generator=generator)
    shift = torch.stack([uniform(batch, -translate * n, translate * n, generator=generator) for n in half], dim=1)
    mirrored = chance(1, mirror, generator=generator)
    moved = [uniform((batch, points, points), -jitter * n, jitter * n, generator=generator) for n in half]
    displacement = torch.stack(moved, dim=1)
    sign = 1 - 2 * mirrored.float()
    cos, sin = factor * torch.cos(radians), factor * torch.sin(radians)
    matrix = torch.stack([torch.stack([cos, sin * sign], dim=1), torch.stack([-sin, cos * sign], dim=1)], dim=1)
    # Interpolation would change the rows' last bits even where nothing moves.
    still = (radians == 0) & (factor == 1) & ~mirrored & (shift == 0).all(1) & (displacement == 0).flatten(1).all(1)
    return ThinPlate(torch.cat([matrix, shift[:, :, None]], dim=2), displacement, ~still)


def apply_thin_plate(x: Tensor, params: ThinPlate, *, interpolation: Interpolation | None = None) -> Tensor:
    """Resample each active row once; what comes from outside is 0. Differentiable with respect to ``x``.

    Args:
        x: ``(B, ..., H, W)`` of any type, of the size that the warp was drawn for: images, logits, label maps, masks.
        params: The warp.
        interpolation: ``None``: linear for floating point, nearest for integers and booleans.

    Returns:
        Same shape and type; inactive rows bit-identical.

    Raises:
        ValueError: if integers or booleans are to be interpolated linearly.

    Example:
        >>> params = sample_thin_plate(2, (16, 16), generator=torch.Generator().manual_seed(0))
        >>> apply_thin_plate(torch.rand(2, 3, 4, 16, 16), params).shape
        torch.Size([2, 3, 4, 16, 16])
    """
    size = tuple(x.shape[-2:])
    basis = _spline_basis(size, params.displacement.shape[-1], params.displacement.device)
    # Autocast would round the positions.
    with torch.autocast(basis.device.type, enabled=False):
        field = (params.displacement.flatten(2) @ basis).view(-1, 2, *size)
    rows, columns = (torch.arange(n, device=field.device, dtype=field.dtype) - (n - 1) / 2 for n in size)
    positions = []
    for axis, length in enumerate(size):
        along_h, along_w, offset = params.to_input[:, axis, :, None, None].unbind(1)
        position = along_h * rows[:, None] + along_w * columns + offset
        positions.append(position + field[:, axis] + (length - 1) / 2)
    return torch.where(as_rows(params.active, x), warp(x, positions, interpolation=interpolation), x)


@lru_cache(maxsize=8)
def _spline_basis(size: tuple[int, int], points: int, device: torch.device) -> Tensor:
    """Influence of each control point on each voxel, ``(points**2, H * W)``, float32.

    The thin-plate spline through values v at the points c is sum_k w_k phi(|x - c_k|) + a + b x, phi(r) = r^2 log r^2,
    where w is orthogonal to all affine functions of c; it is linear in v. Coordinates are in [-1, 1] along both sides.
    """
    centers = _grid((points, points))
    system = torch.zeros(points**2 + 3, points**2 + 3, dtype=torch.float64)
    system[:-3] = _terms(centers, centers)
    system[-3:, :-3] = system[:-3, -3:].T
    coefficients = torch.linalg.inv(system)[:, : points**2]
    basis: Tensor = (_terms(_grid(size), centers) @ coefficients).T.contiguous()
    return basis.to(device, torch.float32, non_blocking=True)


def _grid(size: tuple[int, int]) -> Tensor:
    axes = [torch.linspace(-1, 1, n, dtype=torch.float64) for n in size]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)


def _terms(at: Tensor, centers: Tensor) -> Tensor:
    squared = (at[:, None] - centers).square().sum(2)
    return torch.cat([torch.xlogy(squared, squared), torch.ones(len(at), 1, dtype=at.dtype), at], dim=1)
