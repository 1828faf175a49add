"""Surfaces of voxel masks and the distances between them.

The definition is the literature's: a mask's surface are its voxels with at least one face neighbor outside
the mask (the mask without its erosion by the face-connected cross), and whatever lies outside the array is
background, so mask voxels on the array's edge are surface. Distances are Euclidean, between voxel centers.

An array ``(1, H, W)`` is a 2D image and is measured as ``(H, W)``: taken as a volume of one slice, each of
its voxels would touch the outside above and below, and the whole mask would be surface.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

__all__ = [
    "Box",
    "SurfaceDistances",
    "Surfaces",
    "bounding_box",
    "checked_spacing",
    "drop_single_slice",
    "image_diagonal",
    "surface_voxels",
]

Box = tuple[slice, ...]
Voxel = TypeVar("Voxel", bound=np.generic)

# Most surface voxels of a fair prediction lie within a voxel or two of the reference's surface. Looking these
# up takes a quarter of the time of a tree for all; 2.5 was the best limit on atria, hearts and noise.
_NEAR = 2.5
# Sliding-midpoint trees with leaves of 32 took half the time of SciPy's default tree; results are the same.
_LEAF_SIZE = 32


def drop_single_slice(array: NDArray[Voxel]) -> NDArray[Voxel]:
    """View ``(1, H, W)`` as ``(H, W)``; other shapes as they are."""
    return array[0] if array.ndim == 3 and array.shape[0] == 1 else array


def checked_spacing(spacing: Sequence[float] | None, ndim: int) -> tuple[float, ...] | None:
    """Spacing of the measured axes.

    Args:
        spacing: Voxel size per axis in array order, in mm or any unit; None for voxels. For 2D masks the
            first of three numbers, the slice distance, is left out.
        ndim: Number of axes of the masks after :func:`drop_single_slice`.

    Returns:
        ``ndim`` positive numbers, or None.

    Raises:
        ValueError: if the count does not fit or a number is not positive and finite.
    """
    if spacing is None:
        return None
    values = tuple(float(value) for value in spacing)
    if ndim == 2 and len(values) == 3:
        values = values[1:]
    if len(values) != ndim or not all(np.isfinite(value) and value > 0 for value in values):
        raise ValueError(f"spacing {tuple(spacing)} does not fit: give {ndim} positive numbers, one per axis.")
    return values


def image_diagonal(shape: Sequence[int], spacing: Sequence[float] | None = None) -> float:
    """Length of the diagonal of the whole image, edges of the outer voxels included.

    It is greater than any distance between two voxels of the image, so it serves as the distance of a
    structure that was missed.

    Args:
        shape: Number of voxels per axis.
        spacing: Voxel size per axis; None for 1.

    Returns:
        The diagonal in the unit of ``spacing``, or in voxels.

    Example:
        >>> image_diagonal((3, 4)), image_diagonal((3, 4), (2.0, 2.0))
        (5.0, 10.0)
    """
    sizes = np.asarray(shape, dtype=np.float64)
    return float(np.linalg.norm(sizes if spacing is None else sizes * np.asarray(spacing)))


def bounding_box(array: NDArray[np.generic]) -> Box | None:
    """Smallest box that holds all voxels that are not zero; None if there are none."""
    box: list[slice] = []
    rest = array
    for axis in range(array.ndim):
        others = tuple(other for other in range(array.ndim) if other != axis)
        hits = np.flatnonzero(rest.any(axis=others))
        if hits.size == 0:
            return None
        found = slice(int(hits[0]), int(hits[-1]) + 1)
        box.append(found)
        rest = rest[(slice(None),) * axis + (found,)]
    return tuple(box)


def surface_voxels(mask: NDArray[np.bool_], offset: Sequence[int] | None = None) -> NDArray[np.intp]:
    """Indices of the surface voxels of a mask.

    Args:
        mask: Boolean array. A mask cropped to its bounding box gives the same surface, faster.
        offset: Added to the indices: the corner of the crop in the image.

    Returns:
        Indices ``(n, ndim)`` in the order of the array; ``n = 0`` for an empty mask.
    """
    core = mask.copy()
    for axis in range(mask.ndim):
        inner, source = np.moveaxis(core, axis, 0), np.moveaxis(mask, axis, 0)
        inner[1:] &= source[:-1]
        inner[:-1] &= source[1:]
        inner[:1] = False
        inner[-1:] = False
    points = np.argwhere(mask ^ core)
    return points if offset is None else points + np.asarray(offset, dtype=np.intp)


@dataclass(frozen=True)
class SurfaceDistances:
    """Nearest distances between two surfaces, from which all surface metrics follow.

    Attributes:
        to_reference: For each surface voxel of the prediction, the distance to the reference's surface.
        to_prediction: For each surface voxel of the reference, the distance to the prediction's surface.
    """

    to_reference: NDArray[np.float64]
    to_prediction: NDArray[np.float64]

    def _both(self) -> NDArray[np.float64]:
        return np.concatenate([self.to_reference, self.to_prediction])

    def hd95(self) -> float:
        """95th percentile (linear interpolation) of the distances of both directions together."""
        return float(np.percentile(self._both(), 95))

    def asd(self) -> float:
        """Mean distance from the prediction's surface to the reference's: one direction only."""
        return float(self.to_reference.mean())

    def assd(self) -> float:
        """Mean of the distances of both directions together: the longer surface weighs more."""
        return float(self._both().mean())

    def nsd(self, tolerance: float) -> float:
        """Share of the surface voxels of both masks that lie within ``tolerance`` of the other surface."""
        limit = tolerance * (1 + 1e-9) + 1e-12  # three steps of 0.1 mm are within 0.3 mm, rounding or not
        within = np.count_nonzero(self.to_reference <= limit) + np.count_nonzero(self.to_prediction <= limit)
        return float(within / (self.to_reference.size + self.to_prediction.size))


@dataclass(frozen=True)
class Surfaces:
    """Surface voxels of a prediction and a reference in the coordinates of one image.

    Attributes:
        prediction: Indices ``(n, ndim)``, at least one.
        reference: Indices ``(m, ndim)``, at least one.
    """

    prediction: NDArray[np.intp]
    reference: NDArray[np.intp]

    def distances(self, spacing: Sequence[float] | None = None) -> SurfaceDistances:
        """Exact nearest distances in both directions.

        Args:
            spacing: Voxel size per axis; None for distances in voxels.

        Returns:
            Distances in the unit of ``spacing``, or in voxels.
        """
        size = np.ones(self.prediction.shape[1]) if spacing is None else np.asarray(spacing, dtype=np.float64)
        return SurfaceDistances(
            _nearest(self.prediction, self.reference, size), _nearest(self.reference, self.prediction, size)
        )


def _nearest(points: NDArray[np.intp], targets: NDArray[np.intp], size: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distance of each point to its nearest target: near ones by looking around, the others in a tree."""
    steps, lengths = _neighborhood(size)
    margin = np.abs(steps).max(axis=0)
    low = np.minimum(points.min(axis=0), targets.min(axis=0)) - margin
    shape = np.maximum(points.max(axis=0), targets.max(axis=0)) + margin - low + 1
    strides = np.append(np.cumprod(shape[:0:-1])[::-1], 1)
    occupied = np.zeros(int(shape.prod()), dtype=np.bool_)
    occupied[(targets - low) @ strides] = True

    distances = np.empty(len(points))
    places, far = (points - low) @ strides, np.arange(len(points))
    for length in np.unique(lengths):
        found = np.zeros(len(far), dtype=np.bool_)
        for step in steps[lengths == length] @ strides:
            found |= occupied[places + step]
        distances[far[found]] = length
        places, far = places[~found], far[~found]
    if far.size:
        tree = cKDTree(targets * size, leafsize=_LEAF_SIZE, balanced_tree=False, compact_nodes=False)
        distances[far] = tree.query(points[far] * size)[0]
    return distances


def _neighborhood(size: NDArray[np.float64]) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """All index steps not longer than the limit, ``(n, ndim)``, and their lengths for voxels of ``size``."""
    limit = _NEAR * size.min()
    reach = np.floor(limit / size).astype(np.intp)
    steps = np.argwhere(np.ones(2 * reach + 1, dtype=np.bool_)) - reach
    lengths = np.linalg.norm(steps * size, axis=1)
    return steps[lengths <= limit], lengths[lengths <= limit]
