from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from medpy.metric import binary

from scantly.evaluation import dice_per_class, score_case

pytestmark = pytest.mark.real


def read(path: Path) -> tuple[np.ndarray, tuple[float, ...]]:
    image = nib.load(path)
    return np.asarray(image.dataobj).T, tuple(float(s) for s in image.header.get_zooms()[::-1])


def shifted(labels: np.ndarray, steps: tuple[int, int, int]) -> np.ndarray:
    """A prediction with real anatomy: the reference moved, with a part removed."""
    moved = np.roll(labels, steps, axis=(0, 1, 2))
    moved[: labels.shape[0] // 4] = 0
    return moved


@pytest.mark.parametrize(
    ("dataset", "classes"),
    [("acdc_mini", ("background", "RV", "Myo", "LV")), ("la_mini", ("background", "LA"))],
)
@pytest.mark.parametrize("steps", [(0, 2, -1), (1, -5, 3)])
def test_equal_to_medpy_on_real_anatomy(
    real_data: Path, dataset: str, classes: tuple[str, ...], steps: tuple[int, int, int]
) -> None:
    paths = sorted((real_data / dataset / "labelsTr").glob("*.nii.gz"))[::3]
    assert paths
    for path in paths:
        reference, spacing = read(path)
        prediction = shifted(reference, steps)
        rows = score_case(prediction, reference, classes=classes, spacing=spacing, case=path.name)
        assert [row["status"] for row in rows] == ["scored"] * (len(classes) - 1)
        dice = dice_per_class(prediction, reference, len(classes))
        for value, row in enumerate(rows, start=1):
            masks = prediction == value, reference == value
            assert row["dice"] == pytest.approx(binary.dc(*masks), abs=1e-6)
            assert row["dice"] == pytest.approx(dice[value - 1], abs=1e-12)
            assert row["jaccard"] == pytest.approx(binary.jc(*masks), abs=1e-6)
            for name in ("hd95", "asd", "assd"):
                measure = getattr(binary, name)
                assert row[f"{name}_voxels"] == pytest.approx(measure(*masks), abs=1e-6)
                assert row[f"{name}_mm"] == pytest.approx(measure(*masks, spacing), abs=1e-6)


def test_two_patients_against_each_other(real_data: Path) -> None:
    paths = sorted((real_data / "acdc_mini" / "labelsTr").glob("*frame01.nii.gz"))
    for first, second in pairwise(paths):
        a, b = read(first)[0], read(second)[0]
        slices = min(len(a), len(b))
        a, b = a[:slices], b[:slices]
        rows = score_case(a, b, classes=("background", "RV", "Myo", "LV"), spacing=None, case=first.name)
        for value, row in enumerate(rows, start=1):
            assert row["hd95_voxels"] == pytest.approx(binary.hd95(a == value, b == value), abs=1e-6)
            assert row["asd_voxels"] == pytest.approx(binary.asd(a == value, b == value), abs=1e-6)
