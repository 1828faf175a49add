"""Compressed, chunked arrays in files (see :mod:`scantly.data.frames`), read in parts.

A read fetches, checks and decompresses the chunks that it touches, whether the file is local or in an object
store (through fsspec). Local files are read, not memory-mapped: mapped pages count as the process's memory, which
would grow with the cohort.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from scantly.data.frames import TAIL, ArrayIndex, DamagedFrameError, Span, encode, read_part
from scantly.errors import DatasetError
from scantly.files import atomic_path

__all__ = ["ArrayFolder", "DamagedArrayError", "Recent", "chunks_for", "write_array"]

_LOCAL_HANDLES = 256
_SLICE_TILE = 512
_CHUNK = 32

K = TypeVar("K")
V = TypeVar("V")


class Recent(Generic[K, V]):
    """The last few values by key, forgotten in a forked process.

    File handles must not be shared between a process and its children, and their number
    must not grow with the cohort.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._process = os.getpid()
        self._values: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K, make: Callable[[], V]) -> V:
        """The value of ``key``, made anew if it is not among the last ones used."""
        if self._process != os.getpid():
            self._process, self._values = os.getpid(), OrderedDict()
        if key in self._values:
            self._values.move_to_end(key)
        else:
            self._values[key] = make()
            if len(self._values) > self._limit:
                self._values.popitem(last=False)
        return self._values[key]

    def forget(self, key: K) -> None:
        """Drop one value."""
        self._values.pop(key, None)

    def __len__(self) -> int:
        return len(self._values)


class DamagedArrayError(DatasetError):
    """An array file that is not what was written."""


class _LocalFile:
    """An open file; parts are read by several threads, not by several processes."""

    def __init__(self, path: str) -> None:
        self._file = Path(path).open("rb", buffering=0)  # noqa: SIM115 (closed with this object)
        self._lock = threading.Lock()
        self.size = os.fstat(self._file.fileno()).st_size

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def read(self, spans: Sequence[Span]) -> list[bytes]:
        """The bytes of spans ``[start, stop)``."""
        parts = []
        with self._lock:
            for start, stop in spans:
                self._file.seek(start)
                parts.append(self._file.read(stop - start))
        return parts


class _RemoteFile:
    """A file of any file system of fsspec, read by ranges."""

    def __init__(self, files: Any, path: str) -> None:
        self._files = files
        self._path = path
        self.size = int(files.size(path))

    def read(self, spans: Sequence[Span]) -> list[bytes]:
        """The bytes of spans ``[start, stop)``, fetched at the same time where the file system can."""
        starts, stops = ([span[side] for span in spans] for side in (0, 1))
        parts: list[bytes] = self._files.cat_ranges([self._path] * len(spans), starts, stops, on_error="raise")
        return parts


@dataclass
class _Opened:
    """An array file and its index."""

    file: _LocalFile | _RemoteFile
    index: ArrayIndex


class ArrayFolder:
    """Arrays and small files below one folder or fsspec URL. Pickled by its address alone.

    Attributes:
        url: The folder as given: a path, or a URL such as ``s3://bucket/prepared`` or ``memory://prepared``.
    """

    def __init__(self, url: str | Path) -> None:
        self.url = str(url)
        self._connections: Recent[str, tuple[Any, str]] = Recent(1)
        self._arrays: Recent[str, _Opened] = Recent(_LOCAL_HANDLES)

    def __reduce__(self) -> tuple[type[ArrayFolder], tuple[str]]:
        return type(self), (self.url,)

    @property
    def _system(self) -> tuple[Any, str]:
        """File system and path of the folder; a forked process connects anew."""
        return self._connections.get(self.url, lambda: fsspec.core.url_to_fs(self.url))

    @property
    def local(self) -> bool:
        """Whether the folder is on this machine's file system."""
        return isinstance(self._system[0], LocalFileSystem)

    def read_bytes(self, name: str) -> bytes:
        """Content of a small file.

        Raises:
            DatasetError: if it does not exist or cannot be read.
        """
        with self._explained(name):
            content: bytes = self._system[0].cat_file(self._address(name))
        return content

    def read(self, name: str, index: tuple[slice, ...]) -> NDArray[Any]:
        """Part of an array, from the chunks that it touches, each held against its checksum.

        Args:
            name: File below the folder.
            index: One slice of step 1 per axis.

        Raises:
            DamagedArrayError: if the file is damaged where it was read.
            DatasetError: if the file is missing or cannot be read.
        """
        with self._explained(name):
            opened = self._arrays.get(name, lambda: self._open(name))
            try:
                return read_part(opened.index, index, opened.file.read)
            except DamagedFrameError:
                self._arrays.forget(name)
                raise

    def forget(self, name: str) -> None:
        """Close the array, because its file was replaced."""
        self._arrays.forget(name)

    def _address(self, name: str) -> str:
        return f"{self._system[1]}/{name}"

    def _open(self, name: str) -> _Opened:
        address = self._address(name)
        file = _LocalFile(address) if self.local else _RemoteFile(self._system[0], address)
        tail = b"".join(file.read([(max(file.size - TAIL, 0), file.size)]))
        needed = ArrayIndex.needed(tail)
        if needed > len(tail):
            tail = b"".join(file.read([(max(file.size - needed, 0), file.size)]))
        return _Opened(file, ArrayIndex.parse(tail))

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        """Errors as one sentence that names the file."""
        try:
            yield
        except FileNotFoundError:
            raise DatasetError(f"{self._address(name)} does not exist; prepare the dataset again.") from None
        except DamagedFrameError:
            raise DamagedArrayError(
                f"{self._address(name)} is damaged; remove it and prepare the dataset again."
            ) from None
        except OSError as error:
            reason = error.strerror or error or type(error).__name__
            raise DatasetError(
                f"cannot read {self._address(name)} ({reason}); check the disk or connection and go on."
            ) from error


def chunks_for(shape: tuple[int, ...], spatial_dims: int) -> tuple[int, ...]:
    """Chunk shape for arrays (..., D, H, W): what a read fetches at least.

    2D: one slice with all its channels, in tiles of at most 512 x 512. 3D: 32 voxels a side, one channel each.
    """
    *lead, depth, height, width = shape
    if spatial_dims == 2:
        return *lead, 1, min(height, _SLICE_TILE), min(width, _SLICE_TILE)
    return *(1 for _ in lead), *(min(side, _CHUNK) for side in (depth, height, width))


def write_array(path: Path, array: NDArray[Any], chunks: tuple[int, ...]) -> int:
    """Write an array atomically and losslessly; equal arrays give equal bytes.

    Args:
        path: Final file, ``.b2nd``.
        array: What to write.
        chunks: Shape of the parts that are compressed, checked and read by themselves.

    Returns:
        Size of the file in bytes.

    Raises:
        RunError: if the disk is full or not writable.
    """
    content = encode(array, chunks)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    return len(content)
