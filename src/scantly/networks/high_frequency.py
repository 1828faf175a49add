"""What a feature map has besides its slowly varying part."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from scantly.errors import ConfigError, unknown_name
from scantly.networks.precision import without_autocast

__all__ = ["Extractor", "high_frequency"]

Extractor = Literal["avgpool", "laplacian", "haar", "fft"]


def high_frequency(features: Tensor, kind: Extractor = "avgpool", *, cutoff: float = 0.125) -> Tensor:
    """High-frequency part of each channel, for the attention of Diff-CL.

    X. Guo et al., "Diff-CL: A Novel Cross Pseudo-Supervision Method for Semi-supervised Medical Image Segmentation",
    arXiv 2503.09408, 2025. From the paper is that the attention looks at high frequencies; how they are extracted is
    not public and is our choice. All kinds are linear, and 0 for a constant map; along an axis one voxel long the map
    is constant:

    - ``avgpool``: the map minus its average over 3 voxels along each axis, border voxels repeated.
    - ``laplacian``: a voxel minus the average of its 4 (2D) or 6 (3D) neighbors, border voxels repeated: the kernel
      with 6 in the center and -1 for each neighbor, over 6.
    - ``haar``: the single-level orthonormal Haar transform without its lowest band, transformed back. An odd side is
      made even by repeating the last voxel.
    - ``fft``: only frequencies above the cutoff along at least one axis; the map is taken as periodic.

    It is computed in float32 (float64 stays) also under autocast, because it is a small difference of large numbers.

    Args:
        features: ``(B, C, H, W)`` or ``(B, C, D, H, W)``, of any size.
        kind: The extractor.
        cutoff: Cycles per voxel, from 0 (only the constant part goes) to 0.5 (everything goes); ``fft`` only.

    Returns:
        Of the features' shape and type.

    Raises:
        ConfigError: for another kind.

    Example:
        >>> high_frequency(torch.tensor([[[[0.0, 2.0], [0.0, 2.0]]]]), "haar")
        tensor([[[[-1.,  1.],
                  [-1.,  1.]]]])
    """
    if kind not in get_args(Extractor):
        raise ConfigError(unknown_name("extractor in method.hf_extractor", kind, get_args(Extractor)))
    with without_autocast(features.device):
        exact = features.to(torch.promote_types(features.dtype, torch.float32))
        if kind == "fft":
            high = _fast_part(exact, cutoff)
        else:
            high = exact - {"avgpool": _box_mean, "laplacian": _neighbor_mean, "haar": _block_mean}[kind](exact)
    return high.to(features.dtype)


# Shifted slices instead of padding and pooling: the same in 2D and 3D, for any number of channels and sides of one
# voxel, and their backward pass is deterministic on a GPU, where that of replicate padding and of pooling is not.


def _neighbors(x: Tensor, axis: int) -> Tensor:
    """Sum of the two neighbors along an axis; a border voxel is its own neighbor."""
    n = x.shape[axis]
    before = torch.cat([x.narrow(axis, 0, 1), x.narrow(axis, 0, n - 1)], axis)
    after = torch.cat([x.narrow(axis, 1, n - 1), x.narrow(axis, n - 1, 1)], axis)
    return before + after


def _box_mean(x: Tensor) -> Tensor:
    for axis in range(2, x.ndim):
        x = (x + _neighbors(x, axis)) / 3
    return x


def _neighbor_mean(x: Tensor) -> Tensor:
    axes = range(2, x.ndim)
    return torch.stack([_neighbors(x, axis) for axis in axes]).sum(0) / (2 * len(axes))


def _block_mean(x: Tensor) -> Tensor:
    """Average over blocks of two voxels along each axis: what the lowest Haar band holds.

    The basis functions of that band are constant on a block, so a map without the band is the map minus the means of
    the blocks: neither the other bands nor an inverse transform is needed. A voxel left over at the end of an odd side
    is the mean of itself and its repetition.
    """
    for axis in range(2, x.ndim):
        count, left = divmod(x.shape[axis], 2)
        pairs = x.narrow(axis, 0, 2 * count).reshape(*x.shape[:axis], count, 2, *x.shape[axis + 1 :])
        means = pairs.mean(axis + 1, keepdim=True).expand_as(pairs).flatten(axis, axis + 1)
        x = torch.cat([means, x.narrow(axis, 2 * count, left)], axis)
    return x


def _fast_part(x: Tensor, cutoff: float) -> Tensor:
    sizes = x.shape[2:]
    axes = tuple(range(2, x.ndim))
    kept = torch.zeros((), dtype=torch.bool, device=x.device)
    for axis, n in enumerate(sizes):
        cycles = torch.arange(n, device=x.device)
        cycles = torch.minimum(cycles, n - cycles)
        if axis == len(sizes) - 1:
            cycles = cycles[: n // 2 + 1]
        # Cycles per side, which are whole numbers: 3 / 24 must not be larger than 0.125 by rounding.
        kept = kept | (cycles > cutoff * n).view(-1, *[1] * (len(sizes) - 1 - axis))
    part: Tensor = torch.fft.irfftn(torch.fft.rfftn(x, dim=axes) * kept, s=sizes, dim=axes)
    return part
