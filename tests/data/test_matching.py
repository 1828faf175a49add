"""Names of files: cases, channels and the label of each."""

from __future__ import annotations

from pathlib import Path

import pytest

from scantly.data.matching import group_channels, is_label_name, match_labels, name_files
from scantly.errors import DatasetError


def files(*names: str) -> dict[str, Path]:
    return {name: Path(f"{name}.nii.gz") for name in names}


@pytest.mark.parametrize(
    ("case", "label"),
    [
        ("case1", "case1"),
        ("case1", "CASE1"),
        ("Case1", "case1_seg"),
        ("patient001_frame01", "patient001_frame01_gt"),
        ("a", "a_label"),
        ("a", "a-mask"),
        ("a", "a.manual"),
        ("a", "a_0000_seg"),
        ("ct_train_1001_image", "ct_train_1001_label"),
        ("volume-12", "segmentation-12"),
        ("img_7", "mask_7"),
        ("a_0000", "a"),
    ],
)
def test_labels_find_their_scan(case: str, label: str) -> None:
    cases = [case, "other_1", "volume-1"]
    assert match_labels(cases, files(label)) == {case: Path(f"{label}.nii.gz")}


def test_an_exact_name_wins_over_a_similar_one() -> None:
    matched = match_labels(["a", "a_seg"], files("a_seg", "a"))
    assert {case: path.name for case, path in matched.items()} == {"a": "a.nii.gz", "a_seg": "a_seg.nii.gz"}


def test_a_number_is_never_shortened() -> None:
    with pytest.raises(DatasetError, match=r"case10\.nii\.gz fits no scan by name"):
        match_labels(["case1", "case2"], files("case10"))


def test_what_fits_twice_is_refused() -> None:
    with pytest.raises(DatasetError, match=r"fits several scans \(A, a_image\)"):
        match_labels(["A", "a_image"], files("a_seg"))
    with pytest.raises(DatasetError, match="are both labels of a"):
        match_labels(["a"], files("a_seg", "a_gt"))


@pytest.mark.parametrize(
    ("names", "labels", "expected"),
    [
        (["a_0000", "b_0000"], [], {"a": 1, "b": 1}),
        (["a_0000", "a_0001", "b_0000", "b_0001"], [], {"a": 2, "b": 2}),
        (["IMG_0000", "IMG_0001", "IMG_0002"], [], {"IMG_0000": 1, "IMG_0001": 1, "IMG_0002": 1}),
        (["a_0000", "a_0001"], ["a_seg"], {"a": 2}),
        (["IMG_0001", "IMG_0002"], [], {"IMG_0001": 1, "IMG_0002": 1}),
        (["a_0001", "a_0002", "b_0001"], [], {"a_0001": 1, "a_0002": 1, "b_0001": 1}),
        ([f"a_000{n}" for n in range(6)] + ["b_0000"], [], {f"a_000{n}": 1 for n in range(6)} | {"b_0000": 1}),
        (["a_0000", "b"], [], {"a_0000": 1, "b": 1}),
    ],
)
def test_channels_are_told_from_plain_counts(names: list[str], labels: list[str], expected: dict[str, int]) -> None:
    grouped = group_channels(files(*names), labels)
    assert {case: len(paths) for case, paths in grouped.items()} == expected


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["a_0000", "a_0001", "b_0000"], []),
        (["a_0000", "a_0001", "b_0000", "b_0002"], []),
        ([f"a_000{n}" for n in range(6)] + ["b_0000"], ["a"]),
    ],
)
def test_channels_of_some_cases_alone_are_no_scans_of_their_own(names: list[str], labels: list[str]) -> None:
    with pytest.raises(DatasetError, match=r"a has channels 0, 1.* and b has channels? 0.*add what is missing"):
        group_channels(files(*names), labels)


def test_folders_name_files_that_are_called_alike() -> None:
    paths = [Path("x/p1/mri_norm2.h5"), Path("x/p2/mri_norm2.h5")]
    assert name_files(paths) == {"p1": paths[0], "p2": paths[1]}
    with pytest.raises(DatasetError, match=r"b/p1/mri\.h5 and a/p1/mri\.h5 have the same name"):
        name_files([Path("a/p1/mri.h5"), Path("b/p1/mri.h5")])


def test_a_file_above_another_of_its_name_is_no_case_of_its_folder() -> None:
    with pytest.raises(DatasetError, match=r"scans/old/a\.nii\.gz and scans/a\.nii\.gz have the same name"):
        name_files([Path("scans/a.nii.gz"), Path("scans/old/a.nii.gz")])


def test_label_names() -> None:
    names = ["segmentation", "a_gt", "a.seg", "Case Mask", "target", "staging", "a_segment", "gt1"]
    assert [is_label_name(Path(f"{name}.nii")) for name in names] == [True] * 4 + [False] * 4
