from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from scantly.errors import ConfigError, RunError
from scantly.evaluation import (
    COUNTS,
    DEFINITIONS,
    aggregate_seeds,
    case_means,
    load_table,
    make_table,
    save_table,
    score_case,
    summarize,
)


def table_of(dice: dict[str, dict[str, float | str]], both_empty: float = np.nan) -> pd.DataFrame:
    """Table with Dice given per case and class, or a status in its place; other metrics follow from it."""
    rows = []
    for case, classes in dice.items():
        for name, value in classes.items():
            status = value if isinstance(value, str) else "scored"
            score = {"missed": 0.0, "spurious": 0.0, "both_empty": both_empty}.get(status, value)
            metrics = dict.fromkeys(DEFINITIONS, 10 * score) | {"dice": score}
            rows.append({"case": case, "class": name, "status": status, **metrics})
    return make_table(rows)


THREE = {
    "a": {"RV": 0.8, "LV": 0.9},
    "b": {"RV": 0.6, "LV": "both_empty"},
    "c": {"RV": "missed", "LV": 0.7},
}


def test_cases_are_averaged_before_classes() -> None:
    summary = summarize(table_of(THREE), protocol="acdc")
    rv, lv, overall = summary["classes"]["RV"], summary["classes"]["LV"], summary["overall"]
    assert rv["dice"] == pytest.approx({"mean": 1.4 / 3, "std_over_cases": np.std([0.8, 0.6, 0.0], ddof=1)})
    assert lv["dice"] == pytest.approx({"mean": 0.8, "std_over_cases": np.std([0.9, 0.7], ddof=1)})
    assert overall["dice"]["mean"] == pytest.approx((1.4 / 3 + 0.8) / 2)
    assert overall["dice"]["std_over_cases"] == pytest.approx(np.std([0.85, 0.6, 0.35], ddof=1))
    assert rv["hd95_voxels"]["mean"] == pytest.approx(14 / 3)


def test_every_case_is_counted() -> None:
    summary = summarize(table_of(THREE), protocol="acdc")
    assert {name: summary["classes"]["RV"][name] for name in COUNTS} == {
        "cases": 3,
        "averaged": 3,
        "scored": 2,
        "missed": 1,
        "spurious": 0,
        "both_empty": 0,
    }
    assert {name: summary["overall"][name] for name in COUNTS} == {
        "cases": 3,
        "averaged": 5,
        "scored": 4,
        "missed": 1,
        "spurious": 0,
        "both_empty": 1,
    }


def test_summary_is_json_and_says_what_it_is() -> None:
    table = table_of({"a": {"RV": 0.5, "LV": "both_empty"}})
    summary = summarize(table, protocol="acdc", convention="clean", tolerance_mm=3)
    text = json.loads(json.dumps(summary, allow_nan=False))
    assert text["classes"]["RV"]["dice"] == {"mean": 0.5, "std_over_cases": None}
    assert text["classes"]["LV"]["hd95_mm"] == {"mean": None, "std_over_cases": None}
    assert text["overall"]["dice"] == {"mean": 0.5, "std_over_cases": None}
    assert (text["protocol"], text["convention"], text["tolerance_mm"]) == ("acdc", "clean", 3.0)
    assert "left out" in text["empty_masks"]
    assert text["definitions"]["hd95_mm"]["unit"] == "mm"
    assert not text["definitions"]["hd95_mm"]["higher_is_better"]


def test_a_class_in_neither_mask_counts_0_in_the_means_of_the_literature() -> None:
    """THREE, with case b's LV at 0: per class (0.8 + 0.6 + 0) / 3 and (0.9 + 0 + 0.7) / 3, then their mean."""
    table = table_of(THREE, both_empty=0.0)
    summary = summarize(table, protocol="acdc", convention="literature")
    rv, lv, overall = summary["classes"]["RV"], summary["classes"]["LV"], summary["overall"]
    assert (rv["dice"]["mean"], lv["dice"]["mean"]) == pytest.approx((1.4 / 3, 1.6 / 3))
    assert lv["dice"]["std_over_cases"] == pytest.approx(np.std([0.9, 0.0, 0.7], ddof=1))
    assert overall["dice"]["mean"] == pytest.approx((1.4 / 3 + 1.6 / 3) / 2)
    assert overall["dice"]["std_over_cases"] == pytest.approx(np.std([0.85, 0.3, 0.35], ddof=1))
    assert (lv["averaged"], lv["both_empty"], overall["averaged"]) == (3, 1, 6)
    assert "flatters" in summary["empty_masks"]
    assert case_means(table, "dice").to_dict() == pytest.approx({"a": 0.85, "b": 0.3, "c": 0.35})


def test_tables_scored_by_another_convention_are_refused() -> None:
    """Such as those of an evaluation before the literature's 0 was followed, where a class in neither mask had 1."""
    for value, convention, said in ((1.0, "literature", "1"), (np.nan, "literature", "nothing"), (0.0, "clean", "0")):
        with pytest.raises(
            RunError, match=f"case b has class LV in neither mask and a Dice of {said}, .* '{convention}'.*evaluate"
        ):
            summarize(table_of(THREE, both_empty=value), protocol="p", convention=convention)


def test_definitions_are_the_columns_that_cases_are_scored_in() -> None:
    labels = np.ones((2, 2), int)
    row = score_case(labels, labels, classes=("background", "x"), spacing=(1, 1), case="a")[0]
    assert list(row) == list(make_table([row]).columns) == ["case", "class", "status", *DEFINITIONS]
    perfect = {name: 1.0 if definition.higher_is_better else 0.0 for name, definition in DEFINITIONS.items()}
    assert {name: row[name] for name in DEFINITIONS} == perfect


def test_tables_are_read_back_bit_for_bit(tmp_path: Path) -> None:
    table = table_of({"007": {"NA": 1 / 3, "None, or so": "both_empty"}, "nan": {"NA": 0.1, "None, or so": "missed"}})
    save_table(table, tmp_path / "evaluation" / "val.csv")
    back = load_table(tmp_path / "evaluation" / "val.csv")
    pd.testing.assert_frame_equal(back, table, check_exact=True)
    lines = (tmp_path / "evaluation" / "val.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("case,class,status,dice,jaccard,hd95_voxels,")
    assert len(lines) == 1 + 4
    assert [path.name for path in (tmp_path / "evaluation").iterdir()] == ["val.csv"]


def test_tables_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="does not exist"):
        load_table(tmp_path / "none.csv")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(RunError, match=r"empty\.csv is empty; evaluate again"):
        load_table(tmp_path / "empty.csv")
    (tmp_path / "ragged.csv").write_text("case,class\na,b\nc,d,e\n")
    with pytest.raises(RunError, match=r"ragged\.csv is not a table of metrics"):
        load_table(tmp_path / "ragged.csv")
    table_of(THREE).drop(columns=["asd_mm"]).to_csv(tmp_path / "old.csv", index=False)
    with pytest.raises(RunError, match=r"old\.csv lacks the columns asd_mm"):
        load_table(tmp_path / "old.csv")
    table_of(THREE).astype({"dice": object}).replace({"dice": {0.8: "good"}}).to_csv(tmp_path / "word.csv")
    with pytest.raises(RunError, match=r"word\.csv: column dice does not hold numbers .*good"):
        load_table(tmp_path / "word.csv")


def test_summaries_refuse_what_they_cannot_average() -> None:
    table = table_of(THREE)
    with pytest.raises(RunError, match="no rows"):
        summarize(table.iloc[:0], protocol="acdc")
    with pytest.raises(RunError, match="case a has class RV more than once"):
        summarize(pd.concat([table, table]), protocol="acdc")
    with pytest.raises(ConfigError, match="did you mean 'clean'"):
        summarize(table, protocol="acdc", convention="cleen")
    with pytest.raises(ConfigError, match="did you mean 'hd95_mm'"):
        case_means(table, "hd95")


def test_seeds_are_averaged_over_their_means() -> None:
    seeds = [table_of({"a": {"RV": value}, "b": {"RV": value + 0.2}}) for value in (0.2, 0.4, 0.6)]
    result = aggregate_seeds([summarize(table, protocol="acdc") for table in seeds])
    dice = result["classes"]["RV"]["dice"]
    assert dice["per_seed"] == pytest.approx([0.3, 0.5, 0.7])
    assert (dice["mean"], dice["std_over_seeds"]) == pytest.approx((0.5, 0.2))
    assert result["overall"]["dice"] == dice
    assert (result["seeds"], result["protocol"], result["overall"]["scored"]) == (3, "acdc", 6)
    json.dumps(result, allow_nan=False)


def test_a_seed_without_a_value_is_left_out_of_the_mean() -> None:
    tables = [table_of({"a": {"RV": 0.4, "LV": 0.5}}), table_of({"a": {"RV": "both_empty", "LV": 0.5}})]
    result = aggregate_seeds([summarize(table, protocol="acdc") for table in tables])
    assert result["classes"]["RV"]["dice"] == {"mean": 0.4, "std_over_seeds": None, "per_seed": [0.4, None]}


def test_only_seeds_of_one_thing_are_aggregated() -> None:
    clean = summarize(table_of(THREE), protocol="acdc")
    with pytest.raises(RunError, match=r"different convention \(clean, literature\)"):
        literature = table_of(THREE, both_empty=0.0)
        aggregate_seeds([clean, summarize(literature, protocol="acdc", convention="literature")])
    with pytest.raises(RunError, match="different classes"):
        aggregate_seeds([clean, summarize(table_of({"a": {"RV": 0.5}}), protocol="acdc")])
    with pytest.raises(RunError, match="no summary"):
        aggregate_seeds([])
