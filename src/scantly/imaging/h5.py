"""HDF5 files as the semi-supervised literature shares them: arrays ``image`` and ``label``, no geometry.

A two-dimensional array is one slice (H, W), a three-dimensional one is taken as (D, H, W) in the order
stored.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
from numpy.typing import NDArray

from scantly.errors import ImageError
from scantly.imaging.decoding import decoding, guard_size, say_no_spacing
from scantly.imaging.geometry import Geometry, grid

__all__ = ["has_label", "read_geometry", "read_voxels", "write"]

_KIND = "HDF5 file"
Key = Literal["image", "label"]


def has_label(path: Path) -> bool:
    """Whether the file holds an array ``label``."""
    with decoding(path, _KIND), h5py.File(path, "r") as file:
        return isinstance(file.get("label"), h5py.Dataset)


def read_geometry(path: Path) -> Geometry:
    """Read the shape of ``image``, or of ``label`` if there is no image."""
    with decoding(path, _KIND), h5py.File(path, "r") as file:
        key: Key = "image" if "image" in file else "label"
        return _geometry(_dataset(file, key, path), path, key)


def read_voxels(path: Path, key: Key) -> tuple[NDArray[Any], Geometry]:
    """Read one array.

    Returns:
        Array (D, H, W) as stored (D is 1 for a two-dimensional one) and its grid.

    Raises:
        ImageError: if the file is damaged, has no such array, or one of another kind.
    """
    with decoding(path, _KIND) as reading, h5py.File(path, "r") as file:
        dataset = _dataset(file, key, path)
        geometry = _geometry(dataset, path, key)
        guard_size(path, dataset.nbytes)
        # HDF5 unpacks a chunk into a buffer that it doubles, with the one before at hand until it is copied
        reading.needs = dataset.nbytes + 3 * math.prod(dataset.chunks or (0,)) * dataset.dtype.itemsize
        array: NDArray[Any] = np.asarray(dataset[()]).reshape(geometry.shape)
        return array, geometry


def write(path: Path, array: NDArray[Any], geometry: Geometry, key: Key) -> None:
    """Write (D, H, W) under ``key``, two-dimensional if the geometry is. Not atomic by itself."""
    stored = array[0] if geometry.spatial_dims == 2 else array
    with h5py.File(path, "w") as file:
        file.create_dataset(key, data=stored, compression="gzip", track_times=False)


def _dataset(file: Any, key: Key, path: Path) -> Any:
    dataset = file.get(key)
    if not isinstance(dataset, h5py.Dataset):
        there = ", ".join(sorted(map(str, file))) or "nothing"
        raise ImageError(f"{path} has no array '{key}' (it holds {there}); rename the array or leave it out.")
    return dataset


def _geometry(dataset: Any, path: Path, key: Key) -> Geometry:
    shape = None if dataset.shape is None else tuple(int(size) for size in dataset.shape)
    if dataset.dtype.kind not in "iufb":
        raise ImageError(f"{path} has '{key}' of type {dataset.dtype}; store numbers.")
    if shape is None or len(shape) not in (2, 3) or 0 in shape:
        raise ImageError(f"{path} has '{key}' of shape {shape}; store one slice (H, W) or volume (D, H, W).")
    say_no_spacing(".h5 files")
    depth, height, width = (1, *shape) if len(shape) == 2 else shape
    return Geometry(
        shape=(depth, height, width),
        affine=grid(),
        spatial_dims=2 if len(shape) == 2 else 3,
        has_spacing=False,
    )
