"""What is wrong with the cases that a training or plan would use: told together, not one per start."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

from scantly import imaging
from scantly.data.dataset import Dataset
from scantly.data.parallel import in_order, worker_count
from scantly.errors import DatasetError, ImageError, ScantlyError, together

__all__ = ["as_one", "case_faults", "faults_of_cases"]

#: Memory that reading takes per voxel and channel, about.
_BYTES_PER_VOXEL = 16


def case_faults(dataset: Dataset, name: str, *, with_label: bool) -> list[ScantlyError]:
    """Read one case whole.

    Args:
        dataset: The dataset folder.
        name: Of the case.
        with_label: Whether its label is read too; no other label is opened.

    Returns:
        What is wrong with its scan and with its label; empty if both can be used.
    """
    faults: list[ScantlyError] = []
    try:
        dataset.read_image(name)
    except (DatasetError, ImageError) as error:
        faults.append(error)
    if with_label:
        label = dataset.case(name).label
        try:
            # without a sound scan the label cannot be held against it, but it may be unreadable itself
            if faults and label is not None:
                imaging.read_label(label)
            else:
                dataset.read_label(name)
        except (DatasetError, ImageError) as error:
            faults.append(error)
    return faults


def faults_of_cases(
    dataset: Dataset, names: Sequence[str], *, with_labels: Collection[str]
) -> dict[str, list[ScantlyError]]:
    """Read cases whole, in several processes; those that have faults, in the order of ``names``."""
    jobs = [_Reading(dataset, name, name in with_labels) for name in names]
    workers = worker_count(None, len(jobs), max((job.memory() for job in jobs), default=0))
    with closing(in_order(_Reading.faults, jobs, workers)) as read:
        return {job.name: faults for job, faults in zip(jobs, read, strict=True) if faults}


def as_one(faults: Mapping[str, Sequence[ScantlyError]], cases: int) -> ScantlyError:
    """The faults of several cases as one error, a line each; a single fault is itself.

    Args:
        faults: By case, at least one.
        cases: How many there are in all.
    """
    head = f"{len(faults)} of {cases} cases cannot be used; mend them or take them out, and start again"
    return together([fault for of_case in faults.values() for fault in of_case], head)


@dataclass(frozen=True)
class _Reading:
    """Reading one case; plain data, so it can be sent to another process."""

    dataset: Dataset
    name: str
    with_label: bool

    def memory(self) -> int:
        """Bytes that reading takes, about; 0 if the header cannot be read."""
        try:
            geometry = imaging.read_geometry(self.dataset.case(self.name).images[0])
        except ImageError:
            return 0
        return math.prod(geometry.shape) * len(self.dataset.channels) * _BYTES_PER_VOXEL

    def faults(self) -> list[ScantlyError]:
        return case_faults(self.dataset, self.name, with_label=self.with_label)
