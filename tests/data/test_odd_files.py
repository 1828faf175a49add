"""`check` says of an odd file what training and prediction do with it: all refuse it, in the same words, or none.

The files are sound by the rules of their formats, or nearly; each has something that a reader may trip over.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dataset_folders as folders
import h5py
import nibabel
import numpy as np
import PIL.Image
import pytest
import tifffile

from scantly import imaging
from scantly.data.checks import check
from scantly.data.dataset import Dataset
from scantly.data.plan import Plan
from scantly.data.prepare import prepare, prepare_label, restore_label
from scantly.errors import DatasetError, ImageError
from tiff_files import write_tiff

FLAT = np.arange(35, dtype=np.uint8).reshape(5, 7) % 3
DEEP = np.arange(2 * 5 * 7, dtype=np.uint8).reshape(7, 5, 2) % 3  # (x, y, z)
COLOR = np.stack([FLAT, FLAT, FLAT], axis=-1)

Write = Callable[[Path], Any]


def nifti(array: np.ndarray, affine: np.ndarray | None = None, **fields: Any) -> Write:
    """A NIfTI file; ``fields`` are changed in its header after all else."""

    def write(path: Path) -> None:
        header = nibabel.Nifti1Image(
            array, np.diag([1.0, 1, 2, 1]) if affine is None else affine, dtype=array.dtype
        ).header
        header["vox_offset"] = 352
        for name, value in fields.items():
            header[name] = value
        path.write_bytes(header.binaryblock + bytes(4) + array.tobytes(order="F"))

    return write


def cut(write: Write, count: int) -> Write:
    def shortened(path: Path) -> None:
        write(path)
        path.write_bytes(path.read_bytes()[:-count])

    return shortened


def png(array: np.ndarray, orientation: int = 1, **options: Any) -> Write:
    exif = PIL.Image.Exif()
    exif[274] = orientation
    return lambda path: PIL.Image.fromarray(array).save(path, exif=exif, **options)


def tiff(samples: np.ndarray = FLAT, photometric: int | None = 1, **options: Any) -> Write:
    return lambda path: write_tiff(path, samples, photometric=photometric, **options)


def h5(**arrays: Any) -> Write:
    def write(path: Path) -> None:
        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                file[name] = array

    return write


def both(array: Any) -> Write:
    return h5(image=array, label=array)


def turned(orientation: int) -> dict[int, tuple[str, list[int]]]:
    return {274: ("H", [orientation])}


ODD: dict[str, Write] = {
    "plain.nii": nifti(DEEP),
    "two dimensions.nii": nifti(DEEP[:, :, 0]),
    "one slice.nii": nifti(DEEP[:, :, :1]),
    "fourth dimension of one.nii": nifti(DEEP[..., np.newaxis]),
    "fourth dimension.nii": nifti(np.stack([DEEP, DEEP], axis=-1)),
    "vectors.nii": nifti(np.stack([DEEP] * 3, axis=-1)[:, :, :, np.newaxis]),
    "colors.nii": nifti(np.zeros((7, 5, 2), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))),
    "complex.nii": nifti(DEEP.astype(np.complex64)),
    "int64.nii": nifti(DEEP.astype(np.int64)),
    "unknown type.nii": nifti(DEEP, datatype=77),
    "one dimension.nii": nifti(DEEP, dim=[1, 70, 1, 1, 1, 1, 1, 1]),
    "no extent.nii": nifti(DEEP, dim=[3, 7, 0, 2, 1, 1, 1, 1]),
    "negative size.nii": nifti(DEEP, pixdim=[1, -1, 1, 2, 1, 1, 1, 1], sform_code=0, qform_code=1),
    "no size.nii": nifti(DEEP, pixdim=[1, 1, 1, 0, 1, 1, 1, 1], sform_code=0, qform_code=1),
    "rounded rotation.nii": nifti(DEEP, quatern_d=np.float32(1 + 2.4e-7), sform_code=0, qform_code=1),
    "no rotation.nii": nifti(DEEP, quatern_d=2, sform_code=0, qform_code=1),
    "sheared.nii": nifti(DEEP, np.array([[1, 0.9, 0, 0], [0, 1, 0.9, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])),
    "permuted.nii": nifti(DEEP, np.array([[0, 0, 2, 0], [1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1.0]])),
    "voxels in the header.nii": nifti(DEEP, vox_offset=100),
    "cut off.nii": cut(nifti(DEEP), 1),
    "not finite.nii": nifti(np.where(DEEP == 1, np.nan, DEEP).astype(np.float32)),
    "not whole.nii": nifti(DEEP / 2.0),
    "plain.png": png(FLAT),
    "turned by a quarter.png": png(FLAT, 6),
    "mirrored.png": png(FLAT, 4),
    "color.png": png(COLOR),
    "opacity.png": png(np.concatenate([COLOR, COLOR[..., :1]], axis=-1)),
    "deep.png": png(FLAT.astype(np.uint16)),
    "cut off.png": cut(png(FLAT), 20),
    "animated.png": lambda path: PIL.Image.fromarray(FLAT).save(
        path, save_all=True, append_images=[PIL.Image.fromarray(FLAT + 1)]
    ),
    "plain.tif": tiff(),
    "turned by a quarter.tif": tiff(tags=turned(6)),
    "turned and transposed.tif": tiff(tags=turned(7), compression="lzw"),
    "mirrored.tif": tiff(tags=turned(2), compression="packbits"),
    "turned to nothing.tif": tiff(tags=turned(9)),
    "white is zero.tif": tiff(255 - FLAT, 0, compression="deflate"),
    "white is zero in floats.tif": tiff(FLAT.astype(np.float32), 0),
    "planes.tif": tiff(COLOR, 2, planar=True),
    "deep planes.tif": tiff(COLOR.astype(np.uint16), 2, planar=True, tags=turned(5)),
    "two channels.tif": tiff(COLOR[..., :2], 1, tags={338: ("H", [0])}),
    "two bits.tif": tiff(FLAT, 1, bits=2),
    "inks.tif": tiff(np.concatenate([COLOR, COLOR[..., :1]], axis=-1), 5),
    "television.tif": tiff(COLOR, 6, tags={530: ("H", [1, 1])}),
    "unsaid.tif": tiff(FLAT, None),
    "packed doubles.tif": tiff(FLAT.astype(np.float64), compression="lzw"),
    "large offsets.tif": tiff(big=True),
    "unknown packing.tif": tiff(compression=50002),
    "lossy.tif": lambda path: PIL.Image.fromarray(FLAT).save(path, compression="jpeg"),
    "stack.tif": lambda path: tifffile.imwrite(path, np.stack([FLAT, FLAT]), photometric="minisblack"),
    "volume.tif": lambda path: tifffile.imwrite(
        path, np.zeros((16, 16, 16), np.uint8), volumetric=True, tile=(16, 16, 16), photometric="minisblack"
    ),
    "tiles.tif": lambda path: tifffile.imwrite(path, np.resize(FLAT, (40, 50)), tile=(16, 16)),
    "complex.tif": lambda path: tifffile.imwrite(path, FLAT.astype(np.complex64)),
    "plain.h5": both(FLAT),
    "volume.h5": both(DEEP),
    "truth values.h5": both(FLAT > 0),
    "four dimensions.h5": both(DEEP[np.newaxis]),
    "scalar.h5": both(3.0),
    "texts.h5": both("text"),
    "complex.h5": both(FLAT.astype(np.complex64)),
    "nothing.h5": both(h5py.Empty("u1")),
    "no extent.h5": both(np.zeros((0, 7))),
    "elsewhere.h5": both(h5py.ExternalLink("none.h5", "image")),
    "not finite.h5": both(np.where(FLAT == 1, np.inf, FLAT)),
    "cut off.h5": cut(both(FLAT), 30),
}


def predicted(path: Path, out: Path) -> str | None:
    """What prediction does: read, prepare, bring labels back, write them, and they lie on the scan. None if it can."""
    try:
        image = imaging.read_image([path])
    except ImageError as error:
        return str(error)
    dims = image.geometry.spatial_dims
    given = {
        "spatial_dims": dims,
        "normalization": [{"scheme": "zscore"}] * len(image.array),
        "patch_size": [16] * dims,
        "labeled_batch_size": 1,
        "unlabeled_batch_size": 1,
    }
    plan = Plan.model_validate(given)
    prepared, record = prepare(image, plan)
    labels = restore_label((prepared[0] > 0).astype(np.uint8), record, plan)
    imaging.write_label(out, labels, image.geometry)
    written = imaging.read_label(out)
    np.testing.assert_array_equal(written.array, labels)
    assert imaging.geometry_difference(written.geometry, image.geometry) is None
    return None


def trained_on(root: Path, what: str) -> str | None:
    dataset = Dataset.open(root)
    try:
        if what == "scan":
            dataset.read_image("a")
        else:
            label = dataset.read_label("a")
            prepare_label(label, Plan.model_validate({"spatial_dims": 2, **PLAN_OF_LABELS}))
    except (DatasetError, ImageError) as error:
        return str(error)
    return None


PLAN_OF_LABELS = {
    "normalization": [{"scheme": "none"}],
    "patch_size": [16, 16],
    "labeled_batch_size": 1,
    "unlabeled_batch_size": 1,
}


def errors_of(root: Path, path: Path) -> list[str]:
    return [finding.message for finding in check(root) if finding.level == "error" and finding.file == str(path)]


@pytest.mark.parametrize("name", ODD)
def test_as_a_scan(tmp_path: Path, name: str) -> None:
    ending = Path(name).suffix
    path = tmp_path / "data" / "imagesTr" / f"a_0000{ending}"
    path.parent.mkdir(parents=True)
    ODD[name](path)
    fault = predicted(path, tmp_path / f"out{ending}")
    channels = 1 if fault else len(imaging.read_image([path]).array)
    folders.describe(tmp_path / "data", channels=channels, ending=ending)
    found = errors_of(tmp_path / "data", path)
    assert trained_on(tmp_path / "data", "scan") == fault
    if fault is None:
        assert found == []
        assert imaging.read_geometry(path).shape == imaging.read_image([path]).geometry.shape
        assert imaging.geometry_difference(imaging.read_geometry(path), imaging.read_image([path]).geometry, 0) is None
    else:
        assert len(found) == 1
        assert fault.startswith(str(path))
        assert found[0] == fault or "NaN or infinite" in fault


@pytest.mark.parametrize("name", ODD)
def test_as_a_label(tmp_path: Path, name: str) -> None:
    root, ending = tmp_path / "data", Path(name).suffix
    path, scan = root / "labelsTr" / f"a{ending}", root / "imagesTr" / f"a_0000{ending}"
    path.parent.mkdir(parents=True)
    scan.parent.mkdir()
    ODD[name](path)
    try:
        geometry = imaging.read_geometry(path)
    except ImageError:
        geometry = imaging.Geometry((1, 5, 7), imaging.grid(), spatial_dims=2)
    labels = np.resize(FLAT, geometry.shape)
    imaging.write_label(scan, labels, geometry)
    if ending == ".h5":
        scan.unlink()
        h5(image=labels[0] if geometry.spatial_dims == 2 else labels)(scan)
    folders.describe(root, ending=ending)
    found, fault = errors_of(root, path), trained_on(root, "label")
    assert found == ([] if fault is None else [fault])
    if fault is None:
        assert set(np.unique(imaging.read_label(path).array)) <= {0, 1, 2}


def test_the_table_holds_both_kinds(tmp_path: Path) -> None:
    """Sentences are no use if all is refused, nor the table if nothing is."""
    refused = set()
    for number, (name, write) in enumerate(ODD.items()):
        path = tmp_path / f"{number}{Path(name).suffix}"
        write(path)
        try:
            imaging.read_image([path])
        except ImageError:
            refused.add(name)
    assert not {name for name in refused if name.startswith(("plain", "turned", "mirrored", "rounded", "two d"))}
    assert {"vectors.nii", "no rotation.nii", "animated.png", "stack.tif", "unsaid.tif", "scalar.h5"} <= refused
