"""Cells: which there are, in which order, and what each of them is trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from grid_helpers import SETTINGS, STEPS, spec_values

from scantly.benchmark import cells as cells_module
from scantly.benchmark.cells import ALL, PLANNED, Cell, cells_of, resolve_cells
from scantly.benchmark.spec import BenchmarkSpec
from scantly.errors import ConfigError
from scantly.files import read_json, write_json
from scantly.settings import merge


def spec_of(dataset: Path | str, **changes: Any) -> BenchmarkSpec:
    return BenchmarkSpec.model_validate(spec_values(dataset, **changes))


def names(**changes: Any) -> list[str]:
    return [cell.name for cell in cells_of(spec_of("x", **changes))]


def test_every_row_is_there_once_before_any_is_there_twice() -> None:
    found = names(
        methods=["ict", {"name": "ict", "label": "long"}],
        seeds=[5, 3],
        entry={"labeled": [3, "2.5%"]},
        lower_bound=True,
        upper_bound=True,
        planned=True,
    )
    rows = ["supervised", "ict", "long", PLANNED]
    expected = [f"phantom/{row}-{count}-seed5" for count in ("3", "2.5pct") for row in rows]
    expected += ["phantom/supervised-all-seed5"]
    assert found == [*expected, *(name.replace("seed5", "seed3") for name in expected)]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({"methods": ["ict"], "lower_bound": True}, ["supervised-2", "ict-2"]),
        ({"methods": ["ict"], "lower_bound": False}, ["ict-2"]),
        ({"methods": ["ict", "supervised"], "lower_bound": True}, ["ict-2", "supervised-2"]),
        ({"methods": ["supervised"], "upper_bound": True}, ["supervised-2", "supervised-all"]),
        ({"methods": ["ict"], "upper_bound": True}, ["ict-2", "supervised-all"]),
        ({"methods": ["ict"], "planned": True}, ["ict-2", f"{PLANNED}-2"]),
    ],
)
def test_bounds_and_the_planned_row(changes: dict[str, Any], rows: list[str]) -> None:
    assert names(**changes) == [f"phantom/{row}-seed1" for row in rows]


@pytest.fixture(scope="module")
def resolved(phantom: Path) -> dict[str, Cell]:
    """Cells by row and labels, of a benchmark with everything."""
    spec = spec_of(
        phantom,
        methods=[
            {"name": "mean_teacher", "label": "mt", "settings": {"consistency": 0.5}, "training": {"lr": 0.02}},
            {"name": "ict", "network": {"arguments": {"widths": [8, 16]}}},
        ],
        seeds=[1, 2],
        entry={"labeled": [2, "50%"], "settings": {"data": {"seed_labeled": 4}}},
        lower_bound=True,
        planned=True,
    )
    return {f"{c.row}-{c.labeled}-{c.seed}": c for c in resolve_cells(spec, flags={"device": "cpu"})}


def test_what_a_row_says_of_its_method_training_and_network(resolved: dict[str, Cell]) -> None:
    mt, ict = resolved["mt-2-1"].config, resolved["ict-2-2"].config
    assert mt is not None
    assert ict is not None
    assert mt.method["consistency"] == 0.5
    assert (mt.training.lr, ict.training.lr) == (0.02, 0.01)
    assert mt.network.arguments["widths"] == [4, 8]
    assert ict.network.arguments == {"widths": [8, 16], "dropout": [0.1, 0.3]}
    assert (mt.training.seed, ict.training.seed) == (1, 2)


def test_cells_of_a_count_differ_in_method_and_seed_alone(resolved: dict[str, Cell]) -> None:
    for cell in resolved.values():
        assert cell.config is not None
        assert cell.config.training.steps == STEPS
        assert cell.split == "test"
        assert len(cell.config.split["labeled"]) == (2 if cell.labeled == 2 else 3)  # half of seven, rounded down
    splits = {str(cell.config.split) for cell in resolved.values() if cell.config and cell.labeled == 2}
    assert len(splits) == 1  # the planned row too, though labeled cases were drawn at random
    one, two = resolved["supervised-2-1"].config, resolved["supervised-2-2"].config
    assert one is not None
    assert two is not None
    assert two == one.model_copy(update={"training": one.training.model_copy(update={"seed": 2})})


def test_the_planned_row(resolved: dict[str, Cell]) -> None:
    planned, plain = resolved[f"{PLANNED}-2-1"].config, resolved["supervised-2-1"].config
    assert planned is not None
    assert plain is not None
    assert planned.method["name"] == "supervised"
    assert planned.network.name == "dynunet"
    assert planned.network.arguments["deep_supervision"] is True
    assert planned.plan.spatial_dims == plain.plan.spatial_dims == 2
    assert planned.training.steps == plain.training.steps
    assert planned.plan.size is None
    assert plain.plan.size == (32, 32)
    assert planned.evaluation.selection == plain.evaluation.selection


def test_the_planned_row_follows_the_others_in_what_is_no_plan(phantom: Path) -> None:
    changed = {"evaluation": {"selection": "last"}, "training": {"precision": "bf16"}, "plan": {"spatial_dims": 3}}
    small = {"size": None, "patch_size": [4, 16, 16], "spacing": [27, 5, 5]}
    settings = merge(changed, {"plan": small, "network": {"name": "vnet", "arguments": {"dropout": 0.0}}})
    spec = spec_of(phantom, planned=True, entry={"split": "val", "settings": settings})
    _, planned = resolve_cells(spec)
    assert planned.row == PLANNED
    assert planned.config is not None
    assert planned.config.evaluation.selection == "last"
    assert planned.config.training.precision == "bf16"
    assert planned.config.plan.spatial_dims == 3


def test_the_upper_bound_has_all_labels(phantom: Path) -> None:
    lower, upper = resolve_cells(spec_of(phantom, upper_bound=True))
    assert (upper.row, upper.labeled, upper.name) == ("supervised", ALL, "phantom/supervised-all-seed1")
    assert lower.config is not None
    assert upper.config is not None
    assert len(upper.config.split["labeled"]) == 7
    assert not upper.config.split["unlabeled"]
    assert upper.config.data.labeled is None
    plans = [cell.plan.model_dump(exclude={"fingerprint"}) for cell in (lower.config, upper.config)]
    assert plans[0] == plans[1]
    assert upper.config.network == lower.config.network


def test_a_recipe_of_ones_own_may_not_take_labels_from_the_upper_bound(phantom: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump({"data": {"labeled": 2}, "training": {"lr": 0.5}}))
    spec = spec_of(phantom, entry={"recipe": str(recipe)})
    (cell,) = resolve_cells(spec)
    assert cell.config is not None
    assert cell.config.training.lr == 0.5
    with pytest.raises(ConfigError, match="set upper_bound to false"):
        resolve_cells(spec.model_copy(update={"upper_bound": True}))


def test_flags_hold_for_every_cell(phantom: Path) -> None:
    spec = spec_of(phantom, methods=["ict"], lower_bound=True, planned=True)
    for cell in resolve_cells(spec, flags={"device": None, "precision": "bf16"}):
        assert cell.config is not None
        assert (cell.config.training.device, cell.config.training.precision) == ("cpu", "bf16")


def test_a_count_is_resolved_once_for_all_seeds(phantom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    resolve = cells_module.resolve
    monkeypatch.setattr(cells_module, "resolve", lambda *a, **k: calls.append(k) or resolve(*a, **k))
    cells = resolve_cells(spec_of(phantom, seeds=[4, 5, 6], upper_bound=True))
    assert len(calls) == 2
    assert [cell.config.training.seed for cell in cells if cell.config] == [4, 4, 5, 5, 6, 6]


def test_everything_that_is_wrong_is_told_at_once(phantom: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("scantly.benchmark.nnunet._which", lambda _: None)
    bad = merge(SETTINGS, {"training": {"lr": -1}})
    values = spec_values(
        phantom,
        methods=["mean_techer", {"name": "ict", "settings": {"consistncy": 1}}, {"name": "ua_mt", "network": {"x": 1}}],
        seeds=[1, 2],
        entry={"labeled": [2, 99], "settings": bad},
    )
    gone = {"path": str(tmp_path / "nowhere"), "labeled": [1], "recipe": "acdcc"}
    spec = BenchmarkSpec.model_validate({**values, "datasets": {**values["datasets"], "gone": gone}, "nnunetv2": True})
    with pytest.raises(ConfigError) as refused:
        resolve_cells(spec)
    sentences = str(refused.value).splitlines()
    expected = [
        "setting 'training.lr' is -1",
        "did you mean 'mean_teacher'?",
        "did you mean 'method.consistency'?",
        "unknown setting 'network.x'",
        "--labeled 99 asks for 99 subjects",
        f"the dataset folder {tmp_path / 'nowhere'} does not exist",
        "did you mean 'acdc'?",
        "nnunetv2",
    ]
    assert len(sentences) == len(expected)
    for part in expected:
        assert sum(part in sentence for sentence in sentences) == 1, part
    assert sentences[1].startswith("phantom/mean_techer-2-seed1 and 5 more: ") or "and 5 more" in "".join(sentences)


def test_cases_that_chose_the_checkpoint_are_not_reported_on(phantom: Path) -> None:
    with pytest.raises(ConfigError, match=r"set evaluation\.selection to last"):
        resolve_cells(spec_of(phantom, entry={"split": "val"}))


def test_several_devices_per_cell_are_refused(phantom: Path) -> None:
    with pytest.raises(ConfigError, match=r"a cell trains on one device; leave out training\.devices"):
        resolve_cells(spec_of(phantom, entry={"settings": {"training": {"devices": 2}}}))


def test_without_test_cases_the_validation_cases_are_reported_on(phantom: Path, tmp_path: Path) -> None:
    cohort = tmp_path / "cohort"
    cohort.mkdir()
    for item in phantom.iterdir():
        (cohort / item.name).symlink_to(item)
    (cohort / "splits.json").unlink()
    splits = read_json(phantom / "splits.json")
    write_json(cohort / "splits.json", {**splits, "test": []})
    (cell,) = resolve_cells(spec_of(cohort))
    assert cell.split == "val"
    write_json(cohort / "splits.json", {**splits, "val": [], "test": []})
    with pytest.raises(ConfigError, match="there are no val cases to report on; choose another split"):
        resolve_cells(spec_of(cohort))
