"""Segmentations as DICOM objects (DICOM-SEG) that refer to the series they were made from.

Written by highdicom (Herrmann et al., Journal of Digital Imaging 2022), which comes with the extra ``dicom-seg``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scantly._version import __version__
from scantly.errors import ConfigError, ImageError
from scantly.files import atomic_path
from scantly.imaging.dicom import Series

__all__ = ["require_highdicom", "write_segmentation"]

_SERIES_NUMBER = 1000  # above those of scanners
_EMPTY_IF_UNKNOWN = (
    "AccessionNumber",
    "PatientBirthDate",
    "PatientID",
    "PatientName",
    "PatientSex",
    "PositionReferenceIndicator",
    "ReferringPhysicianName",
    "StudyDate",
    "StudyID",
    "StudyTime",
)
"""Attributes of type 2 in the modules that a segmentation takes over from its source: there, but perhaps empty."""

_ORGANS = {
    "adrenal gland": "AdrenalGland",
    "aorta": "Aorta",
    "bone": "Bone",
    "brain": "Brain",
    "colon": "Colon",
    "esophagus": "Esophagus",
    "gallbladder": "Gallbladder",
    "heart": "Heart",
    "hippocampus": "Hippocampus",
    "kidney": "Kidney",
    "left atrium": "LeftAtrium",
    "left ventricle": "LeftVentricle",
    "liver": "Liver",
    "lung": "Lung",
    "pancreas": "Pancreas",
    "prostate": "Prostate",
    "right atrium": "RightAtrium",
    "right ventricle": "RightVentricle",
    "spleen": "Spleen",
    "stomach": "Stomach",
}
_ABNORMAL = {
    "cyst": "Cyst",
    "edema": "Edema",
    "lesion": "Lesion",
    "necrosis": "Necrosis",
    "nodule": "Nodule",
    "tumor": "Tumor",
    "tumour": "Tumor",
}
"""Class names -> SNOMED CT concepts in pydicom's dictionary; no abbreviations, since a wrong code does harm."""


def require_highdicom() -> None:
    """Check that DICOM-SEG can be written, before any work is done.

    Raises:
        ConfigError: if highdicom is not installed.
    """
    try:
        import highdicom  # noqa: F401
    except ImportError:
        raise ConfigError(
            "DICOM-SEG needs highdicom, which is not installed; pip install 'scantly[dicom-seg]'."
        ) from None


def write_segmentation(
    path: Path,
    labels: NDArray[np.integer[Any]],
    series: Series,
    classes: Sequence[str],
    *,
    model_name: str,
    model_version: str = "1",
) -> None:
    """Write a binary DICOM-SEG: one segment per foreground class, in the frame of reference of the series.

    Every frame refers to the image of the series that it was made from, so any viewer lays it over that image.
    Well-known organs and abnormalities get their SNOMED CT codes by the class's name, other classes the code for
    tissue; the segment's label is always the class's name. Without foreground all frames are written, empty.
    Equal input gives equal content but for UIDs, date and time.

    Args:
        path: File to write, usually ``.dcm``; whole or not at all.
        labels: (D, H, W) class indices on the grid of ``series``, as read by
            :func:`~scantly.imaging.dicom.read_series`.
        series: The source.
        classes: Names of the classes, background first.
        model_name: For the algorithm's identification.
        model_version: For the algorithm's identification.

    Raises:
        ConfigError: if highdicom is not installed.
        ImageError: if the series has no place in space (a radiograph) or lacks what DICOM-SEG must repeat.
        ValueError: if ``labels`` is not on the series' grid or has values that are no class.
    """
    require_highdicom()
    geometry = series.geometry
    if labels.shape != geometry.shape:
        raise ValueError(f"the labels' shape is {labels.shape}, the series' is {geometry.shape}")
    if labels.dtype.kind not in "iub" or labels.min() < 0 or labels.max() >= len(classes):
        raise ValueError(f"labels are class indices 0 to {len(classes) - 1}")
    if series.slices[0].position is None:
        raise ImageError(
            f"{series} has no ImagePositionPatient, to which a DICOM-SEG could refer; write the prediction as NIfTI."
        )
    try:
        segmentation = _segmentation(labels, series, classes, model_name, model_version)
        with atomic_path(path) as temporary:
            segmentation.save_as(temporary, enforce_file_format=True)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:  # on headers with gaps
        reason = " ".join(str(error).split())[:200]
        raise ImageError(
            f"{series} cannot be the source of a DICOM-SEG ({reason}); export the series with its full headers, or "
            "write the prediction as NIfTI alone."
        ) from error


def _sources(files: Sequence[Path], thickness: float) -> list[Any]:
    """Headers of the source images, with what the standard wants there, if only empty (type 2).

    Exports without names leave such attributes out, and highdicom copies them unseen. A sex that is none of the
    standard's values is left empty too.

    Args:
        files: The source images.
        thickness: Distance of the slices in mm, for images that do not say how thick they are.
    """
    import pydicom

    sources = [pydicom.dcmread(path, stop_before_pixels=True, force=True) for path in files]
    for source in sources:
        for keyword in _EMPTY_IF_UNKNOWN:
            if keyword not in source:
                setattr(source, keyword, "")
        if source.PatientSex not in ("M", "F", "O", "", None):
            source.PatientSex = ""
        if "PerFrameFunctionalGroupsSequence" not in source and not source.get("SliceThickness"):
            source.SliceThickness = pydicom.valuerep.DSfloat(thickness, auto_format=True)
    return sources


def _segmentation(
    labels: NDArray[np.integer[Any]], series: Series, classes: Sequence[str], model_name: str, model_version: str
) -> Any:
    import highdicom

    ordered = series.ordered
    files = list(dict.fromkeys(image.path for image in ordered))
    frames = np.asarray(labels, np.uint8 if len(classes) <= 256 else np.uint16)
    if len(files) == 1:  # a multi-frame file keeps its own order of frames
        frames = frames[np.argsort([image.frame for image in ordered])]
    return highdicom.seg.Segmentation(
        source_images=_sources(files, series.geometry.spacing[0]),
        pixel_array=frames,
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=_descriptions(classes, model_name, model_version),
        series_instance_uid=highdicom.UID(),
        series_number=_SERIES_NUMBER,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="Scantly",
        manufacturer_model_name=model_name,
        software_versions=__version__,
        device_serial_number=model_version,
        omit_empty_frames=bool(labels.any()),
        content_label="SEGMENTATION",
        content_description=f"Segmentation by {model_name}"[:64],
        series_description=f"Scantly: {model_name}"[:64],
    )


def _descriptions(classes: Sequence[str], model_name: str, model_version: str) -> list[Any]:
    import highdicom
    from pydicom.sr.codedict import codes

    algorithm = highdicom.AlgorithmIdentificationSequence(
        name=model_name, family=codes.DCM.ArtificialIntelligence, version=model_version, source="Scantly"
    )
    descriptions = []
    for number, name in enumerate(classes[1:], start=1):
        category, kind = _codes(name)
        descriptions.append(
            highdicom.seg.SegmentDescription(
                segment_number=number,
                segment_label=name[:64],
                segmented_property_category=category,
                segmented_property_type=kind,
                algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
                algorithm_identification=algorithm,
            )
        )
    return descriptions


def _codes(name: str) -> tuple[Any, Any]:
    """Category and type of a class, by its name in full."""
    from pydicom.sr.codedict import codes

    plain = " ".join(name.replace("_", " ").replace("-", " ").split()).casefold()
    if plain in _ORGANS:
        return codes.SCT.AnatomicalStructure, getattr(codes.SCT, _ORGANS[plain])
    if plain in _ABNORMAL:
        return codes.SCT.MorphologicallyAbnormalStructure, getattr(codes.SCT, _ABNORMAL[plain])
    return codes.SCT.Tissue, codes.SCT.Tissue
