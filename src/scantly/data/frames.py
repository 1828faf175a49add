"""One array as one file: a blosc2 frame, followed by an index with a checksum per chunk.

The frame is an ordinary ``.b2nd`` file, which blosc2 opens as it is: it does not look behind its end. Scantly
reads the index there and then the chunks themselves, because that gives two things that blosc2 does not: a
chunk is held against its checksum before it is decompressed, and only the bytes of the chunks that a patch
touches are fetched, from a local disk or by ranges from an object store::

    blosc2 frame | index: sizes (n,) uint32, checksums (n,) uint32, JSON | 24 bytes: lengths, checksum, magic

Chunks lie one after the other in C order. A chunk of zeros takes no bytes.
"""

from __future__ import annotations

import itertools
import json
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import blosc2
import numpy as np
from numpy.typing import NDArray

__all__ = ["TAIL", "ArrayIndex", "DamagedFrameError", "Span", "encode", "read_part"]

#: Bytes at the end of a file in which the index of most arrays lies.
TAIL = 32_768

_MAGIC = b"scantly2"
_END = struct.Struct("<IIQ8s")  # checksum of the index, bytes of its JSON, bytes of the index, magic

Span: TypeAlias = tuple[int, int]
Fetch: TypeAlias = Callable[[Sequence[Span]], Sequence[bytes]]


class DamagedFrameError(Exception):
    """Bytes that are not what was written."""


@dataclass(frozen=True)
class ArrayIndex:
    """Where the chunks of an array lie in its file.

    Attributes:
        shape: Of the array.
        dtype: Its element type.
        chunks: Shape of a chunk; those at the far ends are filled up with zeros.
        starts: (n,) first byte of each chunk in the file.
        sizes: (n,) its compressed size in bytes; 0 for a chunk of zeros.
        checksums: (n,) CRC-32 of its compressed bytes.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunks: tuple[int, ...]
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    checksums: NDArray[np.int64]

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of chunks along each axis."""
        return tuple(-(-n // side) for n, side in zip(self.shape, self.chunks, strict=True))

    @classmethod
    def needed(cls, tail: bytes) -> int:
        """How many bytes at the end of the file hold the whole index.

        Raises:
            DamagedFrameError: if this is not the end of such a file.
        """
        if len(tail) < _END.size or tail[-len(_MAGIC) :] != _MAGIC:
            raise DamagedFrameError
        length = _END.unpack(tail[-_END.size :])[2]
        return int(length) + _END.size

    @classmethod
    def parse(cls, tail: bytes) -> ArrayIndex:
        """Read the index from the end of a file.

        Args:
            tail: At least the :meth:`needed` last bytes.

        Raises:
            DamagedFrameError: if they are not what was written.
        """
        length = cls.needed(tail)
        if length > len(tail):
            raise DamagedFrameError
        checksum, described = _END.unpack(tail[-_END.size :])[:2]
        content = tail[-length : -_END.size]
        if checksum != _checksum(content, described):
            raise DamagedFrameError
        values = json.loads(content[len(content) - described :])
        numbers = np.frombuffer(content[: len(content) - described], dtype="<u4").astype(np.int64)
        sizes, checksums = numbers.reshape(2, -1)
        starts = values["first"] + np.cumsum(sizes) - sizes
        dtype = np.dtype(values["dtype"])
        return cls(tuple(values["shape"]), dtype, tuple(values["chunks"]), starts, sizes, checksums)


def encode(array: NDArray[Any], chunks: tuple[int, ...]) -> bytes:
    """The file of an array; equal arrays give equal bytes.

    Compressed by LZ4, behind a byte shuffle where that makes the file smaller: it does where scans are resampled;
    normalized whole numbers, of which there are few distinct ones, are half as large without.

    Args:
        array: Any shape and a plain element type.
        chunks: Shape of the parts that are compressed, checked and read by themselves.
    """
    contiguous = np.ascontiguousarray(array)
    parameters = _parameters(_better_filter(contiguous, chunks))
    # one block per chunk: a chunk is in C order
    packed = blosc2.asarray(contiguous, chunks=chunks, blocks=chunks, cparams=parameters, contiguous=True)
    frame = bytes(packed.to_cframe())
    # blosc2 keeps no bytes of a chunk of zeros in the frame
    zeros = [info.special == blosc2.SpecialValue.ZERO for info in packed.schunk.iterchunks_info()]
    found = [b"" if zero else packed.schunk.get_chunk(number) for number, zero in enumerate(zeros)]
    content = b"".join(found)
    first = frame.find(content)
    if first < 0:
        raise RuntimeError("blosc2 did not lay out the chunks of a frame in order")
    described = json.dumps(
        {"shape": array.shape, "dtype": array.dtype.str, "chunks": chunks, "first": first}, separators=(",", ":")
    ).encode()
    numbers = np.array([[len(chunk) for chunk in found], [zlib.crc32(chunk) for chunk in found]], dtype="<u4")
    index = numbers.tobytes() + described
    return frame + index + _END.pack(_checksum(index, len(described)), len(described), len(index), _MAGIC)


def _checksum(index: bytes, described: int) -> int:
    """Of an index and of how many bytes of it are JSON."""
    return zlib.crc32(described.to_bytes(4, "little"), zlib.crc32(index))


def _parameters(kind: blosc2.Filter) -> blosc2.CParams:
    """One thread: bytes never depend on the machine."""
    return blosc2.CParams(codec=blosc2.Codec.LZ4, clevel=5, filters=[kind], nthreads=1)


def _better_filter(array: NDArray[Any], chunks: tuple[int, ...]) -> blosc2.Filter:
    """With or without shuffling, as makes the part in the middle smaller."""
    middle = tuple(slice((n - min(n, side)) // 2, None) for n, side in zip(array.shape, chunks, strict=True))
    limits = tuple(slice(0, side) for side in chunks)
    sample = np.ascontiguousarray(array[middle][limits])
    filters = (blosc2.Filter.NOFILTER, blosc2.Filter.SHUFFLE)
    return min(filters, key=lambda kind: len(blosc2.compress2(sample, cparams=_parameters(kind))))


def read_part(index: ArrayIndex, window: tuple[slice, ...], fetch: Fetch) -> NDArray[Any]:
    """Part of an array, from the chunks that it touches and no other byte.

    Args:
        index: Of the array.
        window: One slice of step 1 per axis.
        fetch: Gives the bytes of spans ``[start, stop)`` of the file.

    Raises:
        DamagedFrameError: if a chunk is not what was written; nothing of it is decompressed.
    """
    limits = [part.indices(n)[:2] for part, n in zip(window, index.shape, strict=True)]
    out = np.empty([max(stop - start, 0) for start, stop in limits], dtype=index.dtype)
    if out.size == 0:
        return out
    ranges = [
        range(start // side, (stop - 1) // side + 1) for (start, stop), side in zip(limits, index.chunks, strict=True)
    ]
    places = list(itertools.product(*ranges))
    numbers = np.ravel_multi_index(np.array(places).T, index.grid)
    chunk: NDArray[Any] = np.empty(index.chunks, dtype=index.dtype)
    for place, packed, checksum in zip(
        places, _packed(index, numbers, fetch), index.checksums[numbers].tolist(), strict=True
    ):
        target, source = _overlap(place, index.chunks, limits)
        if len(packed) == 0:
            out[target] = 0
            continue
        if zlib.crc32(packed) != checksum:
            raise DamagedFrameError
        blosc2.decompress2(packed, dst=chunk, nthreads=1)
        out[target] = chunk[source]
    return out


def _packed(index: ArrayIndex, numbers: NDArray[np.int64], fetch: Fetch) -> list[memoryview]:
    """The compressed bytes of chunks, in one span where they lie side by side in the file."""
    starts = index.starts[numbers]
    stops = starts + index.sizes[numbers]
    heads = np.flatnonzero(np.concatenate([[True], starts[1:] != stops[:-1]]))
    lasts = np.concatenate([heads[1:], [len(numbers)]]) - 1
    spans = list(zip(starts[heads].tolist(), stops[lasts].tolist(), strict=True))
    found = fetch([span for span in spans if span[0] < span[1]])
    contents = iter(found)
    packed = []
    for (begin, end), head, last in zip(spans, heads.tolist(), lasts.tolist(), strict=True):
        content = memoryview(next(contents) if begin < end else b"")
        if len(content) != end - begin:
            raise DamagedFrameError
        for start, stop in zip(starts[head : last + 1].tolist(), stops[head : last + 1].tolist(), strict=True):
            packed.append(content[start - begin : stop - begin])
    return packed


def _overlap(
    place: tuple[int, ...], chunks: tuple[int, ...], limits: Sequence[Span]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where a chunk meets the window: in the window, and in the chunk."""
    target, source = [], []
    for number, side, (start, stop) in zip(place, chunks, limits, strict=True):
        origin = number * side
        low, high = max(origin, start), min(origin + side, stop)
        target.append(slice(low - start, high - start))
        source.append(slice(low - origin, high - origin))
    return tuple(target), tuple(source)
