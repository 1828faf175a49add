"""Plots are SVG in the page's colors, without touching matplotlib's global state."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable

import matplotlib
import numpy as np

from scantly.report.groups import collect
from scantly.report.plots import COLORS, curves, distributions
from scantly.report.plots import _bins as bins
from scantly.training.run import Run

MakeRun = Callable[..., Run]


def test_plots_are_well_formed_and_use_the_page_colors(shared_runs: list[Run]) -> None:
    (section,) = collect(shared_runs)
    before = dict(matplotlib.rcParams)
    plots = distributions(section) + curves(section)
    assert dict(matplotlib.rcParams) == before
    for plot in plots:
        ElementTree.fromstring(plot.svg)
        assert "currentColor" in plot.svg
        assert not re.search(r"#0b0b", plot.svg), "placeholder colors are all replaced"
        assert "http" not in plot.svg.replace("http://www.w3.org", "")
    assert all(f"var(--c{number})" in plots[0].svg for number in range(3))


def test_ids_are_unique_on_the_page_and_resolve(shared_runs: list[Run]) -> None:
    (section,) = collect(shared_runs)
    text = "".join(plot.svg for plot in distributions(section) + curves(section))
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', text)) <= set(ids)


def test_one_distribution_per_class_and_metric_describes_its_medians(make_run: MakeRun) -> None:
    run = make_run("a", shift=2)
    (section,) = collect([run])
    plots = distributions(section)
    assert [plot.title for plot in plots[:4]] == [
        "Dice, RV",
        "Dice, MYO",
        "Dice, LV",
        "Dice, mean over classes",
    ]
    assert [plot.subject for plot in plots] == ["dice"] * 4 + ["hd95_mm"] * 4
    table = run.evaluation("test")
    assert table is not None
    median = table[table["class"] == "RV"]["dice"].median()
    assert plots[0].description == f"Supervised, 1 labeled: median {median:.3g} of 4 cases"


def test_labels_are_text_not_formulas_or_markup(make_run: MakeRun) -> None:
    runs = [
        make_run("a", settings={"method": {"note": "$x_1$ <b>"}}),
        make_run("b", settings={"method": {"note": "$y$"}}),
    ]
    svg = distributions(collect(runs)[0])[0].svg
    assert "note $x_1$ &lt;b&gt;" in svg


def test_curves_show_validation_dice_and_every_loss(shared_runs: list[Run]) -> None:
    titles = [plot.title for plot in curves(collect(shared_runs)[0])]
    assert titles == ["Dice on validation cases", "Loss: supervised", "Loss: consistency"]


def test_more_methods_than_colors_are_drawn(make_run: MakeRun) -> None:
    runs = [make_run(f"r{n}", settings={"training": {"lr": 0.1 / (n + 1)}}) for n in range(COLORS + 1)]
    (section,) = collect(runs)
    assert distributions(section)[0].svg.count("lr 0.") == COLORS + 1


def test_long_curves_are_averaged_in_bins() -> None:
    x = np.arange(450, dtype=float)
    short_x, short_y = bins(x, 2 * x)
    assert len(short_x) == 150
    np.testing.assert_allclose(short_x[:2], [1, 4])
    np.testing.assert_allclose(short_y, 2 * short_x)
    np.testing.assert_array_equal(bins(x[:200], x[:200])[0], x[:200])
