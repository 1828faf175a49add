"""Read and write scans and labels of every supported file type, chosen by the file's ending."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from scantly.errors import ImageError, times
from scantly.files import atomic_path, normal_name
from scantly.imaging import dicom, h5, nifti, raster
from scantly.imaging.decoding import require_finite, to_labels, within_memory
from scantly.imaging.geometry import Geometry, Image, Label, geometry_difference

__all__ = [
    "ENDINGS",
    "Source",
    "file_ending",
    "has_label",
    "read_geometry",
    "read_image",
    "read_label",
    "stem",
    "write_label",
    "write_scalar",
]

ENDINGS = (".nii.gz", ".nii", ".png", ".tif", ".tiff", ".h5")
"""File endings that can be read and written."""

Source: TypeAlias = Path | dicom.Series
"""Where a scan is read from: a file, or a DICOM series (see :func:`scantly.imaging.dicom.find_cases`)."""


def file_ending(path: Source) -> str | None:
    """The ending of :data:`ENDINGS` that the file's name has, upper or lower case; None if it has none.

    A DICOM series has none: what is written for it is NIfTI.

    Example:
        >>> file_ending(Path("heart.v2.NII.gz"))
        '.nii.gz'
    """
    if isinstance(path, dicom.Series):
        return None
    name = path.name.lower()
    return next((ending for ending in ENDINGS if name.endswith(ending) and name != ending), None)


def stem(path: Path) -> str:
    """The file's name without its ending, in the form in which names are compared (see :func:`normal_name`).

    Example:
        >>> stem(Path("scans/heart.v2.nii.gz"))
        'heart.v2'
    """
    ending = file_ending(path)
    return normal_name(path.name[: -len(ending)] if ending else path.name)


def _require_ending(path: Path) -> str:
    ending = file_ending(path)
    if ending is None:
        raise ImageError(f"{path} is of no known type; use one of {', '.join(ENDINGS)}.")
    return ending


def read_image(paths: Sequence[Source], *, finite: bool = True) -> Image:
    """Read a scan from its channel files.

    Intensities are those the file means: NIfTI slope and intercept are applied, DICOM's too. A color PNG or TIFF
    gives three channels.

    Args:
        paths: One file or DICOM series per channel, in order.
        finite: Refuse NaN and infinite voxels.

    Returns:
        Array (C, D, H, W) float32 and the grid of the first file.

    Raises:
        ImageError: if a file is missing, damaged, 4D or not finite, does not fit into memory, or if the channels
            lie on different grids.
    """
    if not paths:
        raise ValueError("paths is empty; give one file per channel")
    read = [_read_channels(path) for path in paths]
    geometry = read[0][1]
    with within_memory(paths[0], sum(array.nbytes for array, _ in read)):
        for path, (array, own) in zip(paths, read, strict=True):
            if finite:
                require_finite(array, path.folder if isinstance(path, dicom.Series) else path)
            difference = geometry_difference(own, geometry)
            if difference:
                raise ImageError(
                    f"{path} and {paths[0]} are channels of one case but differ in {difference}; "
                    "resample one onto the other."
                )
        return Image(read[0][0] if len(read) == 1 else np.concatenate([array for array, _ in read]), geometry)


def _read_channels(path: Source) -> tuple[NDArray[np.float32], Geometry]:
    if isinstance(path, dicom.Series):
        with within_memory(path, 4 * math.prod(path.geometry.shape)):
            return dicom.read_series(path)
    array, geometry = _decode(path, "image")
    with within_memory(path, 4 * array.size), np.errstate(over="ignore", invalid="ignore"):
        return array.astype(np.float32, copy=False), geometry


def read_label(path: Path) -> Label:
    """Read the class indices of an annotation; of an ``.h5`` file its array ``label``.

    Returns:
        Array (D, H, W) of the smallest of uint8, int16, int32, int64 that holds the values, and its grid.

    Raises:
        ImageError: if the file is missing, damaged or 4D, does not fit into memory, or holds values that are not
            whole numbers.
    """
    array, geometry = _decode(path, "label")
    with within_memory(path, array.nbytes):
        return Label(to_labels(array[0], path), geometry)


def _decode(path: Path, meant: Literal["image", "label"]) -> tuple[NDArray[Any], Geometry]:
    """Array (C, D, H, W) of the type that the format gives, and its grid, held against each other."""
    ending = _require_ending(path)
    if ending in (".nii", ".nii.gz"):
        array, geometry = nifti.read_voxels(path, np.float32 if meant == "image" else None)
        array = array[np.newaxis]
    elif ending == ".h5":
        array, geometry = h5.read_voxels(path, meant)
        array = array[np.newaxis]
    else:
        array, geometry = raster.read_voxels(path, indices=meant == "label")
    if array.shape[1:] != geometry.shape:
        found, said = times(array.shape[1:]), times(geometry.shape)
        raise ImageError(f"{path} holds {found} voxels (z, y, x) where its header says {said}; export it again.")
    return array, geometry


def read_geometry(path: Source) -> Geometry:
    """Read only the header: grid and type of a file or DICOM series, no voxels.

    Raises:
        ImageError: if the header cannot be read.
    """
    if isinstance(path, dicom.Series):
        return path.geometry
    ending = _require_ending(path)
    if ending in (".nii", ".nii.gz"):
        return nifti.read_geometry(path)
    return h5.read_geometry(path) if ending == ".h5" else raster.read_geometry(path)


def has_label(path: Path) -> bool:
    """Whether a scan's file carries its own annotation: an ``.h5`` file with an array ``label``.

    Raises:
        ImageError: if an ``.h5`` file cannot be opened.
    """
    return file_ending(path) == ".h5" and h5.has_label(path)


def write_label(path: Path, array: NDArray[Any], geometry: Geometry) -> None:
    """Write class indices on exactly the grid of the image they belong to; whole or not at all.

    NIfTI files carry the image's transforms, codes and units bit by bit; PNG and TIFF are gray, of one byte
    per pixel (two if there are more than 255 classes), with the image's resolution tags.

    Args:
        path: File to write; its ending chooses the type.
        array: (D, H, W) integers.
        geometry: Of the image, from :func:`read_image` or :func:`read_geometry`.

    Raises:
        ImageError: if the file type cannot hold the array.
        ValueError: if the array is not of ``geometry.shape`` or does not hold integers.
    """
    array = np.asarray(array)
    if array.dtype.kind not in "iub":
        raise ValueError(f"labels are integers, not {array.dtype}")
    _write(path, to_labels(array, path), geometry, is_label=True)


def write_scalar(path: Path, array: NDArray[Any], geometry: Geometry) -> None:
    """Write real numbers, for instance an uncertainty map, as float32 on the grid of an image.

    Args:
        path: File to write: NIfTI, TIFF or ``.h5`` (under ``image``).
        array: (D, H, W).
        geometry: Of the image.

    Raises:
        ImageError: if the file type cannot hold the array (PNG).
        ValueError: if the array is not of ``geometry.shape``.
    """
    _write(path, np.asarray(array, dtype=np.float32), geometry, is_label=False)


def _write(path: Path, array: NDArray[Any], geometry: Geometry, *, is_label: bool) -> None:
    ending = _require_ending(path)
    if array.shape != geometry.shape:
        raise ValueError(f"the array's shape is {array.shape}, the image's is {geometry.shape}")
    array = np.ascontiguousarray(array)
    flat = ending in (".png", ".tif", ".tiff")
    if flat:
        array = _as_picture(path, array, is_label)
    with atomic_path(path) as temporary:
        if flat:
            raster.write(temporary, array, geometry)
        elif ending == ".h5":
            h5.write(temporary, array, geometry, "label" if is_label else "image")
        else:
            nifti.write(temporary, array, geometry)


def _as_picture(path: Path, array: NDArray[Any], is_label: bool) -> NDArray[Any]:
    if array.shape[0] != 1:
        raise ImageError(f"{path} would hold {array.shape[0]} slices, which PNG and TIFF here cannot; use .nii.gz.")
    if not is_label:
        if path.suffix.lower() == ".png":
            raise ImageError(f"{path} would hold real numbers, which PNG cannot; use .tif or .nii.gz.")
        return array
    if array.dtype != np.uint8:
        low, high = int(array.min()), int(array.max())
        if low < 0 or high > np.iinfo(np.uint16).max:
            raise ImageError(f"{path} would hold label values {low} to {high}; PNG and TIFF hold 0 to 65535.")
        return array.astype(np.uint16)
    return array
