"""Example slices: the scan, and over it the reference as a tinted area and the prediction as a line."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from scantly.data.dataset import Dataset
from scantly.errors import DatasetError, ImageError
from scantly.evaluation import case_means
from scantly.imaging import ENDINGS, Geometry, read_image, read_label, to_canonical

if TYPE_CHECKING:
    from scantly.report.groups import Result

__all__ = ["Example", "Outline", "examples"]

_MARGIN = 0.35  # of the structures' extent, shown around them
_TOLD = {"scored": "", "missed": " (missed)", "spurious": " (spurious)", "both_empty": " (in neither)"}
_SMALLEST = 48  # pixels shown at least


@dataclass(frozen=True)
class Outline:
    """Outlines of one class as SVG path data (empty if absent)."""

    number: int
    reference: str
    prediction: str


@dataclass(frozen=True)
class Example:
    """One slice of one case.

    Attributes:
        rank: ``"best"``, ``"median"`` or ``"worst"``, or several of them where there are few cases.
        case: Name of the case.
        slice: Which slice along z, from 1.
        slices: How many there are.
        dice: Mean Dice of the case and Dice per class, as text.
        image: The slice as a PNG data URL.
        pixels: (width, height) of the part shown.
        size: (width, height) of the part shown in the unit of the spacing.
        outlines: One per foreground class.
    """

    rank: str
    case: str
    slice: int
    slices: int
    dice: str
    image: str
    pixels: tuple[int, int]
    size: tuple[float, float]
    outlines: tuple[Outline, ...]


def examples(result: Result, split: str) -> tuple[list[Example], str]:
    """Slices of the best, the median and the worst case of a run, by mean Dice over classes.

    The slice is the one with the largest reference area (predicted area where there is no reference).

    Args:
        result: An evaluated run.
        split: The split evaluated.

    Returns:
        The examples, and a sentence for each that cannot be shown (empty if all can): the dataset or predictions
        may have been moved since.
    """
    root = str(result.run.config.get("data", {}).get("dataset", ""))
    try:
        dataset = Dataset.open(Path(root))
    except DatasetError as error:
        return [], f"The scans of {result.name} cannot be shown: {error}"
    shown: list[Example] = []
    missing: list[str] = []
    for case, rank in _ranked(result).items():
        try:
            shown.append(_example(result, dataset, case, rank, split))
        except (DatasetError, ImageError) as error:
            missing.append(f"{case} of {result.name} cannot be shown: {error}")
    return shown, " ".join(missing)


def _ranked(result: Result) -> dict[str, str]:
    """Case -> rank in words, best first."""
    scores = case_means(result.table, "dice").dropna().sort_values(ascending=False, kind="stable")
    if scores.empty:
        return {}
    ranks: dict[str, str] = {}
    for rank, index in (("best", 0), ("median", (len(scores) - 1) // 2), ("worst", len(scores) - 1)):
        case = str(scores.index[index])
        ranks[case] = f"{ranks[case]} and {rank}" if case in ranks else rank
    return ranks


def _example(result: Result, dataset: Dataset, case: str, rank: str, split: str) -> Example:
    files = dataset.case(case)
    if files.label is None:
        raise DatasetError(f"{dataset.root} has no label of it any more.")
    scan = read_image(files.images)
    reference = read_label(files.label)
    prediction = read_label(_prediction_file(result.run.predictions(split), case))
    if not scan.array.shape[1:] == reference.array.shape == prediction.array.shape:
        raise ImageError("scan, label and prediction differ in shape; they were changed after the evaluation.")
    image, geometry = to_canonical(scan.array[0], scan.geometry)
    truth, _ = to_canonical(reference.array, reference.geometry)
    predicted, _ = to_canonical(prediction.array, prediction.geometry)
    areas = (truth > 0).sum(axis=(1, 2))
    if not areas.any():
        areas = (predicted > 0).sum(axis=(1, 2))
    index = int(areas.argmax())
    rows, columns = _window(truth[index], predicted[index], geometry)
    spacing = geometry.spacing
    part = image[index][rows, columns]
    return Example(
        rank=rank,
        case=case,
        slice=index + 1,
        slices=len(image),
        dice=_dice_text(result, case),
        image=_png(part, image[index]),
        pixels=(part.shape[1], part.shape[0]),
        size=(part.shape[1] * spacing[2], part.shape[0] * spacing[1]),
        outlines=tuple(
            Outline(
                number,
                _outline(truth[index][rows, columns] == number, spacing[1:]),
                _outline(predicted[index][rows, columns] == number, spacing[1:]),
            )
            for number in range(1, len(dataset.classes))
        ),
    )


def _prediction_file(folder: Path, case: str) -> Path:
    for ending in ENDINGS:
        path = folder / f"{case}{ending}"
        if path.is_file():
            return path
    raise DatasetError(f"{folder} has no prediction of it; run scantly evaluate again.")


def _dice_text(result: Result, case: str) -> str:
    rows = result.table[result.table["case"] == case]
    parts = []
    for name, value, status in zip(rows["class"], rows["dice"], rows["status"], strict=True):
        number = "–" if np.isnan(value) else f"{value:.2f}"
        parts.append(f"{name} {number}{_TOLD[status]}")
    mean = float(rows["dice"].mean())
    return f"Dice {mean:.3f}: {', '.join(parts)}"


def _window(truth: NDArray[np.integer], predicted: NDArray[np.integer], geometry: Geometry) -> tuple[slice, slice]:
    """Square part (in mm) around everything annotated or predicted in the slice, with a margin."""
    rows, columns = np.nonzero((truth > 0) | (predicted > 0))
    height, width = truth.shape
    if not rows.size:
        return slice(0, height), slice(0, width)
    _, dy, dx = geometry.spacing
    extent = max((rows.max() - rows.min() + 1) * dy, (columns.max() - columns.min() + 1) * dx)
    side = max(extent * (1 + 2 * _MARGIN), _SMALLEST * min(dx, dy))
    return (
        _around(int(rows.min()), int(rows.max()), round(side / dy), height),
        _around(int(columns.min()), int(columns.max()), round(side / dx), width),
    )


def _around(first: int, last: int, length: int, limit: int) -> slice:
    length = min(max(length, last - first + 1), limit)
    start = min(max((first + last + 1 - length) // 2, 0), limit - length)
    return slice(start, start + length)


def _png(part: NDArray[np.float32], whole: NDArray[np.float32]) -> str:
    """8-bit gray PNG as a data URL; the window runs from the 1st to the 99.5th percentile of the slice."""
    from PIL import Image

    finite = whole[np.isfinite(whole)]
    low, high = np.percentile(finite, [1, 99.5]) if finite.size else (0.0, 1.0)
    scaled = np.clip((np.nan_to_num(part) - low) / max(high - low, 1e-12), 0, 1)
    stream = io.BytesIO()
    Image.fromarray(np.round(scaled * 255).astype(np.uint8)).save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def _outline(mask: NDArray[np.bool_], spacing: Sequence[float]) -> str:
    """Closed half-level lines of a mask as SVG path data, with y and x in the unit of ``spacing``."""
    from contourpy import LineType, contour_generator

    if not mask.any():
        return ""
    padded = np.pad(mask, 1).astype(np.float64)  # so that lines close at the border
    generator = contour_generator(z=padded, line_type=LineType.Separate)
    dy, dx = spacing
    paths = []
    for line in generator.lines(0.5):
        points = (np.asarray(line, np.float64) - 0.5) * (dx, dy)  # pixel (0, 0) covers 0 to 1
        text = "L".join(f"{x:.2f} {y:.2f}" for x, y in points[:-1])
        paths.append(f"M{text}Z")
    return "".join(paths)
