"""A dense head on the features of every decoder level."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, reduce
from itertools import accumulate, pairwise
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from scantly.networks.blocks import CONV, LINEAR
from scantly.networks.precision import without_autocast

__all__ = ["PyramidHead"]

_CONV: dict[int, Callable[..., Tensor]] = {2: functional.conv2d, 3: functional.conv3d}


class PyramidHead(nn.Module):
    """Dense features from all levels of a decoder: the "feature extractor" of ARCO.

    You et al., "Rethinking Semi-Supervised Medical Image Segmentation: A Variance-Reduction Perspective", NeurIPS 2023,
    public code. With maps f_0 (coarsest) to f_L and 1x1 convolutions A_i without bias, it is

        x = f_0 + A_0 f_0;  x = cat(up(x), f_i), x = x + A_i x  for 0 < i < L;  r = A_L cat(up(x), f_L)

    where up is linear interpolation to the next map's size (``align_corners=True``). The parameters are these A_i. The
    computation is another: all of it is linear and interpolation acts on each channel alone, so that
    r = y_L with y_0 = B_0 f_0, y_i = up(y_{i-1}) + B_i f_i, and small matrices B_i that are products of parts of the
    A_i. The results agree up to rounding, and no map has more channels than r; single voxels (:meth:`at`) and averages
    (:meth:`pooled`) cost no full map at all.

    Args:
        spatial_dims: 2 or 3.
        widths: Channels of each map, coarsest first, two maps or more.
        out_channels: Channels D of the result.
    """

    def __init__(self, spatial_dims: Literal[2, 3], widths: Sequence[int], out_channels: int) -> None:
        super().__init__()
        self.spatial_dims = spatial_dims
        self.widths = tuple(widths)
        self.out_channels = out_channels
        sums = list(accumulate(widths))
        self.mixes = nn.ModuleList(
            CONV[spatial_dims](inputs, outputs, 1, bias=False)
            for inputs, outputs in zip(sums, [*sums[:-1], out_channels], strict=True)
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Features of every voxel.

        Args:
            maps: ``(B, widths[i], *sizes[i])``, coarsest first, as :meth:`EncoderDecoder.pyramid` gives them.

        Returns:
            ``(B, D, *sizes[-1])``.
        """
        first, *others = zip(maps, self._composed(), strict=True)
        result = self._mix(*first)
        for features, weight in others:
            coarser = self._resized(result, features.shape[2:])
            # A convolution does not need its own result for the gradient, so the sum may take its place.
            result = self._mix(features, weight).add_(coarser)
        return result

    def at(self, maps: Sequence[Tensor], index: Tensor) -> Tensor:
        """Features of single voxels, for much fewer than there are: about ``3**spatial_dims`` reads per map each.

        Args:
            maps: As for :meth:`forward`.
            index: Flat indices ``image * voxels + voxel`` in the finest map, ``(n,)`` int64; some may be equal.

        Returns:
            ``(n, D)``, in the precision of the parameters, also under autocast.
        """
        finest = maps[-1].shape[2:]
        image = index // math.prod(finest)
        coordinates = _unravel(index % math.prod(finest), finest)
        parts = []
        with without_autocast(index.device):
            for level, (features, weight) in enumerate(zip(maps, self._composed(), strict=True)):
                place, share = index.new_zeros((len(index), 1)), weight.new_ones((len(index), 1))
                for axis, coordinate in enumerate(coordinates):
                    sizes = tuple(m.shape[2 + axis] for m in maps[level:])
                    first, weights = _window(sizes, weight.dtype, index.device)
                    near = first[coordinate, None] + torch.arange(weights.shape[1], device=index.device)
                    place = (place[:, :, None] * sizes[0] + near[:, None]).flatten(1)
                    share = (share[:, :, None] * weights[coordinate][:, None]).flatten(1)
                # In the weights' precision before reading: gradients of voxels drawn often add up in it; and by
                # index_select, whose sum is the same for any number of threads.
                rows = features.to(weight.dtype).flatten(2).transpose(1, 2)
                where = (image[:, None] * rows.shape[1] + place).flatten()
                read = rows.reshape(-1, rows.shape[2]).index_select(0, where).view(*place.shape, rows.shape[2])
                parts.append((share[:, :, None] * read).sum(1) @ weight.T)
        return reduce(torch.add, parts)

    def pooled(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Averages of the features over a grid of boxes.

        Args:
            maps: As for :meth:`forward`.
            size: Boxes along each axis.

        Returns:
            ``adaptive_avg_pool(forward(maps), size)``, ``(B, D, *size)``, in the precision of the parameters, also
            under autocast.
        """
        parts = []
        with without_autocast(maps[-1].device):
            for level, (features, weight) in enumerate(zip(maps, self._composed(), strict=True)):
                averages = features.to(weight.dtype)
                # The last axis first, so that the largest map is read once in its own order.
                for axis in reversed(range(self.spatial_dims)):
                    sizes = tuple(m.shape[2 + axis] for m in maps[level:])
                    matrix = _pooling(sizes, size[axis], weight.dtype, weight.device)
                    averages = (averages.movedim(2 + axis, -1) @ matrix.T).movedim(-1, 2 + axis)
                parts.append(self._mix(averages, weight))
        return reduce(torch.add, parts)

    def _composed(self) -> list[Tensor]:
        """The matrices B_i, each ``(D, widths[i])``, coarsest first, in the precision of the parameters."""
        *inner, whole = [cast(Tensor, mix.weight).flatten(1) for mix in self.mixes]
        composed: list[Tensor] = []
        with without_autocast(whole.device):
            for width, mix in zip(self.widths[:0:-1], reversed(inner), strict=True):
                composed.append(whole[:, -width:])
                coarser = whole[:, :-width]
                whole = coarser + coarser @ mix
        return [whole, *reversed(composed)]

    def _mix(self, features: Tensor, weight: Tensor) -> Tensor:
        return _CONV[self.spatial_dims](features, weight.view(*weight.shape, *[1] * self.spatial_dims))

    def _resized(self, features: Tensor, size: Sequence[int]) -> Tensor:
        if tuple(features.shape[2:]) == tuple(size):
            return features
        return functional.interpolate(features, tuple(size), mode=LINEAR[self.spatial_dims], align_corners=True)


def _unravel(index: Tensor, size: Sequence[int]) -> list[Tensor]:
    coordinates: list[Tensor] = []
    for length in reversed(size):
        coordinates.insert(0, index % length)
        index = index // length
    return coordinates


def _upsampling(sizes: tuple[int, ...]) -> Tensor:
    """Repeated linear interpolation along one axis as a matrix ``(sizes[-1], sizes[0])``, float64, on the CPU."""
    matrix = torch.eye(sizes[0], dtype=torch.float64)
    for coarse, fine in pairwise(sizes):
        if coarse != fine:
            step = (coarse - 1) / max(fine - 1, 1)
            distance = torch.arange(fine, dtype=torch.float64)[:, None] * step - torch.arange(coarse)
            matrix = (1 - distance.abs()).clamp(min=0) @ matrix
    return matrix


@lru_cache(maxsize=256)
def _window(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """What the coarsest positions along one axis contribute to the finest.

    Returns:
        For each finest position the first coarse one ``(sizes[-1],)`` and the weights of it and the next ones,
        ``(sizes[-1], width)``; the width is that of the widest.
    """
    matrix = _upsampling(sizes)
    # What is not larger stands for 0 and would only widen the windows.
    counts = matrix > 1e-12
    position = torch.arange(sizes[0])
    first = torch.where(counts, position, sizes[0]).amin(1)
    width = int((torch.where(counts, position, -1).amax(1) - first).max()) + 1
    first = first.clamp(max=sizes[0] - width)
    weights = matrix.gather(1, first[:, None] + torch.arange(width))
    return first.to(device, non_blocking=True), weights.to(device, dtype, non_blocking=True)


@lru_cache(maxsize=256)
def _pooling(sizes: tuple[int, ...], boxes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Interpolation along one axis, then averages over boxes, as a matrix ``(boxes, sizes[0])``."""
    fine = sizes[-1]
    box, position = torch.arange(boxes)[:, None], torch.arange(fine)
    inside = (position >= box * fine // boxes) & (position < -(-(box + 1) * fine // boxes))
    averages = inside.double() / inside.sum(1, keepdim=True)
    return (averages @ _upsampling(sizes)).to(device, dtype, non_blocking=True)
