"""Average ranks, the Friedman test and Nemenyi's critical difference, by hand and after Demšar (2006)."""

from __future__ import annotations

from itertools import combinations, permutations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from scantly.errors import ConfigError, RunError
from scantly.evaluation import (
    DEFINITIONS,
    case_ranks,
    cliques,
    critical_difference,
    friedman,
    make_table,
    rank_methods,
)

# Demšar (2006), table 2: areas under the ROC curve of C4.5, with m, with cf, with m and cf, as he ranks them.
DEMSAR_RANKS = np.array(
    [
        [4, 3, 2, 1],
        [1, 2, 3, 4],
        [4, 1, 2, 3],
        [4, 1, 3, 2],
        [4, 2, 3, 1],
        [1, 2.5, 4, 2.5],
        [3, 2, 4, 1],
        [2.5, 2.5, 4, 1],
        [4, 3, 2, 1],
        [2.5, 2.5, 2.5, 2.5],
        [4, 2.5, 1, 2.5],
        [3, 2, 4, 1],
        [4, 1, 2, 3],
        [3, 1, 4, 2],
    ]
)


def table_of(values: list[float], metric: str = "dice") -> pd.DataFrame:
    """One class, one value per case; the other metrics are constant, so that reading a wrong one is seen."""
    rows = [
        {"case": f"c{index}", "class": "x", "status": "scored", **dict.fromkeys(DEFINITIONS, 0.5), metric: value}
        for index, value in enumerate(values)
    ]
    return make_table(rows)


def tables_of(scores: dict[str, list[float]], metric: str = "dice") -> dict[str, pd.DataFrame]:
    return {name: table_of(values, metric) for name, values in scores.items()}


HAND = {"A": [0.9, 0.9, 0.5, 0.8], "B": [0.8, 0.9, 0.6, 0.7], "C": [0.7, 0.7, 0.4, 0.6]}


def test_ranks_worked_by_hand() -> None:
    ranks = case_ranks(tables_of(HAND))
    assert ranks.to_dict("list") == {"A": [1, 1.5, 2, 1], "B": [2, 1.5, 1, 2], "C": [3, 3, 3, 3]}
    assert ranks.index.tolist() == ["c0", "c1", "c2", "c3"]
    tables = tables_of(HAND)
    turned = case_ranks({"A": tables["A"][::-1], "B": tables["B"], "C": tables["C"].iloc[[2, 0, 1, 3]]})
    assert turned.index.tolist() == ["c3", "c2", "c1", "c0"]
    pd.testing.assert_frame_equal(turned.sort_index(), ranks)


def test_ranking_worked_by_hand() -> None:
    ranking = rank_methods(tables_of(HAND))
    assert ranking.methods == ("A", "B", "C")
    assert ranking.ranks == (5.5 / 4, 6.5 / 4, 3.0)
    # rank sums 5.5, 6.5, 12: 12 / (4*3*4) * 216.5 - 3*4*4 = 6.125; one tie of two: divided by 1 - 6 / (4*3*8)
    assert ranking.statistic == pytest.approx(6.125 / 0.9375)
    assert ranking.p == pytest.approx(np.exp(-6.125 / 0.9375 / 2))  # chi-square with two degrees of freedom
    assert ranking.critical_difference == pytest.approx(2.343 * np.sqrt(12 / 24), abs=1e-3)  # 1.657 > 3 - 1.375
    assert ranking.cliques == (("A", "B", "C"),)
    assert (ranking.n, ranking.excluded, ranking.alpha, ranking.metric) == (4, 0, 0.05, "dice")


def test_smaller_distances_are_better() -> None:
    ranking = rank_methods(tables_of(HAND, "hd95_mm"), metric="hd95_mm")
    assert ranking.methods == ("C", "B", "A")
    assert ranking.ranks == (1.0, 4 - 6.5 / 4, 4 - 5.5 / 4)


@pytest.mark.parametrize("metric", list(DEFINITIONS))
def test_every_metric_ranks_the_better_value_first(metric: str) -> None:
    good, bad = (0.9, 0.1) if DEFINITIONS[metric].higher_is_better else (0.1, 0.9)
    assert metric.startswith(("dice", "jaccard", "nsd")) == (good > bad)
    assert rank_methods(tables_of({"bad": [bad] * 3, "good": [good] * 3}, metric), metric=metric).methods[0] == "good"


@pytest.mark.parametrize(
    ("alpha", "printed"),
    [
        (0.05, [1.960, 2.343, 2.569, 2.728, 2.850, 2.949, 3.031, 3.102, 3.164]),
        (0.10, [1.645, 2.052, 2.291, 2.459, 2.589, 2.693, 2.780, 2.855, 2.920]),
    ],
)
def test_quantiles_are_those_that_demsar_prints(alpha: float, printed: list[float]) -> None:
    # at n = k (k + 1) / 6 the critical difference is the quantile; other n scale by the root
    for k, q in enumerate(printed, start=2):
        assert critical_difference(k, 6 * k, alpha=alpha) * np.sqrt(36 / (k + 1)) == pytest.approx(q, abs=1.1e-3)


def test_demsars_example() -> None:
    assert DEMSAR_RANKS.mean(axis=0) == pytest.approx([3.143, 2.000, 2.893, 1.964], abs=5e-4)
    assert critical_difference(4, 14) == pytest.approx(1.25, abs=5e-3)
    assert critical_difference(4, 14, alpha=0.10) == pytest.approx(1.12, abs=5e-3)
    # his statistic, 9.28, is not corrected for the ties (three of two methods, one of all four)
    statistic, p = friedman(DEMSAR_RANKS)
    correction = 1 - (3 * (2**3 - 2) + 4**3 - 4) / (14 * 4 * 15)
    assert statistic * correction == pytest.approx(9.28, abs=0.01)
    assert p == pytest.approx(chi2.sf(statistic, 3))


def test_demsars_example_of_groups() -> None:
    ranks = {"both": 1.964, "m": 2.000, "cf": 2.893, "C4.5": 3.143}
    names, values = list(ranks), list(ranks.values())
    assert [names[a:b] for a, b in cliques(values, 1.25)] == [names]  # "not powerful enough" at 0.05
    assert [names[a:b] for a, b in cliques(values, 1.12)] == [["both", "m", "cf"], ["cf", "C4.5"]]  # his figure 1a


def test_two_methods_are_a_sign_test() -> None:
    ranks = np.array([[1, 2], [1, 2], [1, 2], [2, 1], [1.5, 1.5]])
    assert friedman(ranks) == pytest.approx((4 / 4, chi2.sf(1, 1)))  # 3 wins, 1 loss
    ranking = rank_methods(tables_of({"A": [0.9, 0.9, 0.9, 0.1, 0.5], "B": [0.5] * 5}))
    assert ranking.ranks == (1.3, 1.7)
    assert (ranking.statistic, ranking.p) == pytest.approx(friedman(ranks))
    assert ranking.critical_difference == pytest.approx(1.96 / np.sqrt(5), abs=1e-4)


def test_methods_that_tie_everywhere_do_not_differ() -> None:
    for k in (2, 3):
        ranking = rank_methods(tables_of({f"m{index}": [0.5, 0.7] for index in range(k)}))
        assert (ranking.statistic, ranking.p) == (0.0, 1.0)
        assert ranking.ranks == ((k + 1) / 2,) * k
        assert ranking.cliques == (ranking.methods,)


def test_rounding_errors_do_not_break_ties() -> None:
    a, b = [0.1 + 0.2] * 3, [0.3] * 3
    assert a != b
    assert case_ranks(tables_of({"A": a, "B": b})).to_numpy().tolist() == [[1.5, 1.5]] * 3


def test_cases_of_a_subject_are_averaged_first() -> None:
    scores = {"A": [0.9, 0.1, 0.6], "B": [0.5, 0.6, 0.5]}  # c0 and c1 of one subject: 0.5 against 0.55
    ranks = case_ranks(tables_of(scores), groups={"c0": "s", "c1": "s"})
    assert ranks.to_dict("index") == {"s": {"A": 2, "B": 1}, "c2": {"A": 1, "B": 2}}
    ranking = rank_methods(tables_of(scores), groups={"c0": "s", "c1": "s"})
    assert (ranking.n, ranking.ranks) == (2, (1.5, 1.5))


def test_cases_that_a_method_lacks_are_left_out_for_all() -> None:
    lacking = HAND | {"B": [np.nan, 0.9, 0.6, 0.7]}
    ranks = case_ranks(tables_of(lacking))
    assert ranks.loc["c0"].isna().all()
    ranking = rank_methods(tables_of(lacking))
    assert (ranking.n, ranking.excluded) == (3, 1)
    assert dict(zip(ranking.methods, ranking.ranks, strict=True)) == {"A": 1.5, "B": 1.5, "C": 3.0}
    without = {name: values[1:] for name, values in HAND.items()}
    assert ranking.statistic == rank_methods(tables_of(without)).statistic


def test_rankings_that_cannot_be_made() -> None:
    with pytest.raises(RunError, match=r"every method \(none at all for B\)"):
        rank_methods(tables_of(HAND | {"B": [np.nan] * 4}))
    with pytest.raises(RunError, match="each method lacks another case"):
        rank_methods(tables_of({"A": [np.nan, 0.5], "B": [0.5, np.nan]}))
    with pytest.raises(RunError, match="at least two methods, got 1"):
        rank_methods(tables_of({"A": [0.5]}))
    with pytest.raises(RunError, match=r"c3 \(in A, not in B\)"):
        rank_methods(tables_of(HAND | {"B": [0.5] * 3}))
    with pytest.raises(ConfigError, match="did you mean 'dice'"):
        rank_methods(tables_of(HAND), metric="dise")
    for alpha in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="alpha"):
            rank_methods(tables_of(HAND), alpha=alpha)
    with pytest.raises(ValueError, match="k >= 2"):
        critical_difference(1, 10)
    with pytest.raises(ValueError, match="n >= 1"):
        critical_difference(2, 0)
    for shape in ((0, 3), (3, 1), (3,)):
        with pytest.raises(ValueError, match="at least two methods"):
            friedman(np.ones(shape))
    with pytest.raises(ValueError, match="ascending"):
        cliques([2.0, 1.0], 1.0)


def test_a_difference_of_exactly_the_critical_one_counts() -> None:
    assert cliques([1.0, 2.0], 1.0) == []
    assert cliques([1.0, 2.0], np.nextafter(1.0, 2.0)) == [(0, 2)]


def friedman_of_sums(ranks: np.ndarray) -> float:
    """The statistic as a ratio of sums of squares (Conover, Practical Nonparametric Statistics, section 5.8)."""
    n, k = ranks.shape
    between = n * ((ranks.mean(axis=0) - (k + 1) / 2) ** 2).sum()
    total = ((ranks - (k + 1) / 2) ** 2).sum()
    return float((k - 1) * n * between / total)


scores = st.integers(2, 6).flatmap(
    lambda k: st.lists(st.lists(st.integers(0, 5), min_size=k, max_size=k), min_size=1, max_size=12)
)


@settings(max_examples=60)
@given(scores)
def test_properties_of_rankings(values: list[list[int]]) -> None:
    grid = np.array(values) / 5
    k = grid.shape[1]
    named = {f"m{index}": grid[:, index].tolist() for index in range(k)}
    ranks = case_ranks(tables_of(named)).to_numpy()
    np.testing.assert_allclose(ranks.sum(axis=1), k * (k + 1) / 2)
    for row, scored in zip(ranks, grid, strict=True):  # 1 + those better + half of those alike
        for index, value in enumerate(scored):
            assert row[index] == 1 + (scored > value).sum() + ((scored == value).sum() - 1) / 2
    ranking = rank_methods(tables_of(named))
    assert sum(ranking.ranks) == pytest.approx(k * (k + 1) / 2)
    assert list(ranking.ranks) == sorted(ranking.ranks)
    assert 0 <= ranking.p <= 1
    if not (ranks == ranks[:, :1]).all():
        assert ranking.statistic == pytest.approx(friedman_of_sums(ranks), abs=1e-9)

    by_name = dict(zip(ranking.methods, ranking.ranks, strict=True))
    other_order = rank_methods(tables_of({name: values[::-1] for name, values in reversed(named.items())}))
    assert dict(zip(other_order.methods, other_order.ranks, strict=True)) == pytest.approx(by_name)
    assert other_order.statistic == pytest.approx(ranking.statistic)
    assert {frozenset(clique) for clique in other_order.cliques} == {frozenset(clique) for clique in ranking.cliques}
    monotone = rank_methods(tables_of({name: np.exp(values).tolist() for name, values in named.items()}))
    assert (monotone.methods, monotone.ranks) == (ranking.methods, ranking.ranks)


@given(st.lists(st.integers(4, 40), min_size=2, max_size=8), st.integers(1, 24))
def test_cliques_are_the_largest_groups(quarters: list[int], difference: int) -> None:
    ranks = sorted(quarter / 4 for quarter in quarters)
    alike = {
        group
        for size in range(2, len(ranks) + 1)
        for group in combinations(range(len(ranks)), size)
        if max(abs(ranks[a] - ranks[b]) for a, b in permutations(group, 2)) < difference / 4
    }
    largest = {group for group in alike if not any(set(group) < set(other) for other in alike)}
    assert {tuple(range(first, last)) for first, last in cliques(ranks, difference / 4)} == largest


def test_friedman_level_by_simulation() -> None:
    """Alike methods are told apart at 0.05 in about 5 % of trials, by the test and by the critical difference."""
    rng = np.random.default_rng(0)
    trials = rng.random((2000, 30, 4)).argsort(axis=2) + 1.0
    p_values = np.array([friedman(ranks)[1] for ranks in trials])
    assert 0.035 < (p_values < 0.05).mean() < 0.065
    averages = trials.mean(axis=1)
    assert 0.035 < (np.ptp(averages, axis=1) >= critical_difference(4, 30)).mean() < 0.065
