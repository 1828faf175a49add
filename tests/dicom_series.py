"""DICOM series written for the tests: a small volume, sliced along any directions of the patient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.valuerep import DSfloat

SHAPE = (5, 7, 6)
SPACING = (3.0, 0.5, 0.75)
ORIGIN = (-12.5, 30.25, 100.0)

Directions = tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]
AXIAL: Directions = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


@dataclass(frozen=True)
class Stack:
    """A volume of stored values and where it lies.

    Attributes:
        stored: (D, H, W) int16, before rescaling.
        directions: Unit vectors (LPS) in which columns are counted, rows, and slices in the order written.
        spacing: (slice, row, column) in mm.
        origin: Position (LPS) of the first voxel of the first slice written.
    """

    stored: np.ndarray
    directions: Directions = AXIAL
    spacing: tuple[float, float, float] = SPACING
    origin: tuple[float, float, float] = ORIGIN

    @property
    def affine(self) -> np.ndarray:
        """Index (x, y, z) = (column, row, slice written) to RAS+ mm, by the definition in the standard."""
        lps = np.eye(4)
        for axis, (direction, step) in enumerate(zip(self.directions, self.spacing[::-1], strict=True)):
            lps[:3, axis] = np.array(direction) * step
        lps[:3, 3] = self.origin
        return np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps

    def position(self, index: int) -> list[float]:
        return list(np.array(self.origin) + index * self.spacing[0] * np.array(self.directions[2]))


def stack(seed: int = 0, shape: tuple[int, int, int] = SHAPE, **changes: Any) -> Stack:
    """Random values from -1000 to 2000."""
    values = np.random.default_rng(seed).integers(-1000, 2000, size=shape).astype(np.int16)
    return replace(Stack(values), **changes)


def axis_orders() -> Iterator[Directions]:
    """All 48 ways to lay columns, rows and slices along the patient's axes, in both directions each."""
    for order, signs in product(permutations(range(3)), product((1.0, -1.0), repeat=3)):
        unit = np.eye(3)[list(order)] * np.array(signs)[:, None]
        yield tuple(tuple(map(float, row)) for row in unit)  # type: ignore[misc]


OBLIQUE: Directions = tuple(  # type: ignore[assignment]
    tuple(map(float, row)) for row in np.linalg.qr(np.array([[3.0, 1.0, 0.5], [-1.0, 4.0, 1.0], [0.2, -1.0, 5.0]]))[0].T
)

Edit = Callable[[Dataset, int], None]


def write(
    folder: Path,
    volume: Stack | None = None,
    *,
    series: str = "1.2.826.0.1.77.1",
    study: str = "1.2.826.0.1.77",
    patient: str = "P1",
    description: str = "T1 axial",
    scale: Callable[[int], tuple[float, float]] = lambda index: (1.0, 0.0),
    syntax: str = uid.ExplicitVRLittleEndian,
    edit: Edit | None = None,
    shuffle: bool = True,
) -> Stack:
    """Write one file per slice, under names and instance numbers that say nothing about the order.

    Args:
        folder: To write to.
        volume: Default: :func:`stack`.
        scale: Rescale slope and intercept of each slice.
        syntax: Transfer syntax; RLE and JPEG-LS are encoded.
        edit: Changes a slice's dataset before it is written.
        shuffle: Number the files out of order.
    """
    volume = volume or stack()
    folder.mkdir(parents=True, exist_ok=True)
    depth = len(volume.stored)
    numbers = np.random.default_rng(3).permutation(depth) if shuffle else np.arange(depth)
    for index in range(depth):
        dataset = _slice(volume, index, series, study, patient)
        dataset.SeriesDescription = description
        dataset.InstanceNumber = int(numbers[index]) + 1
        slope, intercept = scale(index)
        dataset.RescaleSlope, dataset.RescaleIntercept = str(slope), str(intercept)
        if edit is not None:
            edit(dataset, index)
        save(dataset, folder / f"IM{numbers[index]:04d}", syntax)
    return volume


def save(dataset: Dataset, path: Path, syntax: str = uid.ExplicitVRLittleEndian) -> None:
    encoded = syntax in (uid.RLELossless, uid.JPEGLSLossless)
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian if encoded else uid.UID(syntax)
    if encoded:
        dataset.compress(syntax, generate_instance_uid=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)


def _slice(volume: Stack, index: int, series: str, study: str, patient: str) -> Dataset:
    dataset = bare(uid.CTImageStorage, series, study, patient)
    dataset.SOPInstanceUID = f"{series}.{index + 1}"
    dataset.Modality = "CT"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.ImagePositionPatient = decimals(volume.position(index))
    dataset.ImageOrientationPatient = decimals(value for pair in volume.directions[:2] for value in pair)
    dataset.PixelSpacing = [str(volume.spacing[1]), str(volume.spacing[2])]
    dataset.SliceThickness = str(volume.spacing[0])
    pixels(dataset, volume.stored[index])
    return dataset


def decimals(values: Iterable[float]) -> list[DSfloat]:
    """Numbers as DICOM stores them: text of at most 16 characters."""
    return [DSfloat(float(value), auto_format=True) for value in values]


def bare(sop_class: str, series: str, study: str, patient: str) -> Dataset:
    """What every object has."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    dataset.SpecificCharacterSet = "ISO_IR 100"
    dataset.SOPClassUID = uid.UID(sop_class)
    dataset.SOPInstanceUID = uid.generate_uid()
    dataset.StudyInstanceUID = study
    dataset.SeriesInstanceUID = series
    dataset.FrameOfReferenceUID = study + ".9"
    dataset.PatientID = patient
    dataset.PatientName = "Secret^" + patient
    dataset.PatientBirthDate = dataset.PatientSex = dataset.StudyDate = dataset.StudyTime = ""
    dataset.AccessionNumber = dataset.ReferringPhysicianName = dataset.StudyID = ""
    dataset.SeriesNumber = 1
    dataset.Manufacturer = "none"
    dataset.PositionReferenceIndicator = ""
    return dataset


def pixels(dataset: Dataset, stored: np.ndarray) -> None:
    """Gray int16 pixels: one frame (H, W), or several (frames, H, W)."""
    dataset.Rows, dataset.Columns = stored.shape[-2:]
    if stored.ndim == 3:
        dataset.NumberOfFrames = len(stored)
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit = 15
    dataset.PixelRepresentation = 1
    dataset.PixelData = stored.astype("<i2").tobytes()


def write_enhanced(
    path: Path, volume: Stack, *, order: list[int] | None = None, scales: list[tuple[float, float]] | None = None
) -> None:
    """Write an enhanced CT: all slices in one file, frames in ``order``."""
    order = order or list(range(len(volume.stored)))
    dataset = bare(uid.EnhancedCTImageStorage, "1.2.826.0.1.77.2", "1.2.826.0.1.77", "P1")
    dataset.Modality = "CT"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    pixels(dataset, volume.stored[order])
    shared, frames = Dataset(), []
    shared.PixelMeasuresSequence = Sequence([Dataset()])
    shared.PixelMeasuresSequence[0].PixelSpacing = [str(volume.spacing[1]), str(volume.spacing[2])]
    shared.PixelMeasuresSequence[0].SliceThickness = str(volume.spacing[0])
    shared.PlaneOrientationSequence = Sequence([Dataset()])
    shared.PlaneOrientationSequence[0].ImageOrientationPatient = decimals(
        value for pair in volume.directions[:2] for value in pair
    )
    for frame, index in enumerate(order):
        own = Dataset()
        own.PlanePositionSequence = Sequence([Dataset()])
        own.PlanePositionSequence[0].ImagePositionPatient = decimals(volume.position(index))
        own.PixelValueTransformationSequence = Sequence([Dataset()])
        slope, intercept = scales[frame] if scales else (1.0, -1024.0)
        own.PixelValueTransformationSequence[0].RescaleSlope = str(slope)
        own.PixelValueTransformationSequence[0].RescaleIntercept = str(intercept)
        own.PixelValueTransformationSequence[0].RescaleType = "HU"
        frames.append(own)
    dataset.SharedFunctionalGroupsSequence = Sequence([shared])
    dataset.PerFrameFunctionalGroupsSequence = Sequence(frames)
    save(dataset, path)


def by_place(array: np.ndarray, affine: np.ndarray) -> dict[tuple[float, ...], float]:
    """Voxel values by their place in RAS+ mm, rounded to 1e-3: equal for equal volumes, however stored."""
    grid = np.stack(np.meshgrid(*map(np.arange, array.shape), indexing="ij"), axis=-1).reshape(-1, 3)
    places = grid[:, ::-1] @ affine[:3, :3].T + affine[:3, 3]
    rounded = np.round(places, 3) + 0.0  # no negative zeros
    return {tuple(map(float, place)): float(value) for place, value in zip(rounded, array.ravel(), strict=True)}
