"""Reading, splitting and checking the real scans."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest

from scantly import imaging
from scantly.data.checks import check
from scantly.data.create import init
from scantly.data.dataset import Dataset
from scantly.data.splits import resolve_split

pytestmark = pytest.mark.real


def test_acdc_has_no_error_but_a_patient_under_two_names(real_data: Path) -> None:
    """Patients 074 and 076 of the published files are the same scans with different labels."""
    findings = check(real_data / "acdc")
    assert {(finding.level, finding.code, Path(finding.file).name) for finding in findings} == {
        ("warning", "duplicate_image", "patient076_frame01_0000.nii.gz"),
        ("warning", "duplicate_image", "patient076_frame12_0000.nii.gz"),
    }
    for frame in ("01", "12"):
        first, second = (
            nibabel.load(real_data / "acdc" / "imagesTr" / f"patient{number}_frame{frame}_0000.nii.gz")
            for number in ("074", "076")
        )
        np.testing.assert_array_equal(first.get_fdata(), second.get_fdata())


@pytest.mark.parametrize("name", ["acdc_mini", "la_mini"])
def test_the_small_sets_are_sound(real_data: Path, name: str) -> None:
    assert check(real_data / name) == []


def test_voxels_and_affine_are_nibabels(real_data: Path) -> None:
    for name in ("acdc", "la"):
        path = sorted((real_data / name / "imagesTr").glob("*.nii.gz"))[7]
        reference = nibabel.load(path)
        image = imaging.read_image([path])
        np.testing.assert_array_equal(image.array[0], reference.get_fdata().astype(np.float32).T)
        np.testing.assert_array_equal(image.geometry.affine, reference.affine)
        assert image.geometry.orientation == "LPS"


def test_a_label_written_again_keeps_values_and_affine(real_data: Path, tmp_path: Path) -> None:
    dataset = Dataset.open(real_data / "acdc")
    case = dataset.case("patient099_frame01")
    label = dataset.read_label(case.name)
    imaging.write_label(tmp_path / "p.nii.gz", label.array, imaging.read_geometry(case.images[0]))
    written, image = nibabel.load(tmp_path / "p.nii.gz"), nibabel.load(case.images[0])
    assert written.affine.tobytes() == image.affine.tobytes()
    for field in ("sform_code", "qform_code", "xyzt_units", "pixdim", "dim"):
        assert written.header[field].tobytes() == image.header[field].tobytes()
    np.testing.assert_array_equal(np.asarray(written.dataobj).T, label.array)


@pytest.mark.parametrize(("labeled", "slices"), [(3, 68), (7, 136), ("10%", 136), (14, 256), (None, None)])
def test_the_literatures_acdc_subsets(real_data: Path, labeled: int | str | None, slices: int | None) -> None:
    dataset = Dataset.open(real_data / "acdc")
    split = resolve_split(dataset, labeled=labeled)
    assert len(split.labeled) + len(split.unlabeled) == 140
    assert len(split.val) == 20
    assert split.test == ()
    if slices is not None:
        depths = [imaging.read_geometry(dataset.case(name).images[0]).shape[0] for name in split.labeled]
        assert sum(depths) == slices


def test_la_has_validation_cases_in_the_clean_protocol_only(real_data: Path) -> None:
    dataset = Dataset.open(real_data / "la")
    clean = resolve_split(dataset, labeled=8)
    literature = resolve_split(dataset, labeled=8, protocol="literature")
    assert (len(clean.labeled), len(clean.unlabeled), len(clean.val)) == (8, 62, 10)
    assert (len(literature.labeled), len(literature.unlabeled), len(literature.val)) == (8, 72, 0)
    assert clean.labeled == literature.labeled


def test_init_makes_a_sound_folder_of_bare_real_scans(real_data: Path, tmp_path: Path) -> None:
    source = real_data / "acdc_mini"
    dataset = init(tmp_path / "own", source / "imagesTr", source / "labelsTr")
    assert len(dataset.train) == 16
    assert dataset.classes == ("background", "class 1", "class 2", "class 3")
    assert check(tmp_path / "own") == []
