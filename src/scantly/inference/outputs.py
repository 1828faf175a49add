"""What a prediction is written as: label map, uncertainty and probabilities on the input's grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scantly.errors import ImageError
from scantly.files import atomic_path, name_too_long, normal_name
from scantly.imaging import Geometry, file_ending, nifti, write_label, write_scalar
from scantly.imaging.dicom import Series
from scantly.imaging.dicom_seg import write_segmentation
from scantly.imaging.volumes import Source
from scantly.inference.model import Model

__all__ = ["Outputs", "Prediction", "outputs_of", "refuse_long_names", "refuse_overwriting", "write_prediction"]


@dataclass(frozen=True)
class Prediction:
    """Labels and, if asked for, uncertainty and probabilities of one scan, on its own grid.

    Attributes:
        labels: ``(D, H, W)``, class indices.
        uncertainty: ``(D, H, W)``, entropy of the class probabilities over ``ln C``, in [0, 1].
        geometry: Of the input.
        probabilities: ``(classes, D, H, W)``, float32, sums to 1 over classes; before any choice of components.
    """

    labels: np.ndarray
    uncertainty: np.ndarray | None
    geometry: Geometry
    probabilities: np.ndarray | None = None


@dataclass(frozen=True)
class Outputs:
    """Files of one scan's prediction.

    Attributes:
        label: The label map.
        uncertainty: The entropy.
        probabilities: The class probabilities.
        dicom_seg: The label map as a DICOM segmentation.
    """

    label: Path
    uncertainty: Path
    probabilities: Path
    dicom_seg: Path

    def asked(self, *, uncertainty: bool, probabilities: bool, dicom_seg: bool) -> list[Path]:
        """Those that a prediction with these options writes."""
        chosen = {
            self.label: True,
            self.uncertainty: uncertainty,
            self.probabilities: probabilities,
            self.dicom_seg: dicom_seg,
        }
        return [path for path, wanted in chosen.items() if wanted]


def outputs_of(folder: Path, case: str, source: Source) -> Outputs:
    """The files that belong to a scan.

    Labels are of the input's type; inputs without geometry (``.h5``) and DICOM series get ``.nii.gz``. Uncertainty
    of PNG inputs is TIFF, which holds floating-point values. Probabilities are always one NIfTI file of four
    dimensions: neither PNG nor TIFF here can hold several classes.
    """
    ending = file_ending(source) or ".nii.gz"
    ending = ".nii.gz" if ending == ".h5" else ending
    scalar_ending = ".tiff" if ending == ".png" else ending
    return Outputs(
        folder / f"{case}{ending}",
        folder / f"{case}_uncertainty{scalar_ending}",
        folder / f"{case}_probabilities.nii.gz",
        folder / f"{case}.dcm",
    )


def write_prediction(
    prediction: Prediction, folder: Path, case: str, source: Source, *, dicom_seg_by: Model | None = None
) -> Path:
    """Write ``<case><ending>``, and ``<case>_uncertainty`` and ``<case>_probabilities`` if they were computed.

    All have the input's geometry; probabilities have the axes (x, y, z, class).

    Args:
        prediction: What to write.
        folder: Where.
        case: Name of the scan.
        source: Its file, or its DICOM series.
        dicom_seg_by: The model that predicted a series, to write ``<case>.dcm`` too.

    Returns:
        The label file. The DICOM segmentation is written last: what else was asked for is never lost with it.

    Raises:
        ImageError: if the DICOM segmentation cannot be made; all other files are written.
    """
    paths = outputs_of(folder, case, source)
    if prediction.uncertainty is not None:
        write_scalar(paths.uncertainty, prediction.uncertainty, prediction.geometry)
    if prediction.probabilities is not None:
        with atomic_path(paths.probabilities) as temporary:
            nifti.write(temporary, prediction.probabilities, prediction.geometry)
    write_label(paths.label, prediction.labels, prediction.geometry)
    if dicom_seg_by is not None and isinstance(source, Series):
        classes, name = dicom_seg_by.task.classes, dicom_seg_by.method
        try:
            write_segmentation(paths.dicom_seg, prediction.labels, source, classes, model_name=name)
        except ImageError as error:
            paths.dicom_seg.unlink(missing_ok=True)  # an earlier one would be taken for that of this label map
            raise ImageError(f"{paths.label} is written, but not as DICOM-SEG: {error}") from error
    return paths.label


def refuse_long_names(case: str, paths: Sequence[Path]) -> None:
    """Refuse a scan whose outputs would have names longer than the file system allows, before it is predicted.

    Args:
        case: Name of the scan.
        paths: What would be written for it.

    Raises:
        ImageError: naming the scan and the file.
    """
    for path in paths:
        fault = name_too_long(path)
        if fault is not None:
            raise ImageError(f"{fault}; give the scan '{case}' a shorter name.")


def refuse_overwriting(
    cases: Mapping[str, Sequence[Source]], folder: Path, *, uncertainty: bool, probabilities: bool, dicom_seg: bool
) -> None:
    """No output may be a scan, nor an output of another scan.

    A scan without a channel suffix has the name of its own label map; ``a_uncertainty_0000`` has a label map that
    is called like the uncertainty of ``a_0000``.

    Args:
        cases: The scans.
        folder: Where their predictions go.
        uncertainty: Whether it is written.
        probabilities: Whether they are written.
        dicom_seg: Whether it is written.

    Raises:
        ImageError: naming the scan that a prediction would overwrite, or the scans with one name for two outputs.
    """
    inputs = {_place(file) for files in cases.values() for file in files}
    written: dict[Path, Source] = {}
    for case, files in cases.items():
        paths = outputs_of(folder, case, files[0])
        for path in paths.asked(uncertainty=True, probabilities=True, dicom_seg=True):
            if _place(path) in inputs:
                raise ImageError(f"{path} is a scan and would be overwritten by a prediction; choose another --out.")
        for path in paths.asked(uncertainty=uncertainty, probabilities=probabilities, dicom_seg=dicom_seg):
            if path in written:
                raise ImageError(
                    f"{path} would be written for both {written[path]} and {files[0]}; rename one, or predict them "
                    "into two folders."
                )
            written[path] = files[0]


def _place(file: Source) -> str:
    """Where a file lies; names that differ in the coding of accents alone are one file on some systems."""
    return normal_name(str(file.resolve()))
