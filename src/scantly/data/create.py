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
from scantly.arguments import checked
from scantly.data.dataset import Dataset
from scantly.data.matching import find_files, group_channels, is_label_name, match_labels, name_files, visible_files
from scantly.errors import DatasetError
from scantly.files import name_too_long, write_json
from scantly.imaging.dicom import Series, find_cases, is_dicom
from scantly.imaging.volumes import Source

__all__ = ["init"]

log = logging.getLogger("scantly")

_MOST_VALUES = 256


@checked()
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

    DICOM series are converted to ``.nii.gz``: one folder per case, in which one series lies, or one folder
    that is the case (see :func:`scantly.imaging.dicom.find_cases`). Their labels are files of the other types,
    called like the folders, or in them; a label on the same grid in another order of axes (as dcm2niix writes
    it) is turned to fit.

    Args:
        dataset_root: Folder to make; must not exist or be empty.
        images: Folder of scans, searched with its subfolders.
        labels: Folder of labels; None for unlabeled scans, or ``.h5`` files with both.
        link: Make symbolic links to the files; otherwise copies.
        progress: Called with the number of steps done, of all (one for every label read and every DICOM series
            converted), and the name of the next case.

    Returns:
        The dataset.

    Raises:
        DatasetError: if the folder holds something, nothing is found, or names or values do not fit.
        ImageError: if a label or a DICOM series cannot be read.
    """
    root = Path(dataset_root)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise DatasetError(f"{root} exists already and is not empty; give a new folder.")
    cases, annotations = _gather(Path(images), None if labels is None else Path(labels))
    ending = _common_ending(cases)
    channels = _count_channels(cases)
    series = {name: paths[0] for name, paths in cases.items() if isinstance(paths[0], Series)}
    steps = _Steps(progress, len(annotations) + len(series))
    values = _label_values(annotations, steps)
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        # built beside its place and moved there whole: a killed init leaves no half dataset
        with tempfile.TemporaryDirectory(prefix=".scantly-init-", dir=root.parent) as work:
            folder = Path(work) / "dataset"
            _place_scans(folder / "imagesTr", cases, ending, link, steps)
            _place_labels(folder / "labelsTr", annotations, values, series=series, ending=ending, link=link)
            write_json(folder / "dataset.json", _description(root, len(cases), channels, values, ending))
            if root.exists():
                root.rmdir()
            folder.rename(root)
    except OSError as error:
        reason = error.strerror or error
        raise DatasetError(f"{root} cannot be made ({reason}); free space or choose another place.") from error
    if series:
        log.info("%d DICOM series were converted to NIfTI in %s.", len(series), root / "imagesTr")
    return Dataset.open(root)


class _Steps:
    """Counts what takes time, over labels and scans."""

    def __init__(self, report: Callable[[int, int, str], None] | None, total: int) -> None:
        self._report, self._total, self._done = report, total, 0

    def begin(self, name: str) -> None:
        """The next step is about this case."""
        if self._report is not None:
            self._report(self._done, self._total, name)
        self._done += 1

    def end(self) -> None:
        """All steps are done."""
        if self._report is not None and self._total:
            self._report(self._total, self._total, "")


def _gather(images: Path, labels: Path | None) -> tuple[dict[str, list[Source]], dict[str, Path]]:
    """Files, or DICOM series, of each case, and the label of each labeled case."""
    if any(is_dicom(path) for path in visible_files(images)):
        return _gather_dicom(images, labels)
    cases, annotations = _gather_files(images, labels)
    return {name: list(paths) for name, paths in cases.items()}, annotations


def _gather_dicom(images: Path, labels: Path | None) -> tuple[dict[str, list[Source]], dict[str, Path]]:
    """DICOM series by case; the other files among them are labels or refused."""
    inside = None if labels is None else labels.resolve()
    others = [path for path in visible_files(images) if imaging.file_ending(path)]
    foreign = [path for path in others if inside is None or inside not in path.resolve().parents]
    if foreign:
        raise DatasetError(
            f"{images} holds DICOM and other files ({foreign[0].relative_to(images)}); move these away, or, if they "
            "are the labels, give their folder with --labels (the same folder, if they lie among the DICOM files)."
        )
    series = find_cases(images, collection=True)
    if not series:
        raise DatasetError(f"{images} holds DICOM files but no scan; give the folder of the scans.")
    annotations = {} if labels is None else match_labels(series, name_files(find_files(labels)))
    return {name: [one] for name, one in series.items()}, dict(sorted(annotations.items()))


def _gather_files(images: Path, labels: Path | None) -> tuple[dict[str, list[Path]], dict[str, Path]]:
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


def _common_ending(cases: Mapping[str, list[Source]]) -> str:
    by_ending: dict[str, Path] = {}
    for path in (path for paths in cases.values() for path in paths):
        if isinstance(path, Path):
            by_ending.setdefault(str(imaging.file_ending(path)), path)
    if len(by_ending) > 1:
        listed = ", ".join(f"{path.name} ({ending})" for ending, path in sorted(by_ending.items()))
        raise DatasetError(f"the scans are of several file types: {listed}; convert them to one, or make two datasets.")
    return next(iter(by_ending), ".nii.gz")  # DICOM series are converted to it


def _count_channels(cases: Mapping[str, list[Source]]) -> int:
    """Channels of the first case; ``scantly check`` compares the others."""
    return len(imaging.read_image(next(iter(cases.values())), finite=False).array)


def _label_values(annotations: Mapping[str, Path], steps: _Steps) -> dict[int, int]:
    """Original value -> class index, background 0 first; empty without labels."""
    found: set[int] = set()
    for name, path in annotations.items():
        steps.begin(name)
        found.update(map(int, np.unique(imaging.read_label(path).array)))
        if len(found) > _MOST_VALUES:
            raise DatasetError(
                f"{path} brings the number of label values to {len(found)}: it seems to be a scan, or to "
                "number objects one by one; give labels that number the classes."
            )
    foreground = sorted(found - {0})
    if annotations and not foreground:
        raise DatasetError(
            f"the {len(annotations)} labels hold nothing but 0; give labels in which something is marked."
        )
    return {0: 0} | {value: index for index, value in enumerate(foreground, start=1)}


def _place_scans(folder: Path, cases: Mapping[str, list[Source]], ending: str, link: bool, steps: _Steps) -> None:
    folder.mkdir(parents=True)
    for name, paths in cases.items():
        for channel, path in enumerate(paths):
            target = folder / f"{name}_{channel:04d}{ending}"
            fault = name_too_long(target)
            if fault is not None:
                fault = fault.removeprefix(f"{folder}{os.sep}")  # the folder is a temporary one
                raise DatasetError(f"{path} cannot be placed: {fault}; give the scan a shorter name.")
            if isinstance(path, Series):
                steps.begin(name)
                image = imaging.read_image([path])
                imaging.write_scalar(target, image.array[0], image.geometry)
            else:
                _place(path, target, link)
    steps.end()


def _place_labels(
    folder: Path,
    annotations: Mapping[str, Path],
    values: Mapping[int, int],
    *,
    series: Mapping[str, Series],
    ending: str,
    link: bool,
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
        grid = series[name].geometry if name in series else None
        turned = grid is not None and imaging.geometry_difference(imaging.read_geometry(path), grid) is not None
        if not (renumbered or turned) and imaging.file_ending(path) == ending:
            _place(path, target, link)
            continue
        label = imaging.read_label(path)
        if grid is not None:
            label = _turned(label, grid)
        array = indices[np.searchsorted(originals, label.array)]
        imaging.write_label(target, array, label.geometry)


def _turned(label: imaging.Label, grid: imaging.Geometry) -> imaging.Label:
    """The label in the order of axes of a scan, if that alone differs; ``scantly check`` tells other differences."""
    array, canonical = imaging.to_canonical(label.array, label.geometry)
    _, target = imaging.to_canonical(np.empty(grid.shape, np.uint8), grid)
    if imaging.geometry_difference(canonical, target) is not None:
        return label
    return imaging.Label(imaging.from_canonical(array, grid), grid)


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
