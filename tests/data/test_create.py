"""scantly init: bare folders become a dataset folder that check finds sound."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import dataset_folders as folders
import h5py
import numpy as np
import PIL.Image
import pytest
from pydicom import uid
from pydicom.dataset import Dataset

import dicom_series as dicoms
from scantly import imaging
from scantly.data import create
from scantly.data.checks import check
from scantly.data.create import init
from scantly.errors import DatasetError, ImageError, RunError


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """Folders ``scans`` (three) and ``drawn`` (labels of two of them)."""
    for number, name in enumerate(("Anna", "Bert", "Carl")):
        folders.write_scan(tmp_path / "scans" / f"{name}.nii.gz", number)
    for name in ("anna_seg", "Carl_seg"):
        folders.write_label(tmp_path / "drawn" / f"{name}.nii.gz")
    (tmp_path / "scans" / "._Anna.nii.gz").write_bytes(b"macOS")
    return tmp_path


@pytest.mark.parametrize("link", [True, False])
def test_two_bare_folders_become_a_dataset(bare: Path, link: bool) -> None:
    dataset = init(bare / "heart", bare / "scans", bare / "drawn", link=link)
    assert dataset.name == "heart"
    assert list(dataset.train) == ["Anna", "Bert", "Carl"]
    assert [case.label is not None for case in dataset.train.values()] == [True, False, True]
    assert dataset.channels == ("channel 0",)
    assert dataset.classes == ("background", "class 1", "class 2")
    image = dataset.case("Anna").images[0]
    assert image.is_symlink() == link
    assert image.read_bytes() == (bare / "scans" / "Anna.nii.gz").read_bytes()
    assert check(bare / "heart") == []
    assert sorted(path.name for path in bare.iterdir()) == ["drawn", "heart", "scans"]
    assert "label_values" not in dataset.info


def test_the_folder_can_be_moved_and_edited(bare: Path) -> None:
    init(bare / "heart", bare / "scans", bare / "drawn")
    description = bare / "heart" / "dataset.json"
    info = json.loads(description.read_text())
    info["labels"] = {"background": 0, "LV": 1, "RV": 2}
    description.write_text(json.dumps(info))
    shutil.move(bare / "heart", bare / "moved")
    assert check(bare / "moved") == []


def test_other_label_values_are_renumbered_in_copies_and_recorded(bare: Path, caplog: pytest.LogCaptureFixture) -> None:
    original = bare / "drawn" / "anna_seg.nii.gz"
    folders.write_label(original, (0, 255, 100))
    before = original.read_bytes()
    with caplog.at_level(logging.WARNING, logger="scantly"):
        dataset = init(bare / "heart", bare / "scans", bare / "drawn")
    assert "values changed from 100 to 3, 255 to 4" in caplog.text
    assert dataset.info["label_values"] == {
        "background": 0, "class 1": 1, "class 2": 2, "class 3": 100, "class 4": 255,
    }  # fmt: skip
    stored = imaging.read_label(original).array
    renumbered = dataset.read_label("Anna").array
    np.testing.assert_array_equal(renumbered, np.select([stored == 100, stored == 255], [3, 4], 0))
    assert original.read_bytes() == before
    assert check(bare / "heart") == []


def test_an_unlabeled_collection(bare: Path) -> None:
    dataset = init(bare / "heart", bare / "scans", None)
    assert all(case.label is None for case in dataset.train.values())
    assert [finding.code for finding in check(bare / "heart")] == ["no_labels"]


def test_labels_among_the_scans(tmp_path: Path) -> None:
    for number in (1, 2):
        folder = tmp_path / "raw" / f"case_{number}"
        folders.write_scan(folder / "imaging.nii.gz", number)
        folders.write_label(folder / "segmentation.nii.gz")
    dataset = init(tmp_path / "kits", tmp_path / "raw", tmp_path / "raw")
    assert list(dataset.train) == ["case_1", "case_2"]
    assert check(tmp_path / "kits") == []
    with pytest.raises(DatasetError, match=r"called like labels \(case_1/segmentation\.nii\.gz\)"):
        init(tmp_path / "again", tmp_path / "raw", None)


def test_a_folder_of_labels_among_folders_of_scans(tmp_path: Path) -> None:
    folders.write_scan(tmp_path / "raw" / "scans" / "a.nii.gz", 1)
    folders.write_label(tmp_path / "raw" / "labels" / "a.nii.gz")
    with pytest.raises(DatasetError, match=r"called like labels \(labels/a\.nii\.gz\)"):
        init(tmp_path / "without", tmp_path / "raw", None)
    dataset = init(tmp_path / "heart", tmp_path / "raw", tmp_path / "raw")
    assert [case.label is not None for case in dataset.train.values()] == [True]
    assert list(dataset.train) == ["a"]


def test_a_labels_folder_inside_the_images_folder(bare: Path) -> None:
    (bare / "drawn").rename(bare / "scans" / "drawn")
    dataset = init(bare / "heart", bare / "scans", bare / "scans" / "drawn")
    assert list(dataset.train) == ["Anna", "Bert", "Carl"]


def test_h5_folders_with_image_and_label_in_one_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("X1", "X2"):
        path = tmp_path / "LA" / name / "mri_norm2.h5"
        path.parent.mkdir(parents=True)
        with h5py.File(path, "w") as file:
            file["image"] = rng.normal(size=(4, 5, 6))
            if name == "X1":
                file["label"] = rng.integers(0, 2, (4, 5, 6))
    dataset = init(tmp_path / "la", tmp_path / "LA", None)
    assert list(dataset.train) == ["X1", "X2"]
    assert [case.label is not None for case in dataset.train.values()] == [True, False]
    assert dataset.classes == ("background", "class 1")
    assert check(tmp_path / "la") == []


def test_labels_of_another_type_are_converted(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for name in ("a", "b"):
        PIL.Image.fromarray(rng.integers(0, 255, (5, 4, 3), np.uint8)).save(tmp_path / "images" / f"{name}.tif")
        PIL.Image.fromarray((rng.random((5, 4)) > 0.5).astype(np.uint8) * 255).save(
            tmp_path / "masks" / f"{name}_mask.png"
        )
    dataset = init(tmp_path / "glands", tmp_path / "images", tmp_path / "masks")
    assert dataset.file_ending == ".tif"
    assert len(dataset.channels) == 3
    assert dataset.info["label_values"] == {"background": 0, "class 1": 255}
    expected = np.array(PIL.Image.open(tmp_path / "masks" / "a_mask.png")) // 255
    np.testing.assert_array_equal(dataset.read_label("a").array[0], expected)
    assert check(tmp_path / "glands") == []


def test_channel_files_are_grouped(tmp_path: Path) -> None:
    for name in ("a_0000", "a_0001", "b_0000", "b_0001"):
        folders.write_scan(tmp_path / "scans" / f"{name}.nii.gz", sum(name.encode()))
    folders.write_label(tmp_path / "drawn" / "a.nii.gz")
    dataset = init(tmp_path / "two", tmp_path / "scans", tmp_path / "drawn")
    assert dataset.channels == ("channel 0", "channel 1")
    assert dataset.read_image("b").array.shape == (2, *folders.SHAPE)


def test_what_is_there_is_never_overwritten(bare: Path) -> None:
    init(bare / "heart", bare / "scans", None)
    before = sorted((bare / "heart").rglob("*"))
    with pytest.raises(DatasetError, match="heart exists already and is not empty"):
        init(bare / "heart", bare / "scans", bare / "drawn")
    assert sorted((bare / "heart").rglob("*")) == before
    (bare / "empty").mkdir()
    assert init(bare / "empty", bare / "scans", None).train


def test_a_failed_init_leaves_nothing(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(create.shutil, "copyfile", full)
    with pytest.raises(DatasetError, match="heart cannot be made"):
        init(bare / "heart", bare / "scans", bare / "drawn", link=False)
    assert sorted(path.name for path in bare.iterdir()) == ["drawn", "scans"]


def test_faults_of_the_source_are_explained(bare: Path) -> None:
    with pytest.raises(DatasetError, match="none is not a folder"):
        init(bare / "heart", bare / "none", None)
    (bare / "jpeg").mkdir()
    (bare / "jpeg" / "a.jpg").write_bytes(b"x")
    with pytest.raises(DatasetError, match=r"jpeg has no \.nii\.gz.*\(1 \.jpg instead\)"):
        init(bare / "heart", bare / "jpeg", None)
    folders.write_label(bare / "drawn" / "Dora_seg.nii.gz")
    with pytest.raises(DatasetError, match=r"Dora_seg\.nii\.gz fits no scan by name"):
        init(bare / "heart", bare / "scans", bare / "drawn")
    (bare / "drawn" / "Dora_seg.nii.gz").unlink()
    damaged = bare / "drawn" / "Carl_seg.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    with pytest.raises(ImageError, match="Carl_seg"):
        init(bare / "heart", bare / "scans", bare / "drawn")
    folders.write_label(damaged, (0,))
    folders.write_label(bare / "drawn" / "anna_seg.nii.gz", (0,))
    with pytest.raises(DatasetError, match="the 2 labels hold nothing but 0"):
        init(bare / "heart", bare / "scans", bare / "drawn")
    folders.write_scan(bare / "scans" / "Dora.nii", 9)
    with pytest.raises(DatasetError, match=r"several file types: Dora\.nii \(\.nii\), Anna\.nii\.gz"):
        init(bare / "heart", bare / "scans", None)
    assert not (bare / "heart").exists()


def test_a_scan_given_as_label_is_recognized(tmp_path: Path) -> None:
    geometry = imaging.Geometry((1, 20, 20), imaging.grid())
    folders.write_scan(tmp_path / "scans" / "a.nii", 1, geometry)
    imaging.write_label(tmp_path / "drawn" / "a.nii", np.arange(400).reshape(1, 20, 20), geometry)
    with pytest.raises(DatasetError, match="label values to 400: it seems to be a scan"):
        init(tmp_path / "d", tmp_path / "scans", tmp_path / "drawn")


@pytest.fixture
def hospital(tmp_path: Path) -> Path:
    """Folder ``dicom`` of three patients; ``drawn`` with labels of two, one of them in dcm2niix's order of axes."""
    for number in (1, 2, 3):
        dicoms.write(
            tmp_path / "dicom" / f"case{number}" / "IMAGES",
            dicoms.stack(number),
            series=f"1.2.{number}.1",
            study=f"1.2.{number}",
            patient=f"P{number}",
            scale=lambda index: (1.0, -1024.0),
        )
    drawn = _drawn()
    grid = dicoms.stack().affine
    _save(tmp_path / "drawn" / "case1.nii.gz", drawn, grid)
    flip = np.eye(4)
    flip[1, 1], flip[1, 3] = -1, drawn.shape[1] - 1
    _save(tmp_path / "drawn" / "case3_seg.nii.gz", drawn[:, ::-1], grid @ flip)
    return tmp_path


def _drawn() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 3, size=dicoms.SHAPE).astype(np.uint8)


def _save(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    imaging.write_label(path, array, imaging.Geometry(dicoms.SHAPE, affine))


def test_dicom_series_are_converted_and_labels_laid_on_their_grids(
    hospital: Path, caplog: pytest.LogCaptureFixture
) -> None:
    steps: list[tuple[int, int, str]] = []
    with caplog.at_level(logging.INFO, logger="scantly"):
        dataset = init(
            hospital / "ct", hospital / "dicom", hospital / "drawn", progress=lambda *step: steps.append(step)
        )
    assert "3 DICOM series were converted to NIfTI" in caplog.text
    assert steps == [
        (0, 5, "case1"),
        (1, 5, "case3"),
        (2, 5, "case1"),
        (3, 5, "case2"),
        (4, 5, "case3"),
        (5, 5, ""),
    ]
    assert dataset.file_ending == ".nii.gz"
    assert [case.label is not None for case in dataset.train.values()] == [True, False, True]
    for number in (1, 2, 3):
        image = dataset.read_image(f"case{number}")
        volume = dicoms.stack(number)
        assert np.array_equal(image.array[0], volume.stored - 1024.0)
        assert np.allclose(image.geometry.affine, volume.affine, atol=1e-4)
    for name in ("case1", "case3"):
        assert np.array_equal(dataset.read_label(name).array, _drawn())
    assert check(hospital / "ct") == []


def test_labels_may_lie_among_the_dicom_files(hospital: Path) -> None:
    for number in (1, 3):
        _save(hospital / "dicom" / f"case{number}" / "label.nii.gz", _drawn(), dicoms.stack().affine)
    with pytest.raises(DatasetError, match=r"holds DICOM and other files \(case1/label\.nii\.gz\).*--labels"):
        init(hospital / "ct", hospital / "dicom")
    dataset = init(hospital / "ct", hospital / "dicom", hospital / "dicom")
    assert [case.label is not None for case in dataset.train.values()] == [True, False, True]
    assert check(hospital / "ct") == []


def test_one_folder_of_dicom_is_one_case(hospital: Path) -> None:
    assert list(init(hospital / "a", hospital / "dicom" / "case1" / "IMAGES").train) == ["IMAGES"]
    shutil.rmtree(hospital / "dicom" / "case2")
    shutil.rmtree(hospital / "dicom" / "case3")
    assert list(init(hospital / "b", hospital / "dicom").train) == ["case1"]


def test_a_label_on_another_grid_is_kept_and_told_by_check(hospital: Path) -> None:
    moved = dicoms.stack().affine
    moved[0, 3] += 5
    _save(hospital / "drawn" / "case1.nii.gz", _drawn(), moved)
    init(hospital / "ct", hospital / "dicom", hospital / "drawn")
    assert any("case1" in finding.file and "origin" in finding.message for finding in check(hospital / "ct"))


def test_a_bad_series_leaves_no_dataset(hospital: Path) -> None:
    path = hospital / "dicom" / "case2" / "IMAGES" / "IM0002"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ImageError, match=r"case2/IMAGES/IM0002 cannot be read"):
        init(hospital / "ct", hospital / "dicom")
    path.unlink()
    with pytest.raises(ImageError, match=r"case2 .*lacks 1 slice"):
        init(hospital / "ct", hospital / "dicom")
    assert sorted(path.name for path in hospital.iterdir()) == ["dicom", "drawn"]


def test_dicom_without_a_scan_is_refused(tmp_path: Path) -> None:
    report = dicoms.bare("1.2.840.10008.5.1.4.1.1.88.11", "1.2.1", "1.2", "P1")
    dicoms.save(report, tmp_path / "dicom" / "report.dcm")
    with pytest.raises(DatasetError, match="holds DICOM files but no scan"):
        init(tmp_path / "d", tmp_path / "dicom")


def test_labels_in_a_format_that_is_not_read_are_refused(bare: Path) -> None:
    (bare / "drawn" / "Bert_seg.mha").write_bytes(b"MetaImage")
    (bare / "drawn" / "README.txt").write_text("companion")
    with pytest.raises(DatasetError, match=r"drawn holds 1 file .*not read: Bert_seg\.mha; convert"):
        init(bare / "heart", bare / "scans", bare / "drawn")
    (bare / "drawn" / "Bert_seg.mha").unlink()
    (bare / "scans" / "Dora.nrrd").write_bytes(b"NRRD")
    with pytest.raises(DatasetError, match=r"scans holds 1 file .*not read: Dora\.nrrd; convert"):
        init(bare / "heart", bare / "scans", bare / "drawn")
    assert not (bare / "heart").exists()


def test_all_labels_that_fit_no_scan_are_named(bare: Path) -> None:
    for name in ("Dora", "Emil"):
        folders.write_label(bare / "drawn" / f"{name}_seg.nii.gz")
    with pytest.raises(DatasetError) as caught:
        init(bare / "heart", bare / "scans", bare / "drawn")
    head, *lines = str(caught.value).splitlines()
    assert head == "2 files are no label of a scan:"
    assert ["Dora_seg.nii.gz fits no scan" in lines[0], "Emil_seg.nii.gz fits no scan" in lines[1]] == [True, True]


def test_two_files_of_one_scan_are_refused(bare: Path) -> None:
    folders.write_scan(bare / "scans" / "Anna.nii", 5)
    with pytest.raises(DatasetError, match=r"Anna\.nii.* have the same name"):
        init(bare / "heart", bare / "scans", None)


def test_channel_files_of_some_cases_alone_are_refused(tmp_path: Path) -> None:
    for name in ("a_0000", "a_0001", "b_0000"):
        folders.write_scan(tmp_path / "scans" / f"{name}.nii.gz", sum(name.encode()))
    with pytest.raises(DatasetError, match=r"a has channels 0, 1 and b has channel 0; "):
        init(tmp_path / "two", tmp_path / "scans", None)


def test_bad_labels_leave_their_case_out_and_no_other(bare: Path) -> None:
    damaged = bare / "drawn" / "anna_seg.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    left_out: dict[str, Exception] = {}
    dataset = init(bare / "heart", bare / "scans", bare / "drawn", left_out=left_out)
    assert list(left_out) == ["Anna"]
    assert "anna_seg.nii.gz" in str(left_out["Anna"])
    assert list(dataset.train) == ["Bert", "Carl"]
    assert dataset.info["numTraining"] == 2
    assert check(bare / "heart") == []


def test_a_name_too_long_for_the_dataset_leaves_its_case_out(bare: Path) -> None:
    name = "x" * 247
    folders.write_scan(bare / "scans" / f"{name}.nii.gz", 8)
    left_out: dict[str, Exception] = {}
    dataset = init(bare / "heart", bare / "scans", bare / "drawn", left_out=left_out)
    assert list(left_out) == [name]
    assert "a name of 259 bytes" in str(left_out[name])
    assert list(dataset.train) == ["Anna", "Bert", "Carl"]
    with pytest.raises(DatasetError, match="a name of 259 bytes"):
        init(bare / "again", bare / "scans", bare / "drawn")
    assert not (bare / "again").exists()


def colored(dataset: Dataset, index: int) -> None:
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = uid.SecondaryCaptureImageStorage
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PlanarConfiguration = 3, "RGB", 0
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation = 7, 0
    dataset.PixelData = bytes(3 * dataset.Rows * dataset.Columns)


def test_one_bad_patient_leaves_the_others(hospital: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two series, a truncated file and a missing slice; a color picture beside a scan is no case and no fault."""
    folder = hospital / "dicom"
    dicoms.write(folder / "case1" / "again", dicoms.stack(9), series="1.2.1.9", study="1.2.1", patient="P1")
    broken = folder / "case2" / "IMAGES" / "IM0002"
    broken.write_bytes(broken.read_bytes()[:700])
    small = dicoms.stack(shape=(1, 4, 4))
    dicoms.write(folder / "case3" / "shot", small, series="1.2.3.9", study="1.2.3", patient="P3", edit=colored)
    dicoms.write(folder / "case4" / "shot", small, series="1.2.4.9", study="1.2.4", patient="P4", edit=colored)
    left_out: dict[str, Exception] = {}
    with caplog.at_level(logging.INFO, logger="scantly"):
        dataset = init(hospital / "ct", folder, hospital / "drawn", left_out=left_out)
    assert list(dataset.train) == ["case3"]
    assert sorted(left_out) == ["case1", "case2"]
    assert "holds 2 DICOM series; leave one" in str(left_out["case1"])
    assert "IM0002 cannot be read" in str(left_out["case2"])
    assert "2 color secondary capture (case3/shot/IM0000, case4/shot/IM0000)" in caplog.text
    assert "case4 holds no DICOM scan and is left out" in caplog.text
    assert check(hospital / "ct") == []
    with pytest.raises(ImageError, match=r"^2 of 3 cases cannot be taken:\n  case1: .*\n  case2: .*IM0002"):
        init(hospital / "again", folder, hospital / "drawn")
    assert not (hospital / "again").exists()


def test_segmentations_in_dicom_are_no_labels_and_said_to_be_none(hospital: Path) -> None:
    dicoms.save(dicoms.bare(uid.SegmentationStorage, "1.9.1", "1.2.1", "P1"), hospital / "dicom" / "case1" / "seg.dcm")
    dicoms.save(dicoms.bare(uid.RTStructureSetStorage, "1.9.2", "1.2.3", "P3"), hospital / "drawn" / "rt.dcm")
    for labels in ("dicom", "drawn"):
        with pytest.raises(DatasetError, match=r"(seg|rt)\.dcm.*not read as label.*convert"):
            init(hospital / "ct", hospital / "dicom", hospital / labels)
    (hospital / "drawn" / "rt.dcm").unlink()
    assert init(hospital / "ct", hospital / "dicom", hospital / "drawn").train


def test_volumes_of_another_type_among_dicom_are_refused(hospital: Path) -> None:
    (hospital / "dicom" / "case1" / "case1.mha").write_bytes(b"MetaImage")
    with pytest.raises(DatasetError, match=r"holds DICOM and other files \(case1/case1\.mha\)"):
        init(hospital / "ct", hospital / "dicom", hospital / "drawn")


def test_a_second_init_into_one_folder_is_refused_and_leftovers_of_a_kill_are_cleared(bare: Path) -> None:
    def again(done: int, total: int, name: str) -> None:
        with pytest.raises(RunError, match=r"another process is making .*heart; wait for it"):
            init(bare / "heart", bare / "scans", bare / "drawn")
        leftovers.extend(path for path in bare.iterdir() if path.name.startswith(".scantly-init-"))

    leftovers: list[Path] = []
    init(bare / "heart", bare / "scans", bare / "drawn", progress=again)
    assert leftovers
    assert sorted(path.name for path in bare.iterdir()) == ["drawn", "heart", "scans"]


def test_a_scan_whose_name_leaves_no_room_for_its_channel_is_told(tmp_path: Path) -> None:
    folders.write_scan(tmp_path / "scans" / f"{'é' * 124}.nii.gz", 1)
    with pytest.raises(DatasetError, match="would have a name of 260 bytes, 255 are possible; give the scan a shorter"):
        init(tmp_path / "d", tmp_path / "scans")
    assert not (tmp_path / "d").exists()
