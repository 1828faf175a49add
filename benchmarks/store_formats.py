"""How to store volumes: speed of random patch reads, bytes per patch and size on disk, format by format.

    python benchmarks/store_formats.py --out benchmarks/results/store-formats-cpu.json

One generated scan of 512 x 512 x 200 voxels (smooth anatomy and noise), as whole numbers (uint8), normalized
(float32 of 256 distinct values, what a store holds of a scan that was not resampled) and resampled (float32, all
values distinct). One core, files in the page cache. The bytes per patch are those that a read fetches through a
counting file system of fsspec, which is what an object store would send; a memory-mapped array has no such reader, its
bytes are those of the memory pages that a patch touches. Needs the extra ``bench`` (zarr).
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blosc2
import fsspec
import numpy as np
import zarr
from _common import write_result
from fsspec.implementations.memory import MemoryFileSystem
from numpy.typing import NDArray
from scipy import ndimage
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ShardingCodec
from zarr.storage import FsspecStore, LocalStore

from scantly.data.arrays import ArrayFolder, write_array

SHAPE = (200, 512, 512)
PATCHES = {"96x96x96": (96, 96, 96), "112x112x80": (80, 112, 112)}  # named (W, H, D), read (D, H, W)
PAGE = 4096

Window = tuple[slice, slice, slice]
Read = Callable[[Window], NDArray[Any]]


class CountingFileSystem(MemoryFileSystem):
    """Files in memory that count what is read of them."""

    protocol = "counting"
    cachable = True
    bytes_read = 0
    requests = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        stripped: str = MemoryFileSystem._strip_protocol(path.replace("counting://", "memory://"))
        return stripped

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        content = super().cat_file(path, start, end, **options)
        CountingFileSystem.bytes_read += len(content)
        CountingFileSystem.requests += 1
        return content


@dataclass
class Candidate:
    """A format: how an array is written below a folder, and how a reader of its patches is opened."""

    write: Callable[[Path, NDArray[Any]], None]
    open: Callable[[Path], Read]
    open_remote: Callable[[str], Read] | None


def generated(shape: tuple[int, ...]) -> dict[str, NDArray[Any]]:
    """The scan in its three forms."""
    random = np.random.default_rng(0)
    coarse = random.normal(size=[n // 16 + 2 for n in shape])
    factors = [n / m for n, m in zip(shape, coarse.shape, strict=True)]
    smooth = ndimage.zoom(coarse, factors, order=1).astype(np.float32)
    noise = random.normal(scale=4, size=shape).astype(np.float32)
    whole = np.clip(110 + 40 * smooth + noise, 0, 255).astype(np.uint8)
    whole[smooth < -0.8] = 0  # air, as around a body
    normalized = ((whole - whole.mean()) / whole.std()).astype(np.float32)
    resampled = normalized + random.normal(scale=1e-4, size=shape).astype(np.float32)
    return {"uint8": whole, "float32 normalized": normalized, "float32 resampled": resampled}


def candidates() -> dict[str, Candidate]:
    found = {
        "scantly (b2nd lz4-5, chunk 32, checksums)": scantly(32),
        "scantly (b2nd lz4-5, chunk 64, checksums)": scantly(64),
        "memory-mapped .npy": Candidate(
            lambda folder, array: np.save(folder / "a.npy", array),
            lambda folder: mapped(folder / "a.npy"),
            None,
        ),
    }
    codecs = {"lz4": blosc2.Codec.LZ4, "zstd": blosc2.Codec.ZSTD}
    filters = {"": blosc2.Filter.NOFILTER, " shuffled": blosc2.Filter.SHUFFLE}
    shapes = ((32, 32), (64, 32))
    settings = [("lz4", 5), ("zstd", 1), ("zstd", 5)]
    for (codec, level), (kind, filter_), (chunk, block) in itertools.product(settings, filters.items(), shapes):
        if level == 5 and codec == "zstd" and chunk == 32:
            continue
        name = f"blosc2 {codec}-{level}{kind}, chunk {chunk}, block {block}"
        found[name] = frame(codecs[codec], level, filter_, chunk, block)
    for codec, level, shuffle in (("lz4", 5, "noshuffle"), ("lz4", 5, "shuffle"), ("zstd", 1, "noshuffle")):
        found[f"zarr v3 {codec}-{level} {shuffle}, chunk 64"] = chunked_zarr(codec, level, shuffle, sharded=False)
    found["zarr v3 lz4-5 noshuffle, chunk 32 in one shard, crc32c"] = chunked_zarr("lz4", 5, "noshuffle", sharded=True)
    return found


def scantly(chunk: int) -> Candidate:
    def opened(url: str | Path) -> Read:
        folder = ArrayFolder(url)
        return lambda window: folder.read("a.b2nd", window)

    return Candidate(
        lambda folder, array: (write_array(folder / "a.b2nd", array, (chunk,) * 3), None)[1], opened, opened
    )


def frame(codec: blosc2.Codec, level: int, filter_: blosc2.Filter, chunk: int, block: int) -> Candidate:
    def write(folder: Path, array: NDArray[Any]) -> None:
        parameters = blosc2.CParams(codec=codec, clevel=level, filters=[filter_], nthreads=1)
        packed = blosc2.asarray(array, chunks=(chunk,) * 3, blocks=(block,) * 3, cparams=parameters, contiguous=True)
        (folder / "a.b2nd").write_bytes(packed.to_cframe())

    def opened(folder: Path) -> Read:
        single = blosc2.DParams(nthreads=1)
        array = blosc2.open(str(folder / "a.b2nd"), mode="r", mmap_mode="r", dparams=single)
        return lambda window: array[window]

    def opened_remote(url: str) -> Read:
        """What blosc2 can do with a file system that is not the machine's own: the whole file."""
        files, root = fsspec.core.url_to_fs(url)
        return lambda window: blosc2.ndarray_from_cframe(files.cat_file(f"{root}/a.b2nd"))[window]

    return Candidate(write, opened, opened_remote)


def chunked_zarr(codec: str, level: int, shuffle: str, *, sharded: bool) -> Candidate:
    def write(folder: Path, array: NDArray[Any]) -> None:
        packer = BloscCodec(cname=codec, clevel=level, shuffle=shuffle)
        where = LocalStore(folder / "a.zarr")
        if sharded:
            codecs = [BytesCodec(), packer, Crc32cCodec()]
            serializer = ShardingCodec(chunk_shape=(32, 32, 32), codecs=codecs)
            whole = tuple(-(-n // 32) * 32 for n in array.shape)
            made = zarr.create_array(
                where, shape=array.shape, dtype=array.dtype, chunks=whole, serializer=serializer, compressors=None
            )
        else:
            made = zarr.create_array(where, shape=array.shape, dtype=array.dtype, chunks=(64,) * 3, compressors=packer)
        made[:] = array

    def opened(folder: Path) -> Read:
        array = zarr.open_array(LocalStore(folder / "a.zarr"), mode="r")
        return lambda window: array[window]

    def opened_remote(url: str) -> Read:
        array = zarr.open_array(FsspecStore.from_url(f"{url}/a.zarr"), mode="r")
        return lambda window: array[window]

    return Candidate(write, opened, opened_remote)


def mapped(path: Path) -> Read:
    array = np.load(path, mmap_mode="r")
    return lambda window: np.array(array[window])


def windows(shape: tuple[int, ...], patch: tuple[int, int, int], count: int) -> Iterator[Window]:
    random = np.random.default_rng(1)
    for _ in range(count):
        z, y, x = (
            slice(start, start + side)
            for start, side in (
                (int(random.integers(n - side + 1)), side) for n, side in zip(shape, patch, strict=True)
            )
        )
        yield z, y, x


def pages(shape: tuple[int, ...], itemsize: int, window: Window) -> int:
    """Bytes of the memory pages that a patch of a C-ordered array touches."""
    z, y, x = (np.arange(part.start, part.stop) for part in window)
    rows = (z[:, None] * shape[1] + y[None]).ravel() * shape[2]
    first, last = (rows + x[0]) * itemsize // PAGE, ((rows + x[-1] + 1) * itemsize - 1) // PAGE
    touched = set()
    for start, stop in zip(first.tolist(), last.tolist(), strict=True):
        touched.update(range(start, stop + 1))
    return len(touched) * PAGE


def measure(candidate: Candidate, array: NDArray[Any], folder: Path, patches: int) -> dict[str, Any]:
    started = time.perf_counter()
    candidate.write(folder, array)
    seconds = time.perf_counter() - started
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    result: dict[str, Any] = {"megabytes": size / 1e6, "write_seconds": seconds, "patches": {}}
    for name, patch in PATCHES.items():
        places = list(windows(array.shape, patch, patches))
        read = candidate.open(folder)
        for window in places[:3]:
            np.testing.assert_array_equal(read(window), array[window])
        for window in places:
            read(window)  # the page cache is warm
        times = []
        for window in places:
            before = time.process_time()
            read(window)
            times.append(time.process_time() - before)
        result["patches"][name] = {
            "per_second": 1 / statistics.median(times),
            **fetched(candidate, array, folder, places),
        }
    return result


def fetched(
    candidate: Candidate, array: NDArray[Any], folder: Path, places: list[Window]
) -> Mapping[str, float | None]:
    """Bytes and requests per patch through a file system that counts them."""
    if candidate.open_remote is None:
        touched = [pages(array.shape, array.itemsize, window) for window in places]
        return {"megabytes_fetched": statistics.mean(touched) / 1e6, "requests": None}
    files = CountingFileSystem()
    for path in folder.rglob("*"):
        if path.is_file():
            files.pipe_file(f"/prepared/{path.relative_to(folder)}", path.read_bytes())
    read = candidate.open_remote("counting://prepared")
    read(places[0])
    CountingFileSystem.bytes_read = CountingFileSystem.requests = 0
    few = places[1:9]
    for window in few:
        np.testing.assert_array_equal(read(window), array[window])
    found = {
        "megabytes_fetched": CountingFileSystem.bytes_read / len(few) / 1e6,
        "requests": CountingFileSystem.requests / len(few),
    }
    files.rm("/prepared", recursive=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patches", type=int, default=40)
    parser.add_argument("--shape", type=int, nargs=3, default=SHAPE, metavar=("D", "H", "W"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    fsspec.register_implementation("counting", CountingFileSystem, clobber=True)
    blosc2.set_nthreads(1)
    zarr.config.set({"async.concurrency": 8, "threading.max_workers": 1})
    tables: dict[str, dict[str, Any]] = {}
    for kind, array in generated(tuple(arguments.shape)).items():
        tables[kind] = {}
        print(f"\n{kind}, {array.nbytes / 1e6:.0f} MB")
        for name, candidate in candidates().items():
            folder = Path(tempfile.mkdtemp())
            try:
                found = measure(candidate, array, folder, arguments.patches)
            finally:
                shutil.rmtree(folder)
            tables[kind][name] = found
            reads = "   ".join(
                f"{patch} {one['per_second']:6.0f}/s {one['megabytes_fetched']:7.2f} MB {one['requests'] or 0:5.0f} req"
                for patch, one in found["patches"].items()
            )
            print(
                f"{name:58} {found['megabytes']:7.1f} MB written in {found['write_seconds']:5.1f} s   {reads}",
                flush=True,
            )
    if arguments.out:
        result = {"shape": list(arguments.shape), "patches": arguments.patches, "formats": tables}
        write_result(arguments.out, result, ("blosc2", "zarr", "fsspec", "numpy"))


if __name__ == "__main__":
    main()
