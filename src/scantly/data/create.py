"""Make a dataset folder from two bare folders: scans, and labels for some of them."""

from __future__ import annotations

import glob
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scantly import imaging
from scantly.arguments import checked
from scantly.data.dataset import Dataset
from scantly.data.gather import Gathered, common_ending, gather
from scantly.errors import DatasetError, ImageError, ScantlyError, together
from scantly.files import digest, holding, name_too_long, write_json
from scantly.imaging.dicom import Series
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
    left_out: dict[str, ScantlyError] | None = None,
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
        left_out: Gets the reason of every case that cannot be taken: a label or a DICOM series that cannot be read,
            several series of one patient, a name too long. The dataset is made of the others. None: such a case
            is an error, and nothing is made.

    Returns:
        The dataset.

    Raises:
        DatasetError: if the folder holds something, nothing is found, names or values do not fit, or a file is of a
            type that is not read.
        ImageError: if a label or a DICOM series cannot be read, and ``left_out`` is None; with several, a line each.
        RunError: if another process is making the same folder.
    """
    root = Path(dataset_root)
    # locks and unfinished folders lie beside the place, which must stay empty; names of any length and letters
    mark = f".scantly-init-{digest(root.resolve().name)}"
    beside = root.resolve().parent
    with holding(beside / f"{mark}.lock", f"another process is making {root}; wait for it or choose another folder."):
        for killed in beside.glob(f"{mark}-*"):
            shutil.rmtree(killed)
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise DatasetError(f"{root} exists already and is not empty; give a new folder.")
        found = gather(Path(images), None if labels is None else Path(labels))
        everything = len(found.scans) + len(found.left_out)
        try:
            # built beside its place and moved there whole: a killed init leaves no half dataset
            with tempfile.TemporaryDirectory(prefix=f"{mark}-", dir=beside) as work:
                folder = Path(work) / "dataset"
                _build(folder, root, found, link=link, strict=left_out is None, progress=progress)
                if found.left_out and (left_out is None or not found.scans):
                    raise _refusal(found.left_out, everything)
                if root.exists():
                    root.rmdir()
                folder.rename(root)
        except OSError as error:
            reason = error.strerror or error
            raise DatasetError(f"{root} cannot be made ({reason}); free space or choose another place.") from error
    if left_out is not None:
        left_out.update(sorted(found.left_out.items()))
    converted = sum(isinstance(paths[0], Series) for paths in found.scans.values())
    if converted:
        log.info("%d DICOM series were converted to NIfTI in %s.", converted, root / "imagesTr")
    return Dataset.open(root)


def _refusal(left_out: Mapping[str, ScantlyError], everything: int) -> ScantlyError:
    return together(dict(sorted(left_out.items())), f"{len(left_out)} of {everything} cases cannot be taken")


def _build(
    folder: Path,
    root: Path,
    found: Gathered,
    *,
    link: bool,
    strict: bool,
    progress: Callable[[int, int, str], None] | None,
) -> None:
    """Write the dataset of ``root`` to ``folder``; cases that cannot be taken leave ``found``.

    With ``strict`` nothing is converted if there is such a case already.
    """
    ending = common_ending(found.scans.values())
    _leave_out_long_names(found, root, ending)
    series = sum(isinstance(paths[0], Series) for paths in found.scans.values())
    steps = _Steps(progress, len(found.labels) + series)
    values = _label_values(found, steps)
    if not found.scans or (strict and found.left_out):
        return
    channels = _count_channels(found.scans.values())
    _tell_renumbering(values)
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for name in list(found.scans):
        try:
            _place_case(folder, name, found, ending=ending, values=values, link=link, steps=steps)
        except (ImageError, DatasetError) as error:
            found.leave_out(name, error)
            for placed in folder.glob(f"imagesTr/{glob.escape(name)}_[0-9][0-9][0-9][0-9]{ending}"):
                placed.unlink()
    steps.end()
    write_json(folder / "dataset.json", _description(root, len(found.scans), channels, values, ending))


def _leave_out_long_names(found: Gathered, root: Path, ending: str) -> None:
    for name in list(found.scans):
        fault = name_too_long(root / "imagesTr" / f"{name}_0000{ending}")
        if fault is not None:
            source = found.scans[name][0]
            found.leave_out(name, DatasetError(f"{source} cannot be placed: {fault}; give the scan a shorter name."))


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


def _count_channels(scans: Iterable[list[Source]]) -> int:
    """Channels of the first case that can be read; ``scantly check`` compares the others."""
    faults: list[ScantlyError] = []
    for paths in scans:
        try:
            return len(imaging.read_image(paths, finite=False).array)
        except ImageError as error:
            faults.append(error)
    raise together(faults, "no scan can be read")


def _label_values(found: Gathered, steps: _Steps) -> dict[int, int]:
    """Original value -> class index, background 0 first; empty without labels. Bad labels leave their case out."""
    values: set[int] = set()
    readable = 0
    for name, path in list(found.labels.items()):
        steps.begin(name)
        try:
            values.update(map(int, np.unique(imaging.read_label(path).array)))
        except ImageError as error:
            found.leave_out(name, error)
            continue
        readable += 1
        if len(values) > _MOST_VALUES:
            raise DatasetError(
                f"{path} brings the number of label values to {len(values)}: it seems to be a scan, or to "
                "number objects one by one; give labels that number the classes."
            )
    foreground = sorted(values - {0})
    if readable and not foreground:
        raise DatasetError(f"the {readable} labels hold nothing but 0; give labels in which something is marked.")
    return {0: 0} | {value: index for index, value in enumerate(foreground, start=1)}


def _tell_renumbering(values: Mapping[int, int]) -> None:
    listed = ", ".join(f"{value} to {index}" for value, index in values.items() if value != index)
    if listed:
        log.warning(
            "The label values are not 0, 1, 2, ...: copies of the labels with values changed from %s were "
            'written; "label_values" in dataset.json records it.',
            listed,
        )


def _place_case(
    folder: Path,
    name: str,
    found: Gathered,
    *,
    ending: str,
    values: Mapping[int, int],
    link: bool,
    steps: _Steps,
) -> None:
    """Put one case's scan and label into the dataset folder."""
    grid: imaging.Geometry | None = None
    for channel, path in enumerate(found.scans[name]):
        target = folder / "imagesTr" / f"{name}_{channel:04d}{ending}"
        if isinstance(path, Series):
            steps.begin(name)
            image = imaging.read_image([path])
            imaging.write_scalar(target, image.array[0], image.geometry)
            grid = path.geometry
        else:
            _place(path, target, link)
    if name in found.labels:
        _place_label(folder / "labelsTr" / f"{name}{ending}", found.labels[name], values, grid=grid, link=link)


def _place_label(
    target: Path, path: Path, values: Mapping[int, int], *, grid: imaging.Geometry | None, link: bool
) -> None:
    """A label as it is, or anew where values, file type or, for a DICOM series, the order of axes is another."""
    renumbered = any(value != index for value, index in values.items())
    turned = grid is not None and imaging.geometry_difference(imaging.read_geometry(path), grid) is not None
    if not (renumbered or turned) and target.name.endswith(str(imaging.file_ending(path))):
        _place(path, target, link)
        return
    label = imaging.read_label(path)
    if grid is not None:
        label = _turned(label, grid)
    originals = np.array(sorted(values))
    indices = np.array([values[int(value)] for value in originals])
    imaging.write_label(target, indices[np.searchsorted(originals, label.array)], label.geometry)


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
