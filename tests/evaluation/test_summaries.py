"""Runs of methods, labeled counts and seeds: means, both spreads, counts, and paired comparison over seeds."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scantly.errors import ConfigError, RunError
from scantly.evaluation import (
    DEFINITIONS,
    OVERALL,
    ScoredRun,
    aggregate_seeds,
    compare_methods,
    compare_over_seeds,
    make_table,
    mean_over_seeds,
    rank_methods,
    summarize,
    summarize_runs,
)

Score = float | str


def table_of(scores: dict[str, dict[str, Score]]) -> pd.DataFrame:
    """Dice per case and class, or a status in its place; other metrics are ten times as great."""
    rows = []
    for case, classes in scores.items():
        for name, value in classes.items():
            status = value if isinstance(value, str) else "scored"
            score = {"missed": 0.0, "spurious": 0.0, "both_empty": np.nan}.get(status, value)
            metrics = {metric: 10 * float(score) for metric in DEFINITIONS} | {"dice": float(score)}
            rows.append({"case": case, "class": name, "status": status, **metrics})
    return make_table(rows)


def run_of(method: str, labeled: int | str, seed: int, scores: dict[str, dict[str, Score]]) -> ScoredRun:
    return ScoredRun(method, labeled, seed, table_of(scores))  # type: ignore[arg-type]


def simple(method: str, labeled: int | str, seed: int, *dice: Score) -> ScoredRun:
    """One class."""
    return run_of(method, labeled, seed, {f"c{index}": {"x": value} for index, value in enumerate(dice)})


def row_of(table: pd.DataFrame, method: str, labeled: int | str, name: str, metric: str = "dice") -> pd.Series:
    chosen = table[(table["method"] == method) & (table["class"] == name) & (table["metric"] == metric)]
    chosen = chosen[[value == labeled for value in chosen["labeled"]]]
    assert len(chosen) == 1
    return chosen.iloc[0]


SEED_1: dict[str, dict[str, Score]] = {"a": {"RV": 0.2, "LV": 0.6}, "b": {"RV": 0.4, "LV": 1.0}}
SEED_2: dict[str, dict[str, Score]] = {"a": {"RV": 0.4, "LV": 0.8}, "b": {"RV": "missed", "LV": 0.4}}


def test_summary_worked_by_hand() -> None:
    table = summarize_runs([run_of("M", 3, 1, SEED_1), run_of("M", 3, 2, SEED_2)], metrics=("dice", "hd95_mm"))
    rv, lv, overall = (row_of(table, "M", 3, name) for name in ("RV", "LV", OVERALL))
    # RV: seeds 0.3 and 0.2; cases over seeds 0.3 and 0.2
    assert (rv["mean"], rv["std_over_seeds"], rv["std_over_cases"]) == pytest.approx((0.25, 0.1 / 2**0.5, 0.1 / 2**0.5))
    # LV: seeds 0.8 and 0.6; cases over seeds 0.7 and 0.7
    assert (lv["mean"], lv["std_over_seeds"], lv["std_over_cases"]) == pytest.approx((0.7, 0.2 / 2**0.5, 0.0))
    # both: seeds 0.55 and 0.4; cases 0.5 and 0.45
    assert (overall["mean"], overall["std_over_seeds"]) == pytest.approx((0.475, 0.15 / 2**0.5))
    assert overall["std_over_cases"] == pytest.approx(0.05 / 2**0.5)
    assert (rv["seeds"], rv["cases"], rv["units"], rv["averaged"]) == (2, 2, 2, 2)
    assert [(row["scored"], row["missed"], row["spurious"], row["both_empty"]) for row in (rv, lv, overall)] == [
        (3, 1, 0, 0),
        (4, 0, 0, 0),
        (7, 1, 0, 0),
    ]
    assert row_of(table, "M", 3, "RV", "hd95_mm")["mean"] == pytest.approx(2.5)


def test_rows_are_in_order_and_complete() -> None:
    runs = [
        simple("Z", "all", 1, 0.9, 0.9),
        simple("Z", 14, 1, 0.8, 0.8),
        simple("Z", 3, 1, 0.5, 0.5),
        simple("A", 3, 1, 0.5, 0.6),
    ]
    table = summarize_runs(runs, metrics=("hd95_mm", "dice"))
    assert list(dict.fromkeys(zip(table["method"], table["labeled"], strict=True))) == [
        ("Z", 3),
        ("Z", 14),
        ("Z", "all"),
        ("A", 3),
    ]
    assert list(zip(table["class"], table["metric"], strict=True))[:4] == [
        ("x", "hd95_mm"),
        ("x", "dice"),
        (OVERALL, "hd95_mm"),
        (OVERALL, "dice"),
    ]
    assert len(table) == 4 * 2 * 2
    assert table["std_over_seeds"].isna().all()
    assert set(summarize_runs(runs)["metric"]) == set(DEFINITIONS)


def test_empty_masks_are_left_out_and_counted() -> None:
    runs = [
        run_of("M", 3, 1, {"a": {"RV": 0.5, "LV": 0.5}, "b": {"RV": "both_empty", "LV": 0.7}}),
        run_of("M", 3, 2, {"a": {"RV": 0.7, "LV": 0.5}, "b": {"RV": "spurious", "LV": 0.7}}),
    ]
    rv = row_of(summarize_runs(runs), "M", 3, "RV")
    assert rv["mean"] == pytest.approx((0.5 + 0.35) / 2)
    assert rv["std_over_cases"] == pytest.approx(np.std([0.6, 0.0], ddof=1))
    assert (rv["averaged"], rv["spurious"], rv["both_empty"], rv["scored"]) == (2, 1, 1, 2)
    nothing = [simple("M", 3, seed, 0.5, "both_empty") for seed in (1, 2)]
    row = row_of(summarize_runs(nothing), "M", 3, "x")
    assert (row["averaged"], row["cases"], row["both_empty"]) == (1, 2, 2)
    assert np.isnan(row["std_over_cases"])
    assert row["std_over_seeds"] == 0


def test_cases_of_a_subject_count_once() -> None:
    runs = [simple("M", 3, 1, 0.2, 0.4, 0.9), simple("M", 3, 2, 0.4, 0.6, 0.9)]
    row = row_of(summarize_runs(runs, groups={"c0": "p", "c1": "p"}), "M", 3, "x")
    # subject means 0.3 and 0.9, then 0.5 and 0.9
    assert (row["mean"], row["std_over_seeds"]) == pytest.approx((0.65, 0.1 / 2**0.5))
    assert row["std_over_cases"] == pytest.approx(0.5 / 2**0.5)
    assert (row["cases"], row["units"], row["averaged"], row["scored"]) == (3, 2, 2, 6)
    assert row_of(summarize_runs(runs), "M", 3, "x")["mean"] == pytest.approx((0.5 + 1.9 / 3) / 2)


cell = st.one_of(st.floats(0, 1), st.sampled_from(["missed", "spurious", "both_empty"]))


@settings(max_examples=20)
@given(st.data(), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.randoms(use_true_random=False))
def test_summary_agrees_with_the_summaries_of_single_runs(data, cases, classes, seeds, random) -> None:  # type: ignore[no-untyped-def]
    """An independent path: summarize() of each run, aggregate_seeds() of those; whatever the order of the runs."""
    runs = [
        run_of(
            "M",
            labeled,
            seed,
            {f"c{case}": {f"k{index}": data.draw(cell) for index in range(classes)} for case in range(cases)},
        )
        for labeled in (3, "all")
        for seed in range(seeds)
    ]
    shuffled = random.sample(runs, len(runs))
    table = summarize_runs(shuffled, metrics=("hd95_voxels", "dice"))
    for labeled in (3, "all"):
        members = [run for run in runs if run.labeled == labeled]
        known = aggregate_seeds([summarize(run.table, protocol="p") for run in members])
        averaged = mean_over_seeds(members)["M"].rename(columns={"class": "name"})
        for name, scores in {**known["classes"], OVERALL: known["overall"]}.items():
            by_case = averaged if name == OVERALL else averaged[averaged["name"] == name]
            for metric in ("dice", "hd95_voxels"):
                row = row_of(table, "M", labeled, name, metric)
                expected = [
                    scores[metric]["mean"],
                    scores[metric]["std_over_seeds"],
                    by_case.groupby("case")[metric].mean().std(),
                ]
                got = [row["mean"], row["std_over_seeds"], row["std_over_cases"]]
                np.testing.assert_allclose(got, np.array(expected, dtype=float), atol=1e-9)
                for count in ("scored", "missed", "spurious", "both_empty"):
                    assert row[count] == scores[count]


def test_seeds_are_averaged_case_by_case() -> None:
    runs = [run_of("M", 3, 1, SEED_1), run_of("M", 3, 2, SEED_2), run_of("N", 3, 1, SEED_1)]
    tables = mean_over_seeds(runs)
    assert list(tables) == ["M", "N"]
    dice = tables["M"].set_index(["case", "class"])["dice"]
    assert dice.to_dict() == pytest.approx({("a", "RV"): 0.3, ("a", "LV"): 0.7, ("b", "RV"): 0.2, ("b", "LV"): 0.7})
    assert list(mean_over_seeds([*runs, run_of("M", "all", 1, SEED_1)])) == [
        "M, 3 labeled",
        "M, all labeled",
        "N, 3 labeled",
    ]


A = [(0.8, 0.6, 0.7, 0.9), (0.9, 0.7, 0.5, 0.9)]
B = [(0.5, 0.6, 0.5, 0.7), (0.6, 0.5, 0.4, 0.6)]


def seeds_of(method: str, values: list[tuple[float, ...]], labeled: int = 7) -> list[ScoredRun]:
    return [simple(method, labeled, seed, *dice) for seed, dice in enumerate(values, start=1)]


def test_comparison_is_of_the_seed_averaged_cases() -> None:
    result = compare_over_seeds([*seeds_of("A", A), *seeds_of("B", B)])
    tables = {name: simple(name, 7, 0, *np.mean(values, axis=0)).table for name, values in (("A", A), ("B", B))}
    expected = compare_methods(tables)
    pd.testing.assert_frame_equal(result[expected.columns], expected)
    row = result.iloc[0]
    assert row["n"] == 4  # not 8: seeds are no cases
    assert row["p"] == 2 / 2**4
    assert row["difference"] == pytest.approx(np.mean(A) - np.mean(B))
    assert (row["seeds_a"], row["seeds_b"], row["note"]) == (2, 2, "")


def test_more_seeds_of_the_same_values_add_no_certainty() -> None:
    few = compare_over_seeds([*seeds_of("A", A[:1]), *seeds_of("B", B[:1])])
    many = compare_over_seeds([*seeds_of("A", A[:1] * 5), *seeds_of("B", B[:1] * 5)])
    columns = ["n", "difference", "ci_low", "ci_high", "p", "p_holm"]
    pd.testing.assert_frame_equal(few[columns], many[columns])


def test_unequal_seeds_are_told() -> None:
    result = compare_over_seeds([*seeds_of("A", A), *seeds_of("B", B[:1]), *seeds_of("C", A)])
    by_pair = result.set_index(["a", "b"])
    assert by_pair["note"].to_dict() == {
        ("A", "B"): "A has seeds 1, 2 and B has seed 1.",
        ("A", "C"): "",
        ("B", "C"): "B has seed 1 and C has seeds 1, 2.",
    }
    assert by_pair.loc[("A", "B"), ["seeds_a", "seeds_b"]].tolist() == [2, 1]
    other = [simple("B", 7, seed, *dice) for seed, dice in zip((1, 5), B, strict=True)]
    assert compare_over_seeds([*seeds_of("A", A), *other])["note"].tolist() == [
        "A has seeds 1, 2 and B has seeds 1, 5."
    ]


def test_comparison_with_one_method_only() -> None:
    runs = [*seeds_of("A", A), *seeds_of("B", B), *seeds_of("C", A), *seeds_of("D", B)]
    result = compare_over_seeds(runs, against="B")
    assert result[["a", "b"]].to_numpy().tolist() == [["A", "B"], ["C", "B"], ["D", "B"]]
    every = compare_over_seeds(runs).set_index(["a", "b"])
    assert result["p"].iloc[0] == every.loc[("A", "B"), "p"]
    assert result["p_holm"].iloc[0] < every.loc[("A", "B"), "p_holm"]  # three tests, not six
    with pytest.raises(ConfigError, match="unknown method 'Bee'"):
        compare_over_seeds(runs, against="Bee")


def test_comparison_across_labeled_counts_names_them() -> None:
    result = compare_over_seeds(
        [*seeds_of("A", A, 3), *seeds_of("A", A, 7), *seeds_of("B", B, 7)], against="A, 7 labeled"
    )
    assert result["a"].tolist() == ["A, 3 labeled", "B, 7 labeled"]


def test_groups_reach_the_comparison() -> None:
    runs = [*seeds_of("A", A), *seeds_of("B", B)]
    assert compare_over_seeds(runs, groups={"c0": "p", "c1": "p"})["n"].tolist() == [3]


def test_seed_averages_can_be_ranked() -> None:
    ranking = rank_methods(mean_over_seeds([*seeds_of("B", B), *seeds_of("A", A)]))
    assert (ranking.methods, ranking.ranks) == (("A", "B"), (1.0, 2.0))


def test_runs_that_do_not_belong_together() -> None:
    runs = [*seeds_of("A", A), simple("B", 7, 1, 0.5, 0.5, 0.5)]
    for refuse in (summarize_runs, mean_over_seeds, compare_over_seeds):
        with pytest.raises(
            RunError, match=r"same cases.*c3 \(in A with 7 labeled, seed 1, not in B with 7 labeled, seed 1\)"
        ):
            refuse(runs)
        with pytest.raises(RunError, match="A with 7 labeled, seed 1 is given twice"):
            refuse([*seeds_of("A", A), *seeds_of("A", B)])
        with pytest.raises(RunError, match="no run"):
            refuse([])
        with pytest.raises(RunError, match="A with 7 labeled, seed 1 has no rows"):
            refuse([ScoredRun("A", 7, 1, make_table([]))])
    with pytest.raises(RunError, match="case c0 has class x twice"):
        table = seeds_of("A", A)[0].table
        summarize_runs([ScoredRun("A", 7, 1, pd.concat([table, table]))])
    with pytest.raises(ConfigError, match="did you mean 'dice'"):
        summarize_runs(seeds_of("A", A), metrics=("dise",))


@pytest.mark.parametrize("labeled", [0, -1, "some", 2.5, None])
def test_labeled_is_a_number_of_subjects_or_all(labeled: object) -> None:
    with pytest.raises(ValueError, match="labeled is a number of subjects"):
        ScoredRun("A", labeled, 1, make_table([]))  # type: ignore[arg-type]


def test_numbers_from_a_table_are_labeled_counts() -> None:
    assert ScoredRun("A", np.int64(3), 1, make_table([])).setting == ("A", 3)  # type: ignore[arg-type]
