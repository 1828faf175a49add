"""Learning curves by the number of labeled subjects."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from scantly.errors import ConfigError, RunError
from scantly.evaluation import DEFINITIONS, OVERALL, CurvePoint, ScoredRun, learning_curve, make_table, summarize_runs


def run_of(method: str, labeled: int | str, seed: int, *dice: float, spread: float = 0.1) -> ScoredRun:
    """Two classes, the second with a Dice greater by ``spread``."""
    rows = [
        {"case": f"c{index}", "class": name, "status": "scored", **dict.fromkeys(DEFINITIONS, value + more)}
        for index, value in enumerate(dice)
        for name, more in (("x", 0.0), ("y", spread))
    ]
    return ScoredRun(method, labeled, seed, make_table(rows))  # type: ignore[arg-type]


RUNS = [
    run_of("Mean Teacher", 14, 2, 0.6, 0.8),
    run_of("Supervised", "all", 1, 0.9, 0.9),
    run_of("Supervised", 3, 1, 0.2, 0.4),
    run_of("Mean Teacher", 3, 1, 0.5, 0.5),
    run_of("Mean Teacher", 14, 1, 0.8, 0.8),
    run_of("Supervised", "all", 2, 0.8, 0.8),
]


def test_curve_worked_by_hand() -> None:
    curve = learning_curve(RUNS, class_name="x")
    assert (curve.metric, curve.class_name, curve.counts) == ("dice", "x", (3, 14))
    assert list(curve.points) == ["Mean Teacher", "Supervised"]
    few, many = curve.points["Mean Teacher"]
    assert few == CurvePoint(3, 0.5, None, (1,), (0.5,))
    assert (many.labeled, many.seeds) == (14, (1, 2))
    assert many.values == pytest.approx((0.8, 0.7))
    assert (many.mean, many.std) == pytest.approx((0.75, 0.1 / 2**0.5))
    assert [point.labeled for point in curve.points["Supervised"]] == [3]
    assert curve.upper_bound is not None
    assert (curve.upper_bound.labeled, curve.upper_bound_method) == ("all", "Supervised")
    assert (curve.upper_bound.mean, curve.upper_bound.std) == pytest.approx((0.85, 0.1 / 2**0.5))


def test_curve_over_classes_holds_the_numbers_of_the_summary() -> None:
    curve = learning_curve(RUNS)
    summary = summarize_runs(RUNS, metrics=("dice",))
    summary = summary[summary["class"] == OVERALL]
    expected = summary[["method", "labeled", "mean", "std_over_seeds", "seeds"]].sort_values(["method", "mean"])
    got = curve.table().sort_values(["method", "mean"])
    pd.testing.assert_frame_equal(got.reset_index(drop=True), expected.reset_index(drop=True))
    assert got["mean"].tolist() == pytest.approx([0.55, 0.8, 0.35, 0.9])
    assert curve.table()["labeled"].tolist() == [3, 14, 3, "all"]


def test_curve_groups_subjects() -> None:
    curve = learning_curve(
        [run_of("M", 3, 1, 0.0, 0.2, 0.5)], class_name="x", metric="jaccard", groups={"c0": "p", "c1": "p"}
    )
    assert curve.points["M"][0].mean == pytest.approx(0.3)  # 0.1 and 0.5
    assert (curve.upper_bound, curve.upper_bound_method, curve.metric) == (None, "", "jaccard")


def test_points_without_a_value_are_left_out() -> None:
    runs = [
        run_of("M", 3, 1, np.nan, np.nan),
        run_of("M", 7, 1, 0.5, np.nan),
        run_of("M", 7, 2, np.nan, np.nan),
        run_of("S", "all", 1, np.nan, np.nan),
    ]
    curve = learning_curve(runs, class_name="x")
    assert curve.points == {"M": (CurvePoint(7, 0.5, None, (1,), (0.5,)),)}
    assert (curve.upper_bound, curve.upper_bound_method) == (None, "")


def test_curves_that_cannot_be_made() -> None:
    with pytest.raises(RunError, match="Supervised and Mean Teacher were trained with all labels"):
        learning_curve([*RUNS[1:], run_of("Mean Teacher", "all", 1, 0.5, 0.5)])
    with pytest.raises(ConfigError, match="unknown class 'z'"):
        learning_curve(RUNS, class_name="z")
    with pytest.raises(ConfigError, match="unknown metric"):
        learning_curve(RUNS, metric="dices")
    with pytest.raises(RunError, match=r"c2 \(in M with 3 labeled, seed 1, not in "):
        learning_curve([*RUNS, run_of("M", 3, 1, 0.1, 0.2, 0.3)])
