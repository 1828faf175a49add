"""The learning curve: what it shows, that it can be read, and that methods differ without color."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy as np
import pytest
from drawn import overlaps, texts, texts_outside
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from scantly.evaluation import OVERALL, CurvePoint, LearningCurve
from scantly.report.learning_diagram import _figure as figure_of
from scantly.report.learning_diagram import _look as look_of
from scantly.report.learning_diagram import learning_curve_diagram
from scantly.report.plots import INK, METHOD_COLORS

NAMES = ("Supervised", "Mean Teacher", "BCP", "Deep Adversarial Network", "CPS")


def point(labeled: int | str, *values: float) -> CurvePoint:
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return CurvePoint(labeled, float(np.mean(values)), std, tuple(range(len(values))), values)  # type: ignore[arg-type]


def curve_of(
    points: dict[str, list[CurvePoint]], bound: CurvePoint | None = None, metric: str = "dice"
) -> LearningCurve:
    frozen = {method: tuple(members) for method, members in points.items()}
    return LearningCurve(metric, OVERALL, frozen, bound, "Supervised" if bound else "")


TWO = curve_of(
    {
        "Supervised": [point(3, 0.5, 0.6, 0.55), point(7, 0.7, 0.72, 0.69), point(14, 0.8, 0.79, 0.81)],
        "Mean Teacher": [point(3, 0.6, 0.7), point(14, 0.82)],
    },
    point("all", 0.9, 0.91, 0.92),
)


def many(k: int, counts: tuple[int, ...] = (3, 7, 14), seeds: int = 3) -> LearningCurve:
    rng = np.random.default_rng(k)
    names = [f"{NAMES[index % len(NAMES)]} {index}" for index in range(k)]
    points = {name: [point(c, *rng.normal(0.8 - 0.3 / c, 0.02, seeds)) for c in counts] for name in names}
    return curve_of(points, point("all", 0.88, 0.9))


def lines_of(figure: Figure, number: int) -> list[Line2D]:
    """All lines in a method's color on the axes, error bars' caps among them."""
    return [line for line in figure.axes[1].lines if to_hex(line.get_color()) == METHOD_COLORS[number]]


def test_shows_means_spreads_seeds_and_bound() -> None:
    figure = figure_of(TWO, "patient")
    axes = figure.axes[1]
    curve, *_ = lines_of(figure, 0)
    np.testing.assert_allclose(curve.get_ydata(), [0.55, 0.7033333, 0.8])
    spreads = [segment for bars in axes.collections for segment in bars.get_segments() if len(segment)]
    known = [segment for segment in spreads if np.isfinite(segment).all()]
    half = [np.ptp(segment[:, 1]) / 2 for segment in known]
    np.testing.assert_allclose(half, [*(p.std for p in TWO.points["Supervised"]), TWO.points["Mean Teacher"][0].std])
    seeds = [sorted(line.get_ydata()) for line in lines_of(figure, 0) if line.get_markersize() == 2.6]
    assert seeds == [sorted(p.values) for p in TWO.points["Supervised"]]
    bound = [line for line in axes.lines if to_hex(line.get_color()) == INK]
    assert [line.get_ydata()[0] for line in bound] == [pytest.approx(0.91)]
    assert bound[0].get_linestyle() == "--"
    (band,) = axes.patches
    assert (band.get_y(), band.get_height()) == pytest.approx((0.9, 0.02))
    assert {"labeled patients", "Dice", "3", "7", "14"} <= set(texts(figure))


def test_a_seed_alone_has_no_spread_and_no_point_of_its_own() -> None:
    figure = figure_of(curve_of({"M": [point(3, 0.5)]}, point("all", 0.9)), "subject")
    assert [line.get_ydata().tolist() for line in lines_of(figure, 0) if line.get_marker() == "o"] == [[0.5]]
    assert not figure.axes[1].patches


def test_counts_stand_on_a_logarithmic_axis_in_order() -> None:
    figure = figure_of(many(4, (1, 2, 4, 16)), "subject")
    ticks = figure.axes[1].get_xticks()
    np.testing.assert_allclose(np.diff(ticks), np.array([1, 1, 2]) * (ticks[1] - ticks[0]))
    for number in range(4):
        xs = lines_of(figure, number)[0].get_xdata()
        assert np.abs(xs - ticks).max() < 0.5 * (ticks[1] - ticks[0])  # beside its own count, not another one


def test_description_holds_the_numbers() -> None:
    plot = learning_curve_diagram(TWO, unit="patient")
    assert (plot.subject, plot.title) == ("dice", "Dice, mean over classes, by labeled patients")
    assert plot.description == (
        "Mean ± standard deviation over seeds. Supervised: 3 labeled 0.55 ± 0.05 (3 seeds), 7 labeled 0.703 ± 0.015 "
        "(3 seeds), 14 labeled 0.8 ± 0.01 (3 seeds); Mean Teacher: 3 labeled 0.65 ± 0.071 (2 seeds), 14 labeled 0.82; "
        "Supervised, all labeled 0.91 ± 0.01 (3 seeds)."
    )


def test_says_where_lower_is_better() -> None:
    curve = curve_of({"M": [point(3, 5.0, 6.0)]}, metric="hd95_mm")
    assert "HD95 (mm), lower is better" in texts(figure_of(curve, "subject"))
    assert learning_curve_diagram(curve).title == "HD95 (mm), mean over classes, by labeled subjects"


def test_is_drawn_in_the_page_colors_and_leaves_matplotlib_alone() -> None:
    before = dict(matplotlib.rcParams)
    svg = learning_curve_diagram(TWO).svg
    assert dict(matplotlib.rcParams) == before
    ElementTree.fromstring(svg)
    assert "currentColor" in svg
    assert {"var(--c0)", "var(--c1)"} <= set(re.findall(r"var\(--c\d\)", svg))
    assert "#0b0b" not in svg
    assert svg == learning_curve_diagram(TWO).svg


def test_ids_differ_by_salt() -> None:
    text = "".join(learning_curve_diagram(TWO, salt=salt).svg for salt in ("clean", "literature"))
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', text)) <= set(ids)


def test_names_are_text_not_formulas_or_markup() -> None:
    svg = learning_curve_diagram(curve_of({"$x_1$ <b>": [point(3, 0.5)], "$y$": [point(3, 0.6)]})).svg
    assert "$x_1$ &lt;b&gt;" in svg
    assert "$y$" in svg


@pytest.mark.parametrize("k", [1, 2, 5, 9, 25])
def test_everything_can_be_read(k: int) -> None:
    figure = figure_of(many(k), "subject")
    assert texts_outside(figure) == []
    assert overlaps(figure) == []
    assert figure.get_figwidth() < 5.3


@pytest.mark.parametrize(
    "counts", [(7,), (7, 8), (1, 2, 3, 4, 5, 10, 20, 70), (100, 101, 103, 200), (10, 11, 12, 13, 99)]
)
def test_close_counts_do_not_run_into_each_other(counts: tuple[int, ...]) -> None:
    figure = figure_of(many(3, counts, seeds=1), "subject")
    shown = [int(text) for text in texts(figure) if text.strip().isdigit()]
    assert {counts[0], counts[-1]} <= set(shown) <= set(counts)
    assert set(shown) == set(counts) or counts[0] >= 10
    assert overlaps(figure) == []
    assert texts_outside(figure) == []


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.5, 0.9], ["0.5", "0.6", "0.7", "0.8", "0.9"]),
        ([0.80, 0.84], ["0.80", "0.81", "0.82", "0.83", "0.84"]),
        ([0.0, 120.0], ["0", "20", "40", "60", "80", "100", "120"]),
    ],
)
def test_values_have_the_decimals_that_they_need(values: list[float], expected: list[str]) -> None:
    figure = figure_of(curve_of({"M": [point(3, values[0]), point(7, values[1])]}), "subject")
    assert [text.get_text() for text in figure.axes[1].get_yticklabels()] == expected
    np.testing.assert_allclose(figure.axes[1].get_yticks(), [float(text) for text in expected], atol=1e-12)
    assert texts_outside(figure) == []


def test_all_that_is_drawn_is_in_sight() -> None:
    figure = figure_of(many(25), "subject")
    axes = figure.axes[1]
    for line in axes.lines:
        assert axes.get_ylim()[0] < min(line.get_ydata()) <= max(line.get_ydata()) < axes.get_ylim()[1]
        if len(line.get_xdata()) > 1 and to_hex(line.get_color()) != INK:
            assert axes.get_xlim()[0] < min(line.get_xdata()) <= max(line.get_xdata()) < axes.get_xlim()[1]


def test_no_two_methods_look_alike() -> None:
    looks = {(look["color"], str(look["linestyle"]), look["marker"]) for look in map(look_of, range(25))}
    assert len(looks) == 25
    without_color = {(str(look["linestyle"]), look["marker"]) for look in map(look_of, range(25))}
    assert len(without_color) == 25


def test_labels_are_in_the_order_of_the_last_points() -> None:
    curve = curve_of({"low": [point(3, 0.5)], "high": [point(3, 0.9)], "close": [point(3, 0.89)]}, point("all", 0.95))
    names = {text.get_text(): text.get_position()[1] for text in figure_of(curve, "subject").axes[0].texts}
    assert sorted(names, key=names.__getitem__) == ["Supervised,\nall\u00a0labeled", "high", "close", "low"]


def test_a_curve_without_points() -> None:
    plot = learning_curve_diagram(curve_of({"M": []}))
    ElementTree.fromstring(plot.svg)
    assert plot.description == "no values"
    bound_only = learning_curve_diagram(curve_of({}, point("all", 0.9)))
    assert bound_only.description == "Mean ± standard deviation over seeds. Supervised, all labeled 0.9."
