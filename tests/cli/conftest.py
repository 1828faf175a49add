"""The command line in this process, and a small dataset that tests may spoil."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from cli_helpers import SMALL, Command, Outcome, contents, write_dataset

from scantly.cli import main


@pytest.fixture(scope="session")
def scantly() -> Command:
    """Run ``scantly WORDS...`` in this process."""

    def run(*words: str | Path) -> Outcome:
        out, err, hook = io.StringIO(), io.StringIO(), sys.excepthook
        try:
            with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as end:
                main([str(word) for word in words])
        finally:
            sys.excepthook = hook
        return Outcome(int(end.value.code or 0), out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def small() -> tuple[str, ...]:
    """Options of a training that takes well under a second."""
    return SMALL


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound dataset folder, to be read only."""
    return write_dataset(tmp_path_factory.mktemp("cli") / "sound")


@pytest.fixture
def dataset(sound: Path, tmp_path: Path) -> Path:
    """A sound dataset folder that the test may spoil."""
    return Path(shutil.copytree(sound, tmp_path / "dataset"))


@pytest.fixture
def two_channels(tmp_path: Path) -> Path:
    """A sound dataset folder of two channels that the test may spoil."""
    return write_dataset(tmp_path / "two-channels", channels=2)


@pytest.fixture(scope="session")
def trained(scantly: Command, sound: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished and evaluated run, to be read only."""
    run = tmp_path_factory.mktemp("runs") / "supervised"
    outcome = scantly("train", sound, "--method", "supervised", "--labeled", "2", "--out", run, *SMALL)
    assert outcome.status == 0, outcome.err
    evaluated = scantly("evaluate", run)
    assert evaluated.status == 0, evaluated.err
    before = contents(run)
    yield run
    assert contents(run) == before
