"""From probabilities in prepared space to label maps on the scan's own grid."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np
from scipy import ndimage

from scantly.data.plan import Plan
from scantly.data.prepare import Record, restore_label, restore_map

__all__ = ["class_maps", "label_on_original_grid", "largest_components", "most_probable"]

_LEAST = np.finfo(np.float32).tiny


def class_maps(probs: np.ndarray, record: Record, plan: Plan) -> Iterator[np.ndarray]:
    """The classes' probabilities on the original grid, one at a time, so that memory holds one of them.

    Args:
        probs: ``(classes, D, H, W)`` in prepared space.
        record: What the preparation did to this scan.
        plan: The plan.

    Yields:
        ``(D, H, W)`` of the original scan, float32; together they sum to 1 up to rounding.
    """
    for index, values in enumerate(probs):
        yield restore_map(values, record, plan, outside=1.0 if index == 0 else 0.0)


def most_probable(maps: Iterable[np.ndarray]) -> np.ndarray:
    """Index of the largest of several maps, the first of equal ones; they are taken one by one.

    Args:
        maps: One ``(D, H, W)`` per class.

    Returns:
        ``(D, H, W)``, uint8, or uint16 for more than 256 classes.
    """
    labels: np.ndarray | None = None
    best = np.zeros(())
    for index, values in enumerate(maps):
        if labels is None:
            labels, best = np.zeros(values.shape, np.uint8), np.array(values)
            continue
        if index == 256:
            labels = labels.astype(np.uint16)
        larger = values > best
        labels[larger] = index
        np.copyto(best, values, where=larger)
    if labels is None:
        raise ValueError("there are no maps to choose from")
    return labels


def label_on_original_grid(
    probs: np.ndarray,
    record: Record,
    plan: Plan,
    *,
    largest_component: bool = False,
    resample: Literal["probabilities", "logits"] = "probabilities",
) -> np.ndarray:
    """Class indices on the scan's own grid.

    Where the plan resamples by nearest neighbor (the literature's ACDC preparation), the most probable class
    is taken first and the label map resized, as published; else probabilities are resampled first, or logits.

    Args:
        probs: ``(classes, D, H, W)`` in prepared space.
        record: What the preparation did to this scan.
        plan: The plan.
        largest_component: Keep the largest component of each foreground class.
        resample: What is resampled. Of logits their softmax's logarithm is: they differ by one number per voxel, and so
            do their interpolations, which leaves the order of the classes alone.

    Returns:
        ``(D, H, W)`` of the original scan, unsigned integers.
    """
    if plan.interpolation == "nearest":
        labels = restore_label(most_probable(probs), record, plan)
    elif resample == "logits":
        logs = (np.log(np.maximum(values, _LEAST)) for values in probs)
        labels = most_probable(
            restore_map(values, record, plan, outside=0.0 if index == 0 else float(np.log(_LEAST)))
            for index, values in enumerate(logs)
        )
    else:
        labels = most_probable(class_maps(probs, record, plan))
    return largest_components(labels) if largest_component else labels


def largest_components(labels: np.ndarray) -> np.ndarray:
    """Keep the largest connected component of every foreground class; the others become background.

    Voxels that touch at a face, an edge or a corner are connected, as in the published post-processing on LA (Li
    et al., SASSNet, MICCAI 2020; Luo et al., DTC, AAAI 2021). Of equally large components the first in index
    order stays; a class without voxels stays empty (published code fails there).

    Args:
        labels: ``(D, H, W)``, class indices.

    Returns:
        ``(D, H, W)``, a new array.
    """
    kept = np.zeros_like(labels)
    boxes: list[tuple[slice, ...] | None] = list(ndimage.find_objects(labels))
    for value, box in enumerate(boxes, start=1):
        if box is None:
            continue
        components, _ = ndimage.label(labels[box] == value, structure=np.ones((3,) * labels.ndim))
        sizes = np.bincount(components.ravel())
        kept[box][components == 1 + int(sizes[1:].argmax())] = value
    return kept
