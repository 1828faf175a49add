"""How deep the network goes, along which axis, and the patches that fit it: planned from patch and spacing.

Isensee et al., "nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation",
Nature Methods 2021 (supplementary note 2): an axis is halved while it keeps four voxels, axes with coarser voxels
only once the others are about as coarse, and kernels are flat across an axis until then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "STEP",
    "Topology",
    "anisotropy",
    "default_network",
    "fit_patch",
    "plan_topology",
    "side_factors",
    "side_steps",
    "training_bytes",
]

#: Sides of a patch are multiples of this where voxels are isotropic: networks halve the resolution four times.
STEP = 16
_HALVINGS = 4
#: The shortest side of the deepest features.
_SHORTEST = 4
#: Axes whose voxels differ by this factor or more are not treated alike.
_UNALIKE = 2.0

#: Training memory per voxel of a row, in bytes: activations kept for the backward pass in float32 (2D and 3D
#: networks of the default widths, counted) and a fourth on top for the gradients that live with them.
_BYTES_PER_VOXEL: dict[str, dict[int, int]] = {
    "unet": {2: 2000, 3: 1320},
    "unet3d": {2: 2000, 3: 1400},
    "vnet": {2: 1750, 3: 1050},
    "dynunet": {2: 3000, 3: 2900},
}

#: Channels of the finest level that these numbers are for.
_FINEST_WIDTH = {"unet": 16, "unet3d": 16, "vnet": 16, "dynunet": 32}

Axes = tuple[int, ...]


@dataclass(frozen=True)
class Topology:
    """Kernels and strides per level, finest first, one number per axis.

    Attributes:
        kernel_sizes: Side of the kernels; 1 is flat across that axis.
        strides: Stride with which a level begins; 1 everywhere at the finest.
    """

    kernel_sizes: tuple[Axes, ...]
    strides: tuple[Axes, ...]


def side_factors(strides: Sequence[Sequence[int]]) -> Axes:
    """What each side of a patch must be divisible by: the product of the strides along it."""
    return tuple(math.prod(axis) for axis in zip(*strides, strict=True))


def anisotropy(spacing: Sequence[float]) -> float:
    """Largest over smallest side of a voxel."""
    return max(spacing) / min(spacing)


def default_network(spatial_dims: int, kernel_sizes: Sequence[Sequence[int]] | None) -> str:
    """The network that ``network.name: auto`` stands for.

    The community's U-Net in 2D and V-Net in 3D, with which published numbers compare; where the plan has flat
    kernels in 3D, the network that has them too.
    """
    if spatial_dims == 2:
        return "unet"
    flat = any(1 in kernel for kernel in kernel_sizes or ())
    return "dynunet" if flat else "vnet"


def training_bytes(network: str, spatial_dims: Literal[2, 3], widths: Sequence[int] | None = None) -> float:
    """Memory that one voxel of a training row takes, in bytes; a network that is not ours counts as a U-Net.

    Args:
        network: Its name.
        spatial_dims: 2 or 3.
        widths: Channels per level, finest first; ``None``: the network's default.
    """
    name = network if network in _BYTES_PER_VOXEL else "unet"
    return _BYTES_PER_VOXEL[name][spatial_dims] * (widths[0] / _FINEST_WIDTH[name] if widths else 1.0)


def _late(spacing: Sequence[float]) -> list[int]:
    """Per axis: how often the finest axis is halved before this one is about as fine."""
    smallest = min(spacing)
    return [math.floor(math.log2(length / smallest) + 1e-9) for length in spacing]


def side_steps(spacing: Sequence[float]) -> Axes:
    """What sides of a patch are planned in multiples of: 16, and half as much for each halving that an axis skips.

    Example:
        >>> side_steps((5.0, 0.8, 0.8))
        (4, 16, 16)
    """
    return tuple(max(1, STEP >> skipped) for skipped in _late(spacing))


def plan_topology(patch_size: Sequence[int], spacing: Sequence[float] | None = None) -> Topology:
    """Kernels and strides for patches of a size.

    An axis is halved while it has eight voxels or more, together with all axes whose voxels are within a factor of
    two of the finest; one axis alone while it has twelve. Its kernels have side 1 until its voxels are within that
    factor, then 3; the deepest level has 3 throughout. Beyond 16-fold an axis is halved only where whole voxels
    remain, so that patches in multiples of 16 fit (nnU-Net enlarges the patch instead).

    Args:
        patch_size: Voxels per axis.
        spacing: Size of a voxel per axis, any unit; ``None``: the same for all.

    Example:
        >>> plan_topology((20, 320, 256), (3.6, 0.61, 0.61)).strides  # nnU-Net's for its prostate data
        ((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2), (1, 2, 2))
    """
    sides, lengths = list(patch_size), list(spacing or [1.0] * len(patch_size))
    required = [_HALVINGS - skipped for skipped in _late(lengths)]
    kernel = [1] * len(sides)
    kernels: list[Axes] = []
    strides: list[Axes] = [(1,) * len(sides)]
    while True:
        finest = min(lengths)
        kernel = [
            3 if side == 3 or length < _UNALIKE * finest else 1 for side, length in zip(kernel, lengths, strict=True)
        ]
        axes = _axes_to_halve(sides, lengths, required)
        if not axes:
            return Topology((*kernels, (3,) * len(sides)), tuple(strides))
        kernels.append(tuple(kernel))
        strides.append(tuple(2 if axis in axes else 1 for axis in range(len(sides))))
        for axis in axes:
            sides[axis] = math.ceil(sides[axis] / 2)
            lengths[axis] *= 2
            required[axis] -= 1


def _axes_to_halve(sides: Sequence[int], lengths: Sequence[float], required: Sequence[int]) -> list[int]:
    long = [axis for axis, side in enumerate(sides) if side >= 2 * _SHORTEST and (required[axis] > 0 or side % 2 == 0)]
    finest = min((lengths[axis] for axis in long), default=0.0)
    alike = [axis for axis in long if lengths[axis] < _UNALIKE * finest]
    if len(alike) == 1 and len(sides) > 1 and sides[alike[0]] < 3 * _SHORTEST:
        return []
    return alike


def fit_patch(shape: Sequence[int], steps: Sequence[int], lengths: Sequence[float], voxels: float) -> Axes:
    """The largest patch that fits images and memory.

    Args:
        shape: Voxels of the median image per axis.
        steps: Sides become multiples of these, the nearest to ``shape``.
        lengths: Size of a voxel per axis; the axis that is longest by them is shortened first.
        voxels: The most voxels a patch may have.
    """
    patch = [max(step, (side + step // 2) // step * step) for side, step in zip(shape, steps, strict=True)]
    while math.prod(patch) > voxels:
        open_axes = [axis for axis, step in enumerate(steps) if patch[axis] > step]
        if not open_axes:
            break
        axis = max(open_axes, key=lambda i: patch[i] * lengths[i])
        patch[axis] -= steps[axis]
    return tuple(patch)
