"""Distance maps of masks, and what they cost: signed distances normalized to [-1, 1]."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

__all__ = ["Empty", "signed_distance", "soft_mask", "squared_distance"]

Empty = Literal["outside", "zero"]

#: Longest side for which the squares of distances are whole numbers that float32 holds (3 axes).
_LONGEST_SIDE = 2364


def squared_distance(mask: Tensor) -> Tensor:
    """Squared Euclidean distance of each voxel's center to the nearest voxel of the mask, in voxels.

    On the CPU the transform of SciPy; elsewhere the lower envelope of parabolas, axis after axis (Felzenszwalb and
    Huttenlocher, "Distance Transforms of Sampled Functions", Theory of Computing 2012), each by comparison with every
    offset along the axis, in a few hundred element-wise operations on the device, without waiting for it. Both are
    exact: squared distances are whole numbers, and give the same bits, for sides up to 2,364 voxels.

    Args:
        mask: ``(B, *spatial)``, bool; spacing is 1 along every axis.

    Returns:
        ``(B, *spatial)``, float32; 0 on the mask. Rows with an empty mask have no meaningful values.

    Raises:
        ValueError: if a side is longer than 2,364 voxels.

    Example:
        >>> squared_distance(torch.tensor([[False, True, False, False]]))
        tensor([[1., 0., 1., 4.]])
    """
    if max(mask.shape[1:]) > _LONGEST_SIDE:
        raise ValueError(f"distances are exact for sides up to {_LONGEST_SIDE} voxels; got {tuple(mask.shape[1:])}.")
    return _by_scipy(mask) if mask.device.type == "cpu" else _by_parabolas(mask)


def _by_scipy(mask: Tensor) -> Tensor:
    maps = [ndimage.distance_transform_edt(row) for row in np.logical_not(mask.numpy())]
    # the root of a whole number in float64, squared, is within one half of it
    return torch.from_numpy(np.rint(np.square(np.stack(maps)))).float()


def _by_parabolas(mask: Tensor) -> Tensor:
    values = _along_last_axis(mask)
    for axis in range(1, mask.ndim - 1):
        values = _lower_envelope(values, axis)
    return values


def _along_last_axis(mask: Tensor) -> Tensor:
    """Squared distance within each line of the last axis; a line without mask is farther than any voxel."""
    places = torch.arange(mask.shape[-1], device=mask.device, dtype=torch.float32)
    far = float(2 * sum(mask.shape[1:]))
    before = torch.where(mask, places, -far).cummax(-1).values
    after = torch.where(mask, places, far).flip(-1).cummin(-1).values.flip(-1)
    return torch.minimum(places - before, after - places).square()


def _lower_envelope(values: Tensor, axis: int) -> Tensor:
    """``min over j of values[j] + (i - j)^2`` for every ``i`` along an axis."""
    side, envelope = values.shape[axis], values.clone()
    for offset in range(1, side):
        raised = values + float(offset * offset)
        for target, source in ((offset, 0), (0, offset)):
            part = envelope.narrow(axis, target, side - offset)
            torch.minimum(part, raised.narrow(axis, source, side - offset), out=part)
    return envelope


def signed_distance(mask: Tensor, *, empty: Empty = "outside") -> Tensor:
    """Signed distance map of each mask, negative inside, outside and inside scaled to 1 by their own maxima.

    ``d_out / max(d_out) - d_in / max(d_in)`` with distances to the nearest voxel of the other side, then 0 on inner
    boundary voxels, those of the mask with a face neighbor outside it; as Luo et al., "Semi-supervised Medical Image
    Segmentation through Dual-task Consistency", AAAI 2021, and Li et al., "Shape-aware Semi-supervised 3D Semantic
    Segmentation for Medical Images", MICCAI 2020, have it. Distances are measured within the map alone, so a crop of
    the map is not the map of the crop. The map jumps behind the boundary, from 0 to ``-2 / max(d_in)``.

    Args:
        mask: ``(B, *spatial)``, bool. Exactness and devices: see :func:`squared_distance`.
        empty: What a mask without voxels gives: 1 everywhere (``outside``), or 0 (``zero``, the public code). A mask
            of all voxels gives -1 everywhere (the public code: not a number).

    Returns:
        ``(B, *spatial)``, float32, in [-1, 1].

    Example:
        >>> signed_distance(torch.tensor([[0, 0, 0, 1, 1, 1, 0, 0, 0]]).bool())
        tensor([[ 1.0000,  0.6667,  0.3333,  0.0000, -1.0000,  0.0000,  0.3333,  0.6667,
                  1.0000]])
    """
    both = squared_distance(torch.cat([mask, ~mask]))
    maps = both.sqrt()
    per_row = (-1, *[1] * (mask.ndim - 1))
    largest = maps.flatten(1).amax(1).clamp(min=1).view(per_row)
    outside, inside = (maps / largest).chunk(2)
    rim = mask & (both[len(mask) :] == 1)
    signed = torch.where(rim, 0.0, outside - inside)
    present, full = (found.view(per_row) for found in (mask.flatten(1).any(1), mask.flatten(1).all(1)))
    signed = torch.where(present, signed, 1.0 if empty == "outside" else 0.0)
    return torch.where(full, -1.0, signed)


def soft_mask(distances: Tensor, *, steepness: float = 1500.0) -> Tensor:
    """Probability of being inside from a signed distance, ``sigmoid(-steepness * distance)``.

    Inverse transform of Luo et al., AAAI 2021. It saturates within a few thousandths, so that gradient comes from a
    thin shell alone.

    Args:
        distances: Negative inside; any shape.
        steepness: Published: 1500.

    Returns:
        Same shape, in [0, 1], float32 (float64 distances: float64).

    Example:
        >>> soft_mask(torch.tensor([-0.001, 0.0, 0.001]))
        tensor([0.8176, 0.5000, 0.1824])
    """
    distances = distances if distances.dtype == torch.float64 else distances.float()
    return torch.sigmoid(-steepness * distances)
