"""Where a patch lies in a case, and cutting it out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from scantly.data.plan import Plan

__all__ = ["Corner", "Patches", "any_voxel"]

Corner: TypeAlias = tuple[int, int, int]
Read: TypeAlias = Callable[[str, tuple[slice, slice, slice]], NDArray[Any]]

#: Patches tried around foreground voxels for one that holds enough classes.
_TRIES = 32


class Patches:
    """Patches of a plan's size in cases of any size; in 2D a patch lies on one slice.

    Args:
        plan: Patch size, dimensions and padding.
        shape: Shape (D, H, W) of a case.

    Attributes:
        sides: (D, H, W) of a patch, D is 1 in 2D.
    """

    def __init__(self, plan: Plan, shape: Callable[[str], tuple[int, int, int]]) -> None:
        self._plan, self._shape = plan, shape
        height, width = plan.patch_size[-2:]
        self.sides: Corner = (plan.patch_size[0] if plan.spatial_dims == 3 else 1), height, width

    def random(self, case: str, depth: int, generator: np.random.Generator) -> Corner:
        """Any position at which the patch lies inside the case and its padding; in 2D on the given slice."""
        lows, highs = self._limits(case)
        z, y, x = (int(value) for value in generator.integers(0, np.subtract(highs, lows) + 1) + lows)
        return (z if self._plan.spatial_dims == 3 else depth), y, x

    def around(self, case: str, voxel: NDArray[np.int64]) -> Corner:
        """The patch with the voxel in its middle, moved as far as needed to lie inside the case and its padding."""
        sides = zip(voxel, self.sides, *self._limits(case), strict=True)
        z, y, x = (min(max(int(v) - side // 2, low), high) for v, side, low, high in sides)
        return z, y, x

    def with_classes(
        self,
        case: str,
        depth: int,
        voxels: Mapping[int, NDArray[np.int64]],
        generator: np.random.Generator,
        *,
        wanted: int,
    ) -> Corner:
        """The first patch around drawn foreground voxels that holds enough foreground classes, else the best one.

        Args:
            case: Name of the case.
            depth: The slice, in 2D.
            voxels: Voxels (n, 3) of each foreground class of the case, in 2D of the slice.
            generator: Source of the draws.
            wanted: Number of foreground classes that is enough.
        """
        best, most = self.random(case, depth, generator), 0
        for _ in range(_TRIES if voxels else 0):
            corner = self.around(case, any_voxel(voxels, generator))
            end = np.add(corner, self.sides)
            held = sum(bool(((v >= corner) & (v < end)).all(axis=1).any()) for v in voxels.values())
            if held > most:
                best, most = corner, held
            if most >= min(wanted, len(voxels)):
                break
        return best

    def cut(self, read: Read, case: str, corner: Corner) -> NDArray[Any]:
        """Read a patch (..., *patch), with zeros where it reaches beyond the case."""
        window, beyond = [], []
        for start, side, n in zip(corner, self.sides, self._shape(case), strict=True):
            window.append(slice(max(start, 0), min(start + side, n)))
            beyond.append((max(-start, 0), max(start + side - n, 0)))
        part = read(case, (window[0], window[1], window[2]))
        if any(before or after for before, after in beyond):
            part = np.pad(part, [*[(0, 0)] * (part.ndim - 3), *beyond])
        return part[..., 0, :, :] if self._plan.spatial_dims == 2 else part

    def _limits(self, case: str) -> tuple[Corner, Corner]:
        """First and last corner of a patch; negative ones begin in the zeros that surround a small case.

        The padding is the plan's: what is missing, or, with a margin, the literature's for LA. That one is on
        every axis as soon as one side of the case is not larger than the patch. Where such a margin reaches as far as
        the patch itself (none of the literature's does) the patch is kept on the case by a voxel: one that lies in
        the padding alone would show nothing.
        """
        lows, highs = [], []
        sides, shape = self.sides, self._shape(case)
        first = 3 - self._plan.spatial_dims
        margin = self._plan.pad_margin
        small = margin > 0 and any(n <= side for n, side in zip(shape[first:], sides[first:], strict=True))
        for axis, (n, side) in enumerate(zip(shape, sides, strict=True)):
            if small and axis >= first:
                pad = max((side - n) // 2 + margin, 0)
                low, high = max(-pad, 1 - side), min(n + pad - side, n - 1)
            else:
                low = -(max(side - n, 0) // 2)
                high = low + max(n - side, 0)
            lows.append(low)
            highs.append(high)
        return (lows[0], lows[1], lows[2]), (highs[0], highs[1], highs[2])


def any_voxel(voxels: Mapping[int, NDArray[np.int64]], generator: np.random.Generator) -> NDArray[np.int64]:
    """A random voxel of a random class, every class equally often."""
    values = sorted(voxels)
    of_class = voxels[values[int(generator.integers(len(values)))]]
    voxel: NDArray[np.int64] = of_class[int(generator.integers(len(of_class)))]
    return voxel
