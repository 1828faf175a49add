"""Plots as inline SVG that follow the page's colors, light, dark or printed."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scantly.evaluation import DEFINITIONS, case_means
from scantly.report.groups import Section

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLORS", "DASHES", "Plot", "curves", "distributions"]

COLORS = 8
"""Number of method colors that the page defines as ``--c0``, ``--c1``, ...; further methods reuse them."""

DASHES = ("", "6 3", "2 2", "8 3 2 3")
"""Line patterns by method (SVG ``stroke-dasharray``), so that colors are not needed to tell lines apart."""

INK = "#0b0b01"  # placeholders that svg_element turns into colors of the page
METHOD_COLORS = tuple(f"#0b0b1{number:x}" for number in range(COLORS))
_WIDTH = 3.1  # inches; small, because the page scales the text with it
_POINTS = 200  # of a curve; more are averaged


@dataclass(frozen=True)
class Plot:
    """A plot: its subject (a metric or a scalar of the log), heading, content in words, and SVG element."""

    subject: str
    title: str
    description: str
    svg: str


def distributions(section: Section) -> list[Plot]:
    """Per class and over classes: every case and the quartiles, by method, in Dice and in HD95."""
    distance = "hd95_mm" if section.has_mm and section.protocol != "literature" else "hd95_voxels"
    plots = []
    for metric in ("dice", distance):
        definition = DEFINITIONS[metric]
        values = {
            name: [
                method.table.loc[method.table["class"] == name, metric].dropna().to_numpy(float)
                for method in section.methods
            ]
            for name in section.classes
        }
        if len(section.classes) > 1:
            values["mean over classes"] = [
                case_means(method.table, metric).dropna().to_numpy(float) for method in section.methods
            ]
        limits = _limits(values, share=definition.unit == "1")
        unit = "" if definition.unit == "1" else f" ({definition.unit})"
        for name, members in values.items():
            labels = [method.title for method in section.methods]
            heading = (metric, f"{definition.title}{unit}, {name}")
            plots.append(_strips(heading, members, labels, limits=limits, salt=section.protocol))
    return plots


def _limits(values: dict[str, list[NDArray[np.float64]]], *, share: bool) -> tuple[float, float]:
    """One range for all classes, so that plots can be compared by eye."""
    everything = np.concatenate([array for members in values.values() for array in members] or [np.zeros(1)])
    if not everything.size:
        return 0.0, 1.0
    if share:
        return float(np.floor(everything.min() * 10) / 10) - 0.02, 1.02
    top = max(float(everything.max()), 1.0)
    return -0.02 * top, 1.05 * top


def _strips(
    heading: tuple[str, str],
    members: Sequence[NDArray[np.float64]],
    labels: Sequence[str],
    *,
    limits: tuple[float, float],
    salt: str,
) -> Plot:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, 0.62 * len(members) + 0.5))
    axes = figure.add_axes((0.04, 0.36 / figure.get_figheight(), 0.92, 1 - 0.4 / figure.get_figheight()))
    for row, (values, label) in enumerate(zip(members, labels, strict=True)):
        color = METHOD_COLORS[row % COLORS]
        axes.text(
            0.0,
            row - 0.36,
            label,
            transform=axes.get_yaxis_transform(),
            fontsize=9,
            color=INK,
            parse_math=False,
        )
        if not values.size:
            continue
        low, median, high = np.percentile(values, [25, 50, 75])
        axes.barh(row, high - low, left=low, height=0.36, color=color, alpha=0.22, linewidth=0)
        axes.plot([median, median], [row - 0.2, row + 0.2], color=color, linewidth=2.2, solid_capstyle="butt")
        spread = np.random.default_rng(0).uniform(-0.13, 0.13, values.size)
        axes.plot(values, row + spread, "o", color=color, markersize=3.6, alpha=0.75, markeredgewidth=0)
    axes.set_xlim(*limits)
    axes.set_ylim(len(members) - 0.6, -0.6)
    axes.set_yticks([])
    style_axes(axes)
    axes.spines["left"].set_visible(False)
    medians = "; ".join(
        f"{label}: median {np.median(values):.3g} of {values.size} cases"
        for values, label in zip(members, labels, strict=True)
        if values.size
    )
    return Plot(*heading, medians or "no values", svg_element(figure, f"{salt} {heading[1]}"))


def curves(section: Section) -> list[Plot]:
    """Validation Dice and every loss term over iterations, one line per run."""
    logs = [
        (number, _log(result.run.log())) for number, method in enumerate(section.methods) for result in method.results
    ]
    names = dict.fromkeys(name for _, log in logs for name in log)
    shown = [name for name in names if name == "val/dice"] + [name for name in names if name.startswith("loss/")]
    plots = []
    for name in shown:
        lines = [(number, *log[name]) for number, log in logs if name in log]
        title = "Dice on validation cases" if name == "val/dice" else f"Loss: {name.removeprefix('loss/')}"
        plots.append(_lines((name, title), lines, salt=section.protocol))
    return plots


def _log(table: pd.DataFrame) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Scalar name -> iterations and values; names without a value are left out."""
    series = {}
    for name, rows in table.dropna(subset=["value"]).groupby("name", sort=False):
        ordered = rows.sort_values("iteration", kind="stable")
        series[str(name)] = (ordered["iteration"].to_numpy(float), ordered["value"].to_numpy(float))
    return series


def _lines(
    heading: tuple[str, str],
    lines: Sequence[tuple[int, NDArray[np.float64], NDArray[np.float64]]],
    *,
    salt: str,
) -> Plot:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, 2.1))
    axes = figure.add_axes((0.15, 0.19, 0.82, 0.77))
    averaged = 1
    for number, iterations, values in lines:
        averaged = max(averaged, -(-len(values) // _POINTS))
        x, y = _bins(iterations, values)
        dash = tuple(float(length) / 1.4 for length in DASHES[number % len(DASHES)].split())
        style: Any = (0, dash) if dash else "-"
        alone = "o" if len(x) == 1 else ""
        axes.plot(x, y, linestyle=style, marker=alone, color=METHOD_COLORS[number % COLORS], linewidth=1.4)
    axes.set_xlim(left=0)
    axes.margins(y=0.06)
    axes.set_xlabel("iteration", fontsize=9, color=INK, labelpad=2)
    style_axes(axes)
    axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
    note = f"each point is the mean of {averaged} logged values; " if averaged > 1 else ""
    ends = ", ".join(f"{values[-1]:.3g}" for _, _, values in lines)
    description = f"{note}{len(lines)} run(s), last values {ends}"
    return Plot(*heading, description, svg_element(figure, f"{salt} {heading[1]}"))


def _bins(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    width = -(-len(x) // _POINTS)
    if width <= 1:
        return x, y
    starts = np.arange(0, len(x), width)
    counts = np.diff([*starts, len(x)])
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts


def style_axes(axes: Axes) -> None:
    """Two thin spines and small ticks in the page's ink, no background."""
    axes.patch.set_visible(False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(INK)
        axes.spines[side].set_alpha(0.5)
    axes.tick_params(colors=INK, labelsize=9, length=3)


@contextmanager
def _svg_settings(salt: str) -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        yield


def svg_element(figure: Figure, name: str) -> str:
    """Draw to an SVG element: page colors for the placeholders, ids that begin with ``name``."""
    stream = io.StringIO()
    with _svg_settings(name):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'font: ([^;"]*?)px [^;"]*', r"font: \1px system-ui, sans-serif", text)
    prefix = re.sub(r"\W+", "-", name).strip("-").lower()
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\1{prefix}-", text)
    for number, placeholder in enumerate(METHOD_COLORS):
        text = text.replace(placeholder, f"var(--c{number})")
    return text.replace(INK, "currentColor").replace("<svg", '<svg aria-hidden="true"', 1)
