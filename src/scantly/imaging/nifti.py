"""NIfTI-1 and NIfTI-2 files, plain or gzipped.

nibabel interprets the header; the bytes are read and written here, for three reasons: the check sum at the
end of a gzip file is always verified (a reader that stops after the last voxel misses it), a damaged header
never makes us reserve memory that the file does not fill, and equal arrays give equal files.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import nibabel
import numpy as np
from nibabel.nifti1 import data_type_codes
from numpy.typing import NDArray

from scantly.errors import ImageError, times
from scantly.imaging.decoding import decoding
from scantly.imaging.geometry import Geometry

__all__ = ["read_geometry", "read_voxels", "write"]

_KIND = "NIfTI file"
_CHUNK = 1 << 24
_ROUNDING = 1e-5  # of a squared sum of numbers in float32, some steps of arithmetic included
_MM_PER_UNIT = {1: 1000.0, 3: 1e-3}  # metre, micrometre; 2 is mm, 0 (not said) is read as mm as all tools do


@dataclass(frozen=True)
class _Header:
    raw: bytes
    shape: tuple[int, int, int]  # (x, y, z)
    dtype: np.dtype[Any]
    offset: int
    slope: float
    intercept: float
    affine: NDArray[np.float64]

    @property
    def geometry(self) -> Geometry:
        x, y, z = self.shape
        return Geometry(shape=(z, y, x), affine=self.affine, header=self.raw)


def read_geometry(path: Path) -> Geometry:
    """Read shape and transforms; of a gzipped file only the first bytes are unpacked.

    Raises:
        ImageError: if the header cannot be read or is not that of one 2D or 3D image.
    """
    with decoding(path, _KIND), _stream(path) as stream:
        return _read_header(stream, path).geometry


def read_voxels(path: Path, dtype: type[np.float32] | None) -> tuple[NDArray[Any], Geometry]:
    """Read the voxels, with the file's slope and intercept applied.

    Args:
        path: ``.nii`` or ``.nii.gz`` file.
        dtype: ``np.float32`` for scans. None for labels: the stored type, or float64 if there is a scale.

    Returns:
        Array (D, H, W) and its grid.

    Raises:
        ImageError: if the file is truncated, damaged, no NIfTI, or not one 2D or 3D image.
    """
    with decoding(path, _KIND) as reading, _stream(path) as stream:
        header = _read_header(stream, path)
        _read(stream, header.offset - len(header.raw), path, "header")
        count = math.prod(header.shape) * header.dtype.itemsize
        reading.needs = count + (math.prod(header.shape) * np.dtype(dtype).itemsize if dtype else 0)
        data = _read(stream, count, path, "voxels")
        while stream.read(_CHUNK):  # to the end, where gzip keeps the check sum
            pass
        stored = np.frombuffer(data, header.dtype).reshape(header.shape[::-1])
        return _scale(stored, header, dtype), header.geometry


def _scale(stored: NDArray[Any], header: _Header, dtype: type[np.float32] | None) -> NDArray[Any]:
    native = stored.dtype.newbyteorder("=")
    if header.slope == 1.0 and header.intercept == 0.0:
        with np.errstate(over="ignore", invalid="ignore"):
            return stored.astype(dtype or native, copy=False)
    scaled = np.empty(stored.shape, dtype or np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        for index, plane in enumerate(stored):  # plane by plane: float64 precision without a float64 volume
            scaled[index] = plane.astype(np.float64) * header.slope + header.intercept
    return scaled


@contextmanager
def _stream(path: Path) -> Iterator[IO[bytes] | gzip.GzipFile]:
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if not zipped:
            yield file
            return
        with gzip.GzipFile(fileobj=file) as unzipped:
            yield unzipped


def _read(stream: IO[bytes] | gzip.GzipFile, count: int, path: Path, what: str) -> bytearray:
    data = bytearray()
    try:
        while len(data) < count:
            part = stream.read(min(_CHUNK, count - len(data)))
            if not part:
                break
            data += part
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ImageError(f"{path} is truncated or damaged ({error}); fetch or export it again.") from error
    if len(data) < count:
        raise ImageError(
            f"{path} is truncated: its {what} should take {count} bytes, {len(data)} are there; "
            "fetch or export it again."
        )
    return data


def _read_header(stream: IO[bytes] | gzip.GzipFile, path: Path) -> _Header:
    raw = bytes(_read(stream, 348, path, "header"))
    size = raw[:4]
    if size in ((540).to_bytes(4, "little"), (540).to_bytes(4, "big")):
        raw += bytes(_read(stream, 540 - 348, path, "header"))
        header: Any = nibabel.Nifti2Header(raw, check=False)
        magic = bytes(raw[4:7])
    elif size in ((348).to_bytes(4, "little"), (348).to_bytes(4, "big")):
        header = nibabel.Nifti1Header(raw, check=False)
        magic = bytes(raw[344:347])
    else:
        raise ImageError(f"{path} is not a NIfTI file (its first bytes are {raw[:4]!r}); convert it to NIfTI.")
    if magic not in (b"n+1", b"n+2"):
        raise ImageError(f"{path} is half of an image/header pair or an Analyze file; convert it to .nii.gz.")
    return _interpret(header, raw, path)


def _interpret(header: Any, raw: bytes, path: Path) -> _Header:
    stored = [int(size) for size in header["dim"]]
    shape = stored[1 : stored[0] + 1] if 1 <= stored[0] <= 7 else []
    extra = shape[3:]
    if any(size > 1 for size in extra):
        raise ImageError(
            f"{path} has {len(shape)} dimensions ({times(shape)}), a scan has 3; "
            "split it into one file per channel, named <case>_0000, <case>_0001, ..."
        )
    if len(shape) < 2 or any(size < 1 for size in shape):
        raise ImageError(f"{path} has dimensions {shape}, not those of a 2D or 3D image; export it again.")
    x, y, z = [*shape[:3], 1][:3]
    code = int(header["datatype"])
    if code not in data_type_codes.code:
        raise ImageError(f"{path} has voxels of an unknown type (datatype {code}); export it again.")
    dtype = np.dtype(header.get_data_dtype())
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise ImageError(
            f"{path} has voxels of type {header.get_value_label('datatype')}; "
            "store each channel as integers or floating-point numbers."
        )
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if not (math.isfinite(slope) and math.isfinite(intercept)) or slope == 0:
        slope, intercept = 1.0, 0.0  # the standard: not set
    offset = float(header["vox_offset"])
    if not len(raw) <= offset < 2**40:
        raise ImageError(f"{path} says its voxels begin at byte {offset:g}; it is damaged: export it again.")
    return _Header(raw, (x, y, z), dtype, int(offset), slope, intercept, _affine(header, path))


def _affine(header: Any, path: Path) -> NDArray[np.float64]:
    affine = np.array(_as_others_read(header, path).get_best_affine(), dtype=np.float64)
    affine[:3] *= _MM_PER_UNIT.get(int(header["xyzt_units"]) & 7, 1.0)
    axes = affine[:3, :3]
    lengths = np.linalg.norm(axes, axis=0) if np.isfinite(affine).all() else np.zeros(3)
    if not np.all(lengths > 0) or abs(np.linalg.det(axes / lengths)) < 1e-6:
        raise ImageError(
            f"{path} has no usable voxel size and direction in its header (sizes x, y, z: "
            f"{', '.join(f'{value:g}' for value in lengths)} mm); export it again or mend the header."
        )
    return affine


def _as_others_read(header: Any, path: Path) -> Any:
    """A copy of the header with what nibabel and SimpleITK mend on reading; the file's own stays as it is.

    Voxel sizes are lengths whatever their sign, any ``pixdim[0]`` but a negative one means a right-handed qform (the
    standard says so of 0), and a picture of two dimensions needs no third size. A quaternion is stored as three
    numbers whose squares sum to 1 at most, which rounding can exceed: half a turn is then meant.
    """
    mended = header.copy()
    fields = mended.structarr
    sizes = np.abs(fields["pixdim"][1:4])
    flat = fields["dim"][1:4] == 1
    flat[max(int(fields["dim"][0]), 0) :] = True
    sizes[flat & (sizes == 0)] = 1
    fields["pixdim"][1:4] = sizes
    fields["pixdim"][0] = -1 if fields["pixdim"][0] < 0 else 1
    if fields["sform_code"] > 0 or fields["qform_code"] <= 0:
        return mended
    names = ("quatern_b", "quatern_c", "quatern_d")
    quaternion = np.array([fields[name] for name in names], dtype=np.float64)
    squared = float(quaternion @ quaternion)
    if not squared <= 1 + _ROUNDING:
        numbers = ", ".join(f"{value:.9g}" for value in quaternion)
        raise ImageError(
            f"{path} has a rotation in its header (quaternion b, c, d = {numbers}) that is none: the squares must not "
            f"sum to more than 1, but make {squared:.7g}; mend its qform, or export the scan again."
        )
    if squared > 1:
        for name, value in zip(names, quaternion / math.sqrt(squared), strict=True):
            fields[name] = value
    return mended


def write(path: Path, array: NDArray[Any], geometry: Geometry) -> None:
    """Write one volume, or one per class, with the transforms, codes and units that ``geometry`` came with.

    No time and no file name is stored: equal arrays give equal bytes. The data are packed volume by volume.

    Args:
        path: File to write, gzipped if it ends in ``.gz``. Not atomic by itself.
        array: (D, H, W), of the type to be stored; or (K, D, H, W), which becomes the axes (x, y, z, class).
        geometry: Where it lies.
    """
    header = _header_for(geometry, array.dtype)
    if array.ndim == 4:
        _add_axis(header, geometry, len(array))
    with path.open("wb") as file, _packer(file, path) as stream:
        stream.write(header.binaryblock + bytes(4))
        for volume in array if array.ndim == 4 else array[np.newaxis]:
            stream.write(_stored_bytes(volume, header))


@contextmanager
def _packer(file: IO[bytes], path: Path) -> Iterator[IO[bytes] | gzip.GzipFile]:
    if not path.name.lower().endswith(".gz"):
        yield file
        return
    # level 4: within a few per cent of the smallest size for scans and labels at a third of the time
    with gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0, compresslevel=4) as zipped:
        yield zipped


def _add_axis(header: Any, geometry: Geometry, extent: int) -> None:
    fields = header.structarr
    fields["dim"][:5] = (4, *geometry.shape[::-1], extent)
    fields["dim"][5:] = 1
    fields["pixdim"][4] = 1
    if fields["pixdim"][3] == 0:  # of a file of two dimensions
        fields["pixdim"][3] = 1


def _stored_bytes(array: NDArray[Any], header: Any) -> bytes:
    return array.astype(array.dtype.newbyteorder(header.endianness), copy=False).tobytes(order="C")


def _header_for(geometry: Geometry, dtype: np.dtype[Any]) -> Any:
    if geometry.header is None:
        header: Any = nibabel.Nifti1Header()
        header.set_data_shape(geometry.shape[::-1])
        header.set_sform(geometry.affine, code="scanner")
        header.set_qform(geometry.affine, code="scanner", strip_shears=True)
        header.set_xyzt_units("mm")
    else:
        second = len(geometry.header) == 540
        header = (nibabel.Nifti2Header if second else nibabel.Nifti1Header)(geometry.header, check=False)
    header.set_data_dtype(dtype.newbyteorder("="))
    fields = header.structarr
    fields["vox_offset"] = len(header.binaryblock) + 4
    fields["scl_slope"], fields["scl_inter"] = 1, 0
    fields["cal_min"], fields["cal_max"] = 0, 0
    fields["intent_code"] = 0
    return header
