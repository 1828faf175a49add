"""The learning curve: a metric by the number of labeled subjects, one line per method, and the upper bound.

Every name stands beside its curve, so that no legend is needed; markers and line patterns, not colors alone, tell
methods apart. The width is about 4.5 inches, at which the text is as large on a phone as that of the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scantly.evaluation import DEFINITIONS, CurvePoint, LearningCurve
from scantly.report.canvas import LINE, PAD, SIZE, in_unit, inch_canvas, text_width, wrapped, write
from scantly.report.plots import COLORS, DASHES, INK, METHOD_COLORS, Plot, style_axes, svg_element

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["learning_curve_diagram"]

_MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # seven: with eight colors no pair recurs before 56 methods
_BOUND_DASH = (0, (5.0, 2.5))
_WIDTH, _LEAST_HEIGHT = 2.3, 2.3  # inches of the axes
_TOP, _BEFORE = 0.12, 0.34  # inches above the axes, and before them beside the text of the values
_BELOW = 0.5  # inches for the labeled counts and their title
_BESIDE = 0.42  # of the step from method to method: where single seeds stand
_FEW = 8  # methods up to which error bars and seeds are drawn in full
_LEADER, _KEY = 0.24, 0.32  # inches for the line to a label, and for the piece of curve before its text


def learning_curve_diagram(curve: LearningCurve, *, unit: str = "subject", salt: str = "") -> Plot:
    """One metric by the number of labeled subjects, on a logarithmic axis, for each method.

    Markers are means over seeds, error bars their standard deviation, small points single seeds; methods stand side by
    side at each count. The dashed line is the upper bound, the band its standard deviation over seeds.

    Args:
        curve: Of any number of methods. Names stay apart for 25; curves can be followed for about ten, and from nine on
            spreads and seeds are drawn faintly.
        unit: What is labeled, in the singular.
        salt: Added to the ids inside the SVG; needed where a page shows one metric and class twice.

    Returns:
        The plot. Its subject is the metric; its description holds all numbers.
    """
    figure = _figure(curve, unit)
    definition = DEFINITIONS[curve.metric]
    title = f"{definition.title}{in_unit(curve.metric)}, {curve.class_name}, by labeled {unit}s"
    return Plot(curve.metric, title, _curve_in_words(curve), svg_element(figure, f"{salt} {title}"))


@dataclass(frozen=True)
class _Layout:
    """The methods of a learning curve and their places, in the axes' units and in inches from the top left."""

    methods: dict[str, tuple[CurvePoint, ...]]
    names: tuple[str, ...]
    step: float
    x_limits: tuple[float, float]
    y_limits: tuple[float, float]
    height: float
    counts: tuple[str, ...]
    values: dict[float, str]

    @classmethod
    def of(cls, curve: LearningCurve) -> _Layout:
        """Lay out; methods without a point are left out."""
        methods = {method: points for method, points in curve.points.items() if points}
        names = [wrapped(method) for method in methods]
        if curve.upper_bound is not None:
            names.append(wrapped(f"{curve.upper_bound_method}, all\u00a0labeled"))
        places = np.log2(curve.counts or (1,))
        span = float(np.ptp(places)) or 1.0
        gap = float(np.diff(places).min()) if len(places) > 1 else 1.0
        share = 0.6 if len(methods) <= _FEW else 0.4  # of the gap between two counts that all methods together take
        step = min(0.06 * span, share * gap / max(1, len(methods)))
        margin = step * len(methods) / 2 + (0.04 if len(places) > 1 else 0.5) * span
        limits = float(places[0]) - margin, float(places[-1]) + margin
        y_limits = _value_limits(curve)
        return cls(
            methods=methods,
            names=tuple(names),
            step=step,
            x_limits=limits,
            y_limits=y_limits,
            height=max(_LEAST_HEIGHT, sum(_label_heights(names))),
            counts=_count_ticks(curve.counts, _WIDTH / (limits[1] - limits[0])),
            values=_value_ticks(y_limits),
        )

    @property
    def left(self) -> float:
        """Inches for the values and their title."""
        return _BEFORE + max((text_width(text) for text in self.values.values()), default=0.0)

    @property
    def right(self) -> float:
        """Right end of the axes, in inches."""
        return self.left + _WIDTH

    @property
    def below(self) -> float:
        """Inches for the labeled counts and their title."""
        return _BELOW + (LINE if any("\n" in text for text in self.counts) else 0.0)

    def x(self, number: int, labeled: int) -> float:
        """Place of a method at a labeled count: methods stand side by side."""
        return float(np.log2(labeled)) + (number - (len(self.methods) - 1) / 2) * self.step

    def inches(self, x: float, y: float) -> tuple[float, float]:
        """From the axes' units to inches from the figure's top left."""
        across = (x - self.x_limits[0]) / (self.x_limits[1] - self.x_limits[0])
        down = (self.y_limits[1] - y) / (self.y_limits[1] - self.y_limits[0])
        return self.left + _WIDTH * across, _TOP + self.height * down


def _figure(curve: LearningCurve, unit: str) -> Figure:
    layout = _Layout.of(curve)
    text = layout.right + _LEADER + _KEY + PAD
    full_width = text + max((text_width(name) for name in layout.names), default=0.0) + PAD
    full_height = _TOP + layout.height + layout.below
    figure, canvas = inch_canvas(full_width, full_height)
    axes = figure.add_axes(
        (layout.left / full_width, layout.below / full_height, _WIDTH / full_width, layout.height / full_height)
    )
    axes.set_xlim(*layout.x_limits)
    axes.set_ylim(*layout.y_limits)
    axes.set_xticks(np.log2(curve.counts) if curve.counts else [], layout.counts)
    axes.set_yticks(list(layout.values), list(layout.values.values()))
    _label_axes(axes, curve.metric, unit)
    if curve.upper_bound is not None:
        _draw_bound(axes, curve.upper_bound)
    for number, points in enumerate(layout.methods.values()):
        _draw_method(axes, layout, number, points)
    _label_curves(canvas, layout, curve.upper_bound)
    return figure


def _count_ticks(counts: Sequence[int], inch: float) -> tuple[str, ...]:
    """Labeled counts as text, given the inches of a doubling.

    What has no room beside its neighbor goes to a second line, and what has none there either is left out.
    """
    ticks = []
    ends = [-np.inf, -np.inf]  # of both lines, in inches
    for count in counts:
        place, half = float(np.log2(count)) * inch, 0.045 * len(str(count))
        line = next((line for line in (0, 1) if ends[line] + 0.05 < place - half), None)
        if line is not None:
            ends[line] = place + half
        ticks.append("" if line is None else "\n" * line + str(count))
    return tuple(ticks)


def _value_ticks(limits: tuple[float, float]) -> dict[float, str]:
    """Round values between the limits, each with as many decimals as the steps need."""
    from matplotlib.ticker import MaxNLocator

    values = MaxNLocator(nbins=7, steps=[1, 2, 5, 10]).tick_values(*limits)
    decimals = max(0, -int(np.floor(np.log10(values[1] - values[0]) + 1e-9)))
    return {float(value): f"{value:.{decimals}f}" for value in values if limits[0] <= value <= limits[1]}


def _label_axes(axes: Axes, metric: str, unit: str) -> None:
    style_axes(axes)
    axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
    axes.set_xlabel(f"labeled {unit}s", fontsize=SIZE, color=INK, labelpad=2)
    definition = DEFINITIONS[metric]
    direction = "" if definition.higher_is_better else ", lower is better"
    axes.set_ylabel(f"{definition.title}{in_unit(metric)}{direction}", fontsize=SIZE, color=INK, labelpad=4)


def _draw_bound(axes: Axes, bound: CurvePoint) -> None:
    axes.axhline(bound.mean, color=INK, linewidth=1.1, linestyle=_BOUND_DASH)
    if bound.std:
        axes.axhspan(bound.mean - bound.std, bound.mean + bound.std, color=INK, alpha=0.1, linewidth=0)


def _draw_method(axes: Axes, layout: _Layout, number: int, points: Sequence[CurvePoint]) -> None:
    look = _look(number)
    color = look["color"]
    strength = 1.0 if len(layout.methods) <= _FEW else 0.4  # of what would hide other curves
    x = np.array([layout.x(number, int(point.labeled)) for point in points])
    means = np.array([point.mean for point in points])
    axes.plot(x, means, linewidth=1.3, markersize=5, markeredgewidth=0, **look)
    spreads = np.array([np.nan if point.std is None else point.std for point in points])
    axes.errorbar(x, means, yerr=spreads, fmt="none", ecolor=color, elinewidth=1, capsize=2, capthick=1, alpha=strength)
    for place, point in zip(x + _BESIDE * layout.step, points, strict=True):
        if len(point.values) > 1:
            seeds = np.full(len(point.values), place)
            axes.plot(seeds, point.values, "o", color=color, markersize=2.6, markeredgewidth=0, alpha=0.6 * strength)


def _label_curves(canvas: Axes, layout: _Layout, bound: CurvePoint | None) -> None:
    """Every name at the right, at the height of its last point as far as others leave room, with a line to it."""
    ends = [
        layout.inches(layout.x(number, int(points[-1].labeled)), points[-1].mean)
        for number, points in enumerate(layout.methods.values())
    ]
    looks = [_look(number) for number in range(len(ends))]
    if bound is not None:
        ends.append(layout.inches(layout.x_limits[1], bound.mean))
        looks.append({"color": INK, "linestyle": _BOUND_DASH, "marker": ""})
    heights = _label_heights(layout.names)
    key = layout.right + _LEADER
    places = _spread([y for _, y in ends], heights, layout.height)
    for (x_end, y_end), look, name, y in zip(ends, looks, layout.names, places, strict=True):
        canvas.plot(
            [x_end, layout.right + 0.04, key], [y_end, y_end, y], color=look["color"], linewidth=0.6, alpha=0.55
        )
        canvas.plot(
            [key, key + _KEY / 2, key + _KEY],
            [y] * 3,
            linewidth=1.3,
            markersize=5,
            markeredgewidth=0,
            markevery=[1],
            **look,
        )
        write(canvas, key + _KEY + PAD, y, name, align="left")


def _spread(ends: Sequence[float], heights: Sequence[float], room: float) -> NDArray[np.float64]:
    """Middles of labels: as near to the ends of their curves as they can be without overlap (least squares).

    Args:
        ends: Where the labels would be, in inches from the top.
        heights: Of the labels.
        room: Height of the axes, at least the sum of ``heights``.
    """
    from scipy.optimize import isotonic_regression

    if not ends:
        return np.zeros(0)
    wanted = np.array(ends)
    order = np.argsort(wanted, kind="stable")
    space = np.array(heights)[order]
    offsets = np.concatenate([[0.0], np.cumsum((space[:-1] + space[1:]) / 2)])
    free = isotonic_regression(wanted[order] - offsets).x
    highest = _TOP + space[0] / 2
    lowest = _TOP + room - space[-1] / 2 - offsets[-1]
    places = np.empty(len(ends))
    places[order] = np.clip(free, highest, max(highest, lowest)) + offsets
    return places


def _value_limits(curve: LearningCurve) -> tuple[float, float]:
    points = [point for members in curve.points.values() for point in members]
    points += [] if curve.upper_bound is None else [curve.upper_bound]
    if not points:
        return 0.0, 1.0
    reach = [point.mean + sign * (point.std or 0.0) for point in points for sign in (-1, 1)]
    reach += [value for point in points for value in point.values]
    low, high = min(reach), max(reach)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.05
    return low - margin, high + margin


def _look(number: int) -> dict[str, Any]:
    dash = tuple(float(length) / 1.4 for length in DASHES[number % len(DASHES)].split())
    return {
        "color": METHOD_COLORS[number % COLORS],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": (0, dash) if dash else "-",
    }


def _curve_in_words(curve: LearningCurve) -> str:
    said = [
        f"{method}: " + ", ".join(f"{point.labeled} labeled {_mean_in_words(point)}" for point in points)
        for method, points in curve.points.items()
        if points
    ]
    if curve.upper_bound is not None:
        said.append(f"{curve.upper_bound_method}, all labeled {_mean_in_words(curve.upper_bound)}")
    return f"Mean ± standard deviation over seeds. {'; '.join(said)}." if said else "no values"


def _mean_in_words(point: CurvePoint) -> str:
    return (
        f"{point.mean:.3g}" if point.std is None else f"{point.mean:.3g} ± {point.std:.2g} ({len(point.seeds)} seeds)"
    )


def _label_heights(names: Sequence[str]) -> list[float]:
    return [LINE * (name.count("\n") + 1) + 0.03 for name in names]
