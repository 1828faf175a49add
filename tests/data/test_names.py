"""Names with accents are one name however they are stored: macOS takes letter and accent apart (NFD)."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import dataset_folders as folders
import numpy as np
import pytest

from scantly.data.checks import check
from scantly.data.create import init
from scantly.data.dataset import Dataset
from scantly.data.splits import resolve_split
from scantly.errors import ImageError
from scantly.evaluation import load_table
from scantly.files import normal_name
from scantly.imaging import Geometry, write_label
from scantly.inference.inputs import find_inputs
from scantly.inference.outputs import refuse_overwriting
from scantly.training.folders import evaluate_folders

NAMES = ["Jürgen", "Ångström", "서울"]
NFC = [unicodedata.normalize("NFC", name) for name in NAMES]
NFD = [unicodedata.normalize("NFD", name) for name in NAMES]


def test_the_forms_differ_and_are_one_name() -> None:
    assert NFC != NFD and list(map(normal_name, NFD)) == list(map(normal_name, NFC)) == NFC


@pytest.mark.parametrize("scans", [NFC, NFD])
@pytest.mark.parametrize("labels", [NFC, NFD])
@pytest.mark.parametrize("listed", [NFC, NFD])
def test_scans_labels_and_splits_of_one_name_belong_together(tmp_path: Path, scans, labels, listed) -> None:
    folders.make(tmp_path, [])
    for number, (scan, label) in enumerate(zip(scans, labels, strict=True)):
        folders.write_scan(tmp_path / "imagesTr" / f"{scan}_0000.nii.gz", number)
        folders.write_label(tmp_path / "labelsTr" / f"{label}.nii.gz")
    content = {
        "train": [listed[0], scans[1]],
        "val": [listed[2]],
        "labeled": {"1": [listed[1]]},
        "groups": {listed[0]: labels[0], scans[1]: "Zoë", listed[2]: unicodedata.normalize("NFD", "Zoé")},
    }
    (tmp_path / "splits.json").write_text(json.dumps(content), encoding="utf-8")
    dataset = Dataset.open(tmp_path)
    assert sorted(dataset.train) == sorted(NFC)
    assert all(case.label is not None for case in dataset.train.values())
    assert dataset.case(NFD[0]) is dataset.case(NFC[0])
    split = resolve_split(dataset, labeled=1)
    assert (split.labeled, split.unlabeled, split.val) == ((NFC[1],), (NFC[0],), (NFC[2],))
    assert split.groups == {NFC[0]: NFC[0], NFC[1]: "Zoë", NFC[2]: "Zoé"}
    assert not [finding for finding in check(tmp_path) if finding.level == "error"]


def test_a_subject_on_both_sides_is_found_however_it_is_stored(tmp_path: Path) -> None:
    groups = {"a": unicodedata.normalize("NFD", "Zoë"), "b": "Zoë"}
    folders.make(tmp_path, ["a", "b"], splits={"train": ["a"], "val": ["b"], "groups": groups})
    assert "subject_on_both_sides" in {finding.code for finding in check(tmp_path)}


@pytest.mark.parametrize("folder", ["imagesTr", "labelsTr"])
def test_two_files_of_one_name_are_told(tmp_path: Path, folder: str) -> None:
    folders.make(tmp_path, [NFC[0]])
    (file,) = (tmp_path / folder).iterdir()
    (tmp_path / folder / unicodedata.normalize("NFD", file.name)).write_bytes(file.read_bytes())
    (finding,) = [finding for finding in check(tmp_path) if finding.code == "name_twice"]
    assert "have the same name, with letters and accents stored in two ways" in finding.message


@pytest.mark.parametrize(("scans", "labels"), [(NFC, NFD), (NFD, NFC)])
def test_init_matches_them_and_writes_one_form(tmp_path: Path, scans, labels) -> None:
    for number, (scan, label) in enumerate(zip(scans, labels, strict=True)):
        folders.write_scan(tmp_path / "scans" / f"{scan}.nii.gz", number)
        folders.write_label(tmp_path / "drawn" / f"{label}_seg.nii.gz")
    dataset = init(tmp_path / "d", tmp_path / "scans", tmp_path / "drawn")
    assert sorted(dataset.train) == sorted(NFC)
    assert all(case.label is not None for case in dataset.train.values())
    names = sorted(path.name for path in (tmp_path / "d" / "labelsTr").iterdir())
    assert names == sorted(f"{name}.nii.gz" for name in NFC)


def test_folders_of_predictions_and_labels_are_compared(tmp_path: Path) -> None:
    for predicted, label in zip(NFC, NFD, strict=True):
        folders.write_label(tmp_path / "predicted" / f"{predicted}.nii.gz")
        folders.write_label(tmp_path / "labels" / f"{label}.nii.gz")
    table, summary = evaluate_folders(tmp_path / "predicted", tmp_path / "labels")
    assert set(table["case"]) == set(NFC) and summary["overall"]["dice"]["mean"] == 1.0
    folders.write_label(tmp_path / "labels" / f"{NFC[0]}.nii.gz")
    with pytest.raises(ImageError, match="are both label maps of 'Jürgen'; remove one"):
        evaluate_folders(tmp_path / "predicted", tmp_path / "labels")


def test_two_label_maps_of_one_case_are_not_chosen_from_in_silence(tmp_path: Path) -> None:
    folders.write_label(tmp_path / "predicted" / "a.nii.gz")
    folders.write_label(tmp_path / "predicted" / "a.nii")
    folders.write_label(tmp_path / "labels" / "a.nii.gz")
    with pytest.raises(ImageError, match=r"a\.nii\.gz and .*a\.nii are both label maps of 'a'; remove one"):
        evaluate_folders(tmp_path / "predicted", tmp_path / "labels")


def test_inputs_are_named_in_one_form_and_two_of_one_name_are_told(tmp_path: Path) -> None:
    (tmp_path / f"{NFD[0]}_0000.nii.gz").touch()
    assert list(find_inputs([tmp_path], channels=1)) == [NFC[0]]
    (tmp_path / f"{NFC[0]}.nii.gz").touch()
    with pytest.raises(ImageError, match="both channel 0 of 'Jürgen'; rename one"):
        find_inputs([tmp_path], channels=1)


def test_a_scan_is_not_overwritten_where_both_forms_are_one_file(tmp_path: Path) -> None:
    cases = {NFC[0]: (tmp_path / f"{NFD[0]}.nii.gz",)}
    with pytest.raises(ImageError, match="is a scan and would be overwritten"):
        refuse_overwriting(cases, tmp_path, uncertainty=False, probabilities=False, dicom_seg=False)


def test_classes_and_tables_are_named_in_one_form(tmp_path: Path) -> None:
    folders.make(tmp_path / "d", ["a"])
    folders.describe(tmp_path / "d", labels={"background": 0, unicodedata.normalize("NFD", "Läsion"): 1, "b": 2})
    assert Dataset.open(tmp_path / "d").classes[1] == "Läsion"
    write_label(tmp_path / "p" / f"{NFD[0]}.nii.gz", np.ones((1, 2, 2), np.uint8), Geometry((1, 2, 2), np.eye(4)))
    table, _ = evaluate_folders(tmp_path / "p", tmp_path / "p")
    table["case"] = NFD[0]
    table.to_csv(tmp_path / "t.csv", index=False)
    assert set(load_table(tmp_path / "t.csv")["case"]) == {NFC[0]}
