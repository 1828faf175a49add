"""What bare folders hold: the scan of every case, and the label of every labeled one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from scantly import imaging
from scantly.data.matching import (
    find_files,
    group_channels,
    is_label_name,
    lies_in_label_folder,
    match_labels,
    name_files,
    visible_files,
)
from scantly.data.unread import looks_like_volume, several
from scantly.errors import DatasetError, ImageError, ScantlyError
from scantly.imaging.dicom import find_cases, is_dicom
from scantly.imaging.dicom_files import is_annotation
from scantly.imaging.volumes import Source

__all__ = ["Gathered", "common_ending", "gather"]


@dataclass
class Gathered:
    """Cases by name.

    Attributes:
        scans: Files in order of channel, or the DICOM series, of every case.
        labels: Label file of every labeled case.
        left_out: Why a case cannot be taken; such a case is in neither of the others.
    """

    scans: dict[str, list[Source]]
    labels: dict[str, Path]
    left_out: dict[str, ScantlyError] = field(default_factory=dict)

    def leave_out(self, name: str, error: ScantlyError) -> None:
        """Take a case out."""
        self.scans.pop(name, None)
        self.labels.pop(name, None)
        self.left_out[name] = error


def gather(images: Path, labels: Path | None) -> Gathered:
    """Look through bare folders of scans and labels.

    Args:
        images: Folder of scans or DICOM series, searched with its subfolders.
        labels: Folder of labels; may be the same; None if there is none.

    Raises:
        DatasetError: if names do not fit, or a file is of a type that is not read: what would be lost in silence.
        ImageError: if a folder or link cannot be read.
    """
    if any(is_dicom(path) for path in visible_files(images)):
        return _gather_dicom(images, labels)
    return _gather_files(images, labels)


def _gather_dicom(images: Path, labels: Path | None) -> Gathered:
    """DICOM series by case; the other files among them are labels or refused."""
    inside = None if labels is None else labels.resolve()
    others = [path for path in visible_files(images) if imaging.file_ending(path) or looks_like_volume(path)]
    foreign = [path for path in others if inside is None or inside not in path.resolve().parents]
    foreign += [path for path in others if looks_like_volume(path) and path not in foreign]
    if foreign:
        raise DatasetError(
            f"{images} holds DICOM and other files ({foreign[0].relative_to(images)}); move these away, or, if they "
            "are the labels, give their folder with --labels (the same folder, if they lie among the DICOM files)."
        )
    if labels is not None:
        _refuse_annotations(labels)
    failed: list[tuple[str, ImageError]] = []
    series = find_cases(images, collection=True, broken=failed)
    if not series and not failed:
        raise DatasetError(f"{images} holds DICOM files but no scan; give the folder of the scans.")
    annotations: dict[str, Path] = {}
    if labels is not None:
        same = labels.resolve() == images.resolve()
        annotations = match_labels([*series, *dict(failed)], name_files(find_files(labels, "labels", dicom=same)))
    found = Gathered({name: [one] for name, one in series.items()}, dict(sorted(annotations.items())))
    for name, error in failed:
        found.leave_out(name, error)
    return found


def _refuse_annotations(labels: Path) -> None:
    found = [path for path in visible_files(labels) if is_annotation(path)]
    if found:
        raise DatasetError(
            f"{labels} holds DICOM segmentations or structure sets ({several(found, labels)}), which are not read as "
            "labels: their cases would count as unlabeled; convert them to .nii.gz, or move them away."
        )


def _gather_files(images: Path, labels: Path | None) -> Gathered:
    """Files of each case, and the label of each labeled case."""
    files = find_files(images, "scans")
    if labels is None or labels.resolve() == images.resolve():
        marked = [path for path in files if is_label_name(path) or lies_in_label_folder(path, images)]
        scans = [path for path in files if path not in set(marked)]
        if labels is None and marked and scans:
            raise DatasetError(
                f"{images} holds files that are called like labels ({marked[0].relative_to(images)}) among the scans; "
                "give it as folder of the labels too, or move them away."
            )
        if not scans:
            marked, scans = [], files
    else:
        inside = labels.resolve()
        scans = [path for path in files if inside not in path.resolve().parents]
        marked = find_files(labels, "labels")
    if not scans:
        raise DatasetError(f"{images} holds nothing but the labels; give the folder of the scans.")
    named = name_files(marked)
    cases = group_channels(name_files(scans), named)
    found = Gathered({name: list(cases[name]) for name in sorted(cases)}, match_labels(cases, named))
    if not marked:
        _take_labels_inside(found, cases)
        if labels is not None and not found.labels and not found.left_out:
            raise DatasetError(
                f"{labels} has no file that is called like a label (such as case_gt or case_mask); "
                "put the labels into a folder of their own."
            )
    found.labels = dict(sorted(found.labels.items()))
    return found


def _take_labels_inside(found: Gathered, cases: dict[str, list[Path]]) -> None:
    """Scans whose files hold the label too."""
    for name in list(found.scans):
        try:
            if imaging.has_label(cases[name][0]):
                found.labels[name] = cases[name][0]
        except ImageError as error:
            found.leave_out(name, error)


def common_ending(scans: Iterable[list[Source]]) -> str:
    """The one file ending of all scans; what DICOM series are converted to where there are no files.

    Raises:
        DatasetError: if there are several.
    """
    by_ending: dict[str, Path] = {}
    for path in (path for paths in scans for path in paths):
        if isinstance(path, Path):
            by_ending.setdefault(str(imaging.file_ending(path)), path)
    if len(by_ending) > 1:
        listed = ", ".join(f"{path.name} ({ending})" for ending, path in sorted(by_ending.items()))
        raise DatasetError(f"the scans are of several file types: {listed}; convert them to one, or make two datasets.")
    return next(iter(by_ending), ".nii.gz")
