from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scantly.errors import ConfigError, RunError
from scantly.evaluation import (
    DEFINITIONS,
    bootstrap_interval,
    compare_methods,
    holm,
    make_table,
    wilcoxon_p,
)


def table_of(values: dict[str, list[float]]) -> pd.DataFrame:
    """Dice per case, one value per class."""
    rows = []
    for case, scores in values.items():
        for index, score in enumerate(scores):
            metrics = dict.fromkeys(DEFINITIONS, score)
            rows.append({"case": case, "class": f"class {index}", "status": "scored", **metrics})
    return make_table(rows)


def interval(differences: list[float], seed: int = 0, **options: float) -> tuple[float, float]:
    return bootstrap_interval(np.array(differences), rng=np.random.default_rng(seed), **options)


def test_bootstrap_of_two_cases_has_the_exact_distribution() -> None:
    # means of two draws from {0, 1}: 0, 1/2, 1 with chances 1/4, 1/2, 1/4
    assert interval([0.0, 1.0]) == (0.0, 1.0)
    assert interval([0.0, 1.0], confidence=0.4) == (0.5, 0.5)


def test_bootstrap_equals_the_normal_interval_for_many_cases() -> None:
    differences = np.random.default_rng(1).normal(0.3, 2.0, size=4000)
    low, high = interval(differences.tolist())
    half = 1.96 * differences.std(ddof=1) / np.sqrt(4000)
    assert low == pytest.approx(differences.mean() - half, abs=0.05 * half)
    assert high == pytest.approx(differences.mean() + half, abs=0.05 * half)


def test_bootstrap_depends_on_the_seed_alone() -> None:
    differences = [0.1, 0.5, -0.2, 0.3, 0.07]
    assert interval(differences) == interval(differences)
    assert interval(differences) != interval(differences, seed=1)
    assert interval([0.25] * 7) == (0.25, 0.25)


def test_bootstrap_refuses_nothing_to_resample() -> None:
    with pytest.raises(ValueError, match="need differences"):
        interval([])
    with pytest.raises(ValueError, match="confidence"):
        interval([1.0], confidence=1.0)


def signed_rank_p(differences: list[float]) -> float:
    """Two-sided p by trying all signs; absolute differences distinct and not zero."""
    ranks = np.argsort(np.argsort(np.abs(differences))) + 1
    observed = ranks[np.array(differences) > 0].sum()
    sums = np.array([ranks[np.array(signs)].sum() for signs in product([True, False], repeat=len(ranks))])
    tail = min((sums <= observed).mean(), (sums >= observed).mean())
    return min(1.0, 2 * float(tail))


@pytest.mark.parametrize(
    "differences",
    [
        [0.1],
        [0.1, 0.2, 0.3, 0.4, 0.5],
        [0.1, -0.2, 0.3, 0.4, -0.05, 0.6, 0.7],
        [-1, -2, 3, -4, -5, -6, -7, -8],
    ],
)
def test_wilcoxon_is_exact_for_few_cases(differences: list[float]) -> None:
    assert wilcoxon_p(np.array(differences)) == pytest.approx(signed_rank_p(differences))


def test_wilcoxon_worked_by_hand() -> None:
    # five positive differences: one of 32 sign patterns is as extreme on each side
    assert wilcoxon_p(np.array([0.1, 0.2, 0.3, 0.4, 0.5])) == pytest.approx(2 / 32)


def test_wilcoxon_drops_zeros_and_rounding_errors() -> None:
    assert wilcoxon_p(np.zeros(6)) == 1.0
    assert wilcoxon_p(np.array([])) == 1.0
    assert wilcoxon_p(np.array([1e-17, -1e-16, 0.0])) == 1.0
    few = np.array([0.1, 0.2, -0.3, 0.4, 0.5])
    assert wilcoxon_p(np.concatenate([few, np.zeros(4), [1e-15]])) == wilcoxon_p(few)


def test_wilcoxon_of_many_tied_cases() -> None:
    differences = np.tile([0.1, 0.1, -0.2, 0.3], 20)
    assert wilcoxon_p(differences) == wilcoxon_p(-differences)
    assert wilcoxon_p(np.abs(differences)) < 1e-6 < wilcoxon_p(differences)


@pytest.mark.parametrize(
    ("p_values", "adjusted"),
    [
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
        ([0.02], [0.02]),
        ([], []),
        ([0.5, 0.6, 0.01], [1.0, 1.0, 0.03]),
        ([0.01, 0.01, 0.01, 0.01], [0.04, 0.04, 0.04, 0.04]),
        ([0.04, 0.02, 0.03, 0.01], [0.06, 0.06, 0.06, 0.04]),
    ],
)
def test_holm_worked_by_hand(p_values: list[float], adjusted: list[float]) -> None:
    assert holm(p_values) == pytest.approx(adjusted)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_order_and_lies_between_raw_and_bonferroni(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    for p, q in zip(p_values, adjusted, strict=True):
        assert p <= q <= min(1.0, len(p_values) * p)
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(np.array(adjusted)[order]) >= 0).all()


A = {"p1": [0.8, 0.9], "p2": [0.7, 0.6], "p3": [0.5, 0.9], "p4": [0.9, 0.9]}
B = {"p4": [0.8, 0.8], "p3": [0.5, 0.5], "p2": [0.5, 0.7], "p1": [0.6, 0.8]}
C = {"p1": [0.8, 0.9], "p2": [0.7, 0.6], "p3": [0.5, 0.9], "p4": [0.9, 0.9]}


def test_methods_are_paired_by_case_whatever_the_order() -> None:
    result = compare_methods({"A": table_of(A), "B": table_of(B), "C": table_of(C)})
    assert result[["a", "b"]].to_numpy().tolist() == [["A", "B"], ["A", "C"], ["B", "C"]]
    first, second, third = (row for _, row in result.iterrows())
    differences = [0.15, 0.05, 0.2, 0.1]
    assert first["difference"] == pytest.approx(np.mean(differences))
    assert first["mean_a"] - first["mean_b"] == pytest.approx(first["difference"])
    assert (first["n"], first["excluded"], first["metric"]) == (4, 0, "dice")
    assert first["p"] == pytest.approx(signed_rank_p(differences))
    assert (first["ci_low"], first["ci_high"]) == pytest.approx(interval(differences))
    assert (second["difference"], second["p"], second["ci_low"], second["ci_high"]) == (0, 1, 0, 0)
    assert third["difference"] == pytest.approx(-first["difference"])
    assert result["p_holm"].tolist() == pytest.approx(holm(result["p"].tolist()))


def test_cases_of_a_subject_are_averaged_first() -> None:
    groups = {"p1": "x", "p2": "x", "p3": "y"}
    row = compare_methods({"A": table_of(A), "B": table_of(B)}, groups=groups).iloc[0]
    differences = [0.1, 0.2, 0.1]
    assert row["n"] == 3
    assert row["difference"] == pytest.approx(np.mean(differences))


def test_cases_without_a_value_are_excluded_and_counted() -> None:
    row = compare_methods({"A": table_of(A), "B": table_of(B | {"p1": [np.nan, np.nan]})}).iloc[0]
    assert (row["n"], row["excluded"]) == (3, 1)
    assert row["difference"] == pytest.approx((0.05 + 0.2 + 0.1) / 3)
    nothing = table_of({case: [np.nan, np.nan] for case in A})
    with pytest.raises(RunError, match="A and B have no case with a value of dice"):
        compare_methods({"A": table_of(A), "B": nothing})


def test_one_method_is_compared_with_all_others() -> None:
    tables = {"A": table_of(A), "B": table_of(B), "C": table_of(C)}
    result = compare_methods(tables, against="A")
    assert result[["a", "b"]].to_numpy().tolist() == [["B", "A"], ["C", "A"]]
    assert result["difference"].tolist() == pytest.approx([-0.125, 0.0])
    assert result["p_holm"].tolist() == holm(result["p"].tolist())  # two tests, not three
    with pytest.raises(ConfigError, match="unknown method 'D'"):
        compare_methods(tables, against="D")


def test_methods_that_cannot_be_compared() -> None:
    fewer = {case: scores for case, scores in B.items() if case != "p2"} | {"p9": [0.5, 0.5]}
    with pytest.raises(RunError, match=r"p2 \(in A, not in B\), p9 \(in B, not in A\)"):
        compare_methods({"A": table_of(A), "B": table_of(fewer)})
    with pytest.raises(RunError, match=r"p1 \(in A, not in B\)"):
        compare_methods({"A": table_of(A), "B": table_of(B | {"p1": [0.5]})})
    with pytest.raises(RunError, match="B: case p4 has class class 0 twice"):
        compare_methods({"A": table_of(A), "B": pd.concat([table_of(B), table_of(B)])})
    with pytest.raises(RunError, match="at least two methods, got 1"):
        compare_methods({"A": table_of(A)})
    with pytest.raises(ConfigError, match="unknown metric 'dise'; did you mean 'dice'"):
        compare_methods({"A": table_of(A), "B": table_of(B)}, metric="dise")
