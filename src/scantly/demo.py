"""What ``scantly demo`` does: a generated cohort, two trainings, a report, in minutes on a CPU."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from scantly.data.phantom import write_phantom
from scantly.errors import RunError
from scantly.files import sole_writer
from scantly.report import compare
from scantly.training.resolve import resolve
from scantly.training.run import Run
from scantly.training.train import train_config

__all__ = ["LABELED", "METHODS", "SUBJECTS", "TEST", "demo", "generate", "train_pair"]

_LOGGER = logging.getLogger("scantly")

LABELED = 2
METHODS = ("supervised", "mean_teacher")
SUBJECTS, TEST = 30, 8


def demo(out: str | Path, *, seed: int = 0) -> Path:
    """Generate a cohort, train supervised and Mean Teacher with the same two labels, and compare them.

    Both trainings have the same seed and the same number of iterations; Mean Teacher sees the unlabeled
    subjects besides, so its gain comes from those. The cohort has no validation cases, the last iteration is
    evaluated on test subjects.

    Args:
        out: Folder for the dataset, the runs and the report. A demo that was interrupted is continued.
        seed: Seed of the cohort and of both trainings.

    Returns:
        The report.

    Raises:
        RunError: if the folder holds something else, or another demo runs in it.
    """
    folder = Path(out)
    with sole_writer(folder, "running the demo"):
        dataset = generate(folder, seed=seed)
        return compare(train_pair(dataset, folder / "runs", seed=seed), folder / "report.html")


def generate(folder: Path, *, seed: int) -> Path:
    """Write the cohort to ``folder/dataset``, or find it there.

    It is written under another name and renamed, so that a half-written one is never taken for whole.

    Args:
        folder: New or empty, or a demo's.
        seed: Seed of the cohort.

    Returns:
        The dataset folder.

    Raises:
        RunError: if the folder holds something else.
    """
    dataset, unfinished = folder / "dataset", folder / ".dataset"
    if (dataset / "dataset.json").is_file():
        return dataset
    others = [item for item in folder.glob("*") if item not in (unfinished, folder / ".lock")]
    if others:
        raise RunError(f"{folder} is not empty (it holds '{others[0].name}') and no demo; choose another --out.")
    _LOGGER.info("generating %d subjects in %s", SUBJECTS, dataset)
    shutil.rmtree(unfinished, ignore_errors=True)
    write_phantom(unfinished, subjects=SUBJECTS, val=0, test=TEST, seed=seed)
    unfinished.rename(dataset)
    return dataset


def train_pair(dataset: Path, runs: Path, *, seed: int) -> list[Run]:
    """Train and evaluate both methods on the same labels with the same seed.

    Args:
        dataset: The generated cohort.
        runs: Folder for the run folders.
        seed: Seed of both trainings.

    Returns:
        The evaluated runs, in the order of :data:`METHODS`.
    """
    trained = []
    for method in METHODS:
        flags = {"method": method, "labeled": LABELED, "seed": seed, "store": str(runs.parent / "store")}
        config = resolve(dataset, recipe="demo", flags=flags)
        _LOGGER.info("training %s on %d labeled subjects", method, LABELED)
        run = train_config(config, runs / method, resume=True)
        trained.append(run.evaluate("test"))
    return trained
