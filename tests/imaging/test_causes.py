"""Why a file cannot be read: memory, the system, a missing decoder and damage are told apart, in every reader."""

from __future__ import annotations

import errno
import re
import subprocess
import sys
import textwrap
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import nibabel
import numpy as np
import PIL.Image
import pytest
import tifffile

import dicom_series
from scantly import imaging
from scantly.errors import ImageError
from scantly.imaging.decoding import decoding, within_memory
from scantly.imaging.dicom import find_series

SIDE = 200  # a volume of 8 million voxels, 16 MB as int16 and 32 MB as float32


def volume(path: Path) -> None:
    array = np.zeros((SIDE,) * 3, np.int16)
    if path.suffix == ".h5":
        with h5py.File(path, "w") as file:  # one chunk: HDF5 needs it whole beside the array, and hides why it fails
            file.create_dataset("image", data=array, chunks=array.shape, compression="gzip")
            file.create_dataset("label", data=array, chunks=array.shape, compression="gzip")
    else:
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)


def picture(path: Path) -> None:
    array = np.zeros((SIDE * 20, SIDE * 10), np.uint8 if path.stem != "deep" else np.float64)
    if path.suffix == ".png":
        PIL.Image.fromarray(array).save(path)
    else:
        tifffile.imwrite(path, array, compression="zlib")


BIG = {
    "a.nii": volume,
    "a.nii.gz": volume,
    "a.h5": volume,
    "a.png": picture,
    "a.tif": picture,
    "deep.tif": picture,
}


@pytest.mark.parametrize("name", BIG)
def test_a_sound_file_that_does_not_fit_is_not_called_damaged(tmp_path: Path, name: str) -> None:
    """With little room, with room for the stored voxels but not for their copies, and with enough."""
    BIG[name](tmp_path / name)
    program = """
        import resource, sys
        from pathlib import Path
        import h5py, PIL.Image, tifffile  # loaded before memory is short
        from scantly import imaging
        from scantly.errors import ImageError
        PIL.Image.init()
        small, path = Path(sys.argv[1]), Path(sys.argv[2])
        imaging.read_image([small]); imaging.read_label(small)
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        readers = (imaging.read_label, lambda path: imaging.read_image([path]))
        for room in (4, 12, 24, 40, 90, 4000):
            resource.setrlimit(resource.RLIMIT_AS, (taken + room * 1_000_000, -1))
            for read in readers:
                try:
                    read(path)
                except ImageError as error:
                    print(room, error)
                else:
                    print(room, "read")
    """
    small = tmp_path / f"small{imaging.file_ending(tmp_path / name)}"
    geometry = imaging.Geometry((1, 3, 4), imaging.grid(), spatial_dims=2)
    imaging.write_label(small, np.ones((1, 3, 4), np.uint8), geometry)
    if small.suffix == ".h5":
        with h5py.File(small, "a") as file:
            file["image"] = np.ones((3, 4))
    arguments = [sys.executable, "-c", textwrap.dedent(program), str(small), str(tmp_path / name)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split(" ", 1) for line in done.stdout.splitlines()]
    assert [room for room, _ in lines] == [room for room in ("4", "12", "24", "40", "90", "4000") for _ in range(2)]
    for room, told in lines:
        if told != "read":
            assert re.fullmatch(rf"{tmp_path / name} needs about \d+ MB of memory to be read.*; free memory.*", told)
        assert (told != "read") or room != "4"
        assert (told == "read") or room != "4000"


def test_a_sound_series_that_does_not_fit_is_not_called_damaged(tmp_path: Path) -> None:
    dicom_series.write(tmp_path / "big", dicom_series.stack(0, (2, 2000, 1000)))
    dicom_series.write(tmp_path / "small", dicom_series.stack(0, (2, 4, 5)))
    program = """
        import resource, sys
        from pathlib import Path
        from scantly import imaging
        from scantly.imaging.dicom import find_series
        from scantly.errors import ImageError
        (big,), (small,) = (find_series(Path(folder)) for folder in sys.argv[1:])
        imaging.read_image([small])
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        for room in (2, *range(14, 30, 2), 4000):  # the whole takes 16 MB, a slice 4 and what GDCM needs
            resource.setrlimit(resource.RLIMIT_AS, (taken + room * 1_000_000, -1))
            try:
                imaging.read_image([big])
            except ImageError as error:
                print(room, error)
            else:
                print(room, "read")
    """
    arguments = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "big"), str(tmp_path / "small")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split(" ", 1) for line in done.stdout.splitlines()]
    assert len(lines) == 10
    assert all(told == "read" or re.search(r"big.* needs about \d+ MB of memory to be read", told) for _, told in lines)
    assert lines[0][1] != "read"
    assert lines[-1][1] == "read"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        np._core._exceptions._ArrayMemoryError((9, 9), np.dtype("f4")),
        RuntimeError("itkImportImageContainer.hxx:179:\nFailed to allocate memory for image."),
        RuntimeError("std::bad_alloc"),
        OSError("decoder error -9"),
        OSError("out of memory error when reading image file"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        OSError("Can't read data (memory allocation failed for raw data chunk)"),
        zlib.error("Error -4 while decompressing data"),
    ],
    ids=lambda error: f"{type(error).__name__} {str(error)[:20]}",
)
def test_each_library_s_word_for_a_lack_of_memory_is_known(tmp_path: Path, error: Exception) -> None:
    path = tmp_path / "a.x"
    path.write_bytes(b"sound")
    with pytest.raises(ImageError) as told, decoding(path, "scan") as reading:
        reading.needs = 2_500_000_000
        raise error
    assert str(told.value).startswith(
        f"{path} needs about 2.5 GB of memory to be read, more than this process can get;"
    )


def test_work_on_the_voxels_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"a\.nii needs more memory"), within_memory(tmp_path / "a.nii"):
        raise MemoryError


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            ModuleNotFoundError("No module named 'abc'", name="abc"),
            "needs a decoder that is not installed .*pip install abc",
        ),
        (ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package"), r"LZW.*pip install imagecodecs, or"),
        (OSError("Can't read data (can't open directory (/usr/lib/plugin))"), "no decoder is installed"),
        (OSError("decoder webp not available"), "no decoder is installed"),
        (NotImplementedError("sparse tiles"), r"of a sort that cannot be read \(sparse tiles\)"),
        (nibabel.spatialimages.HeaderDataError("dim is odd"), r"header that cannot be used \(dim is odd\); mend it"),
        (ValueError("bad bytes"), r"cannot be read as a scan \(bad bytes\): it is truncated or damaged"),
        (OSError(errno.EINVAL, "Invalid argument"), "truncated or damaged"),
        (OSError(errno.EIO, "Input/output error"), r"\(Input/output error\): the disk or the network share fails"),
        (OSError(errno.ESTALE, "x"), r"\(Stale file handle\): the disk or the network share fails"),
        (OSError(errno.ENOSPC, "x"), r"No space left on device\): the disk"),
        (OSError(errno.EMFILE, "x"), r"raise the limit on open files \(ulimit -n\)"),
        (BlockingIOError(errno.EAGAIN, "unable to lock file"), "held by another program"),
        (PermissionError(errno.EACCES, "x"), r"may not be read \(Permission denied\); change its permissions"),
        (OSError(errno.ENOTDIR, "x"), "check the path"),
    ],
    ids=lambda value: f"{type(value).__name__} {str(value)[:25]}" if isinstance(value, Exception) else None,
)
def test_every_cause_has_its_sentence(tmp_path: Path, error: Exception, words: str) -> None:
    path = tmp_path / "a.x"
    path.write_bytes(b"sound")
    with pytest.raises(ImageError, match=words) as told, decoding(path, "scan"):
        raise error
    assert ("damaged" in str(told.value)) == ("damaged" in words)
    assert str(path) in str(told.value)
    assert "\n" not in str(told.value)


def test_a_header_that_asks_for_all_memory_is_damaged_and_a_name_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "out of memory, requires the 'abc' package"
    path.write_bytes(b"odd")
    for error in (MemoryError(), OSError(f"cannot identify {path}")):
        with pytest.raises(ImageError, match="truncated or damaged"), decoding(path, "scan"):
            raise error


def test_a_claim_beyond_all_addresses_is_a_lack_of_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.x"
    path.write_bytes(b"sound")
    with pytest.raises(ImageError, match="of memory to be read"), decoding(path, "scan") as reading:
        reading.needs = 2**63
        raise OSError("filter returned failure during read")


def readers() -> dict[str, Callable[[Path], object]]:
    return {
        "image": lambda path: imaging.read_image([path]),
        "label": imaging.read_label,
        "grid": imaging.read_geometry,
    }


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="a file that the system fails to read is Linux's")
@pytest.mark.parametrize("reader", readers())
@pytest.mark.parametrize("ending", imaging.ENDINGS)
def test_a_failing_disk_is_not_called_damage(tmp_path: Path, ending: str, reader: str) -> None:
    path = tmp_path / f"a{ending}"
    path.symlink_to("/proc/self/mem")  # opens, and gives EIO for its first byte
    with pytest.raises(ImageError, match=r"Input/output error\): the disk or the network share fails"):
        readers()[reader](path)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="a file that the system fails to read is Linux's")
def test_a_failing_disk_with_a_series(tmp_path: Path) -> None:
    dicom_series.write(tmp_path)
    (tmp_path / "IM9.dcm").symlink_to("/proc/self/mem")
    with pytest.raises(ImageError, match=r"IM9\.dcm cannot be read \(Input/output error\): the disk"):
        find_series(tmp_path)


@pytest.mark.parametrize("reader", readers())
@pytest.mark.parametrize("ending", imaging.ENDINGS)
def test_paths_that_lead_nowhere_are_named(tmp_path: Path, ending: str, reader: str) -> None:
    read = readers()[reader]
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(ImageError, match=r"\(Not a directory\); check the path"):
        read(tmp_path / "file" / f"a{ending}")
    (tmp_path / f"circle{ending}").symlink_to(tmp_path / f"circle{ending}")
    with pytest.raises(ImageError, match="check the path"):
        read(tmp_path / f"circle{ending}")


def test_an_h5_file_of_a_filter_that_is_not_installed(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        space = h5py.h5s.create_simple((3, 4))
        settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        settings.set_chunk((3, 4))
        settings.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, ())  # Zstandard
        data = h5py.h5d.create(file.id, b"image", h5py.h5t.NATIVE_FLOAT, space, settings)
        data.write_direct_chunk((0, 0), b"packed", 0)
    with pytest.raises(ImageError, match=r"a\.h5 is packed in a way for which no decoder is installed"):
        imaging.read_image([path])


def test_an_h5_file_that_is_being_written(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["image"] = np.zeros((3, 4))
        file.flush()
        read = f"from scantly import imaging; from pathlib import Path; imaging.read_image([Path({str(path)!r})])"
        done = subprocess.run([sys.executable, "-c", read], capture_output=True, text=True, check=False)
    assert "a.h5 is held by another program" in done.stderr


def test_an_h5_array_without_data(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["image"] = h5py.Empty("f4")
    with pytest.raises(ImageError, match=r"'image' of shape None"):
        imaging.read_image([tmp_path / "a.h5"])
