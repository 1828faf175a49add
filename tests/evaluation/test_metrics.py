from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_pairs import random_pairs
from medpy.metric import binary
from numpy.testing import assert_allclose

from scantly.errors import ConfigError, ImageError
from scantly.evaluation import (
    DEFINITIONS,
    asd,
    assd,
    dice,
    dice_per_class,
    hd95,
    image_diagonal,
    jaccard,
    make_table,
    nsd,
    score_case,
    summarize,
    surface_distances,
)

CLASSES = ("background", "RV", "Myo", "LV")
DISTANCES = ("hd95", "asd", "assd")


def rectangles() -> tuple[np.ndarray, np.ndarray]:
    """The worked check of the protocols: 3 x 3 in 3 x 5, three sides shared."""
    small, large = np.zeros((10, 10), np.uint8), np.zeros((10, 10), np.uint8)
    small[2:5, 2:5] = 1
    large[2:5, 2:7] = 1
    return small, large


def test_worked_example_of_the_protocols() -> None:
    small, large = rectangles()
    assert dice(small, large) == 0.75
    assert jaccard(small, large) == 0.6
    assert hd95(small, large) == 2.0
    assert asd(small, large) == 1 / 8
    assert asd(large, small) == pytest.approx(8 / 12)
    assert assd(small, large) == pytest.approx((1 + 8) / (8 + 12))
    # distances of the small one's 8 surface voxels: seven 0, one 1; of the large one's 12: seven 0 (columns 2
    # to 4), two 1 (column 5), three 2 (column 6)
    assert nsd(small, large, 1.0) == pytest.approx((8 + 9) / 20)
    assert nsd(small, large, 0.0) == pytest.approx((7 + 7) / 20)


def test_worked_example_with_spacing() -> None:
    small, large = rectangles()
    # columns are 2 mm apart and rows 0.5 mm: the two extra columns are 2 and 4 mm away, the small one's
    # right middle voxel is 0.5 mm from the large one's upper and lower side
    assert hd95(small, large, (0.5, 2.0)) == pytest.approx(4.0)
    assert asd(small, large, (0.5, 2.0)) == pytest.approx(0.5 / 8)
    assert nsd(small, large, 2.0, (0.5, 2.0)) == pytest.approx((8 + 9) / 20)


@pytest.mark.parametrize(("name", "prediction", "reference", "spacing"), random_pairs())
def test_equal_to_medpy(
    name: str, prediction: np.ndarray, reference: np.ndarray, spacing: tuple[float, ...] | None
) -> None:
    assert_allclose(dice(prediction, reference), binary.dc(prediction, reference), atol=1e-6)
    assert_allclose(jaccard(prediction, reference), binary.jc(prediction, reference), atol=1e-6)
    for ours, theirs in ((hd95, binary.hd95), (asd, binary.asd), (assd, binary.assd)):
        assert_allclose(ours(prediction, reference, spacing), theirs(prediction, reference, spacing), rtol=0, atol=1e-6)
    row = score_case(prediction, reference, classes=("background", "x"), spacing=spacing, case=name)[0]
    for metric in DISTANCES:
        theirs = getattr(binary, metric)
        assert_allclose(row[f"{metric}_voxels"], theirs(prediction, reference), rtol=0, atol=1e-6)
        expected = np.nan if spacing is None else theirs(prediction, reference, spacing)
        assert_allclose(row[f"{metric}_mm"], expected, rtol=0, atol=1e-6)


def test_the_comparison_with_medpy_covers_200_pairs() -> None:
    assert len(random_pairs()) >= 200


def test_single_slice_is_measured_as_a_2d_image() -> None:
    prediction, reference = np.zeros((2, 1, 40, 40), np.uint8)
    prediction[0, 5:20, 5:20] = 1
    reference[0, 8:25, 5:22] = 1
    flat = prediction[0], reference[0]
    for ours, theirs in ((hd95, binary.hd95), (asd, binary.asd), (assd, binary.assd)):
        assert ours(prediction, reference) == pytest.approx(theirs(*flat), abs=1e-9)
        assert ours(prediction, reference, (10.0, 0.5, 1.5)) == pytest.approx(theirs(*flat, (0.5, 1.5)), abs=1e-9)
    assert hd95(prediction, reference) != pytest.approx(binary.hd95(prediction, reference))
    rows = score_case(prediction, reference, classes=("background", "x"), spacing=(10, 0.5, 1.5), case="a")
    assert rows == score_case(*flat, classes=("background", "x"), spacing=(0.5, 1.5), case="a")


def test_two_voxels_a_known_way_apart() -> None:
    prediction, reference = np.zeros((2, 30, 30, 30), bool)
    prediction[3, 4, 5] = True
    reference[3 + 2, 4 + 3, 5 + 6] = True  # 4 + 9 + 36 = 49
    assert hd95(prediction, reference) == asd(prediction, reference) == assd(prediction, reference) == 7.0
    assert hd95(prediction, reference, (3.0, 2.0, 0.0 + 1.0)) == pytest.approx(np.sqrt(36 + 36 + 36))
    assert nsd(prediction, reference, 6.99) == 0.0
    assert nsd(prediction, reference, 7.0) == 1.0


def test_tolerance_is_not_missed_by_rounding() -> None:
    prediction, reference = np.zeros((2, 1, 9), bool)
    prediction[0, 0] = reference[0, 3] = True
    assert 3 * 0.1 > 0.3
    assert nsd(prediction, reference, 0.3, (0.1, 0.1)) == 1.0


def _noise_pair(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 14, size=rng.integers(2, 4)))
    prediction, reference = rng.random((2, *shape)) < rng.uniform(0.02, 0.98, size=(2,) + (1,) * len(shape))
    prediction.flat[rng.integers(prediction.size)] = True
    reference.flat[rng.integers(reference.size)] = True
    return prediction, reference


masks = st.integers(0, 2**32 - 1).map(_noise_pair)


@settings(max_examples=60)
@given(masks)
def test_symmetry_bounds_and_flips(pair: tuple[np.ndarray, np.ndarray]) -> None:
    prediction, reference = pair
    for metric in (dice, jaccard, hd95, assd):
        assert metric(prediction, reference) == pytest.approx(metric(reference, prediction), abs=1e-12)
    assert nsd(prediction, reference, 1.0) == nsd(reference, prediction, 1.0)
    values = [m(prediction, reference) for m in (dice, jaccard, hd95, asd, assd)]
    flipped = [m(np.flip(prediction), np.flip(reference)) for m in (dice, jaccard, hd95, asd, assd)]
    assert_allclose(values, flipped, atol=1e-12)
    assert 0 <= values[1] <= values[0] <= 1
    assert values[0] == pytest.approx(2 * values[1] / (1 + values[1]))
    assert 0 <= values[2] < image_diagonal(prediction.shape)
    assert dice(prediction, prediction) == 1 and hd95(prediction, prediction) == 0


@settings(max_examples=40)
@given(masks, st.lists(st.integers(0, 5), min_size=3, max_size=3))
def test_moving_both_masks_changes_nothing(pair: tuple[np.ndarray, np.ndarray], shift: list[int]) -> None:
    # only the image grows, on all sides: the outside of the array counts as background anyhow
    margins = [(2 + move, 7 - move) for move, _ in zip(shift, pair[0].shape, strict=False)]
    moved = [np.pad(mask, margins) for mask in pair]
    if pair[0].ndim == 3 and pair[0].shape[0] == 1:
        moved = [np.pad(mask[0], margins[1:]) for mask in pair]
    for metric in (dice, jaccard, hd95, asd, assd):
        assert metric(*moved) == pytest.approx(metric(*pair), abs=1e-12)


@settings(max_examples=40)
@given(masks, st.sampled_from([(1, 1, 1), (2.5, 0.8, 0.8), (0.3, 0.3, 7), (1.1, 2.3, 0.9)]))
def test_distances_equal_brute_force(pair: tuple[np.ndarray, np.ndarray], spacing: tuple[float, float, float]) -> None:
    pair = tuple(mask[0] if mask.ndim == 3 and mask.shape[0] == 1 else mask for mask in pair)
    size = spacing[-pair[0].ndim :]
    points = [np.array(list(_surface(mask))) * size for mask in pair]
    table = np.sqrt(((points[0][:, None] - points[1][None]) ** 2).sum(axis=2))
    distances = surface_distances(*pair, size)
    assert_allclose(np.sort(distances.to_reference), np.sort(table.min(axis=1)), atol=1e-12)
    assert_allclose(np.sort(distances.to_prediction), np.sort(table.min(axis=0)), atol=1e-12)


def _surface(mask: np.ndarray) -> list[tuple[int, ...]]:
    inside = {tuple(int(i) for i in voxel) for voxel in np.argwhere(mask)}
    neighbors = [step * sign for step in np.eye(mask.ndim, dtype=int) for sign in (-1, 1)]
    return [v for v in inside if any(tuple((np.array(v) + n).tolist()) not in inside for n in neighbors)]


def test_empty_masks_of_two_mask_functions() -> None:
    empty, full = np.zeros((3, 4), bool), np.ones((3, 4), bool)
    for metric in (hd95, asd, assd):
        assert metric(empty, full) == metric(full, empty) == 5.0
        assert metric(empty, full, (2.0, 2.0)) == 10.0
        assert np.isnan(metric(empty, empty))
    assert dice(empty, full) == jaccard(full, empty) == nsd(empty, full, 1.0) == 0.0
    assert np.isnan([dice(empty, empty), jaccard(empty, empty), nsd(empty, empty, 1.0)]).all()
    with pytest.raises(ValueError, match="not empty"):
        surface_distances(empty, full)


def test_arguments_that_do_not_fit() -> None:
    mask = np.ones((3, 4), bool)
    with pytest.raises(ValueError, match=r"shapes differ: prediction \(3, 4\), reference \(4, 3\)"):
        dice(mask, mask.T)
    for spacing in ((1.0,), (1.0, 0.0), (1.0, np.nan), (1.0, 1.0, 1.0, 1.0)):
        with pytest.raises(ValueError, match="spacing"):
            hd95(mask, mask, spacing)
    with pytest.raises(ValueError, match="tolerance"):
        nsd(mask, mask, -1.0)


def four_cases() -> tuple[np.ndarray, np.ndarray]:
    """RV in both, Myo missed, LV spurious; a volume of 4 x 6 x 8."""
    prediction, reference = np.zeros((2, 4, 6, 8), np.uint8)
    prediction[1:3, 1:4, 1:4] = reference[1:3, 1:4, 1:5] = 1
    reference[3, 5, 5] = 2
    prediction[0, 5, 5] = 3
    return prediction, reference


def test_case_rows_under_the_clean_convention() -> None:
    prediction, reference = four_cases()
    rows = score_case(prediction, reference, classes=(*CLASSES, "Other"), spacing=(10.0, 1.5, 1.5), case="p1")
    assert [row["class"] for row in rows] == ["RV", "Myo", "LV", "Other"]
    assert [row["status"] for row in rows] == ["scored", "missed", "spurious", "both_empty"]
    assert list(rows[0]) == ["case", "class", "status", *DEFINITIONS]
    assert all(list(row) == list(rows[0]) for row in rows)
    assert rows[0]["dice"] == pytest.approx(2 * 18 / (18 + 24))
    diagonal_mm = np.sqrt(40**2 + 9**2 + 12**2)
    for row in rows[1:3]:
        assert row["dice"] == row["jaccard"] == row["nsd_mm"] == row["nsd_voxels"] == 0
        assert row["hd95_voxels"] == row["asd_voxels"] == pytest.approx(np.sqrt(16 + 36 + 64))
        assert row["hd95_mm"] == row["assd_mm"] == pytest.approx(diagonal_mm)
    assert np.isnan([rows[3][metric] for metric in DEFINITIONS]).all()


def test_case_rows_under_the_literature_convention() -> None:
    prediction, reference = four_cases()
    rows = score_case(
        prediction,
        reference,
        classes=(*CLASSES, "Other"),
        spacing=(10.0, 1.5, 1.5),
        case="p1",
        convention="literature",
    )
    assert [row["status"] for row in rows] == ["scored", "missed", "spurious", "both_empty"]
    for row in rows[1:]:  # the public scripts look at the prediction alone: it is empty, so all is 0
        assert [row[metric] for metric in DEFINITIONS] == [0.0] * len(DEFINITIONS)


@pytest.mark.parametrize("shape", [(6, 8), (1, 6, 8), (4, 6, 8)])
def test_what_empty_masks_add_to_the_means_of_the_literature(shape: tuple[int, ...]) -> None:
    """Four cases of one class: 4 voxels found exactly, in neither mask, missed, spurious; worked by hand."""
    mask, empty = np.zeros((2, *shape), np.uint8)
    mask[..., 2:4, 2:4] = 1
    pairs = {"found": (mask, mask), "neither": (empty, empty), "missed": (empty, mask), "spurious": (mask, empty)}
    means = {}
    for convention in ("clean", "literature"):
        rows = [
            score_case(*pair, classes=("b", "x"), spacing=None, case=case, convention=convention)[0]
            for case, pair in pairs.items()
        ]
        summary = summarize(make_table(rows), protocol="p", convention=convention)
        means[convention] = {m: summary["classes"]["x"][m]["mean"] for m in ("dice", "jaccard", "hd95_voxels")}
        assert summary["classes"]["x"]["both_empty"] == summary["overall"]["both_empty"] == 1
        assert summary["classes"]["x"]["averaged"] == (3 if convention == "clean" else 4)
        assert summary["overall"]["dice"]["mean"] == means[convention]["dice"]
    diagonal = image_diagonal([side for side in shape if side > 1])
    assert means["clean"] == pytest.approx({"dice": 1 / 3, "jaccard": 1 / 3, "hd95_voxels": 2 * diagonal / 3})
    assert means["literature"] == {"dice": 1 / 4, "jaccard": 1 / 4, "hd95_voxels": 0.0}


def test_tolerance_in_mm_applies_to_anisotropic_and_isotropic_spacing() -> None:
    prediction, reference = np.zeros((2, 9, 9, 9), np.uint8)
    prediction[0, 4, 4] = reference[3, 4, 4] = 1
    for spacing, tolerance, expected in (
        ((0.5, 0.5, 0.5), 1.5, 1.0),
        ((0.5, 0.5, 0.5), 1.4, 0.0),
        ((0.6, 1.0, 1.0), 1.8, 1.0),
        ((0.6, 1.0, 1.0), 1.7, 0.0),
    ):
        row = score_case(prediction, reference, classes=("b", "x"), spacing=spacing, case="a", tolerance_mm=tolerance)[
            0
        ]
        assert (row["nsd_mm"], row["nsd_voxels"]) == (expected, 0.0)
        assert row["hd95_mm"] == pytest.approx(3 * spacing[0])


def test_unknown_spacing_gives_no_mm() -> None:
    rows = score_case(*four_cases(), classes=CLASSES, spacing=None, case="a")
    for row in rows:
        assert np.isnan([row[m] for m in DEFINITIONS if m.endswith("_mm")]).all()
        assert not np.isnan([row[m] for m in DEFINITIONS if not m.endswith("_mm")]).any()


def test_case_errors_name_case_value_and_cure() -> None:
    prediction, reference = four_cases()
    with pytest.raises(ImageError, match=r"p1: the reference holds label 2, but the classes are 0 to 1 \(b, x\)"):
        score_case(np.minimum(prediction, 1), reference, classes=("b", "x"), spacing=None, case="p1")
    with pytest.raises(ImageError, match="p1: the prediction holds label -1"):
        score_case(-prediction.astype(int).clip(0, 1), reference, classes=CLASSES, spacing=None, case="p1")
    with pytest.raises(ImageError, match=r"p1: .*\(4, 6, 8\).*\(3, 6, 8\)"):
        score_case(prediction, reference[1:], classes=CLASSES, spacing=None, case="p1")
    with pytest.raises(ImageError, match="float32"):
        score_case(prediction.astype(np.float32), reference, classes=CLASSES, spacing=None, case="p1")
    with pytest.raises(ConfigError, match="did you mean 'literature'"):
        score_case(prediction, reference, classes=CLASSES, spacing=None, case="p1", convention="literatur")


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(2, 6), st.sampled_from(["uint8", "int16", "int64"]))
def test_dice_per_class_equals_dice_of_the_masks(seed: int, num_classes: int, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    prediction, reference = rng.integers(0, rng.integers(1, num_classes + 1, 2)[:, None, None], (2, 5, 4))
    found = dice_per_class(prediction.astype(dtype), reference.astype(dtype), num_classes)
    expected = [dice(prediction == c, reference == c) for c in range(1, num_classes)]
    assert_allclose(found, expected)


def test_dice_per_class_refuses_labels_out_of_range() -> None:
    labels = np.array([0, 1, 3])
    with pytest.raises(ValueError, match="prediction holds labels outside 0 to 2"):
        dice_per_class(labels, np.minimum(labels, 2), 3)
    with pytest.raises(ValueError, match="reference holds labels outside 0 to 2"):
        dice_per_class(np.minimum(labels, 2), -labels, 3)
    with pytest.raises(ValueError, match="shapes differ"):
        dice_per_class(labels, labels[:2], 4)
