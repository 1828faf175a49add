"""What is DICOM: by its mark, or without the 128 bytes before it by elements that can be nothing else.

Only the first bytes, which name the kind of object and its coding, are read here: GDCM refuses a structured report in
the same words as a truncated scan, and the two must be told apart. Old archives and some exports leave out the
preamble with its mark, or the whole file meta information; such files are taken for DICOM only if all elements up to
the SOP class are well formed, in order, and name a class.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from scantly.errors import ImageError
from scantly.imaging.decoding import decoding

__all__ = ["FileHead", "is_dicom", "read_head", "refuse_broken"]

_SUFFIXES = (".dcm", ".dicom", ".ima")
_PREAMBLE = 128  # bytes before the mark, mostly zeros
_MARK = b"DICM"
_READ = 1 << 16  # bytes in which the SOP class lies; image types and the like before it are short
_UID = re.compile(rb"[0-2](\.(0|[1-9]\d*)){2,}")

_IMPLICIT, _BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.2"
_SHORT = b"AE AS AT CS DA DS DT FL FD IS LO LT PN SH SL SS ST TM UI UL US".split()
_LONG = b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split()
_UNDEFINED = 0xFFFFFFFF
_END_OF_SEQUENCE = struct.pack("<HHI", 0xFFFE, 0xE0DD, 0), struct.pack(">HHI", 0xFFFE, 0xE0DD, 0)
_META_CLASS, _META_SYNTAX, _CLASS = (0x0002, 0x0002), (0x0002, 0x0010), (0x0008, 0x0016)

Tag = tuple[int, int]


class FileHead(NamedTuple):
    """What the beginning of a DICOM file says.

    Attributes:
        sop_class: UID of the kind of object; empty if a file with the mark does not say.
        syntax: UID of the transfer syntax; empty if it is not said.
    """

    sop_class: str
    syntax: str


class _MalformedError(ValueError):
    """Bytes that are no element."""


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM: with its mark ``DICM`` after 128 bytes, or sure without it (:func:`read_head`).

    Raises:
        ImageError: if the file may not be read.
    """
    return read_head(path) is not None


def read_head(path: Path) -> FileHead | None:
    """Kind of object and coding of a DICOM file; None if it is none.

    A file without the mark is DICOM if it begins with file meta information (group 0002) or with the identifying
    elements (group 0008, any of the uncompressed codings) whose tags ascend, whose lengths fit, and which name a SOP
    class.

    Raises:
        ImageError: if the file may not be read.
    """
    with decoding(path, "DICOM file"), path.open("rb") as file:
        first = file.read(_PREAMBLE + 4)
        marked = first[_PREAMBLE:] == _MARK
        if not marked and first[:2] not in (b"\x02\0", b"\x08\0", b"\0\x08"):
            return None
        rest = first[_PREAMBLE + 4 :] if marked else first
        data = rest + file.read(_READ)
    found, at = _meta(data, strict=not marked)
    if marked:
        return FileHead(found.get(_META_CLASS, ""), found.get(_META_SYNTAX, ""))
    sop_class = found.get(_META_CLASS, "") or _dataset_class(data, at, found.get(_META_SYNTAX))
    return FileHead(sop_class, found.get(_META_SYNTAX, "")) if _UID.fullmatch(sop_class.encode()) else None


def _meta(data: bytes, *, strict: bool) -> tuple[dict[Tag, str], int]:
    """The file meta information (group 0002, always explicit VR, little endian), and where it ends."""
    found: dict[Tag, str] = {}
    at = 0
    try:
        for tag, value, end in _elements(data, 0, "<", explicit=True, strict=strict):
            if tag[0] != 2:
                break
            found[tag] = value.decode("ascii", "replace").strip("\0 ")
            at = end
    except _MalformedError:  # what follows may be coded in another way
        pass
    return found, at


def _dataset_class(data: bytes, at: int, syntax: str | None) -> str:
    """The SOP class that the elements of group 0008 name; empty if they are not well formed."""
    codings = [("<", True), ("<", False), (">", True)]
    if syntax == _IMPLICIT:
        codings = [("<", False)]
    elif syntax == _BIG_ENDIAN:
        codings = [(">", True)]
    for order, explicit in codings:
        try:
            for tag, value, _ in _elements(data, at, order, explicit=explicit):
                if tag == _CLASS:
                    return value.decode("ascii", "replace").strip("\0 ")
                if tag > _CLASS:
                    break
        except _MalformedError:
            continue
    return ""


def _elements(
    data: bytes, at: int, order: str, *, explicit: bool, strict: bool = True
) -> Iterator[tuple[Tag, bytes, int]]:
    """Top-level elements one after the other: tag, value, and where it ends.

    Args:
        data: The beginning of a file.
        at: Where the first element begins.
        order: ``"<"`` little endian, ``">"`` big endian.
        explicit: Whether elements say of which type (VR) they are.
        strict: Refuse types that do not exist, tags that do not ascend and odd lengths too: what has the mark is DICOM
            however badly it is written, all else must prove that it is.

    Raises:
        _MalformedError: where bytes are no element.
    """
    before: Tag = (0, 0)
    while at + 8 <= len(data):
        tag: Tag = struct.unpack_from(f"{order}HH", data, at)
        size, at, known = _size(data, at + 4, order, explicit=explicit)
        if strict and (tag <= before or (size % 2 and size != _UNDEFINED) or not known):
            raise _MalformedError
        before = tag
        if size == _UNDEFINED:
            end = data.find(_END_OF_SEQUENCE[order == ">"], at)
            if end < 0:
                raise _MalformedError
            size = end + 8 - at
        if at + size > len(data):
            raise _MalformedError
        yield tag, data[at : at + size], at + size
        at += size


def _size(data: bytes, at: int, order: str, *, explicit: bool) -> tuple[int, int, bool]:
    """Length of an element's value, where the value begins, and whether the element's type exists."""
    if not explicit:
        (size,) = struct.unpack_from(f"{order}I", data, at)
        return size, at + 4, True
    kind = data[at : at + 2]
    if kind not in _LONG:
        (size,) = struct.unpack_from(f"{order}H", data, at + 2)
        return size, at + 4, kind in _SHORT
    if at + 8 > len(data):
        raise _MalformedError
    (size,) = struct.unpack_from(f"{order}I", data, at + 4)
    return size, at + 8, True


def refuse_broken(path: Path) -> None:
    """Refuse a file that is no DICOM but is called like it, was cut off before the mark, or begins with it.

    Raises:
        ImageError: if it is such a file: passing it over could hide a missing slice.
    """
    with decoding(path, "DICOM file"), path.open("rb") as file:
        first, size = file.read(_PREAMBLE + 4), path.stat().st_size
    suffix = path.suffix.lower()
    bare = suffix == "" or suffix[1:].isdigit()  # DICOM files are often called IM0001, or by their UID
    cut = bare and size < _PREAMBLE + 4 and _MARK.startswith(first.strip(b"\0"))
    if suffix not in _SUFFIXES and not cut and not first.startswith(_MARK):
        return
    raise ImageError(
        f"{path} is called like a DICOM file but lacks the mark DICM after {_PREAMBLE} bytes (it has {size} bytes), "
        "and does not begin with a DICOM header either: a slice may be missing; fetch or export the series again, or "
        "move the file away."
    )
