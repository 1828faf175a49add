"""What a pixel of a picture means, whatever its format, compression and layout.

A PNG or TIFF is a picture here, read as a viewer shows it: brighter is larger, rows and columns as displayed, color
as red, green and blue. Only what a label needs beyond that is kept apart: class indices are the codes that stand for
the brightness (0 to 3 for two bits, where a scan spreads them over 0 to 255), and a palette's entries by number.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.TiffImagePlugin
from numpy.typing import NDArray

from scantly.errors import ImageError
from scantly.imaging.geometry import Resolution

__all__ = ["Layout", "as_displayed", "displayed_layout", "from_pillow", "inverted", "pillow_unbounded"]

_TURNED = (5, 6, 7, 8)  # orientations (TIFF and EXIF tag 274) in which rows and columns change places

_GRAY = ("1", "L", "I;16", "I;16B", "I;16L", "I", "F")
_WITH_OPACITY = {"LA": "L", "RGBA": "RGB", "RGBX": "RGB"}
_CONVERTED = ("CMYK", "YCbCr")

_pillow = threading.Lock()


@dataclass(frozen=True)
class Layout:
    """A picture without its pixels, as displayed.

    Attributes:
        size: (H, W).
        resolution: As its tags say; None if they do not.
    """

    size: tuple[int, int]
    resolution: Resolution | None


def displayed_layout(stored: Layout, orientation: int) -> Layout:
    """The layout that a viewer shows of a picture stored so."""
    if orientation not in _TURNED:
        return stored
    (height, width), resolution = stored.size, stored.resolution
    return Layout((width, height), resolution and (resolution[1], resolution[0], resolution[2]))


@contextmanager
def pillow_unbounded() -> Iterator[None]:
    """Let Pillow read pictures of any size, and every TIFF by libtiff, as this process otherwise leaves it alone.

    Pillow takes pictures of more than 179 million pixels for an attack; slides have more. Readers here refuse what
    the file's bytes cannot hold. Uncompressed TIFF goes through code of Pillow's own that knows less of layouts.
    """
    with _pillow:
        before = PIL.Image.MAX_IMAGE_PIXELS, PIL.TiffImagePlugin.READ_LIBTIFF
        PIL.Image.MAX_IMAGE_PIXELS, PIL.TiffImagePlugin.READ_LIBTIFF = None, True
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", module="PIL")  # of tags that are read, and judged, elsewhere
                yield
        finally:
            PIL.Image.MAX_IMAGE_PIXELS, PIL.TiffImagePlugin.READ_LIBTIFF = before


def from_pillow(picture: PIL.Image.Image, bits: int, path: Path, *, indices: bool) -> NDArray[Any]:
    """The pixels of a picture that Pillow has opened.

    Args:
        picture: Of any mode that PNG and TIFF lead to.
        bits: Per sample, in the file.
        path: For messages.
        indices: True for labels.

    Returns:
        (H, W), or (H, W, 3) for color.

    Raises:
        ImageError: for colors that Pillow cannot convert, or that can be no label.
    """
    if picture.mode == "La":  # premultiplied
        picture = picture.convert("LA")
    mode = picture.mode
    if mode in _GRAY:
        return _gray(np.array(picture), bits, indices=indices)
    if mode in ("P", "PA") and indices:
        return np.array(picture if mode == "P" else picture.getchannel(0))
    if mode in ("P", "PA"):
        return np.array(picture.convert("RGB"))
    if mode in _WITH_OPACITY:
        return np.array(picture.convert(_WITH_OPACITY[mode]))
    if mode == "RGB":
        return np.array(picture)
    if mode not in _CONVERTED:
        raise ImageError(f"{path} holds {mode} colors, which cannot be read; convert it to RGB.")
    if indices:
        raise ImageError(
            f"{path} is a color picture ({mode}), not a label: store the class index of each pixel in gray."
        )
    return np.array(picture.convert("RGB"))


def _gray(array: NDArray[Any], bits: int, *, indices: bool) -> NDArray[Any]:
    """Pillow gives one bit as truth values, two and four bits spread over 0 to 255."""
    if array.dtype == bool:
        return array.astype(np.uint8) * np.uint8(1 if indices else 255)
    if indices and bits < 8:
        array = array // np.uint8(255 // (2**bits - 1))
    return array


def inverted(array: NDArray[Any], bits: int, path: Path) -> NDArray[Any]:
    """Codes of which 0 is white, turned so that brighter is larger.

    Args:
        array: Codes of any shape.
        bits: Of a code in the file.
        path: For messages.

    Raises:
        ImageError: for floating-point pixels, which have no greatest code.
    """
    if array.dtype.kind not in "iu":
        raise ImageError(
            f"{path} says that 0 is white (WhiteIsZero), which has no meaning for {array.dtype} pixels; save it with "
            "0 as black."
        )
    turned: NDArray[Any] = np.invert(array) if array.dtype.kind == "i" else array.dtype.type(2**bits - 1) - array
    return turned


def as_displayed(array: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Turn stored rows and columns to those a viewer shows.

    Args:
        array: (..., H, W) as stored.
        orientation: Value of the tag; 1, or one that does not exist, leaves the array as it is.

    Returns:
        (..., H, W), or (..., W, H) for orientations 5 to 8; a view.
    """
    if orientation in _TURNED:
        array = np.swapaxes(array, -1, -2)
    if orientation in (3, 4, 7, 8):
        array = array[..., ::-1, :]
    if orientation in (2, 3, 6, 7):
        array = array[..., ::-1]
    return array
