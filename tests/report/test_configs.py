"""What differs between configurations."""

from __future__ import annotations

from collections.abc import Callable

from scantly.report.configs import as_yaml, differences, differing_keys, flatten
from scantly.training.run import Run


def test_flatten_keeps_lists_and_order() -> None:
    assert list(flatten({"b": {"y": [1, 2], "x": None}, "a": 1}).items()) == [
        ("b.y", [1, 2]),
        ("b.x", None),
        ("a", 1),
    ]


def test_differing_keys_finds_changed_and_missing_ones() -> None:
    settings = [{"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 5, "d": 4}]
    assert differing_keys(settings) == ["b", "c", "d"]


def test_differences_show_every_run_and_leave_out_reasons(make_run: Callable[..., Run]) -> None:
    long = [f"subject{number:03d}" for number in range(40)]
    runs = [
        make_run("a", settings={"plan": {"reasons": {"patch_size": "one"}}}),
        make_run("b", seed=7, settings={"plan": {"reasons": {"patch_size": "two"}}, "split": {"unlabeled": long}}),
        make_run("c", method="mean_teacher"),
    ]
    lines = {line.key: line.values for line in differences(runs)}
    assert lines["training.seed"] == ("0", "7", "0")
    assert lines["method.consistency"].count("—") == 2
    assert any("40 entries: subject000 … subject039" in value for value in lines["split.unlabeled"])
    assert not any(key.startswith("plan.reasons") for key in lines)
    assert "training.lr" not in lines


def test_yaml_keeps_order_and_text() -> None:
    assert as_yaml({"b": {"x": 1}, "a": "größer"}) == "b:\n  x: 1\na: größer\n"
