"""PNG pictures, read by Pillow."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from scantly.errors import ImageError
from scantly.imaging.decoding import Reading, decoding, guard_size
from scantly.imaging.geometry import Resolution
from scantly.imaging.pixels import Layout, as_displayed, displayed_layout, from_pillow, pillow_unbounded

__all__ = ["read_layout", "read_pixels"]

_KIND = "PNG image"
_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by color type


def read_layout(path: Path) -> Layout:
    """Read size, resolution and orientation.

    The orientation may stand behind the pixels: where there is one, all are decoded.

    Raises:
        ImageError: as :func:`read_pixels`.
    """
    with decoding(path, _KIND) as reading, pillow_unbounded():
        data = path.read_bytes()
        with _open(data, path, reading) as picture:
            return _layout(picture, _orientation(picture, data))


def read_pixels(path: Path, *, indices: bool) -> tuple[NDArray[Any], Layout]:
    """Read the pixels as displayed.

    Args:
        path: The file.
        indices: True for labels: codes instead of brightness or colors.

    Returns:
        (C, H, W) with one channel, or three of a color picture; opacity is left out.

    Raises:
        ImageError: if the file is damaged, animated, or color of 16 bits.
    """
    with decoding(path, _KIND) as reading, pillow_unbounded():
        data = path.read_bytes()
        with _open(data, path, reading) as picture:
            picture.verify()  # the check sums; a picture cannot be used after that
        with _open(data, path, reading) as picture:
            orientation = _orientation(picture, data)
            pixels = from_pillow(picture, data[24], path, indices=indices)
            layout = _layout(picture, orientation)
    channels = pixels[np.newaxis] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)
    return np.ascontiguousarray(as_displayed(channels, orientation)), layout


def _open(data: bytes, path: Path, reading: Reading) -> PIL.Image.Image:
    picture = PIL.Image.open(io.BytesIO(data), formats=["PNG"])
    depth, color = data[24], data[25]  # of the IHDR chunk, always the first
    if depth == 16 and color != 0:
        raise ImageError(
            f"{path} is a color or transparent PNG of 16 bits per channel, which would be cut to 8; save it as TIFF."
        )
    if getattr(picture, "n_frames", 1) != 1:
        raise ImageError(f"{path} is an animation of several pictures; a PNG here is one 2D image.")
    claimed = math.prod(picture.size) * _SAMPLES.get(color, 1) * (2 if depth == 16 else 1)
    guard_size(path, claimed)
    reading.needs = claimed
    return picture


def _orientation(picture: PIL.Image.Image, data: bytes) -> int:
    """As the EXIF chunk says; editors leave other copies of it in texts, which viewers do not follow."""
    if b"eXIf" not in data:
        return 1
    picture.load()
    for text in ("XML:com.adobe.xmp", "xmp", "Raw profile type exif"):
        picture.info.pop(text, None)
    value = picture.getexif().get(274, 1)
    return value if isinstance(value, int) else 1


def _layout(picture: PIL.Image.Image, orientation: int) -> Layout:
    width, height = picture.size
    dpi = picture.info.get("dpi")
    resolution: Resolution | None = None
    if dpi is not None:  # PNG stores whole pixels per meter, Pillow converts them
        x, y = (round(float(value) / 0.0254) for value in dpi)
        resolution = ((x, 1), (y, 1), "m")
    return displayed_layout(Layout((height, width), resolution), orientation)
