"""Where the windows of a volume or slice lie, and what their voxels weigh."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from scantly.inference.settings import InferenceSettings

__all__ = ["Tiling", "gaussian_weights", "tile", "window_starts"]

Index = tuple[slice, ...]


def window_starts(side: int, window: int, stride: int) -> list[int]:
    """First voxels of the windows along one axis, as the literature places them.

    ``ceil((side - window) / stride) + 1`` windows that start at ``min(stride * i, side - window)``, so the last
    one ends with the image.

    Args:
        side: Extent of the (padded) image in voxels, at least ``window``.
        window: Extent of a window.
        stride: Distance of neighbors.

    Example:
        >>> window_starts(160, 112, 18), window_starts(88, 80, 4)
        ([0, 18, 36, 48], [0, 4, 8])
    """
    count = math.ceil((side - window) / stride) + 1
    return [min(stride * index, side - window) for index in range(count)]


@dataclass(frozen=True)
class Tiling:
    """Windows over one image, padded where it is too small.

    Attributes:
        sides: Extent of the image, per axis.
        padded: Extent with padding.
        window: Extent of a window.
        starts: First voxels of the windows, per axis, in the padded image.
    """

    sides: tuple[int, ...]
    padded: tuple[int, ...]
    window: tuple[int, ...]
    starts: tuple[tuple[int, ...], ...]

    @property
    def windows(self) -> list[Index]:
        """Index of every window in the padded image, last axis fastest."""
        corners = itertools.product(*self.starts)
        return [tuple(slice(a, a + n) for a, n in zip(corner, self.window, strict=True)) for corner in corners]

    @property
    def inside(self) -> Index:
        """Index of the image in the padded one: the smaller half of the padding is in front."""
        before = [(total - side) // 2 for total, side in zip(self.padded, self.sides, strict=True)]
        return tuple(slice(left, left + side) for left, side in zip(before, self.sides, strict=True))

    def pad(self, images: Tensor) -> Tensor:
        """``(N, C, *sides)`` with zeros around, ``(N, C, *padded)``; the same tensor where nothing is missing."""
        if self.padded == self.sides:
            return images
        pads = [(part.start, total - part.stop) for part, total in zip(self.inside, self.padded, strict=True)]
        return F.pad(images, [value for pair in reversed(pads) for value in pair])

    def crop(self, maps: Tensor) -> Tensor:
        """The image's part of ``(N, K, *padded)``, a view."""
        return maps if self.padded == self.sides else maps[(slice(None), slice(None), *self.inside)]


def tile(
    sides: Sequence[int], patch_size: Sequence[int], settings: InferenceSettings, divisor: Sequence[int]
) -> Tiling:
    """Lay windows over an image.

    Args:
        sides: Extent of the image, (D, H, W) or (H, W).
        patch_size: The training patch; images are padded to it, as in training.
        settings: Windows and their distance.
        divisor: For ``whole``: the padded sides become multiples of these.

    Returns:
        The tiling. ``whole`` is one window of the padded image.

    Raises:
        ConfigError: if the settings do not fit the dimensions, or leave gaps.
    """
    settings.check(patch_size)
    window = settings.window_sides(patch_size)
    padded = tuple(max(side, extent) for side, extent in zip(sides, window, strict=True))
    if settings.window == "whole":
        padded = tuple(math.ceil(side / step) * step for side, step in zip(padded, divisor, strict=True))
        return Tiling(tuple(sides), padded, padded, tuple((0,) for _ in padded))
    # the small number undoes the binary rounding of shares such as 1 - 16 / 96
    strides = settings.stride or [max(1, int(extent * (1 - settings.overlap) + 1e-6)) for extent in window]
    starts = [tuple(window_starts(*axis)) for axis in zip(padded, window, strides, strict=True)]
    return Tiling(tuple(sides), padded, window, tuple(starts))


@lru_cache(maxsize=4)
def gaussian_weights(window: tuple[int, ...], device: torch.device) -> Tensor:
    """Weight of each voxel of a window: a Gaussian whose deviation is an eighth of the side, at least 0.001.

    The scheme of nnU-Net (Isensee et al., Nature Methods 2021), with the values of MONAI's, which would take two
    seconds and 200 MB to import for these lines.

    Args:
        window: Extent of a window.
        device: Where it is used.

    Returns:
        ``(*window)``, float32, in [0.001, 1].
    """
    weights = torch.ones((), device=device)
    for side in window:
        distance = torch.arange(side, dtype=torch.float32, device=device) - (side - 1) / 2
        weights = weights[..., None] * torch.exp(distance**2 / (-2 * (side / 8) ** 2))
    return weights.clamp_(min=1e-3)
