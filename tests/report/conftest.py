"""Run folders made by hand: a generated cohort, predictions that are its labels moved by a known amount."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scantly import imaging
from scantly.data.phantom import write_phantom
from scantly.evaluation import make_table, save_table, score_case, summarize
from scantly.files import read_json, write_json, write_text, write_yaml
from scantly.settings import merge
from scantly.training.run import Run

CLASSES = ("background", "RV", "MYO", "LV")
MakeRun = Callable[..., Run]


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight subjects: three to train on, one for validation, four to test on."""
    folder = tmp_path_factory.mktemp("phantom") / "cohort"
    return write_phantom(folder, subjects=8, val=1, test=4, size=(5, 40, 48), seed=1)


def write_run(
    root: Path,
    cohort: Path,
    name: str,
    *,
    method: str = "supervised",
    labeled: int = 1,
    seed: int = 0,
    shift: int = 1,
    lose: str | None = None,
    settings: Mapping[str, Any] | None = None,
    evaluate: bool = True,
) -> Run:
    """Write an evaluated run folder whose predictions are the labels moved by ``shift`` pixels."""
    folder = root / name
    splits = read_json(cohort / "splits.json")
    config = merge(
        {
            "recipe": None,
            "data": {"dataset": str(cohort), "labeled": labeled},
            "plan": {"patch_size": [40, 48], "reasons": {"patch_size": "fits"}},
            "method": {"name": method, **({"consistency": 0.1} if method != "supervised" else {})},
            "training": {"steps": 60, "seed": seed, "lr": 0.01},
            "evaluation": {"protocol": "clean", "flaws": []},
            "split": {
                "labeled": splits["train"][:labeled],
                "unlabeled": splits["train"][labeled:],
                "val": splits["val"],
                "test": splits["test"],
                "unit": "subject",
                "groups": splits["groups"],
            },
        },
        settings or {},
    )
    write_yaml(folder / "config.yaml", config)
    write_json(folder / "environment.json", {"scantly": "0", "threads": 1, "packages": {"torch": "2"}})
    write_text(folder / "log" / "metrics.csv", _log(method))
    if evaluate:
        _evaluate(folder, cohort, config, shift, lose)
    return Run.open(folder)


@pytest.fixture
def make_run(tmp_path: Path, cohort: Path) -> MakeRun:
    """Write a run below the test's own folder."""
    return partial(write_run, tmp_path, cohort)


@pytest.fixture(scope="session")
def shared_runs(tmp_path_factory: pytest.TempPathFactory, cohort: Path) -> list[Run]:
    """Two seeds of a lower bound, Mean Teacher, an upper bound; for tests that only read."""
    make = partial(write_run, tmp_path_factory.mktemp("runs"), cohort)
    return [
        make("low-0", seed=0, shift=3),
        make("low-1", seed=1, shift=4),
        make("mt-0", method="mean_teacher", shift=1),
        make("all", labeled=3, shift=0),
    ]


def _log(method: str) -> str:
    lines = ["iteration,stage,name,value"]
    for iteration in range(10, 61, 10):
        lines.append(f"{iteration},train,loss/supervised,{1 / iteration}")
        if method != "supervised":
            lines.append(f"{iteration},train,loss/consistency,{0.001 * iteration}")
        if iteration % 30 == 0:
            lines.append(f"{iteration},train,val/dice,{iteration / 100}")
    return "\n".join(lines) + "\n"


def _evaluate(folder: Path, cohort: Path, config: dict[str, Any], shift: int, lose: str | None) -> None:
    convention = config["evaluation"]["protocol"]
    rows = []
    for number, case in enumerate(config["split"]["test"]):
        reference = imaging.read_label(cohort / "labelsTs" / f"{case}.nii.gz")
        prediction = np.roll(reference.array, shift + number, axis=2)
        if lose == case:
            prediction[prediction == 1] = 0
        imaging.write_label(folder / "predictions" / "test" / f"{case}.nii.gz", prediction, reference.geometry)
        spacing = reference.geometry.spacing
        rows += score_case(
            prediction,
            reference.array,
            classes=CLASSES,
            spacing=spacing,
            case=case,
            convention=convention,
        )
    table = make_table(rows)
    save_table(table, folder / "evaluation" / "test.csv")
    write_json(folder / "evaluation" / "test.json", summarize(table, protocol=convention, convention=convention))
