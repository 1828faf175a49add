"""Compressed, chunked arrays on disk (blosc2 ``.b2nd``), read in parts.

Local files are memory-mapped: a read decompresses only the chunks that it touches. Files of other file
systems (object stores, through fsspec) are fetched whole when first touched; a few of them stay in memory.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

import blosc2
import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from scantly.errors import DatasetError
from scantly.files import atomic_path

__all__ = ["ArrayFolder", "Recent", "chunks_for", "write_array"]

_LOCAL_HANDLES = 256
_REMOTE_FRAMES = 8
_SLICE_TILE = 512
_CHUNK, _BLOCK = 64, 32

K = TypeVar("K")
V = TypeVar("V")


class Recent(Generic[K, V]):
    """The last few values by key, forgotten in a forked process.

    Memory maps and file handles must not be shared between a process and its children, and their number
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


class ArrayFolder:
    """Arrays and small files below one folder or fsspec URL. Pickled by its address alone.

    Attributes:
        url: The folder as given: a path, or a URL such as ``s3://bucket/prepared`` or ``memory://prepared``.
    """

    def __init__(self, url: str | Path) -> None:
        self.url = str(url)
        self._files, self._root = fsspec.core.url_to_fs(self.url)
        self._local = isinstance(self._files, LocalFileSystem)
        self._arrays: Recent[str, Any] = Recent(_LOCAL_HANDLES if self._local else _REMOTE_FRAMES)

    def __reduce__(self) -> tuple[type[ArrayFolder], tuple[str]]:
        return type(self), (self.url,)

    def read_bytes(self, name: str) -> bytes:
        """Content of a small file.

        Raises:
            DatasetError: if it does not exist.
        """
        try:
            content: bytes = self._files.cat_file(self._address(name))
        except FileNotFoundError:
            raise DatasetError(f"{self._address(name)} does not exist; prepare the dataset again.") from None
        return content

    def read(self, name: str, index: tuple[slice, ...]) -> NDArray[Any]:
        """Part of an array, decompressing only the chunks that it touches.

        Args:
            name: File below the folder.
            index: One slice per axis.

        Raises:
            DatasetError: if the file is missing or damaged.
        """
        array = self._arrays.get(name, lambda: self._open(name))
        try:
            part: NDArray[Any] = array[index]
        except (RuntimeError, ValueError) as error:
            raise self._damaged(name) from error
        return part

    def forget(self, name: str) -> None:
        """Close the array, because its file was replaced."""
        self._arrays.forget(name)

    def _address(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _open(self, name: str) -> Any:
        address = self._address(name)
        try:
            if self._local:
                # one thread: loader workers already use every core
                single = blosc2.DParams(nthreads=1)
                return blosc2.open(address, mode="r", mmap_mode="r", dparams=single)
            return blosc2.ndarray_from_cframe(self._files.cat_file(address), copy=True)
        except FileNotFoundError:
            raise DatasetError(f"{address} does not exist; prepare the dataset again.") from None
        except (RuntimeError, ValueError) as error:
            raise self._damaged(name) from error

    def _damaged(self, name: str) -> DatasetError:
        return DatasetError(f"{self._address(name)} is damaged; remove it and prepare the dataset again.")


def chunks_for(shape: tuple[int, ...], spatial_dims: int) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Chunk and block shapes for arrays (..., D, H, W).

    2D: one slice with all its channels, in tiles of at most 512 x 512. 3D: 64 voxels a side, in blocks of 32,
    one channel each: a block is what a read decompresses at least.
    """
    *lead, depth, height, width = shape
    if spatial_dims == 2:
        return (*lead, 1, min(height, _SLICE_TILE), min(width, _SLICE_TILE)), None
    space = [min(side, _CHUNK) for side in (depth, height, width)]
    ones = [1] * len(lead)
    return (*ones, *space), (*ones, *(min(side, _BLOCK) for side in space))


def write_array(path: Path, array: NDArray[Any], chunks: tuple[int, ...], blocks: tuple[int, ...] | None = None) -> int:
    """Write an array atomically and losslessly; equal arrays give equal bytes.

    Args:
        path: Final file, ``.b2nd``.
        array: What to write.
        chunks: Shape of the parts that are stored one after the other.
        blocks: Shape of the least part that is decompressed; ``None``: as fits the processor's caches.

    Returns:
        Size of the file in bytes.

    Raises:
        RunError: if the disk is full or not writable.
    """
    # measured on heart scans: level 5 is 3 % smaller and takes 7 times as long; LZ4 reads 3 times as fast and
    # is 45 % larger
    compression = blosc2.CParams(codec=blosc2.Codec.ZSTD, clevel=1, filters=[blosc2.Filter.SHUFFLE], nthreads=1)
    contiguous = np.ascontiguousarray(array)
    frame = blosc2.asarray(contiguous, chunks=chunks, blocks=blocks, cparams=compression).to_cframe()
    with atomic_path(path) as temporary:
        temporary.write_bytes(frame)
    return len(frame)
