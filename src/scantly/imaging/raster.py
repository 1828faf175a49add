"""Two-dimensional PNG and TIFF files, with the pixel size of their resolution tags."""

from __future__ import annotations

import io
import logging
import math
from pathlib import Path
from typing import Any, Final

import numpy as np
import PIL.Image
import tifffile
from numpy.typing import NDArray

from scantly.errors import ImageError
from scantly.imaging.decoding import decoding, guard_size, say_no_spacing
from scantly.imaging.geometry import Geometry, Resolution, grid

__all__ = ["read_geometry", "read_voxels", "write"]

_MM: Final = {"inch": 25.4, "cm": 10.0, "m": 1000.0}
_UNIT_CODES: Final = {"none": 1, "inch": 2, "cm": 3}  # of the TIFF tag ResolutionUnit
_SCREEN_DPI: Final = (72.0, 96.0)

# our own errors tell what is wrong with a file; without a handler Python would print these lines as well
logging.getLogger("tifffile").addHandler(logging.NullHandler())


def read_geometry(path: Path) -> Geometry:
    """Read size and resolution without decoding the pixels.

    Raises:
        ImageError: if the file is damaged or holds more than one picture.
    """
    if _is_tiff(path):
        with decoding(path, "TIFF image"), tifffile.TiffFile(path) as file:
            return _tiff_geometry(_only_page(file, path), path)
    with decoding(path, "PNG image"), _open_png(path.read_bytes()) as picture:
        return _png_geometry(picture, path)


def read_voxels(path: Path, *, indices: bool) -> tuple[NDArray[Any], Geometry]:
    """Read the pixels.

    Args:
        path: PNG or TIFF file of one picture.
        indices: True for labels: a palette's indices are returned instead of its colors, and a color
            picture is accepted only if its channels are equal.

    Returns:
        Array (C, 1, H, W) of the stored type, and its grid. Color pictures have three channels; opacity is
        left out.

    Raises:
        ImageError: if the file is damaged, holds several pictures, or is a color picture given as label.
    """
    if _is_tiff(path):
        with decoding(path, "TIFF image"), tifffile.TiffFile(path) as file:
            page = _only_page(file, path)
            geometry = _tiff_geometry(page, path)
            pixels = _tiff_pixels(page, path)
    else:
        data = _bytes(path)
        with decoding(path, "PNG image"):
            with _open_png(data) as picture:
                picture.verify()  # the check sums; a picture cannot be used after that
            with _open_png(data) as picture:
                geometry = _png_geometry(picture, path)
                pixels = _png_pixels(picture, data, path, indices)
    channels = _channels_first(pixels, path)
    if indices and len(channels) > 1:
        if not (channels == channels[:1]).all():
            raise ImageError(f"{path} is a color picture, not a label: store the class index of each pixel in gray.")
        channels = channels[:1]
    return channels[:, np.newaxis], geometry


def write(path: Path, array: NDArray[Any], geometry: Geometry) -> None:
    """Write one picture with the resolution tags that ``geometry`` came with. Not atomic by itself.

    Args:
        path: ``.png`` (uint8, uint16) or ``.tif``/``.tiff`` (those and float32) file.
        array: (1, H, W).
        geometry: Its grid.
    """
    resolution = geometry.resolution or _resolution_of(geometry)
    if _is_tiff(path):
        x, y, unit = _in_tiff_units(resolution)
        tifffile.imwrite(
            path,
            array[0],
            photometric="minisblack",
            compression="zlib",
            metadata=None,
            software="",
            resolution=(x, y),
            resolutionunit=_UNIT_CODES[unit],
        )
        return
    options: dict[str, Any] = {}
    if resolution is not None and resolution[2] != "none":
        to_dpi = _MM["inch"] / _MM[resolution[2]]
        options["dpi"] = tuple(top / bottom * to_dpi for top, bottom in resolution[:2])
    PIL.Image.fromarray(array[0]).save(path, format="PNG", **options)


def _is_tiff(path: Path) -> bool:
    return path.suffix.lower() in (".tif", ".tiff")


def _bytes(path: Path) -> bytes:
    with decoding(path, "PNG image"):
        return path.read_bytes()


def _open_png(data: bytes) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(data), formats=["PNG"])


def _png_geometry(picture: PIL.Image.Image, path: Path) -> Geometry:
    width, height = picture.size
    dpi = picture.info.get("dpi")
    resolution: Resolution | None = None
    if dpi is not None:  # PNG stores whole pixels per metre, Pillow converts them
        x, y = (round(float(value) / 0.0254) for value in dpi)
        resolution = ((x, 1), (y, 1), "m")
    return _geometry((height, width), resolution, path)


def _png_pixels(picture: PIL.Image.Image, data: bytes, path: Path, indices: bool) -> NDArray[Any]:
    depth, color = data[24], data[25]  # of the IHDR chunk, always the first
    if depth == 16 and color != 0:
        raise ImageError(
            f"{path} is a color or transparent PNG of 16 bits per channel, which would be cut to 8; save it as TIFF."
        )
    mode = picture.mode
    if mode == "P" and not indices:
        picture = picture.convert("RGB")
    elif mode in ("LA", "RGBA"):
        picture = picture.convert(mode.removesuffix("A"))
    return np.array(picture)


def _only_page(file: tifffile.TiffFile, path: Path) -> Any:
    if len(file.pages) != 1:
        raise ImageError(
            f"{path} holds {len(file.pages)} pictures; a TIFF here is one 2D image: "
            "convert a stack to .nii.gz, which keeps the slice distance too."
        )
    return file.pages[0]


def _tiff_geometry(page: Any, path: Path) -> Geometry:
    if page.imagedepth != 1 or page.imagelength < 1 or page.imagewidth < 1:
        raise ImageError(f"{path} is not a 2D picture (shape {page.shape}); convert a stack to .nii.gz.")
    tags = page.tags
    codes = {code: unit for unit, code in _UNIT_CODES.items()}
    unit = codes.get(int(tags["ResolutionUnit"].value) if "ResolutionUnit" in tags else 2)
    resolution: Resolution | None = None
    if unit is not None and "XResolution" in tags and "YResolution" in tags:
        x, y = (tuple(map(int, tags[name].value)) for name in ("XResolution", "YResolution"))
        resolution = ((x[0], x[1]), (y[0], y[1]), unit)  # type: ignore[assignment]
    return _geometry((int(page.imagelength), int(page.imagewidth)), resolution, path)


def _tiff_pixels(page: Any, path: Path) -> NDArray[Any]:
    guard_size(path, math.prod(page.shape) * np.dtype(page.dtype).itemsize)
    if page.dtype is None or page.dtype.kind not in "iufb":
        raise ImageError(f"{path} has pixels of type {page.dtype}; store integers or floating-point numbers.")
    _require_data(page, path)
    if page.compression in (tifffile.COMPRESSION.LZW, tifffile.COMPRESSION.PACKBITS):
        # tifffile unpacks these with an extra package only; Pillow always does, but narrows some types
        with PIL.Image.open(path, formats=["TIFF"]) as picture:
            pixels = np.array(picture)
        if pixels.dtype.itemsize != page.dtype.itemsize:
            raise ImageError(f"{path} packs {page.dtype} pixels with LZW; save it without compression.")
    else:
        pixels = page.asarray()
    if page.samplesperpixel > 1 and page.planarconfig == tifffile.PLANARCONFIG.SEPARATE:
        pixels = np.moveaxis(pixels, 0, -1) if pixels.shape[0] == page.samplesperpixel else pixels
    return pixels


def _require_data(page: Any, path: Path) -> None:
    """Refuse a picture of which a part is not in the file: tifffile gives zeros for it."""
    size = path.stat().st_size
    parts = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    whole = all(offset > 0 and count > 0 and offset + count <= size for offset, count in parts)
    if not whole or len(parts) != math.prod(page.chunked):
        raise ImageError(f"{path} lacks a part of its pixels: it is truncated or damaged; export it again.")


def _channels_first(pixels: NDArray[Any], path: Path) -> NDArray[Any]:
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8)
    if pixels.ndim == 2:
        return pixels[np.newaxis]
    if pixels.ndim != 3 or pixels.shape[-1] not in (2, 3, 4):
        raise ImageError(f"{path} has pixels of shape {pixels.shape}; store gray or RGB, or one file per channel.")
    colors = 1 if pixels.shape[-1] == 2 else 3
    return np.ascontiguousarray(np.moveaxis(pixels[..., :colors], -1, 0))


def _geometry(size: tuple[int, int], resolution: Resolution | None, path: Path) -> Geometry:
    spacing = _spacing(resolution)
    if spacing is None:
        say_no_spacing(f"{path.suffix.lower()} files without resolution tags")
    height, width = size
    return Geometry(
        shape=(1, height, width),
        affine=grid((1.0, *(spacing or (1.0, 1.0)))),
        spatial_dims=2,
        has_spacing=spacing is not None,
        resolution=resolution,
    )


def _spacing(resolution: Resolution | None) -> tuple[float, float] | None:
    """Pixel size (y, x) in mm; None if the tags are missing, hold no unit, or a screen's default."""
    if resolution is None or resolution[2] == "none" or 0 in (*resolution[0], *resolution[1]):
        return None
    per_mm = [top / bottom / _MM[resolution[2]] for top, bottom in resolution[:2]]
    if all(any(abs(value * 25.4 - dpi) < 0.05 for dpi in _SCREEN_DPI) for value in per_mm):
        return None  # what programs write that know no size: no scan has 0.26 or 0.35 mm pixels by chance
    return 1 / per_mm[1], 1 / per_mm[0]


def _resolution_of(geometry: Geometry) -> Resolution | None:
    if not geometry.has_spacing:
        return None
    _, y, x = geometry.spacing
    return (round(1e6 / x), 1000), (round(1e6 / y), 1000), "m"


def _in_tiff_units(resolution: Resolution | None) -> tuple[tuple[int, int], tuple[int, int], str]:
    if resolution is None:
        return (1, 1), (1, 1), "none"
    x, y, unit = resolution
    if unit != "m":
        return x, y, unit
    return (x[0], x[1] * 100), (y[0], y[1] * 100), "cm"
