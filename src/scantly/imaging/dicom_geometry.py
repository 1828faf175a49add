"""From the positions of DICOM slices to one regular grid, or a sentence on why there is none.

Slices are ordered along the normal of their plane (rows x columns, in which they are stored), never by file
name or instance number. So the axes of the grid are always right-handed in LPS, as in ITK's series reader.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scantly.errors import ImageError
from scantly.imaging.dicom_files import Slice
from scantly.imaging.geometry import Geometry, grid

__all__ = ["arrange"]

log = logging.getLogger("scantly")

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_ROUNDING = 1e-3  # greatest difference of direction cosines, and of pixel spacings in mm, within a series
_SAME_PLACE_MM = 1e-3
_IRREGULAR = 0.1  # of the slice spacing: positions are often written with one decimal
_SHIFT = 0.5  # of a pixel: greatest distance of a slice from where a grid with right angles has it


def arrange(slices: Sequence[Slice], where: str) -> tuple[list[Slice], Geometry]:
    """Order the slices of a series and find their grid.

    Args:
        slices: All of one series.
        where: What messages call the series.

    Returns:
        The slices in ascending order along the normal, and the grid of (D, H, W) = (slice, row, column). An image
        without position (a radiograph) gets LPS axes, origin 0 and ``spatial_dims`` 2.

    Raises:
        ImageError: if the slices differ in size, pixel spacing or orientation, lack positions, are missing, lie
            twice at one place, at varying distances, or on a slope (gantry tilt).
    """
    first = slices[0]
    _same(slices, "image size (rows, columns)", lambda image: image.shape, where)
    if len(slices) == 1 and first.position is None:
        return [first], _flat(first, where)
    for image in slices:
        _require_place(image, where)
    _same(slices, "frame of reference", lambda image: image.reference_frame, where)
    _same(slices, "PixelSpacing", lambda image: image.pixel_spacing, where)
    _same(slices, "ImageOrientationPatient", lambda image: image.orientation, where)
    plane = _plane(first, where)
    positions = np.array([image.position for image in slices], dtype=np.float64)
    order = np.argsort(positions @ plane.normal, kind="stable")
    ordered, positions = [slices[index] for index in order], positions[order]
    spacing = _slice_spacing(ordered, positions, plane, where)
    affine = np.eye(4)
    affine[:3, 0] = plane.row * plane.spacing[1]
    affine[:3, 1] = plane.column * plane.spacing[0]
    affine[:3, 2] = plane.normal * spacing
    affine[:3, 3] = positions[0]
    return ordered, Geometry(shape=(len(ordered), *first.shape), affine=_LPS_TO_RAS @ affine)


@dataclass(frozen=True)
class _Plane:
    """Unit vectors (LPS) along a row, along a column and across both; distance of rows, of columns in mm."""

    row: NDArray[np.float64]
    column: NDArray[np.float64]
    normal: NDArray[np.float64]
    spacing: tuple[float, float]


def _flat(image: Slice, where: str) -> Geometry:
    spacing = image.pixel_spacing
    if spacing is None or min(spacing) <= 0:
        log.warning("%s has no pixel spacing: it is taken as 1, and there will be no distances in mm.", where)
        return Geometry((1, *image.shape), grid(), spatial_dims=2, has_spacing=False)
    return Geometry((1, *image.shape), grid((1.0, spacing[0], spacing[1])), spatial_dims=2)


def _require_place(image: Slice, where: str) -> None:
    needed = {
        "ImagePositionPatient": image.position,
        "ImageOrientationPatient": image.orientation,
        "PixelSpacing": image.pixel_spacing,
    }
    missing = [tag for tag, value in needed.items() if value is None]
    if missing:
        raise ImageError(
            f"{image.path} of {where} has no {' and no '.join(missing)}: its place in space is unknown; "
            "export the series again with its geometry."
        )


def _same(slices: Sequence[Slice], what: str, value: Callable[[Slice], Any], where: str) -> None:
    """Refuse slices whose ``value`` differs; numbers may by rounding."""
    first = value(slices[0])
    for image in slices[1:]:
        other = value(image)
        if other == first or (not isinstance(first, str) and np.allclose(other, first, rtol=0, atol=_ROUNDING)):
            continue
        raise ImageError(
            f"{where} has images of different {what}: {first} in {slices[0].path.name}, {other} in {image.path.name}; "
            "export every stack of slices as a series of its own."
        )


def _plane(image: Slice, where: str) -> _Plane:
    row, column = np.array(image.orientation, dtype=np.float64).reshape(2, 3)
    rows, columns = image.pixel_spacing or (0.0, 0.0)
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if not np.allclose(lengths, 1, atol=0.01) or abs(row @ column) > 0.01 or min(rows, columns) <= 0:
        raise ImageError(
            f"{where} has no usable orientation and pixel spacing (ImageOrientationPatient {image.orientation}, "
            f"PixelSpacing {image.pixel_spacing}); export it again."
        )
    row = row / lengths[0]
    column = column - (column @ row) * row  # rounded cosines are not quite at right angles
    column = column / np.linalg.norm(column)
    return _Plane(row, column, np.cross(row, column), (float(rows), float(columns)))


def _slice_spacing(ordered: Sequence[Slice], positions: NDArray[np.float64], plane: _Plane, where: str) -> float:
    """Distance of neighboring slices in mm, if it is everywhere the same and straight across the plane."""
    if len(ordered) == 1:
        if ordered[0].thickness is None:
            log.warning("%s is one slice without thickness: 1 mm is taken.", where)
        return ordered[0].thickness or 1.0
    heights = (positions - positions[0]) @ plane.normal
    gaps = np.diff(heights)
    if gaps.min() < _SAME_PLACE_MM:
        _refuse_repeated(ordered, gaps, where)
    spacing = float(heights[-1] / (len(heights) - 1))
    if np.abs(heights - spacing * np.arange(len(heights))).max() > _IRREGULAR * spacing:
        _refuse_irregular(gaps, where)
    _refuse_shifted(positions, heights, plane, where)
    return spacing


def _refuse_repeated(ordered: Sequence[Slice], gaps: NDArray[np.float64], where: str) -> None:
    at = int(np.argmax(gaps < _SAME_PLACE_MM))
    one, two = ordered[at], ordered[at + 1]
    if one.sop_uid == two.sop_uid and one.path != two.path:
        raise ImageError(f"{one.path} and {two.path} are the same image twice; remove one of the copies.")
    places = 1 + int((gaps >= _SAME_PLACE_MM).sum())
    raise ImageError(
        f"{where} has {len(ordered)} images at {places} positions (for instance {one.path.name} and {two.path.name} "
        "at one): time points, echoes or repetitions in one series; export each as a series of its own."
    )


def _refuse_irregular(gaps: NDArray[np.float64], where: str) -> None:
    usual = float(np.sort(gaps)[(len(gaps) - 1) // 2])  # the lower median: a gap that exists
    steps = np.rint(gaps / usual)
    if steps.min() >= 1 and np.abs(gaps - steps * usual).max() <= _IRREGULAR * usual:
        missing = int((steps - 1).sum())
        at = int(np.argmax(steps > 1))
        raise ImageError(
            f"{where} lacks {missing} slice{'' if missing == 1 else 's'}: there are {gaps[at]:.4g} mm between slices "
            f"{at + 1} and {at + 2} of {len(gaps) + 1} in order of position, {usual:.4g} mm elsewhere; "
            "fetch or export the whole series."
        )
    raise ImageError(
        f"{where} has slices at varying distances ({gaps.min():.4g} to {gaps.max():.4g} mm); resample it to an even "
        "spacing, or export every stack of slices as a series of its own."
    )


def _refuse_shifted(positions: NDArray[np.float64], heights: NDArray[np.float64], plane: _Plane, where: str) -> None:
    """Slices beside a straight stack: the images would be sheared, which spacings and directions cannot say.

    NIfTI could hold the shear, but resampling, networks trained on straight stacks and ITK's readers could not
    make use of it.
    """
    drift = (positions - positions[0]) - np.outer(heights, plane.normal)
    sideways = np.linalg.norm(drift, axis=1)
    if sideways.max() <= _SHIFT * min(plane.spacing):
        return
    total = positions[-1] - positions[0]
    angle = float(np.degrees(np.arccos(np.clip(total @ plane.normal / np.linalg.norm(total), -1, 1))))
    straight = np.outer(np.arange(len(positions)) / (len(positions) - 1), total)
    if np.linalg.norm(positions - positions[0] - straight, axis=1).max() <= _SHIFT * min(plane.spacing):
        raise ImageError(
            f"{where} was taken with a tilted gantry: its slices are stacked at {angle:.3g} degrees to their normal; "
            "resample it to right angles first, for instance with dcm2niix, and give the NIfTI file."
        )
    at = int(np.argmax(np.abs(np.diff(sideways)))) + 1
    raise ImageError(
        f"{where} has slices that are shifted sideways against each other, by {sideways.max():.3g} mm "
        f"(slice {at + 1} of {len(positions)} in order of position); export every stack as a series of its own."
    )
