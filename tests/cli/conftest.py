"""The command line in this process, and a small dataset of NIfTI files that tests may spoil."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from scantly.cli import main

AFFINE = np.diag([-1.5, -1.5, 8.0, 1.0])
SMALL = (
    *("--size", "32", "32", "--steps", "4", "--device", "cpu", "--set"),
    *("network.arguments.widths=[4,8]", "network.arguments.dropout=[0,0]"),
    *("plan.labeled_batch_size=2", "plan.unlabeled_batch_size=2", "training.checkpoint_every=2"),
)


@dataclass(frozen=True)
class Outcome:
    """What a user sees of one command."""

    status: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """The one line on standard error, without the program's name."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0].removeprefix("scantly: ")


Command = Callable[..., Outcome]


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


def write_case(
    root: Path, part: str, name: str, seed: int, *, channels: int = 1, labeled: bool = True
) -> None:
    """Two bright discs in noise, three slices of 32 x 32."""
    rng = np.random.default_rng(seed)
    x, y = np.mgrid[:32, :32]
    center = rng.integers(12, 20, 2)
    distance = np.hypot(x - center[0], y - center[1])
    label = np.repeat(((distance < 9).astype(np.uint8) + (distance < 5))[..., None], 3, axis=2)
    for channel in range(channels):
        image = (100 * label + rng.normal(0, 10, label.shape) + 50).astype(np.float32)
        nib.save(nib.Nifti1Image(image, AFFINE), root / f"images{part}" / f"{name}_{channel:04d}.nii.gz")
    if labeled:
        nib.save(nib.Nifti1Image(label, AFFINE), root / f"labels{part}" / f"{name}.nii.gz")


def write_dataset(root: Path, *, channels: int = 1) -> Path:
    """Six training cases, four of them labeled, and two test cases."""
    for folder in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (root / folder).mkdir(parents=True)
    for number in range(8):
        part = "Ts" if number >= 6 else "Tr"
        write_case(root, part, f"case{number}", number, channels=channels, labeled=number not in {4, 5})
    description = {
        "channel_names": {str(channel): f"MR{channel}" for channel in range(channels)},
        "labels": {"background": 0, "wall": 1, "pool": 2},
        "numTraining": 6,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(description))
    return root


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


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, to see that nothing was touched."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
