"""Example slices: which cases, which slice, and outlines in the right place."""

from __future__ import annotations

import base64
import io
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from scantly import imaging
from scantly.report.groups import collect
from scantly.report.slices import _dice_text as dice_text
from scantly.report.slices import _outline as outline
from scantly.report.slices import examples
from scantly.training.run import Run

MakeRun = Callable[..., Run]


def numbers(path: str) -> np.ndarray:
    return np.array([[float(v) for v in pair.split()] for pair in re.findall(r"[\d.]+ [\d.]+", path)])


def test_best_median_and_worst_case_by_mean_dice(make_run: MakeRun, cohort: Path) -> None:
    run = make_run("a", shift=1)  # the number of pixels grows from case to case, so Dice falls
    shown, missing = examples(collect([run])[0].results[0], "test")
    assert missing == ""
    table = run.evaluation("test")
    assert table is not None
    order = table.groupby("case")["dice"].mean().sort_values(ascending=False).index.tolist()
    assert [(example.rank, example.case) for example in shown] == [
        ("best", order[0]),
        ("median", order[1]),
        ("worst", order[3]),
    ]
    for example in shown:
        label = imaging.read_label(cohort / "labelsTs" / f"{example.case}.nii.gz").array
        assert example.slice == 1 + int((label > 0).sum(axis=(1, 2)).argmax())
        mean = table[table["case"] == example.case]["dice"].mean()
        assert example.dice.startswith(f"Dice {mean:.3f}: RV ")


def test_prediction_outline_is_the_reference_moved(make_run: MakeRun) -> None:
    run = make_run("a", shift=2)
    (best, *_), _ = examples(collect([run])[0].results[0], "test")
    moved = 150 / 48 * (2 + int(best.case[-1]) - 4)  # mm per pixel times pixels of this case
    for line in best.outlines:
        offset = numbers(line.prediction).mean(axis=0) - numbers(line.reference).mean(axis=0)
        np.testing.assert_allclose(offset, [moved, 0], atol=0.02)


def test_picture_is_the_scan_and_has_the_size_of_the_outlines(make_run: MakeRun) -> None:
    (best, *_), _ = examples(collect([make_run("a")])[0].results[0], "test")
    data = base64.b64decode(best.image.removeprefix("data:image/png;base64,"))
    picture = Image.open(io.BytesIO(data))
    assert picture.mode == "L"
    assert picture.size == best.pixels
    assert best.size == pytest.approx((best.pixels[0] * 150 / 48, best.pixels[1] * 150 / 40))
    points = np.concatenate([numbers(line.reference + line.prediction) for line in best.outlines])
    assert (points >= 0).all()
    assert (points <= best.size).all()


def test_missed_structure_is_said(make_run: MakeRun) -> None:
    run = make_run("a", lose="subject006", shift=1)
    shown, _ = examples(collect([run])[0].results[0], "test")
    assert "RV 0.00 (missed)" in {example.case: example.dice for example in shown}["subject006"]


def test_single_case_is_best_median_and_worst(make_run: MakeRun) -> None:
    run = make_run("a", settings={"split": {"test": ["subject005"]}})
    shown, _ = examples(collect([run])[0].results[0], "test")
    assert [example.rank for example in shown] == ["best and median and worst"]


def test_moved_dataset_or_predictions_are_said_not_raised(make_run: MakeRun) -> None:
    run = make_run("a")
    (result,) = collect([run])[0].results
    shutil.rmtree(run.folder / "predictions")
    shown, missing = examples(result, "test")
    assert shown == []
    assert "has no prediction of it; run scantly evaluate again" in missing
    moved = make_run("b", settings={"data": {"dataset": "/nowhere/cohort"}})
    shown, missing = examples(collect([moved])[0].results[0], "test")
    assert shown == []
    assert missing.startswith("The scans of b cannot be shown: /nowhere/cohort")


def test_a_case_that_cannot_be_shown_does_not_hide_the_others(make_run: MakeRun) -> None:
    run = make_run("a", shift=1)
    (result,) = collect([run])[0].results
    best = examples(result, "test")[0][0].case
    (run.predictions("test") / f"{best}.nii.gz").unlink()
    shown, missing = examples(result, "test")
    assert [example.rank for example in shown] == ["median", "worst"]
    assert missing.startswith(f"{best} of a cannot be shown: ")


def test_outline_of_a_pixel_surrounds_its_center() -> None:
    mask = np.zeros((4, 5), bool)
    mask[1, 2] = True
    path = outline(mask, (2.0, 3.0))
    points = numbers(path)
    assert path.startswith("M")
    assert path.endswith("Z")
    np.testing.assert_allclose(points.mean(axis=0), [2.5 * 3, 1.5 * 2])
    np.testing.assert_allclose(points.min(axis=0), [2.0 * 3, 1.0 * 2])
    np.testing.assert_allclose(points.max(axis=0), [3.0 * 3, 2.0 * 2])


def test_outline_has_one_line_per_part_and_hole_and_closes_at_the_border() -> None:
    mask = np.zeros((9, 9), bool)
    mask[0:5, 0:5] = True
    mask[2, 2] = False
    mask[7, 7] = True
    path = outline(mask, (1.0, 1.0))
    assert path.count("M") == path.count("Z") == 3
    assert numbers(path).min() == 0
    assert outline(np.zeros((3, 3), bool), (1.0, 1.0)) == ""


@pytest.mark.parametrize(("value", "text"), [(np.nan, "LV – (in neither)"), (0.0, "LV 0.00 (in neither)")])
def test_a_class_in_neither_mask_is_told(value: float, text: str) -> None:
    """Its Dice is no number in clean, and 0 in literature, where nothing was missed."""
    rows = [("a", "RV", "scored", 0.5), ("a", "MYO", "missed", 0.0), ("a", "LV", "both_empty", value)]
    table = pd.DataFrame(rows, columns=["case", "class", "status", "dice"])
    told = dice_text(SimpleNamespace(table=table), "a")
    assert told.endswith(f"RV 0.50, MYO 0.00 (missed), {text}")
