"""DICOM series as scans: found in folders, chosen, and read with their geometry.

Intensities are those the files mean: rescale slope and intercept are applied slice by slice. Inverted
radiographs (MONOCHROME1) are turned, so that brighter is larger. Coding without loss is decoded (RLE, JPEG,
JPEG-LS, JPEG 2000: by SimpleITK's GDCM); loss, color and everything that is not one regular grid is refused.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scantly.errors import ImageError
from scantly.files import normal_name
from scantly.imaging.decoding import decoding
from scantly.imaging.dicom_files import Slice, files_below, lossy, read_headers, read_slices, reader_of, unreadable
from scantly.imaging.dicom_geometry import arrange
from scantly.imaging.dicom_marks import is_dicom
from scantly.imaging.dicom_persons import Person, count_persons
from scantly.imaging.geometry import Geometry

__all__ = ["Series", "choose_series", "find_cases", "find_series", "is_dicom", "read_series", "series_of_file"]

log = logging.getLogger("scantly")

_GRAY = ("MONOCHROME1", "MONOCHROME2")
_RADIOGRAPHS = ("CR", "DX", "MG", "IO", "RF", "XA")
_LISTED = 12


@dataclass(frozen=True)
class Series:
    """One DICOM series: takes the place of a file's path where a scan is read.

    Attributes:
        folder: Where it was found (it may lie in subfolders), or its only file.
        uid: SeriesInstanceUID.
        slices: Headers of its images, in order of file name.
    """

    folder: Path
    uid: str
    slices: tuple[Slice, ...]

    def __str__(self) -> str:
        return f"{self.folder} (DICOM series {self.uid})"

    def resolve(self) -> Path:
        """The folder's path without links and ``..``, as :meth:`pathlib.Path.resolve`."""
        return self.folder.resolve()

    @property
    def words(self) -> str:
        """For lists of series: UID, modality, description, number of images."""
        first = self.slices[0]
        about = ", ".join(part for part in (first.modality, first.description) if part)
        count = f"{len(self.slices)} image{'' if len(self.slices) == 1 else 's'}"
        return f"{self.uid} ({', '.join(part for part in (about, count) if part)})"

    @cached_property
    def _arranged(self) -> tuple[list[Slice], Geometry]:
        _require_usable(self)
        return arrange(self.slices, str(self))

    @property
    def ordered(self) -> list[Slice]:
        """The slices in the order of the array's first axis.

        Raises:
            ImageError: as :attr:`geometry`.
        """
        return self._arranged[0]

    @property
    def geometry(self) -> Geometry:
        """The grid, from the headers alone.

        Raises:
            ImageError: if the series is no gray, losslessly stored volume of one patient on a regular grid.
        """
        return self._arranged[1]


def find_series(folder: Path) -> list[Series]:
    """All series below a folder, in order of UID; empty if there is none.

    DICOMDIR, files that are not DICOM, localizers and objects that hold no scan are passed over and named in the
    log; hidden files are not looked at.

    Raises:
        ImageError: if the folder does not exist, or one of its DICOM files is empty, truncated or damaged.
    """
    return _group(folder, _headers(folder, None))


def series_of_file(path: Path) -> Series:
    """A file that is a whole scan by itself: a multi-frame file, or an image without position (a radiograph).

    Raises:
        ImageError: if it is one slice of a volume, or no scan.
    """
    slices = read_slices(path)
    if not slices:
        raise ImageError(f"{path} is a DICOM object that holds no scan; give the folder of the scan's series.")
    if len(slices) == 1 and slices[0].position is not None:
        raise ImageError(f"{path} is one slice of a DICOM series; give the folder that holds the whole series.")
    return Series(path, slices[0].series_uid, tuple(slices))


def choose_series(folder: Path, found: Sequence[Series], uid: str | None, *, option: bool = True) -> Series:
    """The only series of a folder, or the one with this UID.

    Args:
        folder: What messages name.
        found: From :func:`find_series`.
        uid: SeriesInstanceUID; None if there is but one.
        option: Whether the user can give a UID where this is called; messages then say so.

    Raises:
        ImageError: if there is none, several without ``uid``, or none with this UID.
    """
    if not found:
        raise ImageError(f"{folder} holds no DICOM images; give the folder of a series.")
    listed = "; ".join(series.words for series in found[:_LISTED]) + ("; ..." if len(found) > _LISTED else "")
    if uid is not None:
        chosen = [series for series in found if series.uid == uid]
        if not chosen:
            raise ImageError(f"{folder} has no DICOM series {uid}; choose one of: {listed}.")
        return chosen[0]
    if len(found) == 1:
        return found[0]
    patients = count_persons(image.patient for series in found for image in series.slices)
    if patients > 1:
        choice = ", or choose one series with predict --series UID" if option else ""
        raise ImageError(
            f"{folder} mixes DICOM series of {patients} patients; give each patient a folder of its own{choice}: "
            f"{listed}."
        )
    cure = "choose one with predict --series UID, or move" if option else "leave one and move"
    where = "to another folder" if option else "away"
    raise ImageError(f"{folder} holds {len(found)} DICOM series; {cure} the others {where}: {listed}.")


def find_cases(
    folder: Path,
    *,
    series: str | None = None,
    collection: bool = False,
    broken: list[tuple[str, ImageError]] | None = None,
) -> dict[str, Series]:
    """Cases of a folder of DICOM files.

    A folder that holds one series (in whatever subfolders), or that has DICOM files directly in it, is one
    case, named after the folder; so is the series chosen by ``series``. Otherwise each direct subfolder that
    holds a series is a case, named after the subfolder. Subfolders that share a study are no cases but several
    series of one patient, of which one must be chosen.

    Args:
        folder: Searched with its subfolders.
        series: UID of the series to take.
        collection: The subfolders are the cases even if there is only one.
        broken: Gets the name and the error of every case that cannot be used; None to raise the first. Of a case that
            was copied the first folder in order of name is used.

    Returns:
        Case name -> series, in order of name; empty if the folder holds no DICOM scan.

    Raises:
        ImageError: if a case has several series, its series cannot be used (:attr:`Series.geometry`), or two
            subfolders hold the same images.
    """
    faults: dict[Path, ImageError] = {}
    slices = _headers(folder, None if broken is None else faults)
    if not slices and not faults and series is None:
        return {}
    places, faulty = _places(folder, slices, faults, together=series is not None, collection=collection)
    _tell_left_out(folder, places, faulty)
    failed = [(normal_name(name), error) for name, error in faulty.items()]
    if broken is None and failed:
        raise failed[0][1]
    cases: dict[str, Series] = {}
    for name, (place, images) in places.items():
        if name in faulty:
            continue
        try:
            case = choose_series(place, _group(place, images), series, option=not collection)
            _ = case.geometry  # refused now, not after hours of other cases
        except ImageError as error:
            if broken is None:
                raise
            failed.append((normal_name(name), error))
        else:
            if normal_name(name) in cases:
                raise ImageError(f"{place} and {cases[normal_name(name)].folder} have the same name; rename one.")
            cases[normal_name(name)] = case
    if broken is not None:
        broken += failed
    return cases


def read_series(series: Series) -> tuple[NDArray[np.float32], Geometry]:
    """Read the voxels of a series.

    Args:
        series: From :func:`find_series` or :func:`find_cases`.

    Returns:
        Array (1, D, H, W) float32 = (channel, slice in ascending order along the normal, row, column) in rescaled
        units (CT: HU), and its grid: RAS+ affine as for NIfTI, so that a NIfTI file written on it lies where the
        series does.

    Raises:
        ImageError: if the series is no regular gray volume stored without loss, or a file cannot be decoded.
    """
    geometry = series.geometry
    array = np.empty((1, *geometry.shape), np.float32)
    frames_of = Counter(image.path for image in series.ordered)
    decoded: tuple[Path, NDArray[Any]] | None = None
    for index, image in enumerate(series.ordered):
        if decoded is None or decoded[0] != image.path:
            decoded = image.path, _decode(image.path, math.prod(image.shape) * frames_of[image.path])
        frames = decoded[1]
        if image.frame >= len(frames) or frames[image.frame].shape != image.shape:
            raise ImageError(
                f"{image.path} decodes to an image of {frames.shape} (frames, rows, columns), not what its header "
                "says; fetch or export it again."
            )
        array[0, index] = frames[image.frame]
    return array, geometry


def _decode(path: Path, voxels: int) -> NDArray[Any]:
    """(frames, rows, columns), rescaled by GDCM in double precision where the factors are not whole."""
    import SimpleITK

    # the decoder's text is about its source code
    damage = f"{path} cannot be decoded as a DICOM image: it is truncated or damaged; fetch or export it again."
    with decoding(path, "DICOM image", damage=damage) as reading:
        reading.needs = 8 * voxels  # GDCM holds the file, its pixels and the image, of 2 bytes a voxel at least
        array: NDArray[Any] = SimpleITK.GetArrayFromImage(reader_of(path).Execute())
        return array


def _headers(folder: Path, broken: dict[Path, ImageError] | None) -> list[Slice]:
    if not folder.is_dir():
        raise ImageError(f"{folder} is not a folder; give the folder that holds the DICOM files.")
    return read_headers(folder, broken=broken)


def _places(
    folder: Path, slices: list[Slice], faults: Mapping[Path, ImageError], *, together: bool, collection: bool
) -> tuple[dict[str, tuple[Path, list[Slice]]], dict[str, ImageError]]:
    """Cases by name, each with its folder and slices, and the first fault of each case that has any."""

    def part(path: Path) -> str:
        return path.relative_to(folder).parts[0]  # as the folder is called; cases get the normal form of it

    parts: dict[str, list[Slice]] = defaultdict(list)
    for image in slices:
        parts[part(image.path)].append(image)
    broken: dict[str, dict[Path, ImageError]] = defaultdict(dict)
    for path, error in faults.items():
        broken[part(path)][path] = error
    faulty = {name: unreadable(folder, errors) for name, errors in broken.items()}
    direct = any(path.parent == folder for path in (*faults, *(image.path for image in slices)))
    if not direct:
        copies = _copies(folder, parts)
        if copies and together:
            raise next(iter(copies.values()))
        slices = [image for image in slices if part(image.path) not in copies]
        parts = {name: images for name, images in parts.items() if name not in copies}
        faulty |= copies
    # a subfolder of which nothing can be read is taken for a case of its own
    alone = len({image.series_uid for image in slices}) == 1 and faulty.keys() <= parts.keys()
    if together or direct or (alone and not collection) or _share_study(parts.values()):
        name = normal_name(folder.resolve().name)
        return {name: (folder, slices)}, {name: unreadable(folder, faults)} if faults else {}
    return {name: (folder / name, images) for name, images in sorted(parts.items())}, faulty


def _tell_left_out(folder: Path, places: Mapping[str, tuple[Path, list[Slice]]], faulty: Mapping[str, object]) -> None:
    """Name the subfolders that would have been cases, but hold DICOM objects of which none is a scan."""
    if any(place == folder for place, _ in places.values()):
        return
    for path in sorted(folder.iterdir()):
        if not path.is_dir() or path.name.startswith(".") or path.name in places or path.name in faulty:
            continue
        files = [file for file in files_below(path) if is_dicom(file)]
        if files:
            log.warning("%s holds no DICOM scan and is left out.", path)


def _copies(folder: Path, parts: Mapping[str, Sequence[Slice]]) -> dict[str, ImageError]:
    """Subfolders that hold images of an earlier one again, by their UIDs and patient, each with what to say of it."""
    owners: dict[tuple[str, str, int], tuple[str, Slice]] = {}
    copies: dict[str, ImageError] = {}
    for name, images in sorted(parts.items()):
        known = [owners.get((image.series_uid, image.sop_uid, image.frame)) for image in images]
        twice = [
            (owner[0], image)
            for owner, image in zip(known, images, strict=True)
            if owner is not None and image.sop_uid and owner[1].patient.same(image.patient)
        ]
        if twice:
            other, image = twice[0]
            copies[name] = ImageError(
                f"{folder / other} and {folder / name} hold the same series ({image.series_uid}, {len(twice)} images "
                "in both): one is a copy of the other; move one away."
            )
            continue
        for image in images:
            owners.setdefault((image.series_uid, image.sop_uid, image.frame), (name, image))
    return copies


def _group(folder: Path, slices: Iterable[Slice]) -> list[Series]:
    by_uid: dict[str, list[Slice]] = defaultdict(list)
    for image in slices:
        by_uid[image.series_uid].append(image)
    return [Series(folder, uid, tuple(images)) for uid, images in sorted(by_uid.items())]


def _share_study(parts: Iterable[Sequence[Slice]]) -> bool:
    """Whether two subfolders hold images of one study of one patient."""
    seen: dict[str, set[Person]] = defaultdict(set)
    for images in parts:
        own = dict.fromkeys((image.study_uid, image.patient) for image in images)
        if any(patient.same(other) for study, patient in own for other in seen[study]):
            return True
        for study, patient in own:
            seen[study].add(patient)
    return False


def _require_usable(series: Series) -> None:
    """Refuse what is no gray volume of one patient, stored without loss."""
    patients = count_persons(image.patient for image in series.slices)
    if patients > 1:
        raise ImageError(
            f"{series} mixes images of {patients} patients under one series UID; separate them, each in a folder and "
            "series of its own."
        )
    files: Mapping[Path, Slice] = {image.path: image for image in series.slices}
    for path, image in files.items():
        if image.samples != 1 or image.photometric not in _GRAY:
            raise ImageError(
                f"{path} holds color ({image.photometric or 'unknown'}, {image.samples} samples per pixel), a scan is "
                "gray (MONOCHROME2); choose another series or convert the pictures to PNG."
            )
        reason = lossy(image)
        if reason:
            raise ImageError(
                f"{path} is compressed with loss ({reason}); fetch the original from the archive, or convert the "
                "series to NIfTI if the loss is acceptable."
            )
        if image.photometric == "MONOCHROME1" and image.modality not in _RADIOGRAPHS:
            raise ImageError(
                f"{path} is an inverted {image.modality or 'unknown'} image (MONOCHROME1), whose values have no sure "
                "meaning; export the series as MONOCHROME2."
            )
    _require_one_scale_per_file(series)


def _require_one_scale_per_file(series: Series) -> None:
    """Files may differ in rescale slope and intercept, the frames of one file may not: GDCM applies one pair."""
    scales: dict[Path, tuple[float, float]] = {}
    for image in series.slices:
        known = scales.setdefault(image.path, image.scale)
        if known != image.scale:
            raise ImageError(
                f"{image.path} has frames of different rescale slope and intercept ({known} and {image.scale}); "
                "export it as single slices or convert it to NIfTI."
            )
