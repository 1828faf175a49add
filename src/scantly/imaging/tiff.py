"""TIFF pictures: structure and tags by tifffile, pixels by Pillow where it keeps their type, else by tifffile.

Which of the two decodes depends on the kind of pixel alone, so that a picture means the same however it is packed.
Without the package imagecodecs tifffile unpacks less than Pillow; what it lacks is refused by name.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import PIL.Image
import tifffile
from numpy.typing import NDArray

from scantly.errors import ImageError
from scantly.imaging.decoding import decoding, guard_size
from scantly.imaging.geometry import Resolution
from scantly.imaging.pixels import Layout, as_displayed, displayed_layout, from_pillow, inverted, pillow_unbounded

__all__ = ["UNITS", "read_layout", "read_pixels"]

_KIND = "TIFF image"

UNITS: Final[dict[Literal["none", "inch", "cm"], int]] = {"none": 1, "inch": 2, "cm": 3}
"""Values of the tag ResolutionUnit."""

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR = 0, 1, 2, 3, 5, 6
_SAMPLES = {WHITE_IS_ZERO: 1, BLACK_IS_ZERO: 1, RGB: 3, PALETTE: 1, CMYK: 4, YCBCR: 3}
_NO_LABEL = {CMYK: "CMYK", YCBCR: "YCbCr"}

#: Packings that lose something, or may have: class indices cannot be trusted after them.
_LOSSY = (6, 7, 22610, 33003, 33004, 33005, 33007, 34712, 34676, 34677, 34887, 34892, 34927, 34934, 50001, 50002, 52546)
_UNPACKED = 1
#: Packings that a build of libtiff may lack; it does not say so in a way that could be told from damage.
_OPTIONAL = (34925, 50000, 50001)

# our own errors tell what is wrong with a file; without a handler Python would print these lines as well
logging.getLogger("tifffile").addHandler(logging.NullHandler())


def read_layout(path: Path) -> Layout:
    """Read the tags; no pixel is decoded.

    Raises:
        ImageError: as :func:`read_pixels`, as far as tags show it.
    """
    with decoding(path, _KIND), tifffile.TiffFile(path) as file:
        return _layout(_only_page(file, path), path)


def read_pixels(path: Path, *, indices: bool) -> tuple[NDArray[Any], Layout]:
    """Read the pixels as displayed.

    Args:
        path: The file.
        indices: True for labels: codes instead of brightness or colors, and no packing that loses something.

    Returns:
        (C, H, W) with one channel, or three of a color picture; opacity is left out.

    Raises:
        ImageError: if the file is damaged, holds several pictures, or pixels that cannot be read.
    """
    with decoding(path, _KIND) as reading, tifffile.TiffFile(path) as file:
        page = _only_page(file, path)
        layout = _layout(page, path)
        photometric = _photometric(page, path)
        if indices:
            _require_exact(page, photometric, path)
        claimed = math.prod(layout.size) * page.samplesperpixel * -(-_bits(page, path) // 8)
        guard_size(path, claimed)
        reading.needs = claimed
        _require_data(page, path, photometric)
        pixels = _by_pillow(page, photometric, path, indices=indices) if _pillow_keeps(page, photometric) else None
        return pixels if pixels is not None else _by_tifffile(page, photometric, path, indices=indices), layout


def _only_page(file: tifffile.TiffFile, path: Path) -> Any:
    if len(file.pages) != 1:
        raise ImageError(
            f"{path} holds {len(file.pages)} pictures; a TIFF here is one 2D image: "
            "convert a stack to .nii.gz, which keeps the slice distance too."
        )
    return file.pages[0]


def _layout(page: Any, path: Path) -> Layout:
    if page.imagedepth != 1 or page.imagelength < 1 or page.imagewidth < 1:
        raise ImageError(f"{path} is not a 2D picture (shape {page.shape}); convert a stack to .nii.gz.")
    size = int(page.imagelength), int(page.imagewidth)
    return displayed_layout(Layout(size, _resolution(page.tags)), _orientation(page))


def _resolution(tags: Any) -> Resolution | None:
    code = int(tags["ResolutionUnit"].value) if "ResolutionUnit" in tags else UNITS["inch"]
    unit = next((name for name, known in UNITS.items() if known == code), None)
    if unit is None or "XResolution" not in tags or "YResolution" not in tags:
        return None
    (x, x_per), (y, y_per) = (map(int, tags[name].value) for name in ("XResolution", "YResolution"))
    return (x, x_per), (y, y_per), unit


def _orientation(page: Any) -> int:
    return int(page.tags[274].value) if 274 in page.tags else 1


def _bits(page: Any, path: Path) -> int:
    if not isinstance(page.bitspersample, int) or not isinstance(page.sampleformat, int):
        raise ImageError(
            f"{path} has channels of different types (bits {page.bitspersample}); save all with one number of bits."
        )
    return int(page.bitspersample)


def _photometric(page: Any, path: Path) -> int:
    """What codes stand for; refused if that is not said, not known here, or does not fit the number of samples."""
    if 262 not in page.tags:
        raise ImageError(f"{path} does not say whether 0 is black or white (tag 262 is missing); save it again.")
    photometric = int(page.photometric)
    if photometric not in _SAMPLES:
        raise ImageError(
            f"{path} holds {getattr(page.photometric, 'name', photometric)} pixels, neither gray nor color that can be "
            "read; convert it to RGB."
        )
    channels = _channels(page, photometric)
    if channels != _SAMPLES[photometric] and not (channels == 3 and photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO)):
        raise ImageError(
            f"{path} has {page.samplesperpixel} channels that are not gray or color with opacity; store gray or RGB, "
            "or one file per channel."
        )
    return photometric


def _channels(page: Any, photometric: int) -> int:
    """Channels that are not opacity; a single surplus one is, even where the tag that says so is left out."""
    samples = int(page.samplesperpixel)
    if not page.extrasamples and samples == _SAMPLES[photometric] + 1:
        return samples - 1
    return samples - sum(int(meaning) in (1, 2) for meaning in page.extrasamples)


def _require_exact(page: Any, photometric: int, path: Path) -> None:
    if photometric in _NO_LABEL:
        raise ImageError(
            f"{path} is a color picture ({_NO_LABEL[photometric]}), not a label: store the class index of each pixel "
            "in gray."
        )
    if page.compression in _LOSSY:
        raise ImageError(
            f"{path} is packed with {_name(page.compression)}, which may change pixels: class indices need a packing "
            "that keeps them; save the label with deflate or uncompressed."
        )


def _name(compression: Any) -> str:
    return str(getattr(compression, "name", compression))


def _require_data(page: Any, path: Path, photometric: int) -> None:
    """Refuse a picture of which a part is not in the file: decoders give zeros, or other bytes, for it."""
    size = path.stat().st_size
    parts = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    whole = all(offset > 0 and count > 0 and offset + count <= size for offset, count in parts)
    enough = True
    if page.compression == _UNPACKED and photometric != YCBCR:  # whose color may have fewer rows and columns
        planes = page.samplesperpixel if page.planarconfig == 2 else 1
        row = -(-page.imagewidth * (page.samplesperpixel // planes) * page.bitspersample // 8)
        enough = sum(count for _, count in parts) >= planes * page.imagelength * row
    if not whole or not enough or len(parts) != math.prod(page.chunked):
        raise ImageError(f"{path} lacks a part of its pixels: it is truncated or damaged; export it again.")


def _pillow_keeps(page: Any, photometric: int) -> bool:
    """Whether Pillow gives these pixels as stored: it narrows 16-bit color, and swaps bytes of packed MM files."""
    bits, kind = page.bitspersample, int(page.sampleformat)
    if _channels(page, photometric) != _SAMPLES[photometric]:
        return False
    if _SAMPLES[photometric] > 1:
        return bool(kind == 1 and bits == 8)
    if kind == 1:
        return bool(bits <= 16)
    return bool((kind, bits) in ((2, 16), (2, 32), (3, 32)) and page.parent.byteorder == "<")


def _by_pillow(page: Any, photometric: int, path: Path, *, indices: bool) -> NDArray[Any] | None:
    """(C, H, W); None for a layout that Pillow does not know, or a packing that its libtiff may not have."""
    with pillow_unbounded():
        try:
            picture = PIL.Image.open(path, formats=["TIFF"])
        except PIL.UnidentifiedImageError:
            return None
        with picture:
            picture.info.pop("xmp", None)  # the tag alone says how the picture is turned
            try:
                picture.load()
            except OSError:
                if page.compression in _OPTIONAL:
                    return None
                raise
            pixels = from_pillow(picture, page.bitspersample, path, indices=indices)
    if photometric == WHITE_IS_ZERO and page.bitspersample > 8:  # which Pillow leaves as they are
        pixels = inverted(pixels, page.bitspersample, path)
    return pixels[np.newaxis] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)


def _by_tifffile(page: Any, photometric: int, path: Path, *, indices: bool) -> NDArray[Any]:
    """(C, H, W)."""
    if page.dtype is None or page.dtype.kind not in "iufb":
        raise ImageError(f"{path} has pixels of type {page.dtype}; store integers or floating-point numbers.")
    if photometric in _NO_LABEL:
        raise ImageError(
            f"{path} holds {_NO_LABEL[photometric]} colors of {page.bitspersample} bits, which cannot be turned into "
            "RGB without loss; save it as RGB."
        )
    if 1 in map(int, page.extrasamples):
        raise ImageError(f"{path} holds {page.dtype} colors multiplied by opacity; save it without opacity.")
    _require_codec(page)
    parts = page.asarray(squeeze=False)  # (planes, depth 1, H, W, samples)
    pixels = np.moveaxis(parts[:, 0], -1, 1).reshape(-1, *parts.shape[2:4])
    pixels = pixels[: _channels(page, photometric)]
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8)
    if photometric == WHITE_IS_ZERO:
        pixels = inverted(pixels, page.bitspersample, path)
    if photometric == PALETTE:
        pixels = pixels if indices else page.colormap[:, pixels[0]] >> 8  # of 16 bits, as Pillow takes them
    elif page.bitspersample < 8 and not indices:
        pixels = pixels * np.uint8(255 // (2**page.bitspersample - 1))
    return np.ascontiguousarray(as_displayed(pixels, _orientation(page)))


def _require_codec(page: Any) -> None:
    """Raise, as tifffile would for each pixel type in other words, that a decoder is not installed."""
    try:
        tifffile.TIFF.DECOMPRESSORS[page.compression]
        tifffile.TIFF.UNPREDICTORS[page.predictor]
    except (KeyError, ImportError) as error:
        raise ImportError(f"{_name(page.compression)} of {page.dtype} pixels", name="imagecodecs") from error
