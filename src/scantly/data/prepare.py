"""Preparation of one case as the plan says, and the way back to its original grid.

Order: canonical orientation, normalization over the whole image, label-free center crop, resampling to the
plan's spacing or resizing to its size. 2D plans treat every slice by itself.

Two sampling grids, by the plan's interpolation:

- ``nearest`` takes :func:`scipy.ndimage.zoom`'s default grid, in which the centers of the corner voxels
  coincide, with order 0. This is what the ACDC literature does to images and labels alike.
- ``linear`` and ``cubic`` take the pixel-area grid, in which the outer edges of the image coincide, so that
  nothing shifts when the size changes.

Labels are always nearest, on the image's grid.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from scantly.data.plan import ChannelNormalization, Plan
from scantly.errors import ImageError
from scantly.imaging import Geometry, Image, Label, from_canonical, to_canonical

__all__ = ["Record", "normalize", "prepare", "prepare_label", "restore", "restore_label", "restore_map"]

_ORDER = {"nearest": 0, "linear": 1, "cubic": 3}
Shape: TypeAlias = tuple[int, int, int]
Limits: TypeAlias = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True)
class Record:
    """What was done to a case; enough to bring a prediction back to the original grid.

    Attributes:
        shape: Original shape (D, H, W), as the file is read.
        affine: Original affine, 4 rows of 4, file index (x, y, z) to RAS+ mm.
        spatial_dims: 2 for a 2D image, 3 for a volume.
        has_spacing: Whether the file states its spacing.
        oriented_shape: Shape after the change of orientation.
        crop: Start and stop per axis of the center crop, in the oriented image.
        prepared_shape: Shape of the prepared arrays.
    """

    shape: Shape
    affine: tuple[tuple[float, ...], ...]
    spatial_dims: Literal[2, 3]
    has_spacing: bool
    oriented_shape: Shape
    crop: Limits
    prepared_shape: Shape

    @property
    def geometry(self) -> Geometry:
        """The original grid (without the file's header)."""
        return Geometry(
            shape=self.shape,
            affine=np.array(self.affine, dtype=np.float64),
            spatial_dims=self.spatial_dims,
            has_spacing=self.has_spacing,
        )

    @property
    def window(self) -> tuple[slice, slice, slice]:
        """The center crop as an index of the oriented image."""
        z, y, x = (slice(start, stop) for start, stop in self.crop)
        return z, y, x

    @property
    def cropped_shape(self) -> Shape:
        """Shape between crop and resampling."""
        z, y, x = (stop - start for start, stop in self.crop)
        return z, y, x

    def to_dict(self) -> dict[str, Any]:
        """Plain data; floats survive JSON exactly."""
        return {
            "shape": list(self.shape),
            "affine": [list(row) for row in self.affine],
            "spatial_dims": self.spatial_dims,
            "has_spacing": self.has_spacing,
            "oriented_shape": list(self.oriented_shape),
            "crop": [list(limits) for limits in self.crop],
            "prepared_shape": list(self.prepared_shape),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Record:
        """Inverse of :meth:`to_dict`."""
        return cls(
            shape=tuple(values["shape"]),
            affine=tuple(tuple(row) for row in values["affine"]),
            spatial_dims=values["spatial_dims"],
            has_spacing=values["has_spacing"],
            oriented_shape=tuple(values["oriented_shape"]),
            crop=_limits(values["crop"]),
            prepared_shape=tuple(values["prepared_shape"]),
        )


def prepare(image: Image, plan: Plan) -> tuple[NDArray[np.float32], Record]:
    """Prepare an image for the network.

    Args:
        image: (C, D, H, W) in its file's orientation.
        plan: What to do.

    Returns:
        The prepared image, (C, D', H', W') float32, contiguous, and the record for :func:`restore`.

    Raises:
        ImageError: if the number of channels is not the plan's, or a voxel is NaN or infinite.
    """
    if image.array.shape[0] != len(plan.normalization):
        raise ImageError(
            f"the image has {image.array.shape[0]} channels, but the plan has {len(plan.normalization)}; "
            "give the channels that the model was planned for."
        )
    array, geometry = _oriented(image.array, image.geometry, plan)
    record = _record(image.geometry, geometry, plan)
    prepared = np.empty((array.shape[0], *record.prepared_shape), dtype=np.float32)
    for channel, scheme in enumerate(plan.normalization):
        normalized = normalize(array[channel], scheme)[record.window]
        prepared[channel] = _resize(normalized, record.prepared_shape, plan, _ORDER[plan.interpolation])
    return prepared, record


def prepare_label(label: Label, plan: Plan) -> NDArray[np.uint8] | NDArray[np.int16]:
    """Prepare a label map on the same grid as its image; classes are never mixed (nearest neighbor).

    Args:
        label: (D, H, W) integers in its file's orientation, on its image's grid.
        plan: What to do.

    Returns:
        (D', H', W'), uint8, or int16 where a value exceeds 255.
    """
    array, geometry = _oriented(label.array, label.geometry, plan)
    record = _record(label.geometry, geometry, plan)
    cropped = array[record.window]
    if cropped.max(initial=0) <= 255:
        return _resize(cropped.astype(np.uint8), record.prepared_shape, plan, 0)
    return _resize(cropped.astype(np.int16), record.prepared_shape, plan, 0)


def restore(probs: NDArray[np.float32], record: Record, plan: Plan) -> NDArray[np.float32]:
    """Bring class probabilities from the prepared grid back to the original one.

    Args:
        probs: (K, D', H', W'), summing to one over the classes.
        record: Of the prepared image.
        plan: With which it was prepared.

    Returns:
        (K, D, H, W) float32 on the original grid: linear interpolation, then normalized to sum to one.
        Outside the center crop class 0 has probability one.

    Raises:
        ImageError: if the shape is not that of the prepared image.
    """
    restored = np.empty((probs.shape[0], *record.shape), dtype=np.float32)
    for index, values in enumerate(probs):
        restored[index] = restore_map(values, record, plan, outside=1.0 if index == 0 else 0.0)
    restored /= restored.sum(axis=0)
    return restored


def restore_map(
    values: NDArray[np.float32], record: Record, plan: Plan, *, outside: float = 0.0
) -> NDArray[np.float32]:
    """Bring one map of real numbers from the prepared grid back to the original one, linearly interpolated.

    One class at a time, memory holds two volumes whatever the number of classes.

    Args:
        values: (D', H', W').
        record: Of the prepared image.
        plan: With which it was prepared.
        outside: Value outside the center crop.

    Returns:
        (D, H, W) float32 on the original grid.

    Raises:
        ImageError: if the shape is not that of the prepared image.
    """
    _check_shape(values.shape, record)
    oriented = np.full(record.oriented_shape, outside, dtype=np.float32)
    oriented[record.window] = _resize(values, record.cropped_shape, plan, 1)
    return _stored(oriented, record, plan)


def restore_label(labels: NDArray[T], record: Record, plan: Plan) -> NDArray[T]:
    """Bring a label map from the prepared grid back to the original one, nearest neighbor.

    With interpolation ``nearest`` this is the literature's way: argmax on the resized slice, then zoom back
    with order 0.

    Args:
        labels: (D', H', W').
        record: Of the prepared image.
        plan: With which it was prepared.

    Returns:
        (D, H, W) of the same type on the original grid; 0 outside the center crop.

    Raises:
        ImageError: if the shape is not that of the prepared image.
    """
    _check_shape(labels.shape, record)
    oriented = np.zeros(record.oriented_shape, dtype=labels.dtype)
    oriented[record.window] = _resize(labels, record.cropped_shape, plan, 0)
    return _stored(oriented, record, plan)


def normalize(values: NDArray[np.float32], scheme: ChannelNormalization) -> NDArray[np.float32]:
    """Normalize one channel of one whole image; zero voxels are not treated specially.

    Args:
        values: (D, H, W).
        scheme: See :class:`ChannelNormalization`.

    Returns:
        (D, H, W) float32. A constant image becomes zeros under ``zscore``, ``minmax`` and ``percentile``.

    Raises:
        ImageError: if a voxel is NaN or infinite, or if under ``percentile`` both percentiles are the same although
            the image is not constant.
    """
    broken = values.size - int(np.isfinite(values).sum())
    if broken:
        raise ImageError(f"{broken} voxels are NaN or infinite; replace them by real intensities.")
    if scheme.scheme == "none":
        return values.astype(np.float32)
    if scheme.scheme == "ct":
        shift, scale = scheme.mean, scheme.std
        values = np.clip(values, scheme.lower, scheme.upper)
    elif scheme.scheme == "minmax":
        shift, scale = float(values.min()), float(values.max()) - float(values.min())
    elif scheme.scheme == "percentile":
        low, high = (float(value) for value in np.percentile(values, (1, 99)))
        shift, scale = low, high - low
    else:
        shift, scale = float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64))
    if values.min() == values.max() and scheme.scheme != "ct":
        return np.zeros(values.shape, dtype=np.float32)
    if scheme.scheme == "percentile" and scale == 0:
        raise ImageError(
            f"percentiles 1 and 99 of the image are both {shift:g}, so scheme percentile cannot scale it; "
            "choose another scheme under 'plan.normalization'."
        )
    normalized: NDArray[np.float32] = ((values - np.float64(shift)) / np.float64(scale)).astype(np.float32)
    return normalized


def _oriented(array: NDArray[T], geometry: Geometry, plan: Plan) -> tuple[NDArray[T], Geometry]:
    return to_canonical(array, geometry) if plan.orientation == "LPS" else (array, geometry)


def _stored(array: NDArray[T], record: Record, plan: Plan) -> NDArray[T]:
    stored = from_canonical(array, record.geometry) if plan.orientation == "LPS" else array
    return np.ascontiguousarray(stored)


def _record(original: Geometry, oriented: Geometry, plan: Plan) -> Record:
    crop = _center_crop(oriented.shape, plan.crop_fraction)
    cropped = tuple(stop - start for start, stop in crop)
    return Record(
        shape=original.shape,
        affine=tuple(tuple(float(value) for value in row) for row in original.affine),
        spatial_dims=original.spatial_dims,
        has_spacing=original.has_spacing,
        oriented_shape=oriented.shape,
        crop=crop,
        prepared_shape=_target_shape(cropped, oriented, plan),
    )


def _limits(limits: Iterable[Sequence[int]]) -> Limits:
    z, y, x = ((int(start), int(stop)) for start, stop in limits)
    return z, y, x


def _center_crop(shape: Shape, fraction: float | None) -> Limits:
    """Limits per axis; in-plane ``ceil(fraction * n)`` remain, ``floor`` of half the rest goes before."""
    crop = [(0, shape[0])]
    for extent in shape[1:]:
        # a fraction such as 0.7 of 10 voxels is 7 of them, not 8 because of its last binary digit
        kept = extent if fraction is None else max(1, int(np.ceil(round(fraction * extent, 6))))
        start = (extent - kept) // 2
        crop.append((start, start + kept))
    return _limits(crop)


def _target_shape(cropped: tuple[int, ...], oriented: Geometry, plan: Plan) -> Shape:
    first = 3 - plan.spatial_dims
    target = list(cropped)
    if plan.size is not None:
        target[first:] = plan.size
    elif plan.spacing is not None and oriented.has_spacing:
        for axis in range(first, 3):
            target[axis] = max(1, round(cropped[axis] * oriented.spacing[axis] / plan.spacing[axis]))
    z, y, x = target
    return z, y, x


def _resize(array: NDArray[T], shape: Shape, plan: Plan, order: int) -> NDArray[T]:
    """Resize (D, H, W) on the plan's grid; slice by slice in 2D plans, where D does not change."""
    if array.shape == shape:
        return np.ascontiguousarray(array)
    if plan.spatial_dims == 3:
        return _zoom(array, shape, plan, order)
    resized = np.empty(shape, dtype=array.dtype)
    for index, plane in enumerate(array):
        resized[index] = _zoom(plane, shape[1:], plan, order)
    return resized


def _zoom(array: NDArray[T], shape: tuple[int, ...], plan: Plan, order: int) -> NDArray[T]:
    factors = [target / extent for target, extent in zip(shape, array.shape, strict=True)]
    options: dict[str, Any] = {"order": order}
    if plan.interpolation != "nearest":
        options |= {"grid_mode": True, "mode": "nearest"}
    zoom: Any = ndimage.zoom  # its overloads do not know generic element types
    zoomed: NDArray[T] = zoom(array, factors, **options)
    return zoomed


def _check_shape(shape: tuple[int, ...], record: Record) -> None:
    if tuple(shape) != record.prepared_shape:
        raise ImageError(
            f"the prediction has shape {tuple(shape)}, but the prepared image has {record.prepared_shape}; "
            "restore a prediction of this very image."
        )
