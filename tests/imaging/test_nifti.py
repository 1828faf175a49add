"""NIfTI: values, geometry carried bit by bit, and damaged files told in a sentence."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest

from scantly import imaging
from scantly.errors import ImageError

AFFINE = np.array([[-1.5, 0.1, 0, 12.25], [0.1, -1.5, 0, -7], [0, 0, 8, 0.3], [0, 0, 0, 1]])

FIELDS = (
    "srow_x srow_y srow_z sform_code qform_code pixdim xyzt_units descrip dim "
    "quatern_b quatern_c quatern_d qoffset_x qoffset_y qoffset_z"
)


def save(path: Path, array: np.ndarray, *, slope: tuple[float, float] | None = None) -> Path:
    """Write (x, y, z) with nibabel, with all geometry fields set to something unusual."""
    image = nibabel.Nifti1Image(array, None)
    image.header.set_sform(AFFINE, code=4)
    image.header.set_qform(AFFINE, code=2, strip_shears=True)
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"] = b"scanner 7"
    if slope:
        image.header.set_slope_inter(*slope)
        image.header["scl_slope"], image.header["scl_inter"] = slope
    nibabel.save(image, path)
    if slope:  # nibabel chooses its own scale when it writes
        raw = bytearray(path.read_bytes())
        raw[112:120] = np.array(slope, np.float32).tobytes()
        path.write_bytes(raw)
    return path


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_reads_what_nibabel_reads(tmp_path: Path, dtype: type, ending: str) -> None:
    array = np.arange(2 * 3 * 4).reshape(2, 3, 4).astype(dtype)
    path = save(tmp_path / f"scan{ending}", array)
    image = imaging.read_image([path])
    assert image.array.dtype == np.float32
    np.testing.assert_array_equal(image.array[0], array.transpose(2, 1, 0))
    np.testing.assert_array_equal(image.geometry.affine, nibabel.load(path).affine)
    assert image.geometry.shape == (4, 3, 2)
    assert imaging.read_geometry(path).header == image.geometry.header


def test_slope_and_intercept_are_applied(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    path = save(tmp_path / "scan.nii", array, slope=(0.25, -3.0))
    expected = nibabel.load(path).get_fdata()
    assert expected.max() == 23 * 0.25 - 3
    np.testing.assert_array_equal(imaging.read_image([path]).array[0], expected.T.astype(np.float32))


def test_big_endian_and_nifti_2_and_two_dimensions(tmp_path: Path) -> None:
    array = np.arange(12, dtype=">i2").reshape(3, 4)
    header = nibabel.Nifti1Header(endianness=">")
    nibabel.save(nibabel.Nifti1Image(array, np.diag([2, 2, 2, 1.0]), header), tmp_path / "big.nii")
    nibabel.save(nibabel.Nifti2Image(array, np.diag([2, 2, 2, 1.0])), tmp_path / "two.nii.gz")
    for name in ("big.nii", "two.nii.gz"):
        image = imaging.read_image([tmp_path / name])
        assert image.array.shape == (1, 1, 4, 3)
        np.testing.assert_array_equal(image.array[0, 0], array.T)
        out = tmp_path / f"label-{name}"
        imaging.write_label(out, np.ones((1, 4, 3), int), image.geometry)
        assert np.asarray(nibabel.load(out).dataobj).shape == (3, 4)
        assert imaging.read_label(out).array.sum() == 12


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_prediction_has_the_exact_geometry_of_its_image(tmp_path: Path, ending: str) -> None:
    source = save(tmp_path / "scan.nii", np.zeros((2, 3, 4), np.int16), slope=(0.5, 1.0))
    geometry = imaging.read_geometry(source)
    labels = np.arange(24).reshape(4, 3, 2) % 5
    out = tmp_path / f"prediction{ending}"
    imaging.write_label(out, labels, geometry)

    there, here = nibabel.load(source).header, nibabel.load(out).header
    for field in FIELDS.split():
        assert there[field].tobytes() == here[field].tobytes(), field
    assert here.get_data_dtype() == np.uint8
    stored = nibabel.load(out).dataobj
    assert (stored.slope, stored.inter) == (1, 0)
    np.testing.assert_array_equal(np.asarray(nibabel.load(out).dataobj).T, labels)
    np.testing.assert_array_equal(imaging.read_label(out).array, labels)
    assert imaging.geometry_difference(imaging.read_geometry(out), geometry, tolerance=0) is None


def test_equal_arrays_give_equal_bytes(tmp_path: Path) -> None:
    geometry = imaging.Geometry((2, 3, 4), AFFINE)
    for name in ("a.nii.gz", "b.nii.gz"):
        imaging.write_label(tmp_path / name, np.ones((2, 3, 4), np.uint8), geometry)
    content = (tmp_path / "a.nii.gz").read_bytes()
    assert content == (tmp_path / "b.nii.gz").read_bytes()
    assert content[3:8] == bytes(5)  # gzip's flags (no file name) and time


def test_geometry_without_a_header_is_written_from_its_affine(tmp_path: Path) -> None:
    path = tmp_path / "map.nii.gz"
    values = np.linspace(-1, 1, 24, dtype=np.float32).reshape(2, 3, 4)
    imaging.write_scalar(path, values, imaging.Geometry((2, 3, 4), AFFINE))
    np.testing.assert_allclose(nibabel.load(path).affine, AFFINE, atol=1e-6)
    np.testing.assert_array_equal(imaging.read_image([path]).array[0], values)


def test_labels_above_255_take_two_bytes(tmp_path: Path) -> None:
    geometry = imaging.Geometry((1, 1, 2), AFFINE)
    imaging.write_label(tmp_path / "x.nii", np.array([[[0, 300]]]), geometry)
    assert nibabel.load(tmp_path / "x.nii").get_data_dtype() == np.int16
    assert imaging.read_label(tmp_path / "x.nii").array.max() == 300


def test_units_other_than_mm_are_converted_and_kept_in_what_is_written(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.diag([500.0, 500, 2000, 1]))
    image.header.set_xyzt_units("micron")
    nibabel.save(image, tmp_path / "micro.nii")
    geometry = imaging.read_geometry(tmp_path / "micro.nii")
    assert geometry.spacing == pytest.approx((2.0, 0.5, 0.5))
    imaging.write_label(tmp_path / "out.nii", np.zeros((2, 2, 2), int), geometry)
    again = nibabel.load(tmp_path / "out.nii").header
    assert again.get_xyzt_units()[0] == "micron"
    assert imaging.geometry_difference(imaging.read_geometry(tmp_path / "out.nii"), geometry) is None


def test_float_labels_are_taken_if_whole(tmp_path: Path) -> None:
    path = save(tmp_path / "l.nii", np.array([[[0.0, 1.0001, 2.0]]]))
    label = imaging.read_label(path)
    assert label.array.dtype == np.uint8
    assert label.array.ravel().tolist() == [0, 1, 2]
    odd = save(tmp_path / "odd.nii", np.array([[[0.0, 0.5, 1.5]]]))
    with pytest.raises(ImageError, match=r"odd\.nii has 2 voxels whose label is not a whole number.*0\.5"):
        imaging.read_label(odd)


def test_nan_voxels_are_counted(tmp_path: Path) -> None:
    path = save(tmp_path / "nan.nii.gz", np.array([[[0.0, np.nan, np.inf, 1.0]]]))
    with pytest.raises(ImageError, match=r"nan\.nii\.gz has 2 voxels that are NaN or infinite \(of 4\)"):
        imaging.read_image([path])
    assert np.isnan(imaging.read_image([path], finite=False).array).sum() == 1


def test_four_dimensions_are_explained(tmp_path: Path) -> None:
    path = save(tmp_path / "four.nii.gz", np.zeros((2, 3, 4, 2), np.uint8))
    with pytest.raises(ImageError, match=r"2 x 3 x 4 x 2.*one file per channel.*_0001"):
        imaging.read_image([path])
    single = save(tmp_path / "one.nii.gz", np.zeros((2, 3, 4, 1), np.uint8))
    assert imaging.read_image([single]).array.shape == (1, 4, 3, 2)


def test_every_truncation_is_found(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for ending in (".nii", ".nii.gz"):
        whole = save(tmp_path / f"whole{ending}", rng.integers(0, 99, (3, 4, 5)).astype(np.int16)).read_bytes()
        path = tmp_path / f"cut{ending}"
        for length in range(0, len(whole), 7):
            path.write_bytes(whole[:length])
            with pytest.raises(ImageError, match=r"cut\.nii(\.gz)?"):
                imaging.read_image([path])


def test_a_wrong_check_sum_is_found(tmp_path: Path) -> None:
    path = save(tmp_path / "scan.nii.gz", np.zeros((3, 4, 5), np.int16))
    raw = bytearray(path.read_bytes())
    raw[-6] ^= 1  # the CRC behind the last voxel
    path.write_bytes(raw)
    with pytest.raises(ImageError, match="damaged"):
        imaging.read_image([path])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x89PNG" + bytes(400), "not a NIfTI file"),
        (gzip.compress(b"plain text, long enough " * 40, mtime=0), "not a NIfTI file"),
        (b"", "truncated"),
    ],
    ids=["png", "gzipped text", "nothing"],
)
def test_other_content_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "x.nii.gz"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=words):
        imaging.read_image([path])


def test_complex_voxels_pairs_and_flat_affines_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "complex.nii", np.zeros((2, 2, 2), np.complex64))
    with pytest.raises(ImageError, match="complex64"):
        imaging.read_image([tmp_path / "complex.nii"])
    raw = bytearray(save(tmp_path / "pair.nii", np.zeros((2, 2, 2), np.uint8)).read_bytes())
    flat = raw.copy()
    raw[344:348] = b"ni1\0"
    (tmp_path / "pair.nii").write_bytes(raw)
    with pytest.raises(ImageError, match="half of an image/header pair"):
        imaging.read_image([tmp_path / "pair.nii"])
    flat[280:296] = bytes(16)  # srow_x
    (tmp_path / "flat.nii").write_bytes(flat)
    with pytest.raises(ImageError, match="no usable voxel size"):
        imaging.read_geometry(tmp_path / "flat.nii")


def test_channels_on_different_grids_are_refused(tmp_path: Path) -> None:
    first = save(tmp_path / "a_0000.nii", np.zeros((2, 3, 4), np.uint8))
    second = save(tmp_path / "a_0001.nii", np.ones((2, 3, 5), np.uint8))
    with pytest.raises(ImageError, match=r"a_0001.*shape 5 x 3 x 2 against 4 x 3 x 2"):
        imaging.read_image([first, second])
    assert imaging.read_image([first, first]).array.shape == (2, 4, 3, 2)
