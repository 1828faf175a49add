"""Where a NIfTI file lies: as SimpleITK, and where that differs nibabel, read the same header."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK

from scantly import imaging
from scantly.errors import ImageError

ARRAY = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
TURNED = np.array([[0, -3, 0, 1.5], [2, 0, 0, 4], [0, 0, 4, -7], [0, 0, 0, 1.0]])
OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = np.linalg.qr(np.array([[3.0, 1, 0.5], [-1, 4, 1], [0.2, -1, 5]]))[0] @ np.diag([0.5, 0.75, 3])
LEFT_HANDED = np.diag([-1.0, 2, 3, 1])
HALF_TURN = np.diag([-2.0, -3, 4, 1])

Edit = Callable[[Any], None]


def save(path: Path, affine: np.ndarray, edit: Edit, *, array: np.ndarray = ARRAY, sform: bool = False) -> Path:
    """A file with a qform, or an sform, whose header fields are then changed."""
    header = nibabel.Nifti1Image(array, affine).header
    header.set_qform(affine, 0 if sform else 1)
    header["sform_code"] = 1 if sform else 0
    header["vox_offset"] = 352
    edit(header)
    path.write_bytes(header.binaryblock + bytes(4) + array.tobytes(order="F"))
    return path


def fields(**changes: Any) -> Edit:
    def edit(header: Any) -> None:
        for name, value in changes.items():
            if isinstance(value, dict):
                for index, number in value.items():
                    header[name][index] = number
            else:
                header[name] = value

    return edit


def by_simpleitk(path: Path) -> np.ndarray:
    """Affine (x, y, z) -> RAS+ mm."""
    image = SimpleITK.ReadImage(str(path))
    dims = image.GetDimension()
    lps = np.eye(4)
    lps[:dims, :dims] = np.reshape(image.GetDirection(), (dims, dims)) * image.GetSpacing()
    lps[:dims, 3] = image.GetOrigin()
    return np.diag([-1.0, -1, 1, 1]) @ lps


@pytest.mark.parametrize("affine", [TURNED, OBLIQUE, LEFT_HANDED, HALF_TURN, np.diag([2.0, 3, 4, 1])])
@pytest.mark.parametrize("sform", [False, True])
@pytest.mark.parametrize("units", [1, 2, 3, 0])
def test_qforms_and_sforms(tmp_path: Path, affine: np.ndarray, sform: bool, units: int) -> None:
    path = save(tmp_path / "a.nii", affine, fields(xyzt_units=units), sform=sform)
    read = imaging.read_geometry(path).affine
    np.testing.assert_allclose(read, by_simpleitk(path), rtol=1e-5, atol=1e-5 * np.abs(read).max())


@pytest.mark.parametrize(
    "edit",
    [
        fields(quatern_d=np.float32(1 + 2.4e-7)),
        fields(quatern_d=np.float32(1 + 4e-6)),
        fields(quatern_b=1e-4, quatern_d=np.float32(1)),
        fields(pixdim={0: 0}),
        fields(pixdim={0: -1}),
        fields(pixdim={0: -2}),
        fields(pixdim={0: 2}),
    ],
    ids=["rounding", "more rounding", "two parts", "qfac 0", "qfac -1", "qfac -2", "qfac 2"],
)
def test_rounded_quaternions_and_signs(tmp_path: Path, edit: Edit) -> None:
    path = save(tmp_path / "a.nii", HALF_TURN, edit)
    np.testing.assert_allclose(imaging.read_geometry(path).affine, by_simpleitk(path), atol=1e-5)


def test_a_rounded_quaternion_of_nifti_2(tmp_path: Path) -> None:
    image = nibabel.Nifti2Image(ARRAY, HALF_TURN)
    image.header.set_qform(HALF_TURN, 1)
    image.header["sform_code"] = 0
    image.header["quatern_d"] = 1 + 2.4e-7
    raw = image.header
    raw["vox_offset"] = 544
    (tmp_path / "a.nii").write_bytes(raw.binaryblock + bytes(4) + ARRAY.tobytes(order="F"))
    np.testing.assert_allclose(imaging.read_geometry(tmp_path / "a.nii").affine, HALF_TURN, atol=1e-6)


@pytest.mark.parametrize("negative", [{1: -2}, {2: -3}, {3: -4}, {1: -2, 2: -3, 3: -4}])
@pytest.mark.parametrize("how", ["qform", "sform", "neither"])
def test_a_negative_voxel_size_is_a_size(tmp_path: Path, negative: dict[int, float], how: str) -> None:
    """Both readers take its absolute value for the spacing; the directions are nibabel's, SimpleITK flips an axis."""
    code = {"qform_code": 0} if how == "neither" else {}
    path = save(tmp_path / "a.nii", HALF_TURN, fields(pixdim=negative, **code), sform=how == "sform")
    geometry = imaging.read_geometry(path)
    np.testing.assert_array_equal(geometry.affine, nibabel.load(path).affine)
    np.testing.assert_allclose(geometry.spacing[::-1], SimpleITK.ReadImage(str(path)).GetSpacing())
    labels = np.ones((4, 3, 2), np.uint8)
    imaging.write_label(tmp_path / "label.nii", labels, geometry)
    assert imaging.geometry_difference(imaging.read_label(tmp_path / "label.nii").geometry, geometry, 0) is None
    stored = nibabel.Nifti1Header((tmp_path / "label.nii").read_bytes()[:348], check=False)
    assert stored["pixdim"][next(iter(negative))] < 0  # the header of the scan, bit by bit


@pytest.mark.parametrize("depth", [None, 1])
def test_a_picture_without_a_third_size(tmp_path: Path, depth: int | None) -> None:
    array = ARRAY[:, :, 0] if depth is None else ARRAY[:, :, :1]
    path = save(tmp_path / "a.nii", HALF_TURN, fields(pixdim={3: 0}), array=array)
    np.testing.assert_allclose(imaging.read_geometry(path).affine, by_simpleitk(path))
    assert imaging.read_image([path]).geometry.spacing == (1, 3, 2)


def test_what_simpleitk_writes_in_two_dimensions(tmp_path: Path) -> None:
    picture = SimpleITK.GetImageFromArray(np.ones((3, 4), np.int16))
    picture.SetSpacing((0.5, 0.75))
    picture.SetOrigin((10, -20))
    SimpleITK.WriteImage(picture, str(tmp_path / "a.nii.gz"))
    np.testing.assert_allclose(imaging.read_geometry(tmp_path / "a.nii.gz").affine, by_simpleitk(tmp_path / "a.nii.gz"))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (
            fields(quatern_d=1.2),
            r"rotation in its header \(quaternion b, c, d = 0, 0, 1\.2\d*\) that is none: .*make 1\.44",
        ),
        (fields(quatern_c=np.nan), r"quaternion b, c, d = 0, nan, 1\) that is none"),
        (fields(quatern_b=np.inf), r"quaternion b, c, d = inf, 0, 1\) that is none"),
        (fields(pixdim={3: 0}), r"no usable voxel size .*sizes x, y, z: 2, 3, 0 mm"),
        (fields(pixdim={3: np.nan}), "no usable voxel size"),
        (fields(datatype=77), r"voxels of an unknown type \(datatype 77\); "),
    ],
    ids=["too long", "nan", "infinite", "no size", "size nan", "type"],
)
def test_headers_that_mean_nothing_are_not_called_a_fault_of_ours(tmp_path: Path, edit: Edit, words: str) -> None:
    path = save(tmp_path / "a.nii", HALF_TURN, edit)
    for read in (imaging.read_geometry, imaging.read_label, lambda path: imaging.read_image([path])):
        with pytest.raises(ImageError, match=words) as told:
            read(path)
        assert "damaged" not in str(told.value)


def test_an_unused_qform_may_be_wrong(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", HALF_TURN, fields(quatern_d=3), sform=True)
    np.testing.assert_allclose(imaging.read_geometry(path).affine, by_simpleitk(path))
