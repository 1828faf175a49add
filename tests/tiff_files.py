"""TIFF files written from the specification (TIFF 6.0, Adobe 1992), with any tags, for the tests of the readers."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

CODES = {"none": 1, "lzw": 5, "deflate": 32946, "adobe_deflate": 8, "packbits": 32773}
COMPRESSIONS = tuple(CODES)
_SIDES = {  # orientation: where row 0 and column 0 are seen, as the specification lists them
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def stored_for(seen: np.ndarray, orientation: int) -> np.ndarray:
    """The rows and columns (H, W, ...) to store so that a viewer shows ``seen``, pixel by pixel."""
    row0, column0 = _SIDES[orientation]
    height, width = seen.shape[:2]
    turned = row0 in ("left", "right")
    stored = np.empty(((width, height) if turned else (height, width)) + seen.shape[2:], seen.dtype)
    for y in range(height):
        for x in range(width):
            place = {"top": y, "bottom": height - 1 - y, "left": x, "right": width - 1 - x}
            stored[place[row0], place[column0]] = seen[y, x]
    return stored


def _packed_rows(plane: np.ndarray, bits: int, order: str) -> list[bytes]:
    """Rows of a plane (H, W, samples); samples of fewer than 8 bits are packed from the highest bit on."""
    rows = []
    for row in plane.reshape(len(plane), -1):
        if bits >= 8:
            rows.append(row.astype(row.dtype.newbyteorder(order)).tobytes())
            continue
        spread = (row[:, np.newaxis] >> np.arange(bits)[::-1]) & 1
        rows.append(np.packbits(spread.ravel().astype(np.uint8)).tobytes())
    return rows


def _lzw(data: bytes) -> bytes:
    """Literal codes of 9 bits with the table cleared before codes would grow: valid, if long, LZW."""
    codes = []
    for at, value in enumerate(data):
        if at % 200 == 0:
            codes.append(256)
        codes.append(value)
    bits = "".join(f"{code:09b}" for code in [*codes, 257])
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits), 8))


def _packbits(data: bytes) -> bytes:
    parts = [data[at : at + 128] for at in range(0, len(data), 128)]
    return b"".join(bytes([len(part) - 1]) + part for part in parts)


def _compress(rows: Sequence[bytes], compression: str) -> bytes:
    if compression == "packbits":  # each row by itself
        return b"".join(map(_packbits, rows))
    data = b"".join(rows)
    if compression == "lzw":
        return _lzw(data)
    return data if compression == "none" else zlib.compress(data)


def write_tiff(
    path: Path,
    samples: np.ndarray,
    *,
    photometric: int | None,
    bits: int | None = None,
    compression: str | int = "none",
    planar: bool = False,
    order: str = "<",
    big: bool = False,
    strip: int = 2,
    tags: Mapping[int, tuple[str, Sequence[int]]] | None = None,
) -> Path:
    """Write one picture.

    Args:
        path: File to write.
        samples: (H, W) or (H, W, samples) as stored, of an integer or floating-point type.
        photometric: Value of PhotometricInterpretation; None leaves the tag out.
        bits: Of a sample, where fewer than the array's type has.
        compression: A name of ``CODES``, or the number of another, whose data are then nonsense.
        planar: Store the channels apart.
        order: ``"<"`` or ``">"``.
        big: BigTIFF.
        strip: Rows per strip.
        tags: More tags: number -> (type ``"H"``, ``"I"`` or ``"2I"``, values).
    """
    samples = samples if samples.ndim == 3 else samples[..., np.newaxis]
    height, width, count = samples.shape
    bits = bits or samples.dtype.itemsize * 8
    planes = [samples[..., [at]] for at in range(count)] if planar else [samples]
    name = compression if isinstance(compression, str) else "none"
    strips = [
        _compress(_packed_rows(plane[at : at + strip], bits, order), name)
        for plane in planes
        for at in range(0, height, strip)
    ]
    head = 16 if big else 8
    offsets = list(np.cumsum([head, *map(len, strips)])[:-1])
    entries: dict[int, tuple[str, Sequence[int]]] = {
        256: ("I", [width]),
        257: ("I", [height]),
        258: ("H", [bits] * count),
        259: ("H", [CODES[name] if isinstance(compression, str) else compression]),
        273: ("I", offsets),
        277: ("H", [count]),
        278: ("I", [strip]),
        279: ("I", [len(part) for part in strips]),
        284: ("H", [2 if planar else 1]),
        339: ("H", [{"u": 1, "i": 2, "f": 3}[samples.dtype.kind]] * count),
        **(tags or {}),
    }
    if photometric is not None:
        entries[262] = ("H", [photometric])
    body = b"".join(strips)
    body += bytes(-(head + len(body)) % 8)
    path.write_bytes(_with_directory(body, entries, order, big))
    return path


def _with_directory(body: bytes, entries: Mapping[int, tuple[str, Sequence[int]]], order: str, big: bool) -> bytes:
    head, room, number = (16, 8, "Q") if big else (8, 4, "I")
    start = head + len(body)
    directory_size = (8 if big else 2) + (20 if big else 12) * len(entries) + room
    later = b""
    directory = struct.pack(order + ("Q" if big else "H"), len(entries))
    for tag, (form, values) in sorted(entries.items()):
        kind = {"H": 3, "I": 4, "2I": 5}[form]
        data = struct.pack(f"{order}{len(values)}{form[-1]}", *values)
        count = len(values) // (2 if form == "2I" else 1)
        if len(data) <= room:
            field = data.ljust(room, b"\0")
        else:
            field = struct.pack(order + number, start + directory_size + len(later))
            later += data + bytes(-len(data) % 8)
        directory += struct.pack(f"{order}HH{number}", tag, kind, count) + field
    directory += bytes(room)
    mark = b"II" if order == "<" else b"MM"
    head_of = struct.pack(order + "HHHQ", 43, 8, 0, start) if big else struct.pack(order + "HI", 42, start)
    return mark + head_of + body + directory + later
