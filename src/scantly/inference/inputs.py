"""Which scans a prediction is asked for: files, DICOM series and folders of them, channels put together."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from scantly.data.matching import MOST_CHANNELS, find_files, is_label_name, lies_in_label_folder, name_files
from scantly.data.unread import looks_like_volume
from scantly.errors import ImageError
from scantly.files import normal_name
from scantly.imaging import ENDINGS, file_ending, stem
from scantly.imaging.dicom import Series, find_cases, is_dicom, series_of_file
from scantly.imaging.dicom_files import files_below
from scantly.imaging.volumes import Source

__all__ = ["Broken", "find_inputs"]

_CHANNEL = re.compile(r"_(\d{4})$")

Broken = list[tuple[str, ImageError]]
"""Names of cases that cannot be used, and why."""


def find_inputs(
    inputs: Iterable[str | Path],
    *,
    channels: int,
    series: str | None = None,
    out: Path | None = None,
    broken: Broken | None = None,
) -> dict[str, tuple[Source, ...]]:
    """Scans by name from files and folders; channels are told by ``_0000``, ``_0001`` at the end of the name.

    Folders are searched with their subfolders, as ``scantly init`` does: where files in different folders are called
    alike, the folder's name is the case's. A folder without files of a known ending is searched for DICOM series
    (:func:`~scantly.imaging.dicom.find_cases` says what is a case there). Hidden files and plain companions
    (:mod:`scantly.data.unread`) are passed over, nothing else.

    Args:
        inputs: Files, or folders whose scans are all taken.
        channels: How many channels the model takes.
        series: UID of the DICOM series to take from every folder; files of other types are left out then.
        out: Where predictions will go: not into a folder of scans, in which they would be found next time.
        broken: Gets name and error of every case that cannot be used; None to raise the first.

    Returns:
        Case name -> its files in channel order, or its DICOM series.

    Raises:
        ImageError: for a path that does not exist, a folder without scans, with DICOM and other scans, with labels
            among the scans, or of a dataset, two scans of one name, a scan with missing or additional channels, or
            a DICOM series that cannot be used or must be chosen.
        DatasetError: for a folder with files of a type that is not read, or with two files of one scan.
    """
    files: list[tuple[str, Path]] = []
    found: list[tuple[str, Series]] = []
    faults: Broken = []
    for item in map(Path, inputs):
        if item.is_dir():
            scans = [] if series is not None else _scans_in(item)
            _refuse_inside(out, item)
            if scans:
                files += name_files(scans).items()
            else:
                found += _series_in(item, series, faults).items()
        elif not item.is_file():
            raise ImageError(f"{item} does not exist.")
        elif file_ending(item) is None and is_dicom(item):
            try:
                found.append((normal_name(item.stem), series_of_file(item)))
            except ImageError as error:
                faults.append((normal_name(item.stem), error))
        else:
            files.append((stem(item), item))
    cases = _together(_by_channel(files, channels, faults), found, channels)
    if broken is None and faults:
        raise faults[0][1]
    if broken is not None:
        broken += faults
    return cases


def _scans_in(folder: Path) -> list[Path]:
    """Files of readable types in a folder; empty if it has none and may be one of DICOM series."""
    if (folder / "dataset.json").is_file() and (folder / "imagesTs").is_dir() | (folder / "imagesTr").is_dir():
        raise ImageError(f"{folder} is a dataset folder; give {folder / 'imagesTr'} or {folder / 'imagesTs'}.")
    files = files_below(folder)
    scans = [file for file in files if file_ending(file)]
    volumes = [file for file in files if looks_like_volume(file)]
    if not (scans or volumes):
        return []
    known = {*scans, *volumes}
    if any(is_dicom(file) for file in files if file not in known):
        raise ImageError(
            f"{folder} holds DICOM and other scans ({min(known).relative_to(folder)}); move either to another folder, "
            "give the files one by one, or choose a DICOM series with --series UID."
        )
    scans = find_files(folder)
    marked = [file for file in scans if is_label_name(file) or lies_in_label_folder(file, folder)]
    if marked and len(marked) < len(scans):
        raise ImageError(
            f"{folder} holds files that are called like labels ({marked[0].relative_to(folder)}) among the scans; move "
            "them away, or give the scans' own folder, or the files one by one."
        )
    return scans


def _refuse_inside(out: Path | None, folder: Path) -> None:
    if out is not None and out.resolve().is_relative_to(folder.resolve()):
        raise ImageError(
            f"{out} lies in {folder}, whose scans are all taken: the predictions would be taken for scans next time; "
            "choose another --out."
        )


def _series_in(folder: Path, series: str | None, faults: Broken) -> dict[str, Series]:
    unusable: Broken = []
    cases = find_cases(folder, series=series, broken=unusable)
    if not cases and not unusable:
        raise ImageError(f"{folder} holds no scans ({', '.join(ENDINGS)}, DICOM); give files or another folder.")
    faults += unusable
    return cases


def _together(
    cases: dict[str, tuple[Path, ...]], found: Iterable[tuple[str, Series]], channels: int
) -> dict[str, tuple[Source, ...]]:
    """Cases of files and of DICOM series under one set of names."""
    together: dict[str, tuple[Source, ...]] = dict(cases)
    for name, one in found:
        if channels != 1:
            raise ImageError(
                f"{one} is one channel, the model takes {channels}; convert every channel to NIfTI, named "
                "<case>_0000.nii.gz, <case>_0001.nii.gz, ..., and give these."
            )
        if name in together:
            raise ImageError(f"{one} and {together[name][0]} would both be called '{name}'; rename one.")
        together[name] = (one,)
    return together


def _by_channel(files: Iterable[tuple[str, Path]], channels: int, faults: Broken) -> dict[str, tuple[Path, ...]]:
    """Files by case and channel; the cases whose channels are not the model's go to ``faults``."""
    files = list(files)
    numbered = channels > 1 or _are_channels([name for name, _ in files])
    cases: dict[str, dict[int, Path]] = defaultdict(dict)
    for name, file in files:
        case, channel = _case_and_channel(name, numbered)
        if channel in cases[case]:
            raise ImageError(f"{file} and {cases[case][channel]} are both channel {channel} of '{case}'; rename one.")
        cases[case][channel] = file
    for case in list(cases):
        found = sorted(cases[case])
        colors_in_one_file = found == [0] and file_ending(cases[case][0]) in {".png", ".tif", ".tiff"}
        if not colors_in_one_file and found != list(range(channels)):
            sentence = (
                f"'{case}' has channels {found}, the model takes {list(range(channels))}; give one file "
                "per channel, named <case>_0000, <case>_0001, ..."
            )
            faults.append((case, ImageError(sentence)))
            del cases[case]
    return {case: tuple(by_channel[c] for c in sorted(by_channel)) for case, by_channel in cases.items()}


def _are_channels(names: Iterable[str]) -> bool:
    """Whether numbers at the end of one-channel scans are channels, of which some cases have too many.

    Numbered scans or slices of a subject are many, or begin at 1; where every case has a ``_0000`` and some have no
    other number, a few more in other cases are additional channels.
    """
    groups: dict[str, set[int]] = defaultdict(set)
    for name in names:
        match = _CHANNEL.search(name)
        if match is None:
            return False
        groups[name[: match.start()]].add(int(match[1]))
    counts = {len(numbers) for numbers in groups.values()}
    few = all(0 in numbers and max(numbers) < MOST_CHANNELS for numbers in groups.values())
    return few and 1 in counts and len(counts) > 1


def _case_and_channel(name: str, numbered: bool) -> tuple[str, int]:
    """With one channel only ``_0000`` is a channel; other numbers are part of the name, as in ``scan_0017``."""
    match = _CHANNEL.search(name)
    if match is None or (not numbered and int(match[1]) > 0):
        return name, 0
    return name[: match.start()], int(match[1])
