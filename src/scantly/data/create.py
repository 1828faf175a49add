"""Make a dataset folder from two bare folders: scans, and labels for some of them."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scantly import imaging
from scantly.data.dataset import Dataset
from scantly.data.matching import find_files, group_channels, is_label_name, match_labels, name_files
from scantly.errors import DatasetError
from scantly.files import write_json

__all__ = ["init"]

log = logging.getLogger("scantly")

_MOST_VALUES = 256


def init(
    dataset_root: str | Path,
    images: str | Path,
    labels: str | Path | None = None,
    *,
    link: bool = True,
    progress: Callable[[int, int, str], None] | None = None,
) -> Dataset:
    """Make a dataset folder from bare folders of scans and labels.

    Labels are matched to scans by name, upper or lower case, with or without words such as ``_seg``, ``_gt``,
    ``_label``, ``_mask`` and the channel number ``_0000``; there may be fewer labels than scans. Where files
    in different folders are called alike (``<id>/mri_norm2.h5``), the folder's name is the case's. Labels may
    lie among the scans: give the same folder twice. ``.h5`` files that hold ``image`` and ``label`` need no
    labels folder.

    ``dataset.json`` gets the channels and label values found, with names to be edited (``channel 0``,
    ``class 1``). If the values are not 0, 1, 2, ... (for instance 0 and 255), the labels are written anew
    with such values, and ``label_values`` in ``dataset.json`` records which original value each class had.
    Labels of another file type than the scans are converted to it. The originals are never changed.

    Args:
        dataset_root: Folder to make; must not exist or be empty.
        images: Folder of scans, searched with its subfolders.
        labels: Folder of labels; None for unlabeled scans, or ``.h5`` files with both.
        link: Make symbolic links to the files; otherwise copies.
        progress: Called with the number of labels read, of all labels, and the name of the next.

    Returns:
        The dataset.

    Raises:
        DatasetError: if the folder holds something, nothing is found, or names or values do not fit.
        ImageError: if a label cannot be read.
    """
    root = Path(dataset_root)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise DatasetError(f"{root} exists already and is not empty; give a new folder.")
    cases, annotations = _gather(Path(images), None if labels is None else Path(labels))
    ending = _common_ending(cases)
    channels = _count_channels(cases)
    values = _label_values(annotations, progress)
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        # built beside its place and moved there whole: a killed init leaves no half dataset
        with tempfile.TemporaryDirectory(prefix=".scantly-init-", dir=root.parent) as work:
            folder = Path(work) / "dataset"
            _place_scans(folder / "imagesTr", cases, ending, link)
            _place_labels(folder / "labelsTr", annotations, ending, values, link)
            write_json(folder / "dataset.json", _description(root, len(cases), channels, values, ending))
            if root.exists():
                root.rmdir()
            folder.rename(root)
    except OSError as error:
        reason = error.strerror or error
        raise DatasetError(f"{root} cannot be made ({reason}); free space or choose another place.") from error
    return Dataset.open(root)


def _gather(images: Path, labels: Path | None) -> tuple[dict[str, list[Path]], dict[str, Path]]:
    """Files of each case, and the label of each labeled case."""
    files = find_files(images)
    if labels is None or labels.resolve() == images.resolve():
        marked = [path for path in files if is_label_name(path)]
        scans = [path for path in files if path not in set(marked)]
        if labels is None and marked and scans:
            raise DatasetError(
                f"{images} holds files that are called like labels ({marked[0].name}) among the scans; "
                "give it as folder of the labels too, or move them away."
            )
        if not scans:
            marked, scans = [], files
    else:
        inside = labels.resolve()
        scans = [path for path in files if inside not in path.resolve().parents]
        marked = find_files(labels)
    if not scans:
        raise DatasetError(f"{images} holds nothing but the labels; give the folder of the scans.")
    named = name_files(marked)
    cases = group_channels(name_files(scans), named)
    annotations = match_labels(cases, named)
    if not marked:
        annotations = {name: paths[0] for name, paths in cases.items() if imaging.has_label(paths[0])}
        if labels is not None and not annotations:
            raise DatasetError(
                f"{labels} has no file that is called like a label (such as case_gt or case_mask); "
                "put the labels into a folder of their own."
            )
    return dict(sorted(cases.items())), dict(sorted(annotations.items()))


def _common_ending(cases: Mapping[str, list[Path]]) -> str:
    by_ending: dict[str, Path] = {}
    for path in (path for paths in cases.values() for path in paths):
        by_ending.setdefault(str(imaging.file_ending(path)), path)
    if len(by_ending) > 1:
        listed = ", ".join(f"{path.name} ({ending})" for ending, path in sorted(by_ending.items()))
        raise DatasetError(f"the scans are of several file types: {listed}; convert them to one, or make two datasets.")
    return next(iter(by_ending))


def _count_channels(cases: Mapping[str, list[Path]]) -> int:
    """Channels of the first case; ``scantly check`` compares the others."""
    return len(imaging.read_image(next(iter(cases.values())), finite=False).array)


def _label_values(annotations: Mapping[str, Path], progress: Callable[[int, int, str], None] | None) -> dict[int, int]:
    """Original value -> class index, background 0 first; empty without labels."""
    found: set[int] = set()
    for done, (name, path) in enumerate(annotations.items()):
        if progress is not None:
            progress(done, len(annotations), name)
        found.update(map(int, np.unique(imaging.read_label(path).array)))
        if len(found) > _MOST_VALUES:
            raise DatasetError(
                f"{path} brings the number of label values to {len(found)}: it seems to be a scan, or to "
                "number objects one by one; give labels that number the classes."
            )
    if progress is not None and annotations:
        progress(len(annotations), len(annotations), "")
    foreground = sorted(found - {0})
    if annotations and not foreground:
        raise DatasetError(
            f"the {len(annotations)} labels hold nothing but 0; give labels in which something is marked."
        )
    return {0: 0} | {value: index for index, value in enumerate(foreground, start=1)}


def _place_scans(folder: Path, cases: Mapping[str, list[Path]], ending: str, link: bool) -> None:
    folder.mkdir(parents=True)
    for name, paths in cases.items():
        for channel, path in enumerate(paths):
            _place(path, folder / f"{name}_{channel:04d}{ending}", link)


def _place_labels(
    folder: Path, annotations: Mapping[str, Path], ending: str, values: Mapping[int, int], link: bool
) -> None:
    folder.mkdir(parents=True)
    renumbered = any(value != index for value, index in values.items())
    if renumbered:
        listed = ", ".join(f"{value} to {index}" for value, index in values.items() if value != index)
        log.warning(
            "The label values are not 0, 1, 2, ...: copies of the labels with values changed from %s were "
            'written; "label_values" in dataset.json records it.',
            listed,
        )
    originals = np.array(sorted(values))
    indices = np.array([values[int(value)] for value in originals])
    for name, path in annotations.items():
        target = folder / f"{name}{ending}"
        if not renumbered and imaging.file_ending(path) == ending:
            _place(path, target, link)
            continue
        label = imaging.read_label(path)
        array = indices[np.searchsorted(originals, label.array)]
        imaging.write_label(target, array, label.geometry)


def _place(source: Path, target: Path, link: bool) -> None:
    if link:
        try:
            target.symlink_to(source.resolve())
            return
        except OSError:  # some file systems know no symbolic links
            try:
                os.link(source.resolve(), target)
                return
            except OSError:
                log.warning("%s cannot be linked there; it is copied.", source)
    shutil.copyfile(source, target)


def _description(root: Path, cases: int, channels: int, values: Mapping[int, int], ending: str) -> dict[str, Any]:
    classes = {"background": 0} | {f"class {index}": index for index in values.values() if index}
    description: dict[str, Any] = {
        "name": root.resolve().name,
        "channel_names": {str(index): f"channel {index}" for index in range(channels)},
        "labels": classes if len(classes) > 1 else {"background": 0, "class 1": 1},
        "numTraining": cases,
        "file_ending": ending,
    }
    if any(value != index for value, index in values.items()):
        names = {index: name for name, index in classes.items()}
        description["label_values"] = {names[index]: value for value, index in values.items()}
    return description
