"""The tests themselves: nothing in them is left to chance."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).parents[1]
CAMPAIGN = bool(os.environ.get("SCANTLY_CAMPAIGN"))

SEARCH = """
from hypothesis import given, settings, strategies as st
seen = []
@settings(max_examples=7)
@given(st.integers())
def test_numbers(number):
    seen.append(number)
def test_how_many():
    print("SEEN", len(seen), hash(tuple(seen)))
"""


@pytest.mark.skipif(CAMPAIGN, reason="a campaign searches at random")
def test_property_tests_look_at_the_same_examples_in_every_run() -> None:
    assert settings.default is not None
    assert (settings.default.derandomize, settings.default.deadline, settings.default.database) == (True, None, None)


@pytest.mark.parametrize("time", [1, 2])
def test_the_global_generators_begin_alike_in_every_test(time: int) -> None:
    drawn = random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    assert drawn == (random.random(), float(np.random.rand()), float(torch.rand(())))  # noqa: NPY002


def _search(folder: Path, *, seed: int, campaign: int) -> str:
    """What a test that was written to the folder has seen, under the settings of this project's tests."""
    (folder / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "test_search.py").write_text(SEARCH)
    environment = os.environ | {"SCANTLY_CAMPAIGN": str(campaign)}
    words = ["-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", f"--hypothesis-seed={seed}", str(folder)]
    command = [sys.executable, "-m", "pytest", *words]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (said,) = re.findall(r"SEEN .*", done.stdout)
    return str(said)


def test_a_campaign_searches_as_often_as_asked_and_its_seed_repeats_it(tmp_path: Path) -> None:
    one, again, other = (_search(tmp_path, seed=seed, campaign=60) for seed in (1, 1, 2))
    assert one == again != other
    assert one.startswith("SEEN 60 ")


def test_no_test_draws_from_a_generator_without_a_seed() -> None:
    unseeded = re.compile(r"default_rng\(\)|random\.Random\(\)|SystemRandom|torch\.seed\(")
    found = [
        path.name
        for path in ROOT.glob("tests/**/*.py")
        if path != Path(__file__) and unseeded.search(path.read_text(encoding="utf-8"))
    ]
    assert not found
