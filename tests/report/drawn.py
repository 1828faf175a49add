"""Where texts of a figure are, to test that they can be read."""

from __future__ import annotations

from itertools import combinations

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox


def _boxes(figure: Figure) -> list[tuple[str, Bbox]]:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    shown = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    inside_axes = [text for text in shown if text.axes is None or text.axes.axison or text in text.axes.texts]
    return [(text.get_text(), _box(text.get_text(), text.get_window_extent(renderer))) for text in inside_axes]


def _box(text: str, box: Bbox) -> Bbox:
    """The box without its empty lines at the top."""
    empty = len(text) - len(text.lstrip("\n"))
    height = box.height * (1 - empty / (text.count("\n") + 1))
    return Bbox.from_extents(box.x0, box.y0, box.x1, box.y0 + height)


def texts(figure: Figure) -> list[str]:
    """All texts that are drawn."""
    return [text for text, _ in _boxes(figure)]


def texts_outside(figure: Figure) -> list[str]:
    """Texts that the figure's edge cuts."""
    page = figure.bbox
    return [
        text
        for text, box in _boxes(figure)
        if box.x0 < page.x0 or box.y0 < page.y0 or box.x1 > page.x1 or box.y1 > page.y1
    ]


def overlaps(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of texts that lie on one another."""
    return [(a, b) for (a, box), (b, other) in combinations(_boxes(figure), 2) if _share_area(box, other)]


def _share_area(box: Bbox, other: Bbox) -> bool:
    slack = 1.0  # pixels of 1/100 inch: boxes hold the font's room above and below letters
    across = min(box.x1, other.x1) - max(box.x0, other.x0)
    down = min(box.y1, other.y1) - max(box.y0, other.y0)
    return across > slack and down > slack
