"""What a benchmark will cost: steps of every method on made-up images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from grid_helpers import SETTINGS, STEPS, spec_values

from scantly.benchmark import estimate as estimate_module
from scantly.benchmark.cells import resolve_cells
from scantly.benchmark.estimate import Estimate, estimates
from scantly.benchmark.spec import BenchmarkSpec
from scantly.methods import catalogue
from scantly.settings import merge
from small_methods import LEVELS, SMALL


def estimated(dataset: Path, known: dict[tuple[str, str], float] | None = None, **changes: Any) -> list[Estimate]:
    cells = resolve_cells(BenchmarkSpec.model_validate(spec_values(dataset, **changes)))
    return list(estimates(cells, known or {}, threads=1))


def small(name: str) -> dict[str, Any]:
    levels = {"widths": [4, 8, 16], "dropout": [0.0, 0.0, 0.0]} if LEVELS.get(name) else {}
    return {"name": name, "settings": SMALL.get(name, {}), "network": {"arguments": levels} if levels else {}}


def test_every_method_can_be_tried(phantom: Path) -> None:
    rows = [small(entry.name) for entry in catalogue.CATALOGUE]
    found = estimated(phantom, methods=rows, planned=True)
    assert [estimate.cell.split("/")[1].split("-")[0] for estimate in found] == [
        *(row["name"] for row in rows),
        "supervised_planned",
    ]
    for estimate in found:
        assert estimate.source == "tried"
        assert 0 < estimate.seconds < 600
        assert estimate.disk_bytes > 1000


@pytest.mark.parametrize("name", ["supervised", "mean_teacher", "lclpl"])
def test_volumes(phantom: Path, name: str) -> None:
    plan = {"spatial_dims": 3, "size": None, "patch_size": [16, 16, 16], "spacing": [5, 5, 5]}
    network = {"name": "vnet", "arguments": {"widths": [4, 8], "blocks": [1, 1], "dropout": 0.0}}
    settings = merge(SETTINGS, {"plan": plan})
    values = spec_values(phantom, methods=[{"name": name, "network": network, "settings": SMALL.get(name, {})}])
    values["datasets"]["phantom"]["settings"] = {**settings, "network": {}}
    cells = resolve_cells(BenchmarkSpec.model_validate(values))
    (found,) = estimates(cells, {}, threads=1)
    assert found.seconds > 0


def test_a_row_is_tried_once_and_what_was_measured_not_at_all(phantom: Path, monkeypatch) -> None:
    tried: list[tuple[str, bool]] = []

    def pretend(config: Any, *, timed: bool) -> tuple[float, float]:
        tried.append((config.method_name, timed))
        return 5.0, 100.0

    monkeypatch.setattr(estimate_module, "_try", pretend)
    found = estimated(
        phantom,
        known={("phantom", "ict"): 42.0},
        methods=["supervised", "ict"],
        seeds=[1, 2],
        entry={"labeled": [2, 3]},
        upper_bound=True,
    )
    assert tried == [("supervised", True), ("ict", False)]
    assert len(found) == 10
    assert {(e.seconds, e.source) for e in found if "ict" in e.cell} == {(42.0, "measured")}
    assert {(e.seconds, e.source) for e in found if "ict" not in e.cell} == {(5.0, "tried")}


def test_time_is_that_of_all_iterations(phantom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate_module, "_step_seconds", lambda *_: 0.5)
    (one,) = estimated(phantom)
    (staged,) = estimated(phantom, methods=[small("arco")])
    assert one.seconds == staged.seconds == 0.5 * STEPS


def test_disk_is_what_a_run_keeps(phantom: Path, undisturbed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate_module, "_step_seconds", lambda *_: 0.5)
    (estimate,) = estimated(phantom)
    model = len(undisturbed["phantom/supervised-2-seed1"]["model.safetensors"])
    assert 2 * model < estimate.disk_bytes < 5 * model
