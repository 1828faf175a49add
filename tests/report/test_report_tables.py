"""The page's numbers against pandas and against hand-made tables."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from scantly.evaluation import DEFINITIONS
from scantly.report import comparison_table
from scantly.report.groups import Method, Result, Section, collect
from scantly.report.tables import OVERALL, case_table, class_tables, columns, gains, overview, statistics
from scantly.training.run import Run

MakeRun = Callable[..., Run]


def hand_made(values: dict[str, list[list[float]]], *, bound: dict[str, str] | None = None) -> Section:
    """A section of two classes whose Dice are ``values[method][class][case]``; all else is 1."""
    methods = []
    count = len(next(iter(values.values()))[0])
    cases = [f"c{number}" for number in range(count)]
    for label, classes in values.items():
        rows = [
            {"case": case, "class": name, "status": "scored", **dict.fromkeys(DEFINITIONS, 1.0), "dice": dice}
            for name, scores in zip(("A", "B"), classes, strict=True)
            for case, dice in zip(cases, scores, strict=True)
        ]
        table = pd.DataFrame(rows)
        run = Run.__new__(Run)
        result = Result(run=run, name=label, seed=0, table=table, summary={})
        methods.append(Method(label, label, 3, (bound or {}).get(label, ""), (result,), table))
    return Section("clean", "test", tuple(methods), tuple(cases), ("A", "B"), {}, "subject", (), 2.0)


def test_class_table_by_hand() -> None:
    section = hand_made({"one": [[0.2, 0.4], [0.6, 1.0]], "two": [[0.5, 0.5], [0.5, 0.5]]})
    shown, classes = class_tables(section)
    dice = [column.metric for column in shown].index("dice")
    texts = {name: [(row.cells[dice].text, row.cells[dice].spread) for row in rows] for name, rows in classes}
    assert texts == {
        "A": [("0.300", "± 0.141"), ("0.500", "± 0.000")],  # |0.4 - 0.2| / sqrt(2)
        "B": [("0.800", "± 0.283"), ("0.500", "± 0.000")],
        OVERALL: [("0.550", "± 0.212"), ("0.500", "± 0.000")],  # case means 0.4 and 0.7
    }
    assert [[row.cells[dice].best for row in rows] for _, rows in classes] == [
        [False, True],
        [True, False],
        [True, False],
    ]


def test_upper_bound_is_never_the_best() -> None:
    values = {"one": [[0.2], [0.2]], "two": [[0.5], [0.5]], "all": [[0.9], [0.9]]}
    section = hand_made(values, bound={"all": "upper bound"})
    shown, rows = overview(section)
    dice = [column.metric for column in shown].index("dice")
    assert [row.cells[dice].best for row in rows] == [False, True, False]


def test_overview_aggregates_seeds_and_lists_them(make_run: MakeRun) -> None:
    runs = [make_run("a", seed=1, shift=1), make_run("b", seed=2, shift=3), make_run("c", seed=3, shift=4)]
    (section,) = collect(runs)
    shown, rows = overview(section)
    means = [run.evaluation("test").groupby("class")["dice"].mean().mean() for run in runs]
    dice = [column.metric for column in shown].index("dice")
    assert [row.head for row in rows] == ["Supervised, 1 labeled", "a", "b", "c"]
    assert rows[0].note == "seeds 1, 2, 3"
    assert rows[0].cells[dice].text == f"{np.mean(means):.3f}"
    assert rows[0].cells[dice].spread == f"± {np.std(means, ddof=1):.3f}"
    assert [row.cells[dice].text for row in rows[1:]] == [f"{mean:.3f}" for mean in means]


def test_missed_structures_are_counted_over_seeds(make_run: MakeRun) -> None:
    runs = [make_run("a", seed=1, lose="subject005"), make_run("b", seed=2, lose="subject005")]
    (section,) = collect(runs)
    assert [(row.missed, row.spurious) for row in overview(section)[1]] == [(2, 0), (1, 0), (1, 0)]
    by_class = {name: rows[0].missed for name, rows in class_tables(section)[1]}
    assert by_class == {"RV": 2, "MYO": 0, "LV": 0, OVERALL: 2}


def test_columns_in_mm_only_where_spacing_is_known() -> None:
    section = hand_made({"one": [[0.2], [0.2]]})
    assert ("nsd_mm", "NSD", "2 mm") in [(c.metric, c.title, c.unit) for c in columns(section)]
    table = section.methods[0].table
    for name in DEFINITIONS:
        if name.endswith("_mm"):
            table[name] = np.nan
    assert not [column for column in columns(section) if column.metric.endswith("_mm")]


def test_statistics_read_method_minus_bound() -> None:
    base = np.linspace(0.3, 0.6, 8)
    values = {
        "low": [list(base), list(base)],
        "new": [list(base + 0.1), list(base + 0.1)],
        "all": [list(base + 0.3), list(base + 0.3)],
    }
    section = hand_made(values, bound={"low": "lower bound", "all": "upper bound"})
    dice = statistics(section)[0]
    assert [(row["a"], row["b"], row["difference"]) for row in dice.rows] == [
        ("new", "low (lower bound)", "+0.100"),
        ("new", "all (upper bound)", "−0.200"),
        ("low (lower bound)", "all (upper bound)", "−0.300"),
    ]
    assert dice.number == 8
    assert dice.rows[0]["interval"] == "+0.100 to +0.100"
    assert dice.rows[0]["p"] == "0.008"  # 2 / 2^8
    assert dice.rows[0]["p_holm"] == "0.023"  # three comparisons
    assert gains(section) == [
        "new: mean Dice +0.100 against low (lower bound); 95 % interval +0.100 to +0.100, "
        "p = 0.023 (Wilcoxon, Holm), 8 subjects."
    ]


def test_one_method_has_no_statistics_and_says_so() -> None:
    blocks = statistics(hand_made({"one": [[0.2, 0.3], [0.2, 0.3]]}))
    assert all(not block.rows and "one method only" in block.reason for block in blocks)


def test_hardest_case_comes_first_and_absent_values_are_dashes() -> None:
    nan = float("nan")
    section = hand_made({"one": [[0.9, nan, 0.2], [0.7, nan, nan]], "two": [[0.9, 0.5, 0.9], [0.9, 0.5, 0.9]]})
    assert case_table(section) == [
        ("c2", ["0.200", "0.900"]),
        ("c0", ["0.800", "0.900"]),
        ("c1", ["–", "0.500"]),
    ]


def test_comparison_table_holds_numbers_for_scripts(make_run: MakeRun) -> None:
    runs = [make_run("a", seed=1), make_run("b", seed=2, shift=3), make_run("mt", method="mean_teacher")]
    table = comparison_table(runs).set_index(["method", "class"])
    assert table.index.tolist()[:4] == [("Supervised, 1 labeled", n) for n in ("RV", "MYO", "LV", OVERALL)]
    row = table.loc[("Supervised, 1 labeled", "LV")]
    per_seed = [t[t["class"] == "LV"]["hd95_mm"] for run in runs[:2] if (t := run.evaluation("test")) is not None]
    assert row["hd95_mm"] == pytest.approx(np.mean([values.mean() for values in per_seed]))
    assert row["hd95_mm_std_over_seeds"] == pytest.approx(np.std([v.mean() for v in per_seed], ddof=1))
    over_cases = (per_seed[0].to_numpy() + per_seed[1].to_numpy()) / 2
    assert row["hd95_mm_std_over_cases"] == pytest.approx(np.std(over_cases, ddof=1))
    assert (row["seeds"], row["cases"], row["bound"]) == (2, 4, "lower bound")
    assert np.isnan(table.loc[("Mean Teacher, 1 labeled", "LV"), "dice_std_over_seeds"])
