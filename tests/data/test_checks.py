"""scantly check: every fault is found, named, explained; sound data and flat memory."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import dataset_folders as folders
import numpy as np
import PIL.Image
import pytest

from scantly import imaging
from scantly.data.checks import Finding, check


def codes(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.code, Path(finding.file).name) for finding in findings]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four sound cases of two channels, one of them unlabeled, and a test case."""
    return folders.make(tmp_path, ["a", "b", "c"], ["u"], test=["t"], channels=2)


def test_sound_data_has_no_findings(root: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    assert check(root, progress=lambda *state: seen.append(state)) == []
    assert seen == [(0, 5, "a"), (1, 5, "b"), (2, 5, "c"), (3, 5, "u"), (4, 5, "t"), (5, 5, "")]


def truncate(root: Path) -> None:
    path = root / "imagesTr" / "b_0001.nii.gz"
    path.write_bytes(path.read_bytes()[:-30])


def other_shape(root: Path) -> None:
    geometry = imaging.Geometry((3, 6, 4), folders.GEOMETRY.affine)
    folders.write_label(root / "labelsTr" / "a.nii.gz", geometry=geometry)


def other_affine(root: Path) -> None:
    geometry = imaging.Geometry(folders.SHAPE, imaging.grid((5.0, 0.8, 0.7)))
    folders.write_label(root / "labelsTr" / "a.nii.gz", geometry=geometry)


def channel_grid(root: Path) -> None:
    geometry = imaging.Geometry(folders.SHAPE, imaging.grid((5.0, 0.8, 0.7)))
    folders.write_scan(root / "imagesTr" / "u_0001.nii.gz", 77, geometry)


def missing_channel(root: Path) -> None:
    (root / "imagesTr" / "c_0001.nii.gz").unlink()


def extra_channel(root: Path) -> None:
    folders.write_scan(root / "imagesTr" / "c_0002.nii.gz", 78)


def unknown_value(root: Path) -> None:
    folders.write_label(root / "labelsTs" / "t.nii.gz", (0, 1, 2, 4))


def not_finite(root: Path) -> None:
    values = np.full(folders.SHAPE, 2.0)
    values[1, 2, 3:] = np.nan
    imaging.write_scalar(root / "imagesTr" / "a_0000.nii.gz", values, folders.GEOMETRY)


def constant(root: Path) -> None:
    imaging.write_scalar(root / "imagesTr" / "a_0000.nii.gz", np.full(folders.SHAPE, 2.0), folders.GEOMETRY)


def empty_label(root: Path) -> None:
    folders.write_label(root / "labelsTr" / "b.nii.gz", (0,))


def fractional(root: Path) -> None:
    imaging.write_scalar(root / "labelsTr" / "b.nii.gz", np.full(folders.SHAPE, 0.5), folders.GEOMETRY)


def absent_class(root: Path) -> None:
    for path in [*(root / "labelsTr").iterdir(), *(root / "labelsTs").iterdir()]:
        folders.write_label(path, (0, 1))


def stray(root: Path) -> None:
    (root / "imagesTr" / "notes.txt").write_text("x")


def label_of_another_type(root: Path) -> None:
    (root / "labelsTr" / "u.mha").write_bytes(b"MetaImage")


def label_of_another_ending(root: Path) -> None:
    folders.write_label(root / "labelsTr" / "u.nii")


def scan_of_another_type(root: Path) -> None:
    (root / "imagesTr" / "d_0000.nrrd").write_bytes(b"NRRD")


def scan_without_channel(root: Path) -> None:
    folders.write_scan(root / "imagesTs" / "d.nii.gz", 80)


def scans_in_a_subfolder(root: Path) -> None:
    folders.write_scan(root / "imagesTr" / "more" / "d_0000.nii.gz", 80)


def labels_in_a_subfolder(root: Path) -> None:
    folders.write_label(root / "labelsTr" / "more" / "u.nii.gz")


def misspelt(root: Path) -> None:
    (root / "labelsTs").rename(root / "labelsTS")


def link_to_no_folder(root: Path) -> None:
    (root / "labelsTs" / "t.nii.gz").unlink()
    (root / "labelsTs").rmdir()
    (root / "labelsTs").symlink_to(root / "gone")


def file_in_place_of_a_folder(root: Path) -> None:
    (root / "labelsTs" / "t.nii.gz").unlink()
    (root / "labelsTs").rmdir()
    (root / "labelsTs").write_bytes(b"")


def link_misspelt(root: Path) -> None:
    (root / "labelsTR").symlink_to(root / "gone")


def another_folder(root: Path) -> None:
    folders.write_scan(root / "imagesVal" / "v_0000.nii.gz", 80)


def scan_beside_the_folders(root: Path) -> None:
    folders.write_scan(root / "d_0000.nii.gz", 80)


def twice_in_other_letters(root: Path) -> None:
    (root / "labelsTr" / "a.NII.GZ").write_bytes((root / "labelsTr" / "a.nii.gz").read_bytes())


def other_number(root: Path) -> None:
    folders.describe(root, channels=2, numTraining=5)


def empty_scan(root: Path) -> None:
    (root / "imagesTr" / "b_0001.nii.gz").write_bytes(b"")


def case_in_no_list(root: Path) -> None:
    (root / "splits.json").write_text(json.dumps({"train": ["a", "b"], "val": ["c"], "test": ["t"]}))


def lonely_label(root: Path) -> None:
    folders.write_label(root / "labelsTr" / "d.nii.gz")


def no_labels(root: Path) -> None:
    for path in (root / "labelsTr").iterdir():
        path.unlink()


def broken_splits(root: Path) -> None:
    (root / "splits.json").write_text("{")


@pytest.mark.parametrize(
    ("spoil", "code", "level", "file", "words"),
    [
        (truncate, "unreadable", "error", "b_0001.nii.gz", "truncated or damaged"),
        (other_shape, "label_geometry", "error", "a.nii.gz", "shape 3 x 6 x 4 against 3 x 6 x 5"),
        (other_affine, "label_geometry", "error", "a.nii.gz", "spacing (5, 0.8, 0.7) against (5, 0.7, 0.7)"),
        (channel_grid, "channel_geometry", "error", "u_0001.nii.gz", "resample one onto the other"),
        (missing_channel, "missing_channel", "error", "c_0001.nii.gz", "dataset.json names 2"),
        (extra_channel, "extra_channel", "error", "c_0002.nii.gz", "name it under channel_names"),
        (unknown_value, "unknown_label", "error", "t.nii.gz", "4 (22 voxels)"),
        (not_finite, "not_finite", "error", "a_0000.nii.gz", "has 2 voxels that are NaN or infinite (of 90)"),
        (constant, "constant_image", "warning", "a_0000.nii.gz", "the value 2 in every voxel"),
        (
            empty_label,
            "empty_label",
            "warning",
            "b.nii.gz",
            "remove the file and the case counts as",
        ),
        (fractional, "unreadable", "error", "b.nii.gz", "90 voxels whose label is not a whole number"),
        (absent_class, "class_absent", "warning", "labelsTr", "class 'b' (value 2)"),
        (stray, "stray_file", "warning", "notes.txt", "it is not used; rename it"),
        (label_of_another_type, "label_not_read", "error", "u.mha", "its case would count as unlabeled; convert"),
        (label_of_another_ending, "label_not_read", "error", "u.nii", "is not named <case>.nii.gz"),
        (scan_of_another_type, "scan_not_read", "error", "d_0000.nrrd", "is not named <case>_0000.nii.gz"),
        (scan_without_channel, "scan_not_read", "error", "d.nii.gz", "rename it to d_0000.nii.gz"),
        (scans_in_a_subfolder, "scan_not_read", "error", "more", "(d_0000.nii.gz)"),
        (labels_in_a_subfolder, "label_not_read", "error", "more", "(u.nii.gz)"),
        (misspelt, "misspelt_folder", "error", "labelsTS", "rename it to labelsTs"),
        (link_misspelt, "misspelt_folder", "error", "labelsTR", "rename it to labelsTr"),
        (link_to_no_folder, "no_folder", "error", "labelsTs", "leads nowhere"),
        (file_in_place_of_a_folder, "no_folder", "error", "labelsTs", "is not a folder"),
        (another_folder, "stray_file", "warning", "imagesVal", "is not used"),
        (scan_beside_the_folders, "stray_file", "warning", "d_0000.nii.gz", "is not used"),
        (twice_in_other_letters, "file_twice", "error", "a.nii.gz", "keep one of them"),
        (other_number, "case_number", "warning", "dataset.json", '"numTraining" is 5, but imagesTr holds 4 cases'),
        (empty_scan, "unreadable", "error", "b_0001.nii.gz", "0 are there"),
        (case_in_no_list, "split_leaves_out", "warning", "splits.json", "no list names u of imagesTr"),
        (lonely_label, "label_without_image", "error", "d.nii.gz", "rename it to its scan"),
        (no_labels, "no_labels", "error", "labelsTr", "at least one labeled case"),
        (broken_splits, "split_file", "error", "splits.json", "not valid JSON"),
    ],
)
def test_each_fault_is_found_and_nothing_else(
    root: Path, spoil: Callable[[Path], None], code: str, level: str, file: str, words: str
) -> None:
    spoil(root)
    findings = check(root)
    assert codes(findings) == [(code, file)]
    assert findings[0].level == level
    assert words in findings[0].message
    assert findings[0].file in findings[0].message
    assert "\n" not in findings[0].message


@pytest.mark.parametrize("name", ["README", "README.md", "license.txt", "Thumbs.db", "desktop.ini", "protocol.pdf"])
def test_plain_companions_are_no_error(root: Path, name: str) -> None:
    for folder in (root, root / "imagesTr", root / "labelsTs"):
        (folder / name).write_bytes(b"x")
        (folder / ".DS_Store").write_bytes(b"x")
    assert {finding.level for finding in check(root)} <= {"warning"}


def test_endings_in_capital_letters_are_read(root: Path) -> None:
    for path in [*(root / "imagesTr").iterdir(), *(root / "labelsTr").iterdir()]:
        if path.name.startswith("a"):
            path.rename(path.with_name(path.name.replace(".nii.gz", ".NII.GZ")))
    assert check(root) == []


def test_all_faults_are_told_at_once(root: Path) -> None:
    for spoil in (truncate, other_shape, unknown_value, missing_channel, stray, broken_splits):
        spoil(root)
    assert set(codes(check(root))) == {
        ("unreadable", "b_0001.nii.gz"),
        ("label_geometry", "a.nii.gz"),
        ("unknown_label", "t.nii.gz"),
        ("missing_channel", "c_0001.nii.gz"),
        ("stray_file", "notes.txt"),
        ("split_file", "splits.json"),
    }


def copy_case(root: Path, source: str, target: str) -> None:
    """Same voxels under another name and another header."""
    for channel in ("0000", "0001"):
        image = imaging.read_image([root / "imagesTr" / f"{source}_{channel}.nii.gz"])
        moved = imaging.Geometry(folders.SHAPE, imaging.grid((6.0, 0.7, 0.7)))
        imaging.write_scalar(root / "imagesTr" / f"{target}_{channel}.nii.gz", image.array[0], moved)


def test_duplicates_are_found_whatever_their_header_says(root: Path) -> None:
    copy_case(root, "a", "z")
    finding = check(root)[0]
    assert codes([finding]) == [("duplicate_image", "z_0000.nii.gz")]
    assert finding.level == "error"  # a drawn split may put one on each side
    assert "same voxels as" in finding.message
    assert "a_0000.nii.gz" in finding.message
    assert "labels differ" not in finding.message


@pytest.mark.parametrize(
    ("splits", "level"),
    [
        ({"train": ["a", "z", "b", "u"], "val": ["c"]}, "warning"),
        ({"train": ["a", "b", "c", "u"], "val": ["z"]}, "error"),
        ({"train": ["a", "b", "z", "c", "u"], "dev_split": {"train": ["a"], "val": ["z"]}}, "error"),
    ],
)
def test_duplicates_weigh_more_across_a_split(root: Path, splits: dict[str, object], level: str) -> None:
    copy_case(root, "a", "z")
    label = imaging.Geometry(folders.SHAPE, imaging.grid((6.0, 0.7, 0.7)))
    folders.write_label(root / "labelsTr" / "z.nii.gz", (0, 2, 1), label)
    (root / "splits.json").write_text(json.dumps(splits))
    findings = check(root)
    assert [(finding.code, finding.level) for finding in findings] == [("duplicate_image", level)]
    assert "though their labels differ" in findings[0].message


def test_a_duplicate_among_the_test_cases_is_an_error(root: Path) -> None:
    (root / "splits.json").write_text(json.dumps({"train": ["a", "b", "u"], "val": ["c"]}))
    for channel in ("0000", "0001"):
        source = root / "imagesTr" / f"u_{channel}.nii.gz"
        (root / "imagesTs" / f"t_{channel}.nii.gz").write_bytes(source.read_bytes())
    assert [(finding.code, finding.level) for finding in check(root)] == [("duplicate_image", "error")]


def test_faults_of_splits_are_all_listed(root: Path) -> None:
    splits = {
        "unit": "patient",
        "train": ["a", "b", "nobody"],
        "val": ["c", "u"],
        "groups": {"a": "p1", "c": "p1"},
    }
    (root / "splits.json").write_text(json.dumps(splits))
    findings = check(root)
    assert [finding.code for finding in findings] == [
        "split_unknown_case",
        "split_no_label",
        "subject_on_both_sides",
    ]
    assert "nobody" in findings[0].message
    assert '"train" and "val" share the patient p1' in findings[2].message


def test_a_wrong_description_does_not_hide_what_the_files_have(root: Path) -> None:
    folders.describe(root, labels={"background": 0, "a": 2}, channel_names=None)
    truncate(root)
    findings = check(root)
    assert codes(findings) == [
        ("description", "dataset.json"),
        ("description", "dataset.json"),
        ("unreadable", "b_0001.nii.gz"),
    ]


def test_folders_that_are_no_dataset(tmp_path: Path) -> None:
    assert codes(check(tmp_path)) == [("empty_folder", tmp_path.name)]
    assert codes(check(tmp_path / "none")) == [("no_folder", "none")]
    folders.describe(tmp_path)
    assert codes(check(tmp_path)) == [("no_images", "imagesTr"), *[]]


def test_color_and_gray_pictures_in_one_folder(tmp_path: Path) -> None:
    (tmp_path / "imagesTr").mkdir()
    rng = np.random.default_rng(0)
    PIL.Image.fromarray(rng.integers(0, 255, (4, 5, 3), np.uint8)).save(tmp_path / "imagesTr" / "a_0000.png")
    PIL.Image.fromarray(rng.integers(0, 255, (4, 5), np.uint8)).save(tmp_path / "imagesTr" / "b_0000.png")
    folders.describe(tmp_path, channels=3, ending=".png")
    assert codes(check(tmp_path)) == [("no_labels", "labelsTr"), ("channel_count", "b_0000.png")]
    folders.describe(tmp_path, channels=1, ending=".png")
    assert codes(check(tmp_path)) == [("no_labels", "labelsTr"), ("channel_count", "a_0000.png")]


def test_a_broken_link_is_unreadable(root: Path) -> None:
    path = root / "labelsTr" / "a.nii.gz"
    path.unlink()
    path.symlink_to(root / "gone.nii.gz")
    findings = check(root)
    assert codes(findings) == [("unreadable", "a.nii.gz")]
    assert "does not exist" in findings[0].message


def test_memory_does_not_grow_with_the_cohort(tmp_path: Path) -> None:
    geometry = imaging.Geometry((8, 64, 64), imaging.grid())

    def peak(cases: int) -> int:
        root = tmp_path / str(cases)
        for number in range(cases):
            folders.write_scan(root / "imagesTr" / f"c{number}_0000.nii", number, geometry)
            folders.write_label(root / "labelsTr" / f"c{number}.nii", geometry=geometry)
        folders.describe(root, ending=".nii")
        tracemalloc.start()
        assert check(root) == []
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    peak(2)
    one_scan = 8 * 64 * 64 * 4
    assert peak(20) - peak(4) < one_scan


def test_a_file_that_does_not_fit_into_memory_is_a_finding(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("scantly.data.checks._CaseReader._voxels", short)
    findings = check(root)
    assert {finding.code for finding in findings} == {"unreadable"}
    assert len(findings) == 10  # the channels of all cases; the labels fit
    assert all("of memory to be read" in finding.message and "damaged" not in finding.message for finding in findings)
