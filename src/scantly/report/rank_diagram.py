"""The critical-difference diagram: average ranks of methods, and which of them cannot be told apart.

Every name stands beside what it names, so that no legend is needed, and nothing depends on colors. The width is about
4.5 inches, at which the text is as large on a phone as that of the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from scantly.evaluation import DEFINITIONS, Ranking
from scantly.report.canvas import LINE, PAD, SMALL, Align, in_unit, inch_canvas, text_width, wrapped, write
from scantly.report.plots import INK, METHOD_COLORS, Plot, svg_element

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["critical_difference_diagram"]

_AXIS, _LONG_AXIS = 2.0, 2.4  # inches from the lowest to the highest rank, for few and for many methods
_MANY = 12
_AXIS_HEIGHT = 0.62  # inches from the top
_NUMBER, _LEAST_LEAD = 0.34, 0.1  # inches for a method's average rank; of any line beyond the axis
_BESIDE = 0.5  # inches for the words at the ends of the axis
_BAR_STEP = 0.085  # inches from bar to bar
_OVERHANG = 0.045  # inches of a bar beyond the ranks that it joins
_BAR_GAP = 0.16  # inches between the ranks of two bars at one height
_SMALLEST_P = 0.001


def critical_difference_diagram(ranking: Ranking, *, unit: str = "case", salt: str = "") -> Plot:
    """Critical-difference diagram (Demšar, JMLR 7, 2006, figure 1) of average ranks.

    The axis holds the ranks, the best at the left (in the paper: at the right). Methods hang from it, the better half
    at the left, each with its average rank. Bars join the methods that do not differ at the level of the ranking; the
    bar above the axis has the length of the critical difference, and is cut where it is longer than the axis.

    Args:
        ranking: Two methods or more; drawn for up to 25.
        unit: What was ranked, in the singular.
        salt: Added to the ids inside the SVG; needed where a page shows one metric twice.

    Returns:
        The plot. Its subject is the metric; its description holds all numbers, and each group of methods by its best
        and its worst one.
    """
    figure = _figure(ranking, unit)
    definition = DEFINITIONS[ranking.metric]
    title = f"Average ranks in {definition.title}{in_unit(ranking.metric)}"
    return Plot(ranking.metric, title, _ranks_in_words(ranking, unit), svg_element(figure, f"{salt} {title}"))


@dataclass(frozen=True)
class _Layout:
    """Places in a critical-difference diagram, in inches from the top left.

    Attributes:
        width: Of the figure.
        height: Of the figure.
        left: Left end of the axis.
        right: Right end of the axis.
        low: Rank at the left end.
        high: Rank at the right end.
        leads: How far the lines of the left and of the right methods go beyond the axis, for their ranks.
        levels: Row of each clique's bar, counted from the axis.
        rows: Height of each method's line.
        bottom: Where the last row ends.
    """

    width: float
    height: float
    left: float
    right: float
    low: int
    high: int
    leads: tuple[float, float]
    levels: tuple[int, ...]
    rows: tuple[float, ...]
    bottom: float

    def x(self, rank: float) -> float:
        """Horizontal place of a rank."""
        return self.left + (self.right - self.left) * (rank - self.low) / (self.high - self.low)


def _layout(ranking: Ranking, names: Sequence[str]) -> _Layout:
    half = _half(ranking)
    best, worst = ranking.ranks[0], ranking.ranks[-1]
    low = max(1, int(np.floor(best)))
    high = max(low + 1, int(np.ceil(worst)))
    axis = _AXIS if len(names) <= _MANY else _LONG_AXIS
    scale = axis / (high - low)
    leads = max(_LEAST_LEAD, _NUMBER - scale * (best - low)), max(_LEAST_LEAD, _NUMBER - scale * (high - worst))
    widths = [max(text_width(name) for name in side) for side in (names[:half], names[half:])]
    left = PAD + max(widths[0] + PAD + leads[0], _BESIDE)
    after = max(leads[1] + PAD + widths[1], _BESIDE) + PAD
    levels = _levels([(ranks[0] * scale, ranks[-1] * scale) for ranks in _clique_ranks(ranking)])
    top = _AXIS_HEIGHT + 0.19 + _BAR_STEP * (max(levels, default=-1) + 1)
    at_left, left_end = _rows(names[:half], top)
    at_right, right_end = _rows(names[half:][::-1], top)  # the extremes on top, so that no lines cross
    bottom = max(left_end, right_end)
    return _Layout(
        width=left + axis + after,
        height=bottom + 0.27,
        left=left,
        right=left + axis,
        low=low,
        high=high,
        leads=leads,
        levels=levels,
        rows=(*at_left, *at_right[::-1]),
        bottom=bottom,
    )


def _rows(names: Sequence[str], top: float) -> tuple[list[float], float]:
    """Heights of the names' middles from ``top`` down, and where the last one ends."""
    spaces = [max(0.215, LINE * (name.count("\n") + 1) + 0.08) for name in names]
    ends = top + np.cumsum(spaces)
    return (ends - np.array(spaces) / 2).tolist(), float(ends[-1])


def _levels(spans: Sequence[tuple[float, float]]) -> tuple[int, ...]:
    """Level of each bar, given its ends in inches: the least on which it keeps clear of those before it."""
    ends: list[float] = []
    levels = []
    for first, last in spans:
        level = next((number for number, end in enumerate(ends) if end + _BAR_GAP < first), len(ends))
        ends[level : level + 1] = [last]
        levels.append(level)
    return tuple(levels)


def _clique_ranks(ranking: Ranking) -> list[list[float]]:
    ranks = dict(zip(ranking.methods, ranking.ranks, strict=True))
    return [[ranks[name] for name in clique] for clique in ranking.cliques]


def _figure(ranking: Ranking, unit: str) -> Figure:
    names = [wrapped(name) for name in ranking.methods]
    layout = _layout(ranking, names)
    figure, canvas = inch_canvas(layout.width, layout.height)
    _draw_axis(canvas, layout)
    _draw_difference(canvas, layout, ranking.critical_difference)
    for level, ranks in zip(layout.levels, _clique_ranks(ranking), strict=True):
        y = _AXIS_HEIGHT + 0.12 + _BAR_STEP * level
        canvas.plot(
            _bar(layout, ranks, ranking.ranks), [y, y], color=METHOD_COLORS[0], linewidth=3.2, solid_capstyle="butt"
        )
    for index, (name, rank, y) in enumerate(zip(names, ranking.ranks, layout.rows, strict=True)):
        at_left = index < _half(ranking)
        outward: Align = "right" if at_left else "left"
        inward: Align = "left" if at_left else "right"
        end = layout.left - layout.leads[0] if at_left else layout.right + layout.leads[1]
        x = layout.x(rank)
        canvas.plot([x, x, end], [_AXIS_HEIGHT, y, y], color=INK, linewidth=0.8, alpha=0.75, solid_joinstyle="miter")
        canvas.plot(x, _AXIS_HEIGHT, "o", color=INK, markersize=4, markeredgewidth=0)
        write(canvas, end + (-PAD if at_left else PAD), y, name, align=outward)
        write(canvas, end, y - 0.02, f"{rank:.2f}", align=inward, vertical="bottom", size=SMALL)
    write(canvas, layout.width / 2, layout.bottom + 0.14, _friedman(ranking, unit), align="center", size=SMALL)
    return figure


def _bar(layout: _Layout, members: Sequence[float], ranks: Sequence[float]) -> list[float]:
    """Ends of a clique's bar: beyond its members, but never as far as the method beside them."""
    first, last = layout.x(members[0]), layout.x(members[-1])
    before = max((layout.x(rank) for rank in ranks if rank < members[0]), default=-np.inf)
    after = min((layout.x(rank) for rank in ranks if rank > members[-1]), default=np.inf)
    return [first - min(_OVERHANG, 0.4 * (first - before)), last + min(_OVERHANG, 0.4 * (after - last))]


def _draw_axis(canvas: Axes, layout: _Layout) -> None:
    canvas.plot([layout.left, layout.right], [_AXIS_HEIGHT] * 2, color=INK, linewidth=1.2, solid_capstyle="butt")
    step = next(step for step in (1, 2, 5, 10, 100) if (layout.high - layout.low) / step <= 12)
    for rank in range(layout.low, layout.high + 1):
        numbered = rank % step == 0
        x = layout.x(rank)
        tick = 0.07 if numbered else 0.04
        canvas.plot([x, x], [_AXIS_HEIGHT - tick, _AXIS_HEIGHT], color=INK, linewidth=0.9)
        if numbered:
            write(canvas, x, _AXIS_HEIGHT - 0.09, str(rank), align="center", vertical="bottom", size=SMALL)
    write(canvas, layout.left - 0.1, _AXIS_HEIGHT, "better", align="right", size=SMALL)
    write(canvas, layout.right + 0.1, _AXIS_HEIGHT, "worse", align="left", size=SMALL)
    write(canvas, layout.width - PAD, 0.12, "average rank", align="right", size=SMALL)


def _draw_difference(canvas: Axes, layout: _Layout, difference: float) -> None:
    cut = layout.low + difference > layout.high
    end = layout.right if cut else layout.x(layout.low + difference)
    canvas.plot([layout.left, end], [0.27, 0.27], color=INK, linewidth=1.6, solid_capstyle="butt")
    for x in [layout.left] if cut else [layout.left, end]:
        canvas.plot([x, x], [0.225, 0.315], color=INK, linewidth=1.2)
    text = f"critical difference {difference:.2f}{' (cut)' if cut else ''}"
    write(canvas, layout.left, 0.12, text, align="left", size=SMALL)


def _half(ranking: Ranking) -> int:
    return (len(ranking.methods) + 1) // 2


def _friedman(ranking: Ranking, unit: str) -> str:
    p = f"p < {_SMALLEST_P}" if ranking.p < _SMALLEST_P else f"p = {ranking.p:.3f}"
    shown = "" if ranking.p <= ranking.alpha else ", no difference shown"
    left_out = f", {ranking.excluded} left out" if ranking.excluded else ""
    return f"Friedman {p}{shown}; {ranking.n} {unit}{'' if ranking.n == 1 else 's'}{left_out}"


def _ranks_in_words(ranking: Ranking, unit: str) -> str:
    ranks = ", ".join(f"{name} {rank:.2f}" for name, rank in zip(ranking.methods, ranking.ranks, strict=True))
    groups = "; ".join(f"{clique[0]} {'and' if len(clique) == 2 else 'to'} {clique[-1]}" for clique in ranking.cliques)
    return (
        f"Average ranks, 1 is best: {ranks}. {_friedman(ranking, unit)}. Critical difference "
        f"{ranking.critical_difference:.2f} at {ranking.alpha:g}. "
        + (f"Not told apart: {groups}." if groups else "All methods differ.")
    )
