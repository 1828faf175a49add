"""Two-dimensional PNG and TIFF files, with the pixel size of their resolution tags."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import PIL.Image
import tifffile
from numpy.typing import NDArray

from scantly.errors import ImageError
from scantly.imaging import png, tiff
from scantly.imaging.decoding import say_no_spacing
from scantly.imaging.geometry import Geometry, Resolution, grid
from scantly.imaging.pixels import Layout

__all__ = ["read_geometry", "read_voxels", "write"]

_MM: Final = {"inch": 25.4, "cm": 10.0, "m": 1000.0}
_SCREEN_DPI: Final = (72.0, 96.0)


def read_geometry(path: Path) -> Geometry:
    """Read size and resolution, of the picture as displayed.

    Raises:
        ImageError: if the file is damaged or holds more than one picture.
    """
    return _geometry(tiff.read_layout(path) if _is_tiff(path) else png.read_layout(path), path)


def read_voxels(path: Path, *, indices: bool) -> tuple[NDArray[Any], Geometry]:
    """Read the pixels as a viewer shows them; :mod:`scantly.imaging.pixels` says what they mean.

    Args:
        path: PNG or TIFF file of one picture.
        indices: True for labels: a palette's indices are returned instead of its colors, codes of few bits are not
            spread over 0 to 255, and a color picture is accepted only if its channels are equal.

    Returns:
        Array (C, 1, H, W) of a type that holds the stored one, and its grid. Color pictures have three channels;
        opacity is left out.

    Raises:
        ImageError: if the file is damaged, holds several pictures or pixels that cannot be read, or is a color
            picture given as label.
    """
    channels, layout = (tiff if _is_tiff(path) else png).read_pixels(path, indices=indices)
    if indices and len(channels) > 1:
        if not (channels == channels[:1]).all():
            raise ImageError(f"{path} is a color picture, not a label: store the class index of each pixel in gray.")
        channels = channels[:1]
    return channels[:, np.newaxis], _geometry(layout, path)


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
            resolutionunit=tiff.UNITS[unit],
        )
        return
    options: dict[str, Any] = {}
    if resolution is not None and resolution[2] != "none":
        to_dpi = _MM["inch"] / _MM[resolution[2]]
        options["dpi"] = tuple(top / bottom * to_dpi for top, bottom in resolution[:2])
    PIL.Image.fromarray(array[0]).save(path, format="PNG", **options)


def _is_tiff(path: Path) -> bool:
    return path.suffix.lower() in (".tif", ".tiff")


def _geometry(layout: Layout, path: Path) -> Geometry:
    resolution = layout.resolution
    spacing = _spacing(resolution)
    if spacing is None:
        say_no_spacing(f"{path.suffix.lower()} files without resolution tags")
    height, width = layout.size
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


def _in_tiff_units(
    resolution: Resolution | None,
) -> tuple[tuple[int, int], tuple[int, int], Literal["none", "inch", "cm"]]:
    if resolution is None:
        return (1, 1), (1, 1), "none"
    x, y, unit = resolution
    if unit != "m":
        return x, y, unit
    return (x[0], x[1] * 100), (y[0], y[1] * 100), "cm"
