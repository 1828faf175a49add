"""Geometric transforms of a batch: exact flips and quarter turns, and affine resampling.

Parameters are drawn by ``sample_*`` and applied by ``apply_*`` to anything that shares the geometry: images
``(B, C, *spatial)``, label maps and confidence maps ``(B, *spatial)``. A transform acts on the **last** two
axes (in-plane: H, W) or three (D, H, W), and is the same for all axes before them. A volume is
thereby transformed slice by slice at the cost of 2D, and 2D and 3D are one code.

Nothing here waits for the device or loops over rows or voxels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from scantly.views.draws import as_rows, chance, uniform, working_dtype

__all__ = [
    "Affine",
    "Interpolation",
    "Orthogonal",
    "RotFlip",
    "apply_affine",
    "apply_orthogonal",
    "invert_affine",
    "invert_orthogonal",
    "make_affine",
    "sample_affine",
    "sample_orthogonal",
    "warp",
]

Interpolation = Literal["nearest", "linear"]
RotFlip = Literal["official", "flips", "independent", "none"]


@dataclass(frozen=True)
class Orthogonal:
    """Flips and quarter turns of each row, as a signed permutation of the last ``n`` axes.

    Attributes:
        swap: H and W are exchanged first, ``(B,)`` bool; ``None``: in no row.
        flip: Then the axes are mirrored, ``(B, n)`` bool, ``n`` in {2, 3}, in the order of the axes.
    """

    swap: Tensor | None
    flip: Tensor


@dataclass(frozen=True)
class Affine:
    """Affine map of each row on the last ``n`` axes, in voxels from the center ``(size - 1) / 2``.

    Attributes:
        to_input: Output position -> input position, ``(B, n, n + 1)``: matrix, then offset.
        to_output: Its inverse.
        active: Rows that are resampled, ``(B,)`` bool; the others pass bit-identical.
    """

    to_input: Tensor
    to_output: Tensor
    active: Tensor


def sample_orthogonal(
    kind: RotFlip,
    batch: int,
    size: Sequence[int],
    *,
    flip_depth: bool = False,
    active: Tensor | None = None,
    generator: torch.Generator,
) -> Orthogonal:
    """Draw flips and quarter turns.

    Args:
        kind: ``official``: the literature's turn by k in {0, 1, 2, 3} quarters followed by one flip along
            a random in-plane axis, which is always a reflection: the identity never occurs, and only the
            four mirror images of a square do. ``flips``: each axis with probability 0.5. ``independent``:
            k uniform and each axis with probability 0.5, so the eight symmetries of a square are equally
            likely. ``none``: the identity.
        batch: Number of rows B.
        size: ``(H, W)`` or ``(D, H, W)``. Where H and W differ, only half turns (k in {0, 2}) are drawn.
        flip_depth: Also mirror D with probability 0.5 (``flips`` and ``independent``, in 3D).
        active: Rows that are transformed, ``(B,)`` bool; ``None``: all.
        generator: Source of the draws; its device is the parameters' device.
    """
    turns_allowed = kind in ("official", "independent")
    square = size[-2] == size[-1]
    quarters = torch.zeros(batch, device=generator.device)
    if turns_allowed:
        step = 1 if square else 2
        quarters = step * uniform(batch, 0, 4 // step, generator=generator).floor()
    # A counter-clockwise quarter turn exchanges the axes and mirrors the rows; three mirror the columns.
    flip = torch.stack([(quarters == 1) | (quarters == 2), quarters >= 2], dim=1)
    if kind == "official":
        along_rows = chance(batch, 0.5, generator=generator)
        flip = flip ^ torch.stack([along_rows, ~along_rows], dim=1)
    elif kind != "none":
        flip = flip ^ (uniform((batch, 2), 0, 1, generator=generator) < 0.5)
        if flip_depth and len(size) == 3:
            flip = torch.cat([chance(batch, 0.5, generator=generator)[:, None], flip], dim=1)
    swap = (quarters % 2 == 1) if turns_allowed and square else None
    if active is None:
        return Orthogonal(swap, flip)
    return Orthogonal(None if swap is None else swap & active, flip & active[:, None])


def apply_orthogonal(x: Tensor, params: Orthogonal) -> Tensor:
    """Flip and turn each row exactly, ``(B, ...)`` of any type -> the same shape and type.

    Raises:
        ValueError: if the parameters hold quarter turns and H and W of ``x`` differ.
    """
    if params.swap is not None:
        if x.shape[-1] != x.shape[-2]:
            raise ValueError(f"quarter turns need equal sides, not {tuple(x.shape[-2:])}; draw them for this size.")
        # x stands first: the result takes its memory layout from there.
        x = torch.where(~as_rows(params.swap, x), x, x.transpose(-1, -2))
    axes = params.flip.shape[1]
    for axis in range(axes):
        x = torch.where(as_rows(params.flip[:, axis], x), x.flip(axis - axes), x)
    return x


def invert_orthogonal(params: Orthogonal) -> Orthogonal:
    """The parameters that undo these."""
    if params.swap is None:
        return params
    in_plane = params.flip[:, -2:]
    undone = torch.where(params.swap[:, None], in_plane.flip(1), in_plane)
    return Orthogonal(params.swap, torch.cat([params.flip[:, :-2], undone], dim=1))


def make_affine(degrees: Tensor, scale: Tensor, shift: Tensor, active: Tensor | None = None) -> Affine:
    """Build the map that turns, scales and then shifts the content of each row about its center.

    Args:
        degrees: In-plane angle ``(B,)`` with the sign of ``scipy.ndimage.rotate`` on (H, W).
        scale: Magnification ``(B,)``, above 1 enlarges.
        shift: Displacement ``(B, n)`` in voxels, ``n`` in {2, 3}: the number of axes the map acts on.
        active: Rows that are resampled, ``(B,)`` bool; ``None``: all.
    """
    radians = degrees * (math.pi / 180)
    cos, sin = torch.cos(radians), torch.sin(radians)
    zero, one = torch.zeros_like(cos), torch.ones_like(cos)
    rows = [[cos, sin], [-sin, cos]]
    if shift.shape[1] == 3:
        rows = [[one, zero, zero], [zero, *rows[0]], [zero, *rows[1]]]
    rotation = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)
    to_input = rotation / scale[:, None, None]
    # An elementwise product, so that neither TF32 nor autocast lowers the precision of the positions.
    offset = -(to_input * shift[:, None, :]).sum(2, keepdim=True)
    to_output = rotation.transpose(1, 2) * scale[:, None, None]
    return Affine(
        to_input=torch.cat([to_input, offset], dim=2),
        to_output=torch.cat([to_output, shift[:, :, None]], dim=2),
        active=torch.ones_like(degrees, dtype=torch.bool) if active is None else active,
    )


def sample_affine(
    batch: int,
    size: Sequence[int],
    *,
    rotate_degrees: float = 0.0,
    rotate_integer: bool = False,
    scale: tuple[float, float] = (1.0, 1.0),
    translate: float = 0.0,
    through_plane: bool = False,
    active: Tensor | None = None,
    generator: torch.Generator,
) -> Affine:
    """Draw a rotation, a magnification and a shift per row.

    Args:
        batch: Number of rows B.
        size: ``(H, W)`` or ``(D, H, W)``.
        rotate_degrees: In-plane angle from U[-a, a).
        rotate_integer: Whole degrees -a, ..., a - 1, as in the literature.
        scale: Bounds of the magnification, drawn log-uniformly (enlarging and reducing equally likely).
        translate: Shift along each axis from U[-t, t) of its length.
        through_plane: In 3D, scale and shift along D too; the map then interpolates between slices.
        active: Rows that are resampled, ``(B,)`` bool; ``None``: all.
        generator: Source of the draws; its device is the parameters' device.
    """
    axes = len(size) if through_plane else 2
    degrees = uniform(batch, -rotate_degrees, rotate_degrees, generator=generator)
    if rotate_integer:
        degrees = degrees.floor()
    magnification = uniform(batch, math.log(scale[0]), math.log(scale[1]), generator=generator).exp()
    lengths = [translate * length for length in size[-axes:]]
    shift = torch.stack([uniform(batch, -length, length, generator=generator) for length in lengths], dim=1)
    return make_affine(degrees, magnification, shift, active)


def apply_affine(x: Tensor, params: Affine, *, interpolation: Interpolation | None = None) -> Tensor:
    """Resample each active row once; what comes from outside is 0.

    Args:
        x: ``(B, ..., *spatial)`` of any type.
        params: The map.
        interpolation: ``None``: linear for floating point, nearest for integers and booleans.

    Returns:
        Same shape and type; inactive rows bit-identical.

    Raises:
        ValueError: if integers or booleans are to be interpolated linearly.
    """
    axes = params.to_input.shape[1]
    positions = _positions(params.to_input, x.shape[-axes:])
    return torch.where(as_rows(params.active, x), warp(x, positions, interpolation=interpolation), x)


def invert_affine(params: Affine) -> Affine:
    """The map back. Applying it interpolates again, and cannot bring back what left the field of view."""
    return Affine(to_input=params.to_output, to_output=params.to_input, active=params.active)


def warp(x: Tensor, positions: Sequence[Tensor], *, interpolation: Interpolation | None = None) -> Tensor:
    """Resample each row at given positions.

    Agrees with ``scipy.ndimage.map_coordinates`` (order 0 or 1, ``mode="grid-constant"``, ``cval=0``).

    Args:
        x: ``(B, ..., *spatial)`` of any type.
        positions: For each of the last ``n`` axes, where to read, in voxels, ``(B, *last n axes)``.
        interpolation: As in :func:`apply_affine`.

    Returns:
        Same shape and type as ``x``.

    Raises:
        ValueError: if integers or booleans are to be interpolated linearly.
    """
    if interpolation is None:
        interpolation = "linear" if x.is_floating_point() else "nearest"
    if interpolation == "linear" and not x.is_floating_point():
        raise ValueError(f"a map of type {x.dtype} would get values that mean nothing; use interpolation='nearest'.")
    if x.shape[0] == 0:
        return x
    axes = len(positions)
    # A double holds integers up to 2**53 exactly, a float only those up to 2**24.
    dtype = torch.float64 if x.dtype in (torch.int32, torch.int64) else working_dtype(x)
    if interpolation == "nearest":
        positions = [torch.floor(position + 0.5) for position in positions]
    # grid_sample without aligned corners puts voxel i at (2 i + 1) / n - 1, also for n = 1, last axis first.
    lengths = x.shape[-axes:]
    normalized = [p.to(dtype) * (2 / n) + (1 / n - 1) for p, n in zip(positions, lengths, strict=True)]
    read = functional.grid_sample(
        x.reshape(x.shape[0], math.prod(x.shape[1:-axes]), *lengths).to(dtype),
        torch.stack(normalized[::-1]).movedim(0, -1),
        mode="nearest" if interpolation == "nearest" else "bilinear",
        padding_mode="zeros",
        align_corners=False,
    )
    return read.to(x.dtype).view(x.shape)


def _positions(matrix: Tensor, size: Sequence[int]) -> list[Tensor]:
    axes = len(size)
    positions = []
    for row in range(axes):
        position = matrix[:, row, axes] + (size[row] - 1) / 2
        position = position.view(-1, *[1] * axes)
        for axis, length in enumerate(size):
            from_center = torch.arange(length, device=matrix.device, dtype=matrix.dtype) - (length - 1) / 2
            along = from_center.view(-1, *[1] * (axes - 1 - axis))
            position = position + matrix[:, row, axis].view(-1, *[1] * axes) * along
        positions.append(position)
    return positions
