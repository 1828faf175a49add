"""Shared fixtures: the real scans, a cache folder of the tests' own, a tiny cohort and tiny settings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from scantly.data.phantom import write_phantom

DATA = Path(os.environ.get("SCANTLY_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real datasets (``acdc``, ``la``, ``acdc_mini``, ``la_mini``)."""
    if not (DATA / "acdc" / "imagesTr").is_dir():
        message = f"the real scans are not in {DATA}; set SCANTLY_DATA to where they are"
        if os.environ.get("SCANTLY_REQUIRE_DATA"):
            pytest.fail(message)
        pytest.skip(message)
    return DATA


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Prepared cases never land in the user's cache."""
    os.environ["SCANTLY_CACHE"] = str(tmp_path_factory.mktemp("cache"))


TINY: dict[str, Any] = {
    "plan": {
        "spatial_dims": 2,
        "size": [32, 32],
        "normalization": [{"scheme": "zscore"}],
        "labeled_batch_size": 2,
        "unlabeled_batch_size": 2,
        "foreground_fraction": 0.5,
    },
    "network": {"arguments": {"widths": [4, 8], "dropout": [0.1, 0.3]}},
    "training": {"steps": 12, "validate_every": 4, "checkpoint_every": 3, "log_every": 1, "device": "cpu"},
}


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight generated subjects: five to train, one to validate, two to test."""
    root = tmp_path_factory.mktemp("cohort") / "phantom"
    return write_phantom(root, subjects=8, val=1, test=2, size=(4, 32, 32))


@pytest.fixture
def tiny() -> dict[str, Any]:
    """Settings of a training of seconds."""
    return TINY
