"""Drawing in inches: a canvas over a whole figure, and text of known size on it."""

from __future__ import annotations

import re
import textwrap
from typing import TYPE_CHECKING, Literal

from scantly.evaluation import DEFINITIONS
from scantly.report.plots import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["LINE", "PAD", "SIZE", "SMALL", "Align", "in_unit", "inch_canvas", "text_width", "wrapped", "write"]

SIZE, SMALL = 9.0, 8.0
"""Sizes of text in points: names, and what stands beside them."""

LINE = 0.15
"""Inches from line to line of text."""

PAD = 0.06
"""Inches around text."""

Align = Literal["left", "center", "right"]

_WRAP = 17  # characters of a name per line


def in_unit(metric: str) -> str:
    """The unit of a metric in brackets, as it follows the title; empty for shares from 0 to 1."""
    unit = DEFINITIONS[metric].unit
    return "" if unit == "1" else f" ({unit})"


def wrapped(name: str) -> str:
    r"""A name on as many lines as it needs, broken after spaces, hyphens and underscores where it can be.

    Example:
        >>> wrapped("supervised_planned by Scantly")
        'supervised_\nplanned by\nScantly'
    """
    lines = [""]
    for part in re.split(r"(?<=[ _-])", name):
        if lines[-1] and len(lines[-1] + part.rstrip()) > _WRAP:
            lines.append("")
        lines[-1] += part
    return "\n".join(piece for line in lines for piece in textwrap.wrap(line, _WRAP) or [line])


def text_width(text: str) -> float:
    """Width in inches of the widest line, in the font that matplotlib has, which is wider than most of a page."""
    from matplotlib.textpath import TextPath

    lines = [line.replace("$", "S") for line in text.split("\n")]  # a pair of $ would be read as a formula
    return (
        max(float(TextPath((0, 0), line, size=SIZE).get_extents().x1) if line.strip() else 0.0 for line in lines) / 72
    )


def inch_canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure and axes all over it, in inches from the top left."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    canvas = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    canvas.set_xlim(0, width)
    canvas.set_ylim(height, 0)
    canvas.set_axis_off()
    return figure, canvas


def write(
    canvas: Axes,
    x: float,
    y: float,
    text: str,
    *,
    align: Align,
    vertical: Literal["center", "bottom"] = "center",
    size: float = SIZE,
) -> None:
    """Write text as it is, in the page's ink, at a place in inches from the top left."""
    canvas.text(
        x,
        y,
        text,
        ha=align,
        va=vertical,
        fontsize=size,
        color=INK,
        linespacing=1.15,
        parse_math=False,
    )
