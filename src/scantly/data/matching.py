"""Which files of bare folders are one case, and which label belongs to which: by their names alone."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from scantly import imaging
from scantly.data.unread import not_readable, several
from scantly.errors import DatasetError, together
from scantly.files import normal_name
from scantly.imaging.dicom_files import files_below
from scantly.imaging.dicom_marks import is_dicom

__all__ = [
    "MOST_CHANNELS",
    "find_files",
    "group_channels",
    "is_label_name",
    "lies_in_label_folder",
    "match_labels",
    "name_files",
    "visible_files",
]

_LABEL_WORDS = "segmentations?|segs?|gt|groundtruth|ground_truth|labels?|masks?|manual|annotations?|anno"
_IMAGE_WORDS = "images?|imgs?|imaging|scans?|volumes?|vol"
_LABEL_NAME = re.compile(rf"(?:.*[_\-. ])?(?:{_LABEL_WORDS})", re.IGNORECASE)
_TAIL = re.compile(rf"[_\-. ]+(?:{_LABEL_WORDS}|{_IMAGE_WORDS})$")
_HEAD = re.compile(rf"^(?:{_LABEL_WORDS}|{_IMAGE_WORDS})[_\-. ]+")
#: More files per case than this are numbered slices or visits rather than channels.
MOST_CHANNELS = 4
_CHANNEL = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")


def visible_files(folder: Path) -> list[Path]:
    """All files below a folder, in order of path, without hidden ones.

    Raises:
        DatasetError: if it is not a folder.
    """
    if not folder.is_dir():
        raise DatasetError(f"{folder} is not a folder; give the folder that holds the files.")
    return files_below(folder)


def find_files(folder: Path, what: str = "scans", *, dicom: bool = False) -> list[Path]:
    """All files of a readable type below a folder, in order of path, without hidden ones and plain companions.

    Args:
        folder: Searched with its subfolders.
        what: What the files are, in words: ``"scans"`` or ``"labels"``.
        dicom: Whether DICOM files may lie among them, which are taken otherwise.

    Raises:
        DatasetError: if there is none, naming what there is instead, or if there are others besides, which would
            be lost.
    """
    files = visible_files(folder)
    known = [path for path in files if imaging.file_ending(path)]
    if not known:
        others = Counter(path.suffix or path.name for path in files)
        there = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(3)) or "no files"
        raise DatasetError(
            f"{folder} has no {', '.join(imaging.ENDINGS)} files ({there} instead); convert the {what} to one of these."
        )
    lost = [path for path in not_readable(files) if not (dicom and is_dicom(path))]
    if lost:
        raise DatasetError(
            f"{folder} holds {len(lost)} file{'' if len(lost) == 1 else 's'} of a type that is not read: "
            f"{several(lost, folder)}; convert them to one of {', '.join(imaging.ENDINGS)}, or move them away."
        )
    return known


def is_label_name(path: Path) -> bool:
    """Whether a file's name says that it is an annotation.

    Example:
        >>> [is_label_name(Path(name)) for name in ("a_gt.nii.gz", "segmentation.nii", "target.png")]
        [True, True, False]
    """
    return _LABEL_NAME.fullmatch(imaging.stem(path)) is not None


def lies_in_label_folder(path: Path, below: Path) -> bool:
    """Whether one of the folders between a file and the folder that is searched is called like a folder of labels.

    Example:
        >>> lies_in_label_folder(Path("scans/labelsTr/a.nii.gz"), Path("scans"))
        True
    """
    folders = path.relative_to(below).parts[:-1]
    return any(_LABEL_NAME.fullmatch(name) or name.casefold() in ("labelstr", "labelsts") for name in folders)


def name_files(files: Sequence[Path]) -> dict[str, Path]:
    """Give every file a name of its own: without ending, or its folder's if several files are called alike.

    Raises:
        DatasetError: if two files have the same name and folder name.
    """
    by_name = _unique(files, imaging.stem)
    if by_name is None and not _nested({path.parent for path in files}):
        by_name = _unique(files, lambda path: normal_name(path.parent.name))
    if by_name is None:
        twice = Counter(map(imaging.stem, files)).most_common(1)[0][0]
        first, second = [path for path in files if imaging.stem(path) == twice][:2]
        raise DatasetError(f"{second} and {first} have the same name; rename the files so that each is one case.")
    return by_name


def _nested(folders: Collection[Path]) -> bool:
    """Whether one folder lies in another: then they are no folders of a case each."""
    return any(above in folders for folder in folders for above in folder.parents)


def _unique(files: Sequence[Path], name_of: Callable[[Path], str]) -> dict[str, Path] | None:
    names = {name_of(path): path for path in files}
    return names if len(names) == len(files) else None


def group_channels(files: Mapping[str, Path], labels: Iterable[str]) -> dict[str, list[Path]]:
    """Put files that are channels of one case together.

    Numbers of four digits at the end are channels (``_0000``, ``_0001``) only if all files have them, each
    case has the same from 0, and it cannot be a plain count: more than one case, one channel only, or a label
    named like the case without number.

    Args:
        files: Name -> file.
        labels: Names of the labels.

    Returns:
        Case name -> files in order of channel.

    Raises:
        DatasetError: if the numbers are channels by all appearances, but some cases have others than the rest: few
            per case, or labels are named like the cases without number.
    """
    groups: dict[str, dict[int, Path]] = defaultdict(dict)
    for name, path in files.items():
        match = _CHANNEL.fullmatch(name)
        if match is None:
            return {name: [path] for name, path in files.items()}
        groups[match["case"]][int(match["channel"])] = path
    counts = {len(channels) for channels in groups.values()}
    from_zero = all(sorted(channels) == list(range(len(channels))) for channels in groups.values())
    named = {_plain(name) for name in labels}
    real = len(groups) > 1 or counts == {1} or any(_plain(case) in named for case in groups)
    if len(groups) > 1 and (len(counts) > 1 or not from_zero):
        few = all(0 in channels and max(channels) < MOST_CHANNELS for channels in groups.values())
        if few or not groups.keys().isdisjoint(labels):
            _refuse_uneven(groups)
    if len(counts) > 1 or not from_zero or not real:
        return {name: [path] for name, path in files.items()}
    return {case: [path for _, path in sorted(channels.items())] for case, channels in groups.items()}


def _refuse_uneven(groups: Mapping[str, Mapping[int, Path]]) -> NoReturn:
    kinds: dict[tuple[int, ...], str] = {}
    for case, channels in groups.items():
        kinds.setdefault(tuple(sorted(channels)), case)
    (one, first), (other, second) = list(kinds.items())[:2]
    words = [f"channel{'' if len(kind) == 1 else 's'} {', '.join(map(str, kind))}" for kind in (one, other)]
    raise DatasetError(
        f"{first} has {words[0]} and {second} has {words[1]}; every case needs the same files _0000, _0001, ...: add "
        "what is missing or move away what is too much (or, if these are numbers of scans, write them otherwise)."
    )


def match_labels(cases: Iterable[str], labels: Mapping[str, Path]) -> dict[str, Path]:
    """Find the case of every label.

    Names are compared as they are, then in lower case without words such as ``_seg``, ``_gt``, ``_mask``,
    ``image_`` and the channel number ``_0000``.

    Args:
        cases: Names of the cases.
        labels: Name -> file.

    Returns:
        Case name -> label file; cases may be missing.

    Raises:
        DatasetError: if a label fits no case or several, or a case gets two labels; one line for each.
    """
    cases = list(cases)
    exact = set(cases)
    plain: dict[str, list[str]] = defaultdict(list)
    for case in cases:
        plain[_plain(case)].append(case)
    matched: dict[str, Path] = {}
    faults: list[DatasetError] = []
    for name, path in labels.items():
        found = [name] if name in exact else plain.get(_plain(name), [])
        if len(found) != 1:
            what = "no scan" if not found else f"several scans ({', '.join(found[:3])})"
            faults.append(
                DatasetError(
                    f"{path} fits {what} by name; name it like its scan, for instance {cases[0]}, or move it away."
                )
            )
        elif found[0] in matched:
            faults.append(
                DatasetError(f"{path} and {matched[found[0]]} are both labels of {found[0]}; keep one of them.")
            )
        else:
            matched[found[0]] = path
    if faults:
        raise together(faults, f"{len(faults)} files are no label of a scan")
    return matched


def _plain(name: str) -> str:
    """Lower case, without what says image, label or first channel."""
    name = name.casefold()
    for _ in range(3):  # a few words may follow each other: "case_0000_image_seg"
        shorter = _HEAD.sub("", _TAIL.sub("", name.removesuffix("_0000")))
        if not shorter or shorter == name:
            break
        name = shorter
    return name
