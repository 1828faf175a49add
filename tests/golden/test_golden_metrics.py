"""Metrics of mask pairs against those of medpy."""

from __future__ import annotations

import pytest
from golden_values import entries
from known_deviations import check
from mask_comparisons import METRIC_NAMES, compared_metrics


def test_all_pairs_are_there() -> None:
    pairs = entries("metrics").values()
    assert len(pairs) == 40
    assert {len(pair["shape"]) for pair in pairs} == {2, 3}
    assert sum(pair["spacing"] is None for pair in pairs) == 20


@pytest.mark.parametrize("name", entries("metrics"))
def test_metrics(name: str) -> None:
    compared = list(compared_metrics(name))
    assert {each.term for each in compared} == set(METRIC_NAMES)
    check("metrics", name, compared, "float64")
