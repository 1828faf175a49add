"""Losses, gradients, ramps, learning rates and the moving average against values of the public codes."""

from __future__ import annotations

import pytest
import torch
from golden_runs import computed_in
from golden_values import Entry, entries, fill, golden, inputs_of
from known_deviations import check
from loss_comparisons import LOSSES, SCHEDULES, compared_loss, compared_schedule

ENTRIES = entries("losses")


def test_every_entry_is_compared() -> None:
    assert LOSSES.keys() | SCHEDULES.keys() == ENTRIES.keys()
    assert not LOSSES.keys() & SCHEDULES.keys()
    assert len(golden("losses")["entries"]) == 35
    schedules = {name for name, value in ENTRIES["learning_rates"].items() if isinstance(value, dict)}
    assert {each.term for each in compared_schedule("learning_rates")} == schedules
    ramps = {name for name, value in ENTRIES["ramps"].items() if isinstance(value, dict) and "values" in value}
    assert {each.term for each in compared_schedule("ramps")} == ramps


@pytest.mark.parametrize("name", [name for name in ENTRIES if "input_sums" in ENTRIES[name]])
def test_the_inputs_are_those_of_the_file(name: str) -> None:
    entry: Entry = ENTRIES[name]
    sums = {key: float(values.detach().double().sum()) for key, values in inputs_of(entry).items()}
    assert {key: sums[key] for key in entry["input_sums"]} == pytest.approx(entry["input_sums"], rel=1e-12, abs=1e-9)
    assert sums.keys() - entry["input_sums"].keys() <= {"box", "box1", "box2", "positions"}


def test_the_first_values_of_the_inputs() -> None:
    x = inputs_of(ENTRIES["supervised_2d"])
    assert x["logits"].flatten()[:3].tolist() == pytest.approx([-1.58030498028, -4.06925106049, 1.20660352707])
    assert x["labels"].flatten()[:8].tolist() == [1, 0, 2, 2, 0, 3, 1, 1]
    assert torch.equal(x["logits"], x["logits"].float().double())


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str, precision: str) -> None:
    with computed_in(precision) as dtype:
        compared = list(compared_loss(name, dtype))
    assert {each.term for each in compared} == ENTRIES[name]["terms"].keys()
    check("losses", name, compared, precision)


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name: str, precision: str) -> None:
    with computed_in(precision):
        check("losses", name, compared_schedule(name), precision)


def test_nothing_of_the_precision_stays_behind() -> None:
    with computed_in("float64"):
        assert torch.ones(1).float().dtype == torch.zeros(1).dtype == torch.float64
    assert torch.ones(1).double().float().dtype == torch.zeros(1).dtype == torch.float32
    assert not fill(torch.nn.Linear(1, 1)).training
