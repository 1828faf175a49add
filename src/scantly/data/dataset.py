"""A dataset folder whose structure is whole, and its cases read and held against it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scantly import imaging
from scantly.data.layout import Case, describe, scan
from scantly.errors import DatasetError
from scantly.files import normal_name

__all__ = ["Case", "Dataset", "channel_sentence", "geometry_sentence", "label_fault"]


@dataclass(frozen=True)
class Dataset:
    """A dataset folder whose structure is whole; voxels have not been read.

    Attributes:
        root: The folder.
        name: ``name`` of ``dataset.json``, else the folder's name.
        channels: Names in file order.
        classes: Names, background first; the index is the label value.
        file_ending: For instance ``".nii.gz"``.
        train: Cases of ``imagesTr`` by name, sorted.
        test: Cases of ``imagesTs`` by name, sorted.
        info: All of ``dataset.json``.
    """

    root: Path
    name: str
    channels: tuple[str, ...]
    classes: tuple[str, ...]
    file_ending: str
    train: Mapping[str, Case]
    test: Mapping[str, Case]
    info: Mapping[str, Any]

    @classmethod
    def open(cls, root: Path | str) -> Dataset:
        """Read ``dataset.json`` and list the files.

        Raises:
            DatasetError: with the first structural fault; ``scantly check`` tells them all.
        """
        root = Path(root)
        description, faults = describe(root)
        if description is None:
            raise DatasetError(faults[0].message)
        found = scan(root, description.file_ending, channels=len(description.channels))
        fatal = [fault for fault in found.faults if fault.fatal]
        if fatal:
            more = f" ({len(fatal) - 1} more: run scantly check)" if len(fatal) > 1 else ""
            raise DatasetError(fatal[0].message + more)
        return cls(
            root=root,
            name=description.name,
            channels=description.channels,
            classes=description.classes,
            file_ending=description.file_ending,
            train=found.train,
            test=found.test,
            info=description.info,
        )

    def case(self, name: str) -> Case:
        """The case of that name, from the training or the test folder.

        Raises:
            DatasetError: if there is none, with the nearest name.
        """
        name = normal_name(name)
        case = self.train.get(name) or self.test.get(name)
        if case is None:
            known = [*self.train, *self.test]
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else "scantly check lists what it has."
            raise DatasetError(f"{self.root} has no case '{name}' among its {len(known)}; {hint}")
        return case

    def read_image(self, name: str) -> imaging.Image:
        """Read a case's scan.

        Returns:
            Array (C, D, H, W) float32, C being ``len(channels)``.

        Raises:
            DatasetError: if the files hold another number of channels.
            ImageError: if a file cannot be read or holds NaN, or the channels do not fit each other.
        """
        case = self.case(name)
        image = imaging.read_image(case.images)
        if len(image.array) != len(self.channels):
            raise DatasetError(channel_sentence(case.images[0], len(image.array), self.channels))
        return image

    def read_label(self, name: str) -> imaging.Label:
        """Read a case's annotation and hold it against the scan's header and the classes.

        Returns:
            Array (D, H, W) of values below ``len(classes)``.

        Raises:
            DatasetError: if there is none, it lies on another grid than the scan, or has an unknown value.
            ImageError: if the file cannot be read.
        """
        case = self.case(name)
        if case.label is None:
            raise DatasetError(f"{name} has no label file in {self.root}; it can only be used as unlabeled case.")
        label = imaging.read_label(case.label)
        difference = imaging.geometry_difference(label.geometry, imaging.read_geometry(case.images[0]))
        if difference:
            raise DatasetError(geometry_sentence(case.label, case.images[0], difference))
        fault = label_fault(label, case.label, self.classes)
        if fault:
            raise DatasetError(fault)
        return label


def channel_sentence(path: Path, found: int, channels: tuple[str, ...]) -> str:
    """Sentence for a case with another number of channels than ``dataset.json`` names."""
    return (
        f"{path} holds {found} channels with its sister files, but dataset.json names {len(channels)} "
        f"({', '.join(channels)}); mend channel_names or the file."
    )


def geometry_sentence(label: Path, image: Path, difference: str) -> str:
    """Sentence for a label on another grid than its scan."""
    return (
        f"{label} does not lie on the grid of {image.name}: {difference}; "
        "draw or resample the label on that scan, or copy its header if the voxels do match."
    )


def label_fault(label: imaging.Label, path: Path, classes: tuple[str, ...]) -> str | None:
    """Sentence for values that are no class; None if all are.

    Args:
        label: The annotation.
        path: Its file, for the sentence.
        classes: Names; values from 0 to their number less 1 are known.
    """
    array = label.array
    if array.size == 0 or (int(array.min()) >= 0 and int(array.max()) < len(classes)):
        return None
    values, counts = np.unique(array, return_counts=True)
    unknown = [(v, n) for v, n in zip(values.tolist(), counts.tolist(), strict=True) if not 0 <= v < len(classes)]
    listed = ", ".join(f"{value} ({number} voxels)" for value, number in unknown[:8])
    more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
    return (
        f"{path} has label values that are not in dataset.json (0 to {len(classes) - 1}): {listed}{more}; "
        'add them under "labels" or correct the file.'
    )
