"""Why a file could not be read, in one sentence: memory, the system, a missing decoder, or damage.

A decoder's error seldom tells these apart: libraries in C report a failing disk, a full memory and a flipped bit in
the same words. Where the error leaves it open, the two causes outside the file are tried out: whether the system
still gives the file's bytes, and whether the memory that its voxels take can be had.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError, HeaderTypeError
from nibabel.wrapstruct import WrapStructError

from scantly.errors import megabytes

__all__ = ["HEADER_FAULTS", "memory_sentence", "why_unreadable"]

#: What nibabel raises on a header that it can take apart but not use. They are no ``ValueError``.
HEADER_FAULTS = (HeaderDataError, HeaderTypeError, ImageFileError, WrapStructError)

_CHUNK = 1 << 20
_HEADER = 1 << 26  # more bytes than any header takes

# Pillow, ITK, the C++ library, zlib, HDF5 and GDCM on memory; NumPy and Python raise MemoryError
_OF_MEMORY = re.compile(
    r"out of memory|not enough memory|insufficient memory|cannot allocate memory|can't allocate"
    r"|memory allocation failed|failed to allocate|unable to allocate|bad_alloc|bad allocation"
    r"|decoder error -9\b|^error -4\b",
    re.IGNORECASE,
)
_PACKAGE = re.compile(r"requires the '([\w.-]+)' package")
# HDF5 looks for a filter that is not built in among its plugins; libtiff and Pillow name theirs
_OF_CODECS = re.compile(
    r"can't open directory .*plugin|required filter|filter .*not (?:registered|available)|decoder .* not available"
    r"|compression support is not configured|unknown compression",
    re.IGNORECASE,
)

_DISK = (
    errno.EIO,
    errno.ENXIO,
    errno.ENODEV,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ENOTCONN,
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    getattr(errno, "EREMOTEIO", errno.EIO),
)
_OF_SYSTEM = (
    ((errno.EACCES, errno.EPERM), "may not be read ({}); change its permissions."),
    ((errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG), "cannot be opened ({}); check the path."),
    ((errno.EMFILE, errno.ENFILE), "cannot be opened ({}); raise the limit on open files (ulimit -n)."),
    (
        (errno.EAGAIN, errno.EBUSY, errno.ETXTBSY),
        "is held by another program ({}); close that, or wait until it is done.",
    ),
    (
        _DISK,
        "cannot be read ({}): the disk or the network share fails, whatever the file is like; see that it works and "
        "try again.",
    ),
)
# any other number, such as EINVAL for a position before the file's begin, is what damaged bytes lead to


def memory_sentence(path: object, needs: int = 0) -> str:
    """Sentence for a file that is sound but does not fit into memory.

    Args:
        path: The file, or what stands for it.
        needs: Bytes that its voxels take; 0 if not known.
    """
    much = f"about {megabytes(needs)} of" if needs else "more"
    than = ", more than this process can get" if needs else " than this process can get"
    return (
        f"{path} needs {much} memory to be read{than}; free memory, raise the limit (ulimit -v, or the container's), "
        "or use a machine with more."
    )


def why_unreadable(path: Path, kind: str, error: BaseException, *, needs: int = 0, damage: str | None = None) -> str:
    """Decide why a decoder failed and say it in a sentence.

    Args:
        path: The file.
        kind: Its format in words, for instance ``"PNG image"``.
        error: What the decoder raised.
        needs: Bytes that its voxels take; 0 if not known.
        damage: What to say if the file is damaged, where the decoder's own words are of no use.

    Returns:
        The sentence. Damage is what is left when nothing else explains the error.
    """
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    words = str(error).replace(str(path), "")  # a file may be called anything
    said = isinstance(error, MemoryError) or getattr(error, "errno", 0) == errno.ENOMEM or _OF_MEMORY.search(words)
    # where it is not known what the voxels take, a header asked for memory: for more than any does if it is damaged
    if said and (needs or not _can_get(_HEADER)):
        return memory_sentence(path, needs)
    told = _of_system(path, kind, error) if isinstance(error, OSError) else None
    told = told or _of_codecs(path, error, words, reason) or _bytes_withheld(path, kind)
    if told:
        return told
    if needs and not _can_get(needs):
        return memory_sentence(path, needs)
    if isinstance(error, NotImplementedError):
        return f"{path} is a {kind} of a sort that cannot be read ({reason}); convert it, or save it uncompressed."
    if isinstance(error, HEADER_FAULTS):
        return f"{path} has a header that cannot be used ({reason}); mend it, or export the scan again."
    return damage or (
        f"{path} cannot be read as a {kind} ({reason}): it is truncated or damaged; fetch or export it again."
    )


def _of_system(path: Path, kind: str, error: OSError) -> str | None:
    """Sentence for what the operating system reports; None for what damaged bytes can lead to."""
    number = error.errno or 0
    if number == errno.ENOENT:
        return f"{path} does not exist."
    if number == errno.EISDIR:
        return f"{path} is a folder, not a {kind}."
    known = next((rest for numbers, rest in _OF_SYSTEM if number in numbers), None)
    return known and f"{path} {known.format(os.strerror(number))}"


def _of_codecs(path: Path, error: BaseException, words: str, reason: str) -> str | None:
    """Sentence for a decoder that is not installed; None if that is not what the error says."""
    named = _PACKAGE.search(words)
    if named is None and not isinstance(error, ImportError):
        if not _OF_CODECS.search(words):
            return None
        return f"{path} is packed in a way for which no decoder is installed ({reason}); save it uncompressed."
    package = named[1] if named else getattr(error, "name", None)
    cure = f"pip install {package}, or " if package else ""
    return f"{path} needs a decoder that is not installed ({reason}); {cure}save it uncompressed."


def _bytes_withheld(path: Path, kind: str) -> str | None:
    """Whether the system fails to give the file's bytes, which decoders in C do not say; then the sentence for it."""
    if path.is_dir():
        return None
    try:
        with path.open("rb") as file:
            while file.read(_CHUNK):
                pass
    except OSError as error:
        return _of_system(path, kind, error)
    return None


def _can_get(count: int) -> bool:
    """Whether so many bytes can be reserved; nothing is written to them."""
    try:
        np.empty(count, np.uint8)
    except (MemoryError, ValueError):  # ValueError: more than there are addresses
        return False
    return True
