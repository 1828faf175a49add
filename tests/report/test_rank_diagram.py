"""The critical-difference diagram: what it shows, that it can be read, and that it is drawn in the page's colors."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from itertools import combinations

import matplotlib
import numpy as np
import pytest
from drawn import overlaps, texts, texts_outside
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from scantly.evaluation import Ranking, cliques, critical_difference
from scantly.report.plots import METHOD_COLORS
from scantly.report.rank_diagram import _figure as figure_of
from scantly.report.rank_diagram import critical_difference_diagram

NAMES = ("Supervised", "Uncertainty-aware Mean Teacher, consistency 0.1", "BCP", "Deep Adversarial Network", "CPS")


def ranking_of(ranks: list[float], n: int = 40, names: tuple[str, ...] = (), **changes: object) -> Ranking:
    """A ranking with these average ranks, ascending."""
    methods = names or tuple(f"{NAMES[index % len(NAMES)]} {index}" for index in range(len(ranks)))
    difference = critical_difference(len(ranks), n)
    values = {
        "metric": "dice",
        "methods": methods,
        "ranks": tuple(ranks),
        "n": n,
        "excluded": 0,
        "statistic": 9.3,
        "p": 0.02,
        "alpha": 0.05,
        "critical_difference": difference,
        "cliques": tuple(methods[first:last] for first, last in cliques(ranks, difference)),
    }
    return Ranking(**(values | changes))  # type: ignore[arg-type]


def random_ranks(k: int, seed: int) -> list[float]:
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(40, k)) + np.linspace(0, rng.uniform(0, 2), k)
    return sorted((scores.argsort(axis=1).argsort(axis=1) + 1).mean(axis=0).tolist())


def bars_of(figure: Figure) -> list[tuple[float, float, float]]:
    """Left and right end and height of the bars that join methods."""
    lines = [line for line in figure.axes[0].lines if to_hex(line.get_color()) == METHOD_COLORS[0]]
    return [(*line.get_xdata(), line.get_ydata()[0]) for line in lines]


def elbows_of(figure: Figure) -> list[tuple[float, float, float]]:
    """Horizontal place of the rank, height of the name, and where the line ends, per method."""
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 3]
    return [(line.get_xdata()[0], line.get_ydata()[1], line.get_xdata()[2]) for line in lines]


def test_shows_names_ranks_difference_and_test() -> None:
    ranking = ranking_of([1.25, 2.0, 3.5, 3.75], names=("MC-Net+", "BCP", "CPS", "UA-MT"), n=12, p=0.0004)
    plot = critical_difference_diagram(ranking, unit="subject")
    root = ElementTree.fromstring(plot.svg)
    shown = {"".join(element.itertext()).strip() for element in root.iter() if element.tag.endswith("text")}
    expected = {"MC-Net+", "BCP", "CPS", "UA-MT", "1.25", "2.00", "3.50", "3.75", "1", "2", "3", "4"}
    assert expected | {"critical difference 1.35", "Friedman p < 0.001; 12 subjects", "average rank"} <= shown
    assert (plot.subject, plot.title) == ("dice", "Average ranks in Dice")
    assert plot.description == (
        "Average ranks, 1 is best: MC-Net+ 1.25, BCP 2.00, CPS 3.50, UA-MT 3.75. Friedman p < 0.001; 12 subjects. "
        "Critical difference 1.35 at 0.05. Not told apart: MC-Net+ and BCP; CPS and UA-MT."
    )


def test_says_what_the_test_did_not_show_and_what_was_left_out() -> None:
    ranking = ranking_of([1.4, 1.6], n=1, p=0.4, excluded=3)
    words = "Friedman p = 0.400, no difference shown; 1 case, 3 left out"
    assert words in texts(figure_of(ranking, "case"))
    assert words in critical_difference_diagram(ranking).description
    apart = ranking_of([1.0, 2.0, 3.0], n=1000)
    assert critical_difference_diagram(apart).description.endswith("All methods differ.")
    wide = ranking_of([1.0, 2.0, 2.5, 4.0, 5.5, 6.0], n=9)
    assert f"{wide.cliques[0][0]} to {wide.cliques[0][-1]}" in critical_difference_diagram(wide).description


def test_title_names_the_unit() -> None:
    assert critical_difference_diagram(ranking_of([1.0, 2.0], metric="hd95_mm")).title == "Average ranks in HD95 (mm)"


def test_is_drawn_in_the_page_colors_and_leaves_matplotlib_alone() -> None:
    before = dict(matplotlib.rcParams)
    ranking = ranking_of([1.2, 2.3, 2.5])
    svg = critical_difference_diagram(ranking).svg
    assert dict(matplotlib.rcParams) == before
    assert "currentColor" in svg
    assert "var(--c0)" in svg
    assert "#0b0b" not in svg
    assert svg == critical_difference_diagram(ranking).svg


def test_ids_differ_by_salt() -> None:
    ranking = ranking_of([1.2, 2.3, 2.5])
    text = "".join(critical_difference_diagram(ranking, salt=salt).svg for salt in ("clean 3", "clean 7"))
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', text)) <= set(ids)


def test_names_are_text_not_formulas_or_markup() -> None:
    svg = critical_difference_diagram(ranking_of([1.2, 1.8], names=("$x_1$ <b>", "$y$ & z"))).svg
    assert "$x_1$ &lt;b&gt;" in svg
    assert "$y$ &amp; z" in svg


@pytest.mark.parametrize("k", [2, 3, 4, 7, 12, 13, 25])
def test_everything_can_be_read(k: int) -> None:
    for seed in range(2):
        figure = figure_of(ranking_of(random_ranks(k, seed)), "subject")
        assert texts_outside(figure) == []
        assert overlaps(figure) == []
        assert figure.get_figwidth() < 5.6


def test_bars_join_exactly_the_cliques() -> None:
    for seed in range(3):
        ranking = ranking_of(random_ranks(16, seed))
        figure = figure_of(ranking, "case")
        places = [x for x, _, _ in elbows_of(figure)]
        joined = [
            tuple(name for name, x in zip(ranking.methods, places, strict=True) if left <= x <= right)
            for left, right, _ in bars_of(figure)
        ]
        assert joined == list(ranking.cliques)
        for (left, right, y), (other_left, other_right, other_y) in combinations(bars_of(figure), 2):
            assert y != other_y or right + 0.05 < other_left or other_right + 0.05 < left


def test_ranks_and_critical_difference_share_a_scale() -> None:
    ranking = ranking_of([1.5, 3.0, 4.25, 5.0, 5.25, 5.5, 5.75, 5.75], n=40)
    figure = figure_of(ranking, "case")
    places = np.array([x for x, _, _ in elbows_of(figure)])
    inches = np.polyfit(ranking.ranks, places, 1)[0]
    np.testing.assert_allclose(np.diff(places), inches * np.diff(ranking.ranks))
    above = [line for line in figure.axes[0].lines if line.get_ydata()[0] == line.get_ydata()[-1] == 0.27]
    assert len(above) == 1
    assert np.ptp(above[0].get_xdata()) == pytest.approx(inches * ranking.critical_difference)


def test_a_critical_difference_longer_than_the_axis_is_cut() -> None:
    figure = figure_of(ranking_of([1.0, 2.0, 3.0], n=1), "case")
    assert "critical difference 3.31 (cut)" in texts(figure)
    assert texts_outside(figure) == []
    assert overlaps(figure) == []


def test_lines_to_names_do_not_cross() -> None:
    elbows = elbows_of(figure_of(ranking_of(random_ranks(25, 3)), "case"))
    for (x, y, end), (other_x, other_y, _) in [pair for a, b in combinations(elbows, 2) for pair in ((a, b), (b, a))]:
        within = min(x, end) < other_x < max(x, end)  # the other's vertical line meets this horizontal one
        assert not (within and other_y > y + 1e-9)


def test_equal_ranks_are_drawn() -> None:
    figure = figure_of(ranking_of([2.0, 2.0, 2.0], p=1.0), "case")
    assert overlaps(figure) == []
    assert len(bars_of(figure)) == 1
