"""The comparison itself: what it lets pass, and what it does not."""

from __future__ import annotations

import known_deviations
import pytest
import torch
from golden_values import Compared, array, compared_term, entries, inputs_of
from known_deviations import KNOWN_DEVIATIONS, Deviation, check

KNOWN = {("losses", "x"): Deviation("On purpose.", {"a": [2.0]})}
AGREES = Compared("b", "value", 1e-16, (1.0,))


def _differences(scale: float = 1.0, extra: float = 0.0) -> dict[str, float]:
    """Of the mean squared difference of mean_teacher, scaled, and with some of a teacher's gradient."""
    entry = entries("losses")["mean_teacher"]
    x = inputs_of(entry)
    loss = (x["student"][2:].softmax(1) - (x["teacher"] if extra else x["teacher"].detach()).softmax(1)).square().mean()
    compared = compared_term("consistency", entry["terms"]["consistency"], scale * loss, x)
    return {each.what: each.difference for each in compared}


def test_a_gradient_is_compared_in_all_its_entries() -> None:
    assert max(_differences().values()) < 1e-13
    doubled = _differences(scale=2.0)
    assert doubled["value"] == pytest.approx(1.0)
    assert doubled["gradient of student"] == pytest.approx(1.0)
    assert _differences(extra=1.0)["no gradient of teacher"] > 1e-6


def test_one_wrong_entry_of_a_gradient_is_seen() -> None:
    """It is none of the ten listed, and changes the norm by less than the projection."""
    entry = entries("losses")["mean_teacher"]
    x = inputs_of(entry)
    loss = (x["student"][2:].softmax(1) - x["teacher"].detach().softmax(1)).square().mean()
    norm = entry["terms"]["consistency"]["gradients"]["student"]["l2"]
    place = torch.zeros_like(x["student"]).view(-1)
    place[1500] = 1e-6 * norm
    wrong = (
        loss + (x["student"] * place.view(x["student"].shape)).sum() - float((x["student"].view(-1) @ place).detach())
    )
    compared = {each.what: each.difference for each in compared_term("c", entry["terms"]["consistency"], wrong, x)}
    assert compared["value"] < 1e-12
    assert compared["gradient of student"] > 1e-7


def test_what_is_beyond_its_bound_fails() -> None:
    check("losses", "x", [AGREES], "float64")
    check("losses", "x", [Compared("b", "value", 1e-6, (1.0,))], "float32")
    with pytest.raises(AssertionError, match="'b'"):
        check("losses", "x", [AGREES, Compared("b", "value", 1e-6, (1.0,))], "float64")
    with pytest.raises(AssertionError):
        check("losses", "x", [], "float64")
    check("losses", "x", [Compared("b", "no gradient of teacher", 0.0)], "float32")
    with pytest.raises(AssertionError, match="no gradient"):
        check("losses", "x", [Compared("b", "no gradient of teacher", 1e-9)], "float32")


def test_a_deviation_must_have_its_value_and_must_not_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_deviations, "KNOWN_DEVIATIONS", KNOWN)
    check("losses", "x", [AGREES, Compared("a", "value", 0.5, (2.0,))], "float64")
    with pytest.raises(AssertionError, match="neither theirs nor the deviation"):
        check("losses", "x", [AGREES, Compared("a", "value", 0.5, (2.1,))], "float64")
    with pytest.raises(AssertionError, match="a agrees; take it out of KNOWN_DEVIATIONS"):
        check("losses", "x", [AGREES, Compared("a", "value", 0.0, (2.0,))], "float64")
    with pytest.raises(AssertionError):
        check("losses", "x", [AGREES], "float64")  # the term is not there
    with pytest.raises(AssertionError, match="'b'"):
        check("losses", "x", [Compared("a", "value", 0.5, (2.0,)), Compared("b", "value", 0.5, (2.0,))], "float64")


def test_known_deviations_are_of_entries() -> None:
    assert all(name in entries(kind) for kind, name in KNOWN_DEVIATIONS)
    assert all(deviation.reason.endswith(".") for deviation in KNOWN_DEVIATIONS.values())


def test_shapes_are_made_by_hand_computed_rules() -> None:
    ball = array({"shape": [3, 3], "balls": [[[2, [1, 1], 1]]]})
    assert ball.tolist() == [[0, 2, 0], [2, 2, 2], [0, 2, 0]]
    box = array({"shape": [2, 3], "boxes": [[[[0, 1], [1, 3]]]]})
    assert box.tolist() == [[0, 1, 1], [0, 0, 0]]
    rows = array({"shape": [2, 2], "boxes": [[[[0, 1]]], [[[1, 2]]]]})
    assert rows.tolist() == [[1, 0], [0, 1]]
