"""Shared fixtures: the real scans, a cache folder of the tests' own, a tiny cohort and tiny settings."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from scantly.data.phantom import write_phantom

# Property tests look at the same examples in every run: a newcomer's run never fails by chance. Random search is a
# campaign (make campaign), with as many examples of each as its number says; its seed repeats it.
CAMPAIGN = int(os.environ.get("SCANTLY_CAMPAIGN", "0"))
settings.register_profile("test", derandomize=True, deadline=None, database=None)
settings.register_profile("campaign", derandomize=False, deadline=None, database=None, print_blob=True)
settings.load_profile("campaign" if CAMPAIGN else "test")

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


@pytest.hookimpl(trylast=True)  # hypothesis marks its tests in this hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A campaign's number of examples holds also where a test names its own."""
    for item in items if CAMPAIGN else ():
        if item.get_closest_marker("hypothesis") is not None:
            test = item.function  # type: ignore[attr-defined]
            test._hypothesis_internal_use_settings = settings(
                test._hypothesis_internal_use_settings, max_examples=CAMPAIGN
            )


@pytest.fixture(autouse=True)
def _same_chance() -> None:
    """Every test draws the same from the global generators, whatever ran before it in its process."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (libraries draw from it)
    torch = sys.modules.get("torch")  # without it, it begins with a seed of its own, which is always the same
    if torch is not None:
        torch.manual_seed(0)


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
