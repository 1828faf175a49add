"""Overlap and surface metrics of segmentations, per pair of masks and per case.

All distances are exact and follow the definitions of the semi-supervised literature (those of the ``medpy``
package, which its papers use), in voxels, and with the voxel spacing in mm:

- HD95: 95th percentile, linearly interpolated, of the surface distances of both directions together;
- ASD: mean distance from the prediction's surface to the reference's, one direction;
- ASSD: mean of the surface distances of both directions together (not the mean of two means);
- NSD: normalized surface Dice (Nikolov et al., "Clinically Applicable Segmentation of Head and Neck Anatomy
  for Radiotherapy", JMIR 2021), the share of surface voxels of both masks within a tolerance. It counts
  voxels, where Nikolov et al. weight them by an estimate of the surface area they stand for.

Sources of the definitions of surface and distance are in :mod:`scantly.evaluation.surfaces`. Arrays
``(1, H, W)`` are 2D images and are measured as ``(H, W)``.

Functions of two masks answer NaN where nothing can be said (both masks empty), and the image diagonal as the
distance if one of them is empty; :func:`score_case` also offers the literature's values for empty masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scantly.errors import ConfigError, ImageError, unknown_name
from scantly.evaluation.masks import Pair, Status, class_masks
from scantly.evaluation.surfaces import (
    SurfaceDistances,
    checked_spacing,
    drop_single_slice,
    image_diagonal,
)

__all__ = [
    "CONVENTIONS",
    "TOLERANCE_MM",
    "TOLERANCE_VOXELS",
    "Convention",
    "Row",
    "Status",
    "asd",
    "assd",
    "dice",
    "dice_per_class",
    "hd95",
    "jaccard",
    "nsd",
    "score_case",
    "surface_distances",
]

Convention = Literal["clean", "literature"]
TOLERANCE_MM = 2.0
TOLERANCE_VOXELS = 1.0

CONVENTIONS: dict[Convention, str] = {
    "clean": (
        "A missed structure (prediction empty) and a spurious one (reference empty) score 0 in Dice, Jaccard "
        "and NSD, and the image diagonal in every distance; where both are empty the case is left out."
    ),
    "literature": (
        "A missed structure (prediction empty), a spurious one (reference empty) and one that is in neither mask "
        "score 0 in every metric: in distances, which flatters them, and in Dice, Jaccard and NSD, even where nothing "
        "was to be found. Published scripts differ for a spurious structure (0, a crash, or Dice 1); 0 is used."
    ),
}

Row = dict[str, str | float]


def dice(prediction: ArrayLike, reference: ArrayLike) -> float:
    """Dice coefficient ``2 |P and R| / (|P| + |R|)`` of two masks.

    Args:
        prediction: Mask of any shape; what is not zero belongs to it.
        reference: Mask of the same shape.

    Returns:
        From 0 (disjoint, or one mask empty) to 1 (equal); NaN if both are empty.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> dice([1, 1, 0, 0], [0, 1, 1, 1])
        0.4
    """
    return Pair.of(prediction, reference).dice()


def jaccard(prediction: ArrayLike, reference: ArrayLike) -> float:
    """Jaccard index ``|P and R| / |P or R|`` of two masks; arguments and empty masks as :func:`dice`."""
    return Pair.of(prediction, reference).jaccard()


def surface_distances(
    prediction: ArrayLike, reference: ArrayLike, spacing: Sequence[float] | None = None
) -> SurfaceDistances:
    """All nearest distances between the surfaces of two masks, for several metrics at the cost of one.

    Args:
        prediction: Mask, ``(H, W)`` or ``(D, H, W)``; what is not zero belongs to it.
        reference: Mask of the same shape.
        spacing: Voxel size per axis in array order (mm); None for distances in voxels.

    Returns:
        Distances of both directions, in the unit of ``spacing`` or in voxels.

    Raises:
        ValueError: if the shapes differ, the spacing does not fit, or a mask is empty.
    """
    pair = Pair.of(prediction, reference)
    if pair.status != "scored":
        raise ValueError("surface distances need two masks that are not empty.")
    return pair.surfaces().distances(checked_spacing(spacing, len(pair.shape)))


def hd95(prediction: ArrayLike, reference: ArrayLike, spacing: Sequence[float] | None = None) -> float:
    """95th percentile of the surface distances of both directions together.

    Args:
        prediction: Mask, ``(H, W)`` or ``(D, H, W)``; what is not zero belongs to it.
        reference: Mask of the same shape.
        spacing: Voxel size per axis in array order (mm); None for voxels.

    Returns:
        In the unit of ``spacing`` or in voxels; the image diagonal if one mask is empty, NaN if both are.

    Raises:
        ValueError: if the shapes differ or the spacing does not fit.
    """
    distances = _distances_or_penalty(prediction, reference, spacing)
    return distances if isinstance(distances, float) else distances.hd95()


def asd(prediction: ArrayLike, reference: ArrayLike, spacing: Sequence[float] | None = None) -> float:
    """Mean distance from the prediction's surface to the reference's; arguments as :func:`hd95`.

    One direction only: a prediction that is a part of the reference scores better than it should. The papers
    print this one; :func:`assd` is the symmetric one.
    """
    distances = _distances_or_penalty(prediction, reference, spacing)
    return distances if isinstance(distances, float) else distances.asd()


def assd(prediction: ArrayLike, reference: ArrayLike, spacing: Sequence[float] | None = None) -> float:
    """Mean of the surface distances of both directions together; arguments as :func:`hd95`."""
    distances = _distances_or_penalty(prediction, reference, spacing)
    return distances if isinstance(distances, float) else distances.assd()


def nsd(
    prediction: ArrayLike,
    reference: ArrayLike,
    tolerance: float,
    spacing: Sequence[float] | None = None,
) -> float:
    """Normalized surface Dice: share of both surfaces' voxels within ``tolerance`` of the other surface.

    Args:
        prediction: Mask, ``(H, W)`` or ``(D, H, W)``; what is not zero belongs to it.
        reference: Mask of the same shape.
        tolerance: Distance that still counts as right, in the unit of ``spacing``, or in voxels.
        spacing: Voxel size per axis in array order (mm); None for voxels.

    Returns:
        From 0 to 1 (all within); 0 if one mask is empty, NaN if both are.

    Raises:
        ValueError: if the shapes differ, the spacing does not fit, or the tolerance is negative.
    """
    _check_tolerance(tolerance)
    distances = _distances_or_penalty(prediction, reference, spacing)
    if isinstance(distances, float):
        return np.nan if np.isnan(distances) else 0.0
    return distances.nsd(tolerance)


def dice_per_class(
    prediction: NDArray[np.integer],
    reference: NDArray[np.integer],
    num_classes: int,
    *,
    convention: Convention = "clean",
) -> NDArray[np.float64]:
    """Dice of every foreground class from one pass over two label maps, for validation while training.

    Args:
        prediction: Labels from 0 to ``num_classes - 1``, any shape.
        reference: Labels of the same shape.
        num_classes: Number of classes, background included.
        convention: What empty masks score, see :data:`CONVENTIONS`.

    Returns:
        ``(num_classes - 1,)``, classes 1, 2, ...; for a class that neither has NaN, or 0 by the literature.

    Raises:
        ValueError: if the shapes differ or a label is out of range.

    Example:
        >>> dice_per_class(np.array([0, 1, 1, 2]), np.array([0, 1, 2, 2]), 4).round(3).tolist()
        [0.667, 0.667, nan]
    """
    if prediction.shape != reference.shape:
        raise ValueError(f"shapes differ: prediction {prediction.shape}, reference {reference.shape}.")
    for name, labels in (("prediction", prediction), ("reference", reference)):
        if labels.size and not 0 <= labels.min() <= labels.max() < num_classes:
            raise ValueError(f"{name} holds labels outside 0 to {num_classes - 1}.")
    pairs = reference.ravel().astype(np.intp) * num_classes + prediction.ravel()
    counts = np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)
    total = counts.sum(axis=0) + counts.sum(axis=1)
    scores = np.full(num_classes, 0.0 if convention == "literature" else np.nan)
    np.divide(2.0 * counts.diagonal(), total, out=scores, where=total > 0)
    return scores[1:]


def score_case(
    prediction: NDArray[np.integer],
    reference: NDArray[np.integer],
    *,
    classes: Sequence[str],
    spacing: Sequence[float] | None,
    case: str,
    convention: Convention = "clean",
    tolerance_mm: float = TOLERANCE_MM,
) -> list[Row]:
    """All metrics of every foreground class of one case.

    Surfaces are found once per class and the distances once in voxels and, where the spacing is not the same
    along all axes, once in mm.

    Args:
        prediction: Labels ``(D, H, W)`` or ``(H, W)``; ``D = 1`` is a 2D image.
        reference: Labels of the same shape.
        classes: Class names, background first; the index is the label value.
        spacing: Voxel size (z, y, x) in mm; None if unknown, then the columns in mm are NaN.
        case: Name of the case, for the table and for messages.
        convention: What empty masks score, see :data:`CONVENTIONS`.
        tolerance_mm: Tolerance of ``nsd_mm``; the default of 2 mm is a choice of Scantly's, better is
            what two annotators differ by. ``nsd_voxels`` has a tolerance of one voxel.

    Returns:
        One row per foreground class, in order: ``case``, ``class``, ``status`` and the metrics of
        :data:`scantly.evaluation.DEFINITIONS`. Status is ``scored``, ``missed`` (only the reference has the
        class), ``spurious`` (only the prediction has it) or ``both_empty``.

    Raises:
        ImageError: if the shapes differ or a label is not an index of ``classes``.
        ConfigError: if the convention is unknown.
        ValueError: if the spacing does not fit or the tolerance is negative.
    """
    if convention not in CONVENTIONS:
        raise ConfigError(unknown_name("convention", convention, CONVENTIONS))
    _check_tolerance(tolerance_mm)
    if prediction.shape != reference.shape:
        raise ImageError(
            f"{case}: the prediction has shape {prediction.shape} and the reference {reference.shape}; "
            "predict on the grid of the image that was annotated."
        )
    prediction, reference = drop_single_slice(prediction), drop_single_slice(reference)
    voxel_size = checked_spacing(spacing, prediction.ndim)
    predicted = class_masks(prediction, classes, f"{case}: the prediction")
    annotated = class_masks(reference, classes, f"{case}: the reference")
    rows: list[Row] = []
    for index, name in enumerate(classes[1:]):
        pair = Pair(predicted[index], annotated[index], prediction.shape)
        scores = _scores(pair, voxel_size, convention, tolerance_mm)
        rows.append({"case": case, "class": name, "status": pair.status, **scores})
    return rows


def _distances_or_penalty(
    prediction: ArrayLike, reference: ArrayLike, spacing: Sequence[float] | None
) -> SurfaceDistances | float:
    """Distances, or the value of every distance where they are not defined: image diagonal or NaN."""
    pair = Pair.of(prediction, reference)
    voxel_size = checked_spacing(spacing, len(pair.shape))
    if pair.status == "scored":
        return pair.surfaces().distances(voxel_size)
    return np.nan if pair.status == "both_empty" else image_diagonal(pair.shape, voxel_size)


def _scores(
    pair: Pair, voxel_size: tuple[float, ...] | None, convention: Convention, tolerance_mm: float
) -> dict[str, float]:
    if pair.status != "scored":
        return _empty_scores(pair, voxel_size, convention)
    surfaces = pair.surfaces()
    voxels = surfaces.distances()
    scores = {
        "dice": pair.dice(),
        "jaccard": pair.jaccard(),
        **_surface_scores(voxels, "voxels", TOLERANCE_VOXELS),
    }
    if voxel_size is None:
        return scores | dict.fromkeys(("hd95_mm", "asd_mm", "assd_mm", "nsd_mm"), np.nan)
    if len(set(voxel_size)) > 1:
        return scores | _surface_scores(surfaces.distances(voxel_size), "mm", tolerance_mm)
    size = voxel_size[0]
    scaled = {f"{name}_mm": scores[f"{name}_voxels"] * size for name in ("hd95", "asd", "assd")}
    return scores | scaled | {"nsd_mm": voxels.nsd(tolerance_mm / size)}


def _surface_scores(distances: SurfaceDistances, unit: str, tolerance: float) -> dict[str, float]:
    return {
        f"hd95_{unit}": distances.hd95(),
        f"asd_{unit}": distances.asd(),
        f"assd_{unit}": distances.assd(),
        f"nsd_{unit}": distances.nsd(tolerance),
    }


def _empty_scores(pair: Pair, voxel_size: tuple[float, ...] | None, convention: Convention) -> dict[str, float]:
    both_empty = pair.status == "both_empty"
    if convention == "literature":  # the scripts ask whether the prediction is empty, and no further
        share, diagonals = 0.0, 0.0
    else:
        share, diagonals = (np.nan, np.nan) if both_empty else (0.0, 1.0)
    scores = {"dice": share, "jaccard": share}
    unit_size = (1.0,) * len(pair.shape)
    for unit, size in (("voxels", unit_size), ("mm", voxel_size)):
        distance = np.nan if size is None else diagonals * image_diagonal(pair.shape, size)
        scores |= {f"{name}_{unit}": distance for name in ("hd95", "asd", "assd")}
        scores[f"nsd_{unit}"] = np.nan if size is None else share
    return scores


def _check_tolerance(tolerance: float) -> None:
    if not tolerance >= 0:
        raise ValueError(f"tolerance {tolerance} is not a distance; give 0 or more.")
