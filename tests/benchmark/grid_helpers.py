"""A small benchmark: its settings, cells worked on in this process, and what must be equal in the end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from scantly.benchmark.grid import Grid
from scantly.benchmark.run import open_grid
from scantly.benchmark.work import Job, Outcome, run_job
from scantly.settings import merge

STEPS = 20
SETTINGS: dict[str, Any] = {
    "plan": {
        "spatial_dims": 2,
        "size": [32, 32],
        "normalization": [{"scheme": "zscore"}],
        "labeled_batch_size": 2,
        "unlabeled_batch_size": 2,
    },
    "network": {"arguments": {"widths": [4, 8], "dropout": [0.1, 0.3]}},
    "training": {"checkpoint_every": 5, "validate_every": 10, "log_every": 1, "device": "cpu"},
}


def spec_values(dataset: Path | str, *, entry: Mapping[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """A benchmark of one cell, ``phantom/supervised-2-seed1``, or with changes, also of its entry for the dataset."""
    own = merge({"path": str(dataset), "labeled": [2], "steps": STEPS, "settings": SETTINGS}, entry or {})
    values: dict[str, Any] = {"datasets": {"phantom": own}, "methods": ["supervised"], "seeds": [1]}
    return {**values, "upper_bound": False, "lower_bound": False, "planned": False, **changes}


def write_spec(path: Path, dataset: Path, **changes: Any) -> Path:
    """A benchmark file."""
    path.write_text(yaml.safe_dump(spec_values(dataset, **changes), sort_keys=False))
    return path


def gated_row(gate_path: Path) -> dict[str, object]:
    """The row of a benchmark that waits at the gate."""
    return {"name": "gated", "settings": {"gate": str(gate_path)}}


def install(packages: Path, patch: pytest.MonkeyPatch) -> None:
    """Make the method known here and in processes that are started from here."""
    patch.syspath_prepend(packages)
    before = os.environ.get("PYTHONPATH")
    patch.setenv("PYTHONPATH", f"{packages}{os.pathsep}{before}" if before else str(packages))


class Here:
    """A pool that works in this process, one cell after the other.

    Args:
        work: What does a cell.
    """

    processes = 1

    def __init__(self, work: Callable[[Job], Outcome] = run_job) -> None:
        self._work = work
        self.begun: list[str] = []

    def run(self, jobs: Sequence[Job]) -> Generator[Outcome]:
        for job in jobs:
            self.begun.append(job.name)
            yield self._work(job)

    def running(self) -> list[str]:
        return []


def opened(spec: Path, out: Path) -> Grid:
    """The grid of a benchmark file."""
    return open_grid(spec, str(out))


def jobs_of(spec: Path, out: Path) -> list[Job]:
    """What the workers of a benchmark would be told."""
    grid = opened(spec, out)
    return [grid._job(cell, 1, None) for cell in grid.cells]


def results(folder: Path) -> dict[str, bytes]:
    """What must not depend on how often a cell was interrupted: model, scores, predictions."""
    kept = [folder / "model.safetensors", *folder.glob("evaluation/*"), *folder.glob("predictions/*/*")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(kept)}


def times(folder: Path) -> dict[str, int]:
    """When every file below a folder was changed."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def wait_until(true: Callable[[], Any], seconds: float = 300.0) -> Any:
    """What ``true`` gives as soon as that is something."""
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline, "nothing happens"
        time.sleep(0.05)
    return found


def waiting(gate: Path, count: int = 1) -> list[int]:
    """Process numbers of the trainings that wait at the gate, as soon as there are so many."""

    def found() -> list[int]:
        numbers = [int(path.name.rpartition("-")[2]) for path in gate.parent.glob(f"{gate.name}-*")]
        alive = [number for number in numbers if Path(f"/proc/{number}").exists()]
        return alive if len(alive) >= count else []

    return wait_until(found)


def parent_of(number: int) -> int:
    """Process number of the parent of a process."""
    return int(Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[1])


def ended(number: int) -> bool:
    """Whether a process is gone, or only its status is left."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def kill(number: int, signal_number: int) -> None:
    """Send a signal to a process that a test has started."""
    os.kill(number, signal_number)
