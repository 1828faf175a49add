"""Inputs of a prediction: files, DICOM series and folders of both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import dicom_series as dicoms
from scantly.errors import ImageError
from scantly.imaging import file_ending, read_image
from scantly.imaging.dicom import Series
from scantly.inference.inputs import find_inputs


@pytest.fixture
def patients(tmp_path: Path) -> Path:
    """A folder of two patients, one series each."""
    for number in (1, 2):
        dicoms.write(
            tmp_path / "patients" / f"case{number}" / "DICOM",
            dicoms.stack(number),
            series=f"1.2.{number}.1",
            study=f"1.2.{number}",
            patient=f"P{number}",
        )
    return tmp_path / "patients"


def _touch(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def test_files_and_folders_become_cases(tmp_path: Path) -> None:
    folder = _touch(tmp_path / "scans", "a_0000.nii.gz", "b.nii.gz", ".hidden.nii.gz", "notes.txt")
    single = _touch(tmp_path, "scan_0017.nii.gz") / "scan_0017.nii.gz"
    assert find_inputs([folder, single], channels=1) == {
        "a": (folder / "a_0000.nii.gz",),
        "b": (folder / "b.nii.gz",),
        "scan_0017": (single,),
    }


def test_channels_are_put_together_in_order(tmp_path: Path) -> None:
    folder = _touch(tmp_path, "a_0001.nii.gz", "a_0000.nii.gz")
    assert find_inputs([folder], channels=2) == {"a": (folder / "a_0000.nii.gz", folder / "a_0001.nii.gz")}
    with pytest.raises(ImageError, match=r"'a' has channels \[0, 1\], the model takes \[0, 1, 2\]"):
        find_inputs([folder], channels=3)


def test_a_folder_of_one_series_is_a_case_named_after_it(patients: Path) -> None:
    cases = find_inputs([patients / "case1", patients / "case2" / "DICOM"], channels=1)
    assert list(cases) == ["case1", "DICOM"]
    (series,) = cases["case1"]
    assert isinstance(series, Series)
    assert series.resolve() == (patients / "case1").resolve()
    assert file_ending(series) is None
    assert np.array_equal(read_image([series]).array[0], dicoms.stack(1).stored)


def test_a_folder_of_patients_gives_a_case_each(patients: Path) -> None:
    cases = find_inputs([patients], channels=1)
    assert list(cases) == ["case1", "case2"]
    assert np.array_equal(read_image(cases["case2"]).array[0], dicoms.stack(2).stored)


def test_one_of_several_series_is_chosen_by_uid(patients: Path) -> None:
    dicoms.write(patients / "case1" / "other", dicoms.stack(9), series="1.2.1.9", study="1.2.1", patient="P1")
    with pytest.raises(
        ImageError, match=r"case1 holds 2 DICOM series; choose one with predict --series UID, .*: 1\.2\.1\.1"
    ):
        find_inputs([patients / "case1"], channels=1)
    cases = find_inputs([patients / "case1"], channels=1, series="1.2.1.9")
    assert np.array_equal(read_image(cases["case1"]).array[0], dicoms.stack(9).stored)
    with pytest.raises(ImageError, match=r"has no DICOM series 1\.2; choose one of"):
        find_inputs([patients / "case1"], channels=1, series="1.2")


def test_files_and_series_may_be_mixed_unless_their_names_collide(patients: Path, tmp_path: Path) -> None:
    folder = _touch(tmp_path / "scans", "a.nii.gz")
    assert list(find_inputs([folder, patients], channels=1)) == ["a", "case1", "case2"]
    _touch(folder, "case1.nii.gz")
    with pytest.raises(ImageError, match=r"would both be called 'case1'; rename one"):
        find_inputs([folder, patients], channels=1)


def test_several_channels_are_not_taken_from_dicom(patients: Path) -> None:
    with pytest.raises(ImageError, match=r"is one channel, the model takes 2; convert every channel to NIfTI"):
        find_inputs([patients / "case1"], channels=2)


def test_a_file_that_is_a_whole_scan_is_taken_and_a_single_slice_refused(patients: Path, tmp_path: Path) -> None:
    dicoms.write_enhanced(tmp_path / "whole.dcm", dicoms.stack())
    cases = find_inputs([tmp_path / "whole.dcm"], channels=1)
    assert read_image(cases["whole"]).array.shape == (1, *dicoms.SHAPE)
    with pytest.raises(ImageError, match="is one slice of a DICOM series"):
        find_inputs([patients / "case1" / "DICOM" / "IM0000"], channels=1)


def test_every_series_is_examined_before_any_prediction(patients: Path) -> None:
    (patients / "case2" / "DICOM" / "IM0002").unlink()
    with pytest.raises(ImageError, match=r"case2 .*lacks 1 slice"):
        find_inputs([patients], channels=1)
    broken: list[ImageError] = []
    assert list(find_inputs([patients], channels=1, broken=broken)) == ["case1"]
    assert len(broken) == 1 and "lacks 1 slice" in str(broken[0])


def test_a_folder_of_dicom_and_other_scans_is_refused(patients: Path) -> None:
    for folder in (patients, patients / "case1" / "DICOM"):
        _touch(folder, "drawn.nii.gz")
        with pytest.raises(ImageError, match=r"holds DICOM and other scans \(drawn\.nii\.gz\); .* --series UID"):
            find_inputs([folder], channels=1)
    assert list(find_inputs([patients], channels=1, series="1.2.1.1")) == ["patients"]
    assert list(find_inputs([patients / "drawn.nii.gz"], channels=1)) == ["drawn"]


def test_what_holds_no_scan_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"empty holds no scans \(\.nii\.gz, .*DICOM\)"):
        find_inputs([_touch(tmp_path / "empty", "notes.txt")], channels=1)
    with pytest.raises(ImageError, match=r"nothing\.nii\.gz does not exist"):
        find_inputs([tmp_path / "nothing.nii.gz"], channels=1)
