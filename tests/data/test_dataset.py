"""Dataset folders: what is read from them, and the sentence for every structural fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dataset_folders as folders
import numpy as np
import PIL.Image
import pytest

from scantly import imaging
from scantly.data.dataset import Dataset
from scantly.errors import DatasetError


def test_a_sound_folder(tmp_path: Path) -> None:
    folders.make(tmp_path / "heart", ["b", "a"], ["c_0001"], test=["t"], channels=2)
    (tmp_path / "heart" / "imagesTr" / "._a_0000.nii.gz").write_bytes(b"macOS")
    (tmp_path / "heart" / "imagesTr" / ".DS_Store").write_bytes(b"macOS")
    dataset = Dataset.open(tmp_path / "heart")
    assert dataset.name == "heart"
    assert dataset.channels == ("c0", "c1")
    assert dataset.classes == ("background", "a", "b")
    assert list(dataset.train) == ["a", "b", "c_0001"]
    assert list(dataset.test) == ["t"]
    assert dataset.case("c_0001").label is None
    assert dataset.case("a").label == tmp_path / "heart" / "labelsTr" / "a.nii.gz"
    assert [path.name for path in dataset.case("t").images] == ["t_0000.nii.gz", "t_0001.nii.gz"]
    assert dataset.read_image("a").array.shape == (2, *folders.SHAPE)
    assert set(np.unique(dataset.read_label("t").array)) == {0, 1, 2}


def test_label_values_and_keys_may_be_texts_in_any_order(tmp_path: Path) -> None:
    folders.make(tmp_path, ["a"], channels=2)
    folders.describe(
        tmp_path,
        channel_names={"1": "T2", "0": "T1"},
        labels={"tumor": "2", "background": "0", "organ": "1"},
        name="own name",
    )
    dataset = Dataset.open(tmp_path)
    assert dataset.channels == ("T1", "T2")
    assert dataset.classes == ("background", "organ", "tumor")
    assert dataset.name == "own name"


def test_a_color_picture_holds_three_channels_in_one_file(tmp_path: Path) -> None:
    (tmp_path / "imagesTr").mkdir()
    PIL.Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save(tmp_path / "imagesTr" / "a_0000.png")
    PIL.Image.fromarray(np.zeros((4, 5), np.uint8)).save(tmp_path / "imagesTr" / "b_0000.png")
    folders.describe(tmp_path, channels=3, ending=".png")
    dataset = Dataset.open(tmp_path)
    assert dataset.read_image("a").array.shape == (3, 1, 4, 5)
    with pytest.raises(DatasetError, match=r"b_0000\.png.*1 channels.*names 3 \(c0, c1, c2\)"):
        dataset.read_image("b")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"channel_names": None}, '"channel_names" is missing; write'),
        ({"channel_names": None, "modality": {"0": "MR"}}, "nnU-Net version 1"),
        ({"channel_names": {"1": "MR"}}, "number the channels from 0"),
        ({"labels": None}, '"labels" is missing'),
        ({"labels": {"background": 0, "a": 2}}, "values 0, 2; they must run from 0"),
        ({"labels": {"background": 0}}, "name at least one structure"),
        ({"labels": {"background": 0, "a": 1, "b": 1}}, "value 1 to both 'a' and 'b'"),
        ({"labels": {"background": 0, "whole": [1, 2], "core": 2}}, "'whole' a region of several values"),
        ({"labels": {"background": 0, "a": 1, "ignore": 2}}, '"ignore", which is not supported'),
        ({"labels": {"0": "background", "1": "a"}}, "the other way round: write name: value"),
        ({"labels": {"background": 0, "a": True}}, "which is no whole number"),
        ({"file_ending": ".mha"}, r'"file_ending" is .\.mha.*use one of \.nii\.gz'),
        ({"file_ending": None}, '"file_ending" is missing'),
    ],
)
def test_faults_of_the_description(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    folders.make(tmp_path, ["a"])
    folders.describe(tmp_path, **change)
    with pytest.raises(DatasetError, match=words) as caught:
        Dataset.open(tmp_path)
    assert str(tmp_path / "dataset.json") in str(caught.value)


def test_folders_that_are_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="is not a folder"):
        Dataset.open(tmp_path / "none")
    with pytest.raises(DatasetError, match="is empty; make a dataset folder with scantly init"):
        Dataset.open(tmp_path)
    (tmp_path / "imagesTr").mkdir()
    with pytest.raises(DatasetError, match=r"has no dataset\.json"):
        Dataset.open(tmp_path)
    folders.describe(tmp_path)
    with pytest.raises(DatasetError, match=r"holds no scans named <case>_0000\.nii\.gz"):
        Dataset.open(tmp_path)
    for content, words in (("{", "not valid JSON"), ("[]", "holds a list, not an object")):
        (tmp_path / "dataset.json").write_text(content)
        with pytest.raises(DatasetError, match=words):
            Dataset.open(tmp_path)


def test_a_missing_channel_names_the_file(tmp_path: Path) -> None:
    folders.make(tmp_path, ["a", "b"], channels=2)
    (tmp_path / "imagesTr" / "b_0001.nii.gz").unlink()
    with pytest.raises(DatasetError, match=r"b_0001\.nii\.gz is missing: case b has channels 0,"):
        Dataset.open(tmp_path)


def test_an_additional_channel_and_a_label_without_scan_are_counted(tmp_path: Path) -> None:
    folders.make(tmp_path, ["a"])
    folders.write_scan(tmp_path / "imagesTr" / "a_0001.nii.gz", 1)
    folders.write_label(tmp_path / "labelsTr" / "zz.nii.gz")
    with pytest.raises(DatasetError, match=r"zz\.nii\.gz has no scan zz_0000.*\(1 more: run scantly check\)"):
        Dataset.open(tmp_path)


def test_a_name_in_both_folders_is_refused(tmp_path: Path) -> None:
    folders.make(tmp_path, ["a", "b"], test=["a"])
    with pytest.raises(DatasetError, match="'a' is in imagesTr too"):
        Dataset.open(tmp_path)


def test_companions_do_not_hinder(tmp_path: Path) -> None:
    folders.make(tmp_path, ["a"])
    (tmp_path / "imagesTr" / "notes.txt").write_text("x")
    (tmp_path / "imagesTr" / "Thumbs.db").write_text("x")
    assert list(Dataset.open(tmp_path).train) == ["a"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("imagesTr/b.nii.gz", r"b\.nii\.gz is not named <case>_0000\.nii\.gz"),
        ("labelsTr/b.seg.nrrd", r"b\.seg\.nrrd is not named <case>\.nii\.gz.*unlabeled"),
        ("labelsTr/b.nii", r"b\.nii is not named <case>\.nii\.gz.*unlabeled"),
        ("labelsTr/more/b.nii.gz", r"more is a folder.*\(b\.nii\.gz\)"),
    ],
)
def test_what_would_be_lost_in_silence_is_refused(tmp_path: Path, name: str, words: str) -> None:
    folders.make(tmp_path, ["a"], ["b"])
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DatasetError, match=words):
        Dataset.open(tmp_path)


def test_unknown_cases_get_the_nearest_name(tmp_path: Path) -> None:
    dataset = Dataset.open(folders.make(tmp_path, ["patient010"], ["patient020"]))
    with pytest.raises(DatasetError, match="no case 'patient10' among its 2; did you mean 'patient010'"):
        dataset.case("patient10")
    with pytest.raises(DatasetError, match="patient020 has no label file"):
        dataset.read_label("patient020")


def test_labels_are_held_against_scan_and_classes(tmp_path: Path) -> None:
    dataset = Dataset.open(folders.make(tmp_path, ["a", "b", "c"]))
    folders.write_label(tmp_path / "labelsTr" / "a.nii.gz", (0, 1, 7))
    with pytest.raises(DatasetError, match=r"a\.nii\.gz has label values.*\(0 to 2\): 7 \(30 voxels\)"):
        dataset.read_label("a")
    small = imaging.Geometry((3, 6, 4), folders.GEOMETRY.affine)
    folders.write_label(tmp_path / "labelsTr" / "b.nii.gz", geometry=small)
    with pytest.raises(DatasetError, match=r"b\.nii\.gz.*b_0000\.nii\.gz: shape 3 x 6 x 4 against 3 x 6 x 5"):
        dataset.read_label("b")
    moved = imaging.Geometry(folders.SHAPE, imaging.grid((6.0, 0.7, 0.7)))
    folders.write_label(tmp_path / "labelsTr" / "c.nii.gz", geometry=moved)
    with pytest.raises(DatasetError, match=r"spacing \(6, 0\.7, 0\.7\) against \(5, 0\.7, 0\.7\)"):
        dataset.read_label("c")


def test_everything_in_the_description_is_kept(tmp_path: Path) -> None:
    folders.make(tmp_path, ["a"])
    folders.describe(tmp_path, licence="CC BY")
    assert Dataset.open(tmp_path).info["licence"] == "CC BY"
    assert json.loads((tmp_path / "dataset.json").read_text()) == Dataset.open(tmp_path).info
