"""Signed distance maps against those of the public codes of DTC and SASSNet."""

from __future__ import annotations

import pytest
from golden_runs import computed_in
from golden_values import entries
from known_deviations import check
from mask_comparisons import compared_distance_map


def test_all_masks_are_there() -> None:
    shapes = [entry["shape"] for entry in entries("sdf").values()]
    assert len(shapes) == 19
    assert {len(shape) for shape in shapes} == {2, 3}


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("name", entries("sdf"))
def test_distance_maps(name: str, precision: str) -> None:
    with computed_in(precision):
        check("sdf", name, compared_distance_map(name), precision)
