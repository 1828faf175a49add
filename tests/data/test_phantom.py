"""The generated cohort: the same everywhere, anatomically consistent, and a dataset folder that opens."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from scantly.data.phantom import CLASSES, EXTENT_MM, generate_subject, write_phantom
from scantly.errors import DatasetError

RV, MYO, LV = (CLASSES.index(name) for name in ("RV", "MYO", "LV"))
SIZE = (8, 96, 96)


def test_same_seed_and_subject_give_the_same_scan() -> None:
    first, again = generate_subject(3, 5, SIZE), generate_subject(3, 5, SIZE)
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])


@pytest.mark.parametrize("other", [(3, 6), (4, 5)])
def test_other_seed_or_subject_gives_other_anatomy_and_intensities(other: tuple[int, int]) -> None:
    image, label = generate_subject(3, 5, SIZE)
    other_image, other_label = generate_subject(*other, SIZE)
    assert (label != other_label).mean() > 0.005
    assert abs(np.corrcoef(image.ravel(), other_image.ravel())[0, 1]) < 0.95


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), subject=st.integers(0, 10_000))
def test_anatomy_holds_for_any_subject(seed: int, subject: int) -> None:
    image, label = generate_subject(seed, subject, SIZE)
    assert image.shape == label.shape == SIZE
    assert image.dtype == np.float32
    assert label.dtype == np.uint8
    assert np.isfinite(image).all()
    assert image.min() >= 0
    assert set(np.unique(label)) == {0, RV, MYO, LV}
    assert not (label[0] == RV).any(), "the right ventricle does not reach the apex"
    assert (label[5] == RV).sum() > 10
    for index in (3, 4, 5):  # the cavity touches nothing but myocardium, which is one piece
        cavity = label[index] == LV
        rim = ndimage.binary_dilation(cavity) & ~cavity
        assert cavity.any()
        assert set(np.unique(label[index][rim])) == {MYO}
        assert ndimage.label(label[index] == MYO)[1] == 1
    border = np.ones(SIZE[1:], bool)
    border[1:-1, 1:-1] = False
    assert not (label[:, border] > 0).any(), "the heart lies inside the field of view"


def test_blood_is_brighter_than_muscle_but_intensity_alone_does_not_segment() -> None:
    for subject in range(8):
        image, label = generate_subject(0, subject, SIZE)
        assert np.median(image[label == LV]) > 1.15 * np.median(image[label == MYO])
        darkest_cavity = np.quantile(image[label == LV], 0.25)
        as_bright_elsewhere = (image > darkest_cavity) & (label != LV) & (label != RV)
        assert as_bright_elsewhere.sum() > 0.1 * (label == LV).sum(), "distractors are as bright"


def test_contrast_differs_between_subjects() -> None:
    ratios, scales = [], []
    for subject in range(12):
        image, label = generate_subject(0, subject, SIZE)
        ratios.append(np.median(image[label == LV]) / np.median(image[label == MYO]))
        scales.append(np.median(image[label == LV]))
    assert max(ratios) > 1.5 * min(ratios)
    assert max(scales) > 2 * min(scales)


def test_finer_grid_shows_the_same_anatomy() -> None:
    _, coarse = generate_subject(1, 2, (8, 48, 48))
    _, fine = generate_subject(1, 2, (8, 144, 144))
    for value in (RV, MYO, LV):  # volumes as shares of the box
        assert (fine == value).mean() == pytest.approx((coarse == value).mean(), rel=0.06)
    np.testing.assert_array_equal(fine[:, 1::3, 1::3], coarse)  # the middle of three fine voxels is a coarse one


def test_written_cohort_is_a_dataset_folder(tmp_path: Path) -> None:
    root = write_phantom(tmp_path / "cohort", subjects=7, val=1, test=2, size=(4, 32, 40), seed=9)
    described = json.loads((root / "dataset.json").read_text())
    assert described["labels"] == {"background": 0, "RV": 1, "MYO": 2, "LV": 3}
    assert described["channel_names"] == {"0": "MRI"}
    assert (described["numTraining"], described["numTest"]) == (5, 2)
    splits = json.loads((root / "splits.json").read_text())
    assert splits["train"] == ["subject000", "subject001", "subject002", "subject003"]
    assert splits["val"] == ["subject004"]
    assert splits["test"] == ["subject005", "subject006"]
    assert splits["labeled"] == {
        "1": splits["train"][:1],
        "2": splits["train"][:2],
        "4": splits["train"],
    }
    assert splits["unit"] == "subject"
    assert splits["groups"]["subject003"] == "subject003"
    files = sorted(str(path.relative_to(root)) for path in root.rglob("*.nii.gz"))
    assert files == sorted(
        [f"imagesTr/subject00{n}_0000.nii.gz" for n in range(5)]
        + [f"labelsTr/subject00{n}.nii.gz" for n in range(5)]
        + [f"imagesTs/subject00{n}_0000.nii.gz" for n in (5, 6)]
        + [f"labelsTs/subject00{n}.nii.gz" for n in (5, 6)]
    )


def test_written_files_hold_the_generated_arrays_with_their_spacing(tmp_path: Path) -> None:
    root = write_phantom(tmp_path, subjects=2, val=0, test=1, size=(4, 32, 40), seed=9)
    image, label = generate_subject(9, 1, (4, 32, 40))
    read = nibabel.load(root / "imagesTs" / "subject001_0000.nii.gz")
    mask = nibabel.load(root / "labelsTs" / "subject001.nii.gz")
    np.testing.assert_array_equal(np.asanyarray(read.dataobj), image.T)  # the file's order is (x, y, z)
    np.testing.assert_array_equal(np.asanyarray(mask.dataobj), label.T)
    spacing = (EXTENT_MM[2] / 40, EXTENT_MM[1] / 32, EXTENT_MM[0] / 4)
    np.testing.assert_allclose(read.header.get_zooms(), spacing, rtol=1e-6)
    assert nibabel.aff2axcodes(read.affine) == ("L", "P", "S")
    np.testing.assert_array_equal(read.affine, mask.affine)


def test_refuses_what_it_cannot_write(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="leave none to train on"):
        write_phantom(tmp_path / "new", subjects=8, val=2, test=6)
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(DatasetError, match="is not empty"):
        write_phantom(tmp_path, subjects=9)
    assert (tmp_path / "mine.txt").read_text() == "keep"
