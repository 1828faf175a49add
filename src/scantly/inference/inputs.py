"""Which scans a prediction is asked for: files, DICOM series and folders of them, channels put together."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from scantly.errors import ImageError
from scantly.files import normal_name
from scantly.imaging import ENDINGS, file_ending, stem
from scantly.imaging.dicom import Series, find_cases, is_dicom, series_of_file
from scantly.imaging.dicom_files import files_below
from scantly.imaging.volumes import Source

__all__ = ["find_inputs"]

_CHANNEL = re.compile(r"_(\d{4})$")


def find_inputs(
    inputs: Iterable[str | Path],
    *,
    channels: int,
    series: str | None = None,
    out: Path | None = None,
    broken: list[ImageError] | None = None,
) -> dict[str, tuple[Source, ...]]:
    """Scans by name from files and folders; channels are told by ``_0000``, ``_0001`` at the end of the name.

    A folder without files of a known ending is searched for DICOM series, with its subfolders
    (:func:`~scantly.imaging.dicom.find_cases` says what is a case there).

    Args:
        inputs: Files, or folders whose scans are all taken.
        channels: How many channels the model takes.
        series: UID of the DICOM series to take from every folder; files of other types are left out then.
        out: Where predictions will go: not into a folder of DICOM scans, in which they would be found next time.
        broken: Gets an error for every DICOM case that cannot be used; None to raise the first.

    Returns:
        Case name -> its files in channel order, or its DICOM series.

    Raises:
        ImageError: for a path that does not exist, a folder without scans, or with DICOM and other scans, two
            scans of one name, a scan with missing channels, a folder in which a DICOM series must be chosen, or a
            DICOM series that cannot be used.
    """
    files: list[Path] = []
    found: list[tuple[str, Series]] = []
    for item in map(Path, inputs):
        if item.is_dir():
            scans = sorted(f for f in item.iterdir() if file_ending(f) and not f.name.startswith("."))
            if scans and series is None:
                _refuse_dicom_beside(scans, item)
                files += scans
                continue
            unusable: list[ImageError] | None = None if broken is None else []
            cases = find_cases(item, series=series, broken=unusable)
            if not cases and not unusable:
                raise ImageError(f"{item} holds no scans ({', '.join(ENDINGS)}, DICOM); give files or another folder.")
            if out is not None and out.resolve().is_relative_to(item.resolve()):
                raise ImageError(
                    f"{out} lies in {item}, a folder of DICOM scans, where the predictions would be taken for scans; "
                    "choose another --out."
                )
            if broken is not None:
                broken += unusable or []
            found += cases.items()
        elif not item.is_file():
            raise ImageError(f"{item} does not exist.")
        elif file_ending(item) is None and is_dicom(item):
            found.append((normal_name(item.stem), series_of_file(item)))
        else:
            files.append(item)
    return _together(_by_channel(files, channels), found, channels)


def _refuse_dicom_beside(scans: Iterable[Path], folder: Path) -> None:
    """Either kind alone would be taken without a word about the other."""
    known = set(scans)
    if any(is_dicom(file) for file in files_below(folder) if file not in known and file_ending(file) is None):
        raise ImageError(
            f"{folder} holds DICOM and other scans ({min(known).name}); move either to another folder, give the files "
            "one by one, or choose a DICOM series with --series UID."
        )


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


def _by_channel(files: Iterable[Path], channels: int) -> dict[str, tuple[Path, ...]]:
    cases: dict[str, dict[int, Path]] = {}
    for file in files:
        name, channel = _case_and_channel(file, channels)
        if channel in cases.setdefault(name, {}):
            raise ImageError(f"{file} and {cases[name][channel]} are both channel {channel} of '{name}'; rename one.")
        cases[name][channel] = file
    for name, by_channel in cases.items():
        colors_in_one_file = list(by_channel) == [0] and file_ending(by_channel[0]) in {".png", ".tif", ".tiff"}
        if not colors_in_one_file and sorted(by_channel) != list(range(channels)):
            raise ImageError(
                f"'{name}' has channels {sorted(by_channel)}, the model takes {list(range(channels))}; give one file "
                "per channel, named <case>_0000, <case>_0001, ..."
            )
    return {name: tuple(by_channel[c] for c in sorted(by_channel)) for name, by_channel in cases.items()}


def _case_and_channel(file: Path, channels: int) -> tuple[str, int]:
    """With one channel only ``_0000`` is a channel; other numbers are part of the name, as in ``scan_0017``."""
    match = _CHANNEL.search(stem(file))
    if match is None or (channels == 1 and int(match[1]) > 0):
        return stem(file), 0
    return stem(file)[: match.start()], int(match[1])
