"""The files of a DICOM folder: which are images, and what their headers say.

SimpleITK (GDCM) reads the headers. The positions of the frames of a multi-frame file lie in nested sequences that
SimpleITK does not give out; those pydicom reads.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scantly.errors import ImageError
from scantly.imaging.decoding import decoding, guard_size
from scantly.imaging.dicom_marks import FileHead, read_head, refuse_broken
from scantly.imaging.dicom_persons import Person, person_of

__all__ = ["Slice", "files_below", "is_annotation", "lossy", "read_headers", "read_slices", "reader_of", "unreadable"]

log = logging.getLogger("scantly")

_STORAGE = "1.2.840.10008.5.1.4.1.1."
_NO_SCAN = {
    "1.2.840.10008.1.3.10": "DICOMDIR",
    _STORAGE + "4.2": "spectroscopy",
    _STORAGE + "9": "waveform",
    _STORAGE + "11": "presentation state",
    _STORAGE + "30": "parametric map",
    _STORAGE + "66": "raw data, registration or segmentation",
    _STORAGE + "88": "report",
    _STORAGE + "104": "document",
    _STORAGE + "481.2": "RT dose",
    _STORAGE + "481.3": "RT structure set",
    _STORAGE + "481.4": "RT treatment record",
    _STORAGE + "481.5": "RT plan",
}
"""SOP classes, or the roots of several, that hold no scan; in words."""

_SECONDARY_CAPTURE = _STORAGE + "7"
_ANNOTATIONS = (_STORAGE + "66.4", _STORAGE + "481.3")  # segmentation, RT structure set

_LOSSY_SYNTAXES = (
    "1.2.840.10008.1.2.4.50",  # JPEG baseline
    "1.2.840.10008.1.2.4.51",  # JPEG extended
    "1.2.840.10008.1.2.4.81",  # JPEG-LS near-lossless
    "1.2.840.10008.1.2.4.10",  # MPEG-2, MPEG-4, HEVC: .100 to .108
)
_LISTED = 12


@dataclass(frozen=True)
class Slice:
    """One image of a series: a file, or a frame of a multi-frame file. No names or numbers of patients.

    Attributes:
        path: The file.
        frame: Index of the frame in the file, from 0.
        sop_uid: SOPInstanceUID.
        series_uid: SeriesInstanceUID.
        study_uid: StudyInstanceUID.
        patient: Tells patients apart without naming them.
        reference_frame: FrameOfReferenceUID; positions in different ones cannot be compared.
        description: SeriesDescription.
        modality: For instance ``"CT"``.
        image_type: ImageType, for instance ``("ORIGINAL", "PRIMARY", "AXIAL")``.
        shape: (rows, columns).
        samples: SamplesPerPixel; 1 for gray.
        photometric: PhotometricInterpretation.
        position: ImagePositionPatient, LPS millimetres; None if missing.
        orientation: ImageOrientationPatient: directions in which columns, then rows are counted; None if missing.
        pixel_spacing: Distance of rows, of columns in mm; None if missing.
        thickness: SliceThickness, else SpacingBetweenSlices, in mm; None if missing.
        scale: RescaleSlope and RescaleIntercept as in the file; (1, 0) if missing.
        syntax: Transfer syntax UID.
        lossy_flag: Whether LossyImageCompression is 01.
    """

    path: Path
    frame: int
    sop_uid: str
    series_uid: str
    study_uid: str
    patient: Person
    reference_frame: str
    description: str
    modality: str
    image_type: tuple[str, ...]
    shape: tuple[int, int]
    samples: int
    photometric: str
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    pixel_spacing: tuple[float, ...] | None
    thickness: float | None
    scale: tuple[float, float]
    syntax: str
    lossy_flag: bool


def files_below(folder: Path) -> list[Path]:
    """All files below a folder, in order of path, without hidden ones; links to folders are followed.

    A link to nothing is listed too: whoever reads it says so, rather than that a slice is left out unseen.
    """
    return sorted(_walk(folder, ()))


def _walk(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    real = folder.resolve()
    if real in above:  # links in a circle
        return
    with decoding(folder, "folder"):
        listed = list(folder.iterdir())
    for item in listed:
        if item.name.startswith("."):
            continue
        if item.is_dir():
            yield from _walk(item, (*above, real))
        elif item.is_file() or not item.exists():
            yield item


def is_annotation(path: Path) -> bool:
    """Whether a DICOM file is a segmentation or a structure set, which may be meant as a label.

    Raises:
        ImageError: if the file may not be read.
    """
    head = read_head(path)
    return head is not None and head.sop_class in _ANNOTATIONS


def lossy(image: Slice) -> str | None:
    """Why an image counts as compressed with loss, in words; None if it does not."""
    if image.lossy_flag:
        return "LossyImageCompression is 01"
    if image.syntax.startswith(_LOSSY_SYNTAXES):
        return f"transfer syntax {image.syntax}"
    return None


def read_headers(folder: Path, *, broken: dict[Path, ImageError] | None = None) -> list[Slice]:
    """Headers of all scans below a folder; what else lies there is passed over and named in the log.

    DICOMDIR, files that are not DICOM, localizers, color secondary captures, and objects that hold no scan
    (segmentations, structure sets, reports, ...) are passed over, each named in the log with the reason; hidden files
    are not looked at.

    Args:
        folder: Searched with its subfolders.
        broken: Gets the files that cannot be read, with the error of each; None to raise one
            error that names them all.

    Raises:
        ImageError: for files that should be images and are empty, truncated, damaged or of an unknown
            coding: passing them over could hide a missing slice.
    """
    slices: list[Slice] = []
    ignored: dict[str, list[str]] = defaultdict(list)
    faults: dict[Path, ImageError] = {}
    for path in files_below(folder):
        try:
            kind, found = ("DICOMDIR", []) if path.name.upper() == "DICOMDIR" else _examine(path)
        except ImageError as error:
            faults[path] = error
            continue
        if found:
            slices += found
        else:
            ignored[kind].append(str(path.relative_to(folder)))
    if ignored:
        listed = ", ".join(f"{len(names)} {kind} ({', '.join(names)})" for kind, names in sorted(ignored.items()))
        log.info("%s: passed over what is no DICOM scan: %s.", folder, listed)
    if faults and broken is None:
        raise unreadable(folder, faults)
    if broken is not None:
        broken.update(faults)
    return slices


def unreadable(folder: Path, faults: Mapping[Path, ImageError]) -> ImageError:
    """One error for the files of a folder that cannot be read: the only one's own, or one that names them all."""
    first = next(iter(faults.values()))
    if len(faults) == 1:
        return first
    names = [str(path.relative_to(folder)) for path in faults]
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ImageError(
        f"{folder} holds {len(names)} files that cannot be read as DICOM images, {', '.join(names[:_LISTED])}{more}; "
        f"of the first: {first}"
    )


def read_slices(path: Path) -> list[Slice]:
    """Header of one file: one :class:`Slice`, or one per frame. Empty if it holds no scan.

    Raises:
        ImageError: as :func:`read_headers`.
    """
    return _examine(path)[1]


def _examine(path: Path) -> tuple[str, list[Slice]]:
    """As :func:`_classify`, for a file that may be of any kind."""
    head = read_head(path)
    if head is not None:
        return _classify(path, head)
    refuse_broken(path)
    return "not DICOM", []


def _classify(path: Path, head: FileHead) -> tuple[str, list[Slice]]:
    """What to call the file if it is passed over, and its slices if it is not."""
    for known, words in _NO_SCAN.items():
        if head.sop_class == known or head.sop_class.startswith(known + "."):
            return words, []
    tags = _tags(path, head.syntax)
    image = _slice(path, tags, head.syntax)
    if "LOCALIZER" in image.image_type:
        return "localizer", []
    if image.samples != 1 and f"{head.sop_class}.".startswith(f"{_SECONDARY_CAPTURE}."):
        return "color secondary capture", []
    frames = int(_number(tags.get("0028|0008")) or 1)
    guard_size(path, math.prod(image.shape) * frames * 2)
    return "", [image] if frames == 1 else _frames(image, frames)


def reader_of(path: Path) -> Any:
    """SimpleITK's reader for a DICOM file, whatever the file is called."""
    import SimpleITK

    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    return reader


def _tags(path: Path, syntax: str) -> dict[str, str]:
    """The top-level elements as text, read by SimpleITK without decoding the voxels."""
    reader = reader_of(path)
    damage = (
        f"{path} cannot be read as a DICOM image (transfer syntax {syntax or 'missing'}): it is truncated, "
        "damaged, without pixels or coded in an unknown way; fetch or export it again, or move it away."
    )
    with decoding(path, "DICOM image", damage=damage):
        reader.ReadImageInformation()
        return {key: reader.GetMetaData(key).strip("\0 ") for key in reader.GetMetaDataKeys()}


def _slice(path: Path, tags: Mapping[str, str], syntax: str) -> Slice:
    def text(key: str) -> str:
        # bytes of another character set come as lone surrogates, which cannot be printed
        return tags.get(key, "").encode("utf-8", "replace").decode("utf-8")

    def stored(key: str) -> bytes:
        return tags.get(key, "").encode("utf-8", "surrogateescape")

    return Slice(
        path=path,
        frame=0,
        sop_uid=text("0008|0018"),
        series_uid=text("0020|000e"),
        study_uid=text("0020|000d"),
        patient=person_of(stored("0010|0020"), stored("0010|0010"), text("0008|0005")),
        reference_frame=text("0020|0052"),
        description=text("0008|103e"),
        modality=text("0008|0060"),
        image_type=tuple(part.strip() for part in text("0008|0008").split("\\")),
        shape=(int(_number(tags.get("0028|0010")) or 0), int(_number(tags.get("0028|0011")) or 0)),
        samples=int(_number(tags.get("0028|0002")) or 1),
        photometric=text("0028|0004"),
        position=_numbers(tags.get("0020|0032"), 3),
        orientation=_numbers(tags.get("0020|0037"), 6),
        pixel_spacing=_numbers(tags.get("0028|0030"), 2) or _numbers(tags.get("0018|1164"), 2),
        thickness=_positive(tags.get("0018|0050")) or _positive(tags.get("0018|0088")),
        scale=(_number(tags.get("0028|1053"), 1.0) or 1.0, _number(tags.get("0028|1052"), 0.0) or 0.0),
        syntax=syntax,
        lossy_flag=text("0028|2110") == "01",
    )


def _numbers(text: str | None, count: int) -> tuple[float, ...] | None:
    """The ``count`` numbers of a text separated by backslashes; None if there are not so many."""
    values = [_number(part) for part in (text or "").split("\\")]
    present = tuple(value for value in values if value is not None)
    return present if len(present) == len(values) == count else None


def _number(text: str | None, default: float | None = None) -> float | None:
    try:
        value = float((text or "").strip("\0 "))
    except ValueError:
        return default
    return value if math.isfinite(value) else default


def _positive(text: str | None) -> float | None:
    value = _number(text)
    return value if value is not None and value > 0 else None


def _frames(image: Slice, frames: int) -> list[Slice]:
    """One slice per frame of a multi-frame file, with the positions of its functional groups."""
    import pydicom

    with decoding(image.path, "multi-frame DICOM file"):
        dataset: Any = pydicom.dcmread(image.path, stop_before_pixels=True, force=True)
        shared = (dataset.get("SharedFunctionalGroupsSequence") or [{}])[0]
        own = list(dataset.get("PerFrameFunctionalGroupsSequence") or [])
        if len(own) != frames:
            raise ImageError(
                f"{image.path} holds {frames} frames in one file without a position for each "
                f"({len(own)} given); convert it to NIfTI, or export it as single slices."
            )
        return [_frame(image, index, shared, groups) for index, groups in enumerate(own)]


def _frame(image: Slice, index: int, shared: Any, own: Any) -> Slice:
    def value(sequence: str, keyword: str) -> Any:
        for groups in (own, shared):
            items = groups.get(sequence)
            if items and items[0].get(keyword) is not None:
                return items[0].get(keyword)
        return None

    def numbers(sequence: str, keyword: str) -> tuple[float, ...] | None:
        found = value(sequence, keyword)
        return None if found is None else tuple(map(float, found))

    slope = value("PixelValueTransformationSequence", "RescaleSlope")
    intercept = value("PixelValueTransformationSequence", "RescaleIntercept")
    thickness = value("PixelMeasuresSequence", "SliceThickness")
    return replace(
        image,
        frame=index,
        position=numbers("PlanePositionSequence", "ImagePositionPatient"),
        orientation=numbers("PlaneOrientationSequence", "ImageOrientationPatient"),
        pixel_spacing=numbers("PixelMeasuresSequence", "PixelSpacing"),
        thickness=float(thickness) if thickness else None,
        scale=(1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept)),
    )
