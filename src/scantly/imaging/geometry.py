"""Where voxels lie in space: shape, spacing, orientation, and the way to a common orientation and back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
from nibabel import orientations
from numpy.typing import NDArray

from scantly.errors import times

__all__ = [
    "Geometry",
    "Image",
    "Label",
    "Resolution",
    "from_canonical",
    "geometry_difference",
    "grid",
    "to_canonical",
]

Resolution: TypeAlias = tuple[tuple[int, int], tuple[int, int], Literal["inch", "cm", "m", "none"]]
"""Pixels per unit in x and in y, each as (numerator, denominator), and the unit, as PNG and TIFF store it."""

CANONICAL = ("L", "P", "S")


@dataclass(frozen=True, eq=False)
class Geometry:
    """Grid of one image or label file.

    Attributes:
        shape: (D, H, W) = (z, y, x), the reverse of the file's own index order.
        affine: (4, 4) float64; takes the file's own (x, y, z) index to RAS+ millimetres.
        spatial_dims: 2 for PNG, TIFF and two-dimensional arrays in ``.h5`` (then D is 1), else 3.
        has_spacing: False where the file says nothing about size; the spacing is 1 then.
        header: The NIfTI header as stored, so that what is written for this image carries the same
            transforms, codes and units; None if there is none or the grid has been changed since.
        resolution: The resolution tags of a PNG or TIFF as stored, for the same purpose.
    """

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]
    spatial_dims: Literal[2, 3] = 3
    has_spacing: bool = True
    header: bytes | None = None
    resolution: Resolution | None = None

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size (z, y, x) in mm; 1 where the file holds none."""
        x, y, z = (float(size) for size in np.linalg.norm(self.affine[:3, :3], axis=0))
        return z, y, x

    @property
    def orientation(self) -> str:
        """Nearest anatomical direction in which each file axis (x, y, z) grows, for instance ``"LPS"``."""
        return "".join(orientations.aff2axcodes(self.affine))


@dataclass(frozen=True, eq=False)
class Image:
    """A scan: ``array`` (C, D, H, W) float32 in the file's intensity units, and where it lies."""

    array: NDArray[np.float32]
    geometry: Geometry


@dataclass(frozen=True, eq=False)
class Label:
    """An annotation: ``array`` (D, H, W) of class indices (uint8 where they fit), and where it lies."""

    array: NDArray[np.integer[Any]]
    geometry: Geometry


def grid(spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> NDArray[np.float64]:
    """Affine of an image without orientation: LPS axes, origin 0.

    Files that hold no orientation get this one, so that turning them to the canonical orientation leaves
    them as they are.

    Args:
        spacing: (z, y, x) in mm.
    """
    z, y, x = spacing
    return np.diag([-x, -y, z, 1.0])


def geometry_difference(a: Geometry, b: Geometry, tolerance: float = 1e-3) -> str | None:
    """Say in words how two grids differ.

    The affines are compared only if both files hold a spacing: a PNG without resolution tags fits one with.

    Args:
        a: First grid.
        b: Second grid.
        tolerance: Greatest difference of an affine entry that counts as equal, in mm.

    Returns:
        For instance ``"shape 10 x 256 x 216 against 10 x 216 x 256 (z, y, x)"``; None if they agree.
    """
    if a.shape != b.shape:
        first, second = (times(shape) for shape in (a.shape, b.shape))
        return f"shape {first} against {second} (z, y, x)"
    comparable = a.has_spacing and b.has_spacing
    if not comparable or np.allclose(a.affine, b.affine, rtol=0, atol=tolerance):
        return None
    return _affine_difference(a, b, tolerance)


def _affine_difference(a: Geometry, b: Geometry, tolerance: float) -> str:
    if not np.allclose(a.spacing, b.spacing, rtol=0, atol=tolerance):
        return f"spacing {_numbers(a.spacing)} against {_numbers(b.spacing)} mm (z, y, x)"
    if a.orientation != b.orientation:
        return f"orientation {a.orientation} against {b.orientation}"
    if not np.allclose(a.affine[:3, :3], b.affine[:3, :3], rtol=0, atol=tolerance):
        return f"direction of the axes, by up to {np.abs(a.affine - b.affine)[:3, :3].max():.4g} mm per voxel"
    return f"origin {_numbers(a.affine[:3, 3])} against {_numbers(b.affine[:3, 3])} mm"


def _numbers(values: Any) -> str:
    return "(" + ", ".join(f"{float(value):.6g}" for value in values) + ")"


def _turn(geometry: Geometry) -> NDArray[np.float64]:
    """Per file axis (x, y, z): the axis it becomes in LPS, and 1 or -1 if it is flipped."""
    target = orientations.axcodes2ornt(CANONICAL)
    current = orientations.io_orientation(geometry.affine)
    turn: NDArray[np.float64] = orientations.ornt_transform(current, target)
    return turn


def to_canonical(array: NDArray[Any], geometry: Geometry) -> tuple[NDArray[Any], Geometry]:
    """Flip and permute axes to the nearest LPS orientation, without interpolation.

    Args:
        array: (..., D, H, W), in the orientation of ``geometry``.
        geometry: Its grid. Files without orientation (PNG, TIFF, ``.h5``) are left as they are.

    Returns:
        The turned array (a view where possible) and its grid, whose ``header`` is None if anything changed.

    Raises:
        ValueError: if the array's last three axes are not ``geometry.shape``.
    """
    _require_shape(array, geometry.shape)
    turn = _turn(geometry)
    if np.array_equal(turn, [[0, 1], [1, 1], [2, 1]]):
        return array, geometry
    turned = np.flip(array, axis=_flipped(turn))
    turned = np.transpose(turned, _lead(array) + [array.ndim - 3 + axis for axis in _order(turn)])
    file_shape = geometry.shape[::-1]
    affine = geometry.affine @ orientations.inv_ornt_aff(turn, file_shape)
    return turned, replace(geometry, shape=turned.shape[-3:], affine=affine, header=None)


def from_canonical(array: NDArray[Any], geometry: Geometry) -> NDArray[Any]:
    """Undo :func:`to_canonical` exactly.

    Args:
        array: (..., D, H, W) in the LPS orientation of the same image.
        geometry: The original grid, to which the array is turned back.

    Returns:
        The array in the orientation of ``geometry`` (a view where possible).

    Raises:
        ValueError: if the result would not have ``geometry.shape``.
    """
    turn = _turn(geometry)
    back = np.argsort(_order(turn))
    turned: NDArray[Any] = np.transpose(array, _lead(array) + [array.ndim - 3 + int(axis) for axis in back])
    _require_shape(turned, geometry.shape)
    return np.flip(turned, axis=_flipped(turn))


def _flipped(turn: NDArray[np.float64]) -> tuple[int, ...]:
    """Axes of a (..., z, y, x) array, counted from the end, that are flipped."""
    return tuple(-1 - axis for axis in range(3) if turn[axis, 1] < 0)


def _order(turn: NDArray[np.float64]) -> list[int]:
    """Which of the array's (z, y, x) axes becomes the first, second, third of (z, y, x)."""
    source = np.argsort(turn[:, 0])
    return [2 - int(source[2 - axis]) for axis in range(3)]


def _lead(array: NDArray[Any]) -> list[int]:
    return list(range(array.ndim - 3))


def _require_shape(array: NDArray[Any], shape: tuple[int, int, int]) -> None:
    if array.shape[-3:] != shape:
        raise ValueError(f"the array's shape is {array.shape}, its last three axes should be {shape}")
