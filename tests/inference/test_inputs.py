"""Inputs of a prediction: files, DICOM series and folders of both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import dicom_series as dicoms
from scantly.errors import ImageError, ScantlyError
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
    broken: list[tuple[str, ImageError]] = []
    assert list(find_inputs([patients], channels=1, broken=broken)) == ["case1"]
    ((name, error),) = broken
    assert name == "case2"
    assert "lacks 1 slice" in str(error)


def test_a_patient_of_two_series_does_not_hinder_the_others(patients: Path) -> None:
    dicoms.write(patients / "case1" / "other", dicoms.stack(9), series="1.2.1.9", study="1.2.1", patient="P1")
    broken: list[tuple[str, ImageError]] = []
    assert list(find_inputs([patients], channels=1, broken=broken)) == ["case2"]
    ((name, error),) = broken
    assert name == "case1"
    assert "choose one with predict --series UID" in str(error)


def test_missing_and_additional_channels_are_the_fault_of_their_case(tmp_path: Path) -> None:
    folder = _touch(tmp_path / "two", "a_0000.nii.gz", "a_0001.nii.gz", "b_0000.nii.gz", "c_0001.nii.gz")
    broken: list[tuple[str, ImageError]] = []
    assert list(find_inputs([folder], channels=2, broken=broken)) == ["a"]
    assert [name for name, _ in broken] == ["b", "c"]
    assert "'b' has channels [0], the model takes [0, 1]" in str(broken[0][1])
    folder, broken = _touch(tmp_path / "one", "a_0000.nii.gz", "a_0001.nii.gz", "b_0000.nii.gz"), []
    assert list(find_inputs([folder], channels=1, broken=broken)) == ["b"]
    assert "'a' has channels [0, 1], the model takes [0]" in str(broken[0][1])


def test_numbered_slices_are_scans_of_their_own(tmp_path: Path) -> None:
    folder = _touch(tmp_path, *(f"{case}_{n:04d}.png" for case, count in (("a", 6), ("b", 4)) for n in range(count)))
    assert len(find_inputs([folder], channels=1)) == 10


def test_scans_in_subfolders_are_found_as_init_finds_them(tmp_path: Path) -> None:
    folder = _touch(tmp_path / "scans", "a.nii.gz")
    _touch(folder / "more" / "deep", "b_0000.nii.gz", ".hidden.nii.gz")
    assert find_inputs([folder], channels=1) == {
        "a": (folder / "a.nii.gz",),
        "b": (folder / "more" / "deep" / "b_0000.nii.gz",),
    }
    alike = _touch(tmp_path / "la" / "p1", "mri_norm2.h5").parent
    _touch(alike / "p2", "mri_norm2.h5")
    assert list(find_inputs([alike], channels=1)) == ["p1", "p2"]


@pytest.mark.parametrize("name", ["b.mha", "b.seg.nrrd", "b.jpg", "more/b.mha", "b"])
def test_a_scan_of_a_type_that_is_not_read_is_refused(tmp_path: Path, name: str) -> None:
    folder = _touch(tmp_path / "scans", "a.nii.gz", "README.txt", "Thumbs.db")
    assert list(find_inputs([folder], channels=1)) == ["a"]
    _touch((folder / name).parent, Path(name).name)
    with pytest.raises(ScantlyError, match=rf"holds 1 file of a type that is not read: {name}; convert"):
        find_inputs([folder], channels=1)


def test_two_files_of_one_scan_are_refused(tmp_path: Path) -> None:
    folder = _touch(tmp_path / "scans", "c0.nii", "c0.nii.gz", "c1.nii.gz")
    with pytest.raises(ScantlyError, match=r"c0\.nii.* and .*c0\.nii.* have the same name"):
        find_inputs([folder], channels=1)


def test_labels_among_the_scans_are_refused(tmp_path: Path) -> None:
    folder = _touch(tmp_path / "scans", "a.nii.gz", "b.nii.gz")
    marked = _touch(folder, "a_seg.nii.gz") / "a_seg.nii.gz"
    with pytest.raises(ImageError, match=r"files that are called like labels \(a_seg\.nii\.gz\)"):
        find_inputs([folder], channels=1)
    marked.unlink()
    _touch(folder / "labels", "a.nii.gz")
    with pytest.raises(ImageError, match=r"files that are called like labels \(labels/a\.nii\.gz\)"):
        find_inputs([folder], channels=1)
    assert list(find_inputs([folder / "a.nii.gz", folder / "b.nii.gz"], channels=1)) == ["a", "b"]


def test_a_dataset_folder_is_no_folder_of_scans(tmp_path: Path) -> None:
    _touch(tmp_path / "heart", "dataset.json")
    _touch(tmp_path / "heart" / "imagesTs", "a_0000.nii.gz")
    with pytest.raises(ImageError, match=r"heart is a dataset folder; give .*imagesTr or .*imagesTs"):
        find_inputs([tmp_path / "heart"], channels=1)
    assert list(find_inputs([tmp_path / "heart" / "imagesTs"], channels=1)) == ["a"]


def test_predictions_do_not_go_among_the_scans(tmp_path: Path) -> None:
    folder = _touch(tmp_path / "scans", "a_0000.nii.gz")
    for out in (folder, folder / "predictions"):
        with pytest.raises(ImageError, match=r"lies in .*scans, whose scans are all taken.*choose another --out"):
            find_inputs([folder], channels=1, out=out)
    assert find_inputs([folder / "a_0000.nii.gz"], channels=1, out=folder)


def test_other_scans_beside_a_chosen_series_are_named(patients: Path, caplog: pytest.LogCaptureFixture) -> None:
    _touch(patients, "drawn.nii.gz")
    with caplog.at_level("INFO", logger="scantly"):
        find_inputs([patients], channels=1, series="1.2.1.1")
    assert "passed over what is no DICOM scan: 1 not DICOM (drawn.nii.gz)" in caplog.text


def test_volumes_of_another_type_among_dicom_are_refused(patients: Path) -> None:
    _touch(patients / "case1", "case1.mha")
    with pytest.raises(ImageError, match=r"holds DICOM and other scans \(case1/case1\.mha\)"):
        find_inputs([patients], channels=1)


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
