"""What every reader needs: faults told in a sentence, and voxel values checked."""

from __future__ import annotations

import functools
import logging
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scantly.errors import ImageError
from scantly.imaging.causes import HEADER_FAULTS, memory_sentence, why_unreadable

__all__ = ["Reading", "decoding", "guard_size", "require_finite", "say_no_spacing", "to_labels", "within_memory"]

log = logging.getLogger("scantly")

# What decoders raise on damaged bytes. They are written for sound files: a flipped bit may surface as any of
# these, so a shorter list would let a traceback through where the user needs the file's name.
_FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
    *HEADER_FAULTS,
)

# No lossless coding of the formats we read packs more than about 1:1400 (deflate 1:1032, LZW 1:1365): a file
# that claims more is damaged or made to exhaust the memory.
_GREATEST_RATIO = 2000


@dataclass
class Reading:
    """What a reader finds out about its file while it decodes.

    Attributes:
        needs: Bytes that the voxels take in memory, as soon as the header has said so.
    """

    needs: int = 0


@contextmanager
def decoding(path: Path, kind: str, *, damage: str | None = None) -> Iterator[Reading]:
    """Turn whatever a decoder raises into one :class:`ImageError` that names the cause.

    Args:
        path: The file being read.
        kind: Its format in words, for instance ``"PNG image"``.
        damage: What to say of a damaged file, where the decoder's own words are of no use.

    Yields:
        Where the reader notes what the file needs; with it a lack of memory is told from damage.
    """
    reading = Reading()
    try:
        with np.errstate(all="ignore"):  # damaged headers hold any number; the result is examined instead
            yield reading
    except ImageError:
        raise
    except _FAULTS as error:
        raise ImageError(why_unreadable(path, kind, error, needs=reading.needs, damage=damage)) from error


@contextmanager
def within_memory(path: object, needs: int = 0) -> Iterator[None]:
    """Say which file was too large where work on its voxels runs out of memory.

    Args:
        path: The file, or what stands for it.
        needs: Bytes that its voxels take; 0 if not known.

    Raises:
        ImageError: in place of ``MemoryError``.
    """
    try:
        yield
    except MemoryError as error:
        raise ImageError(memory_sentence(path, needs)) from error


def guard_size(path: Path, claimed: int) -> None:
    """Refuse a file whose header claims far more voxels than its bytes can hold, before memory is taken.

    Args:
        path: The file.
        claimed: Bytes that its voxels would take in memory.

    Raises:
        ImageError: if the claim is not possible.
    """
    size = path.stat().st_size
    if claimed > _GREATEST_RATIO * max(size, 1):
        raise ImageError(
            f"{path} says it holds {claimed:.3g} bytes of voxels but has {size} bytes: "
            "it is truncated or damaged; fetch or export it again."
        )


def require_finite(array: NDArray[Any], path: Path) -> None:
    """Raise :class:`ImageError` if ``array`` holds NaN or infinite values, with their number."""
    if not np.issubdtype(array.dtype, np.floating):
        return
    bad = int(array.size - np.count_nonzero(np.isfinite(array)))
    if bad:
        raise ImageError(
            f"{path} has {bad} voxels that are NaN or infinite (of {array.size}); "
            "replace them, for instance by the image's minimum, and save it again."
        )


def to_labels(array: NDArray[Any], path: Path) -> NDArray[np.integer[Any]]:
    """Give class indices the smallest of uint8, int16, int32, int64 that holds them.

    Floating-point files are common; values within 1e-3 of a whole number are taken as that number (a stored
    scale of 1/255 gives 1.0000001).

    Raises:
        ImageError: if a value is not a whole number or not finite.
    """
    if array.dtype == bool:
        return array.astype(np.uint8)
    if np.issubdtype(array.dtype, np.floating):
        require_finite(array, path)
        rounded = np.rint(array)
        odd = np.abs(array - rounded) > 1e-3
        if odd.any():
            raise ImageError(
                f"{path} has {int(odd.sum())} voxels whose label is not a whole number, "
                f"for instance {float(array[odd][0]):g}; store class indices 0, 1, 2, ..."
            )
        array = rounded
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    for kind in (np.uint8, np.int16, np.int32, np.int64):
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return array.astype(kind)
    raise ImageError(f"{path} has a label value of {high}; store class indices 0, 1, 2, ...")


@functools.cache
def say_no_spacing(kind: str) -> None:
    """Warn, once per process and kind of file, that distances will be in voxels."""
    log.warning("%s hold no voxel size: the spacing is taken as 1, and there will be no distances in mm.", kind)
