"""Masks cropped to their bounding boxes, and pairs of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import find_objects

from scantly.errors import ImageError
from scantly.evaluation.surfaces import Box, Surfaces, bounding_box, drop_single_slice, surface_voxels

__all__ = ["Mask", "Pair", "Status", "class_masks"]

Status = Literal["scored", "missed", "spurious", "both_empty"]


@dataclass(frozen=True)
class Mask:
    """A mask cropped to its bounding box.

    Attributes:
        voxels: Boolean array of the box.
        box: Where the box lies in the image; all its sides are 0 for an empty mask.
    """

    voxels: NDArray[np.bool_]
    box: Box

    @classmethod
    def empty(cls, ndim: int) -> Mask:
        """Mask without voxels in an image of ``ndim`` axes."""
        return cls(np.zeros((0,) * ndim, dtype=np.bool_), (slice(0, 0),) * ndim)

    @cached_property
    def size(self) -> int:
        """Number of voxels."""
        return int(np.count_nonzero(self.voxels))

    def surface(self) -> NDArray[np.intp]:
        """Indices ``(n, ndim)`` of the surface voxels in the image."""
        return surface_voxels(self.voxels, [part.start for part in self.box])

    def overlap(self, other: Mask) -> int:
        """Number of voxels that both masks hold."""
        mine, others = [], []
        for own, foreign in zip(self.box, other.box, strict=True):
            low, high = max(own.start, foreign.start), min(own.stop, foreign.stop)
            if low >= high:
                return 0
            mine.append(slice(low - own.start, high - own.start))
            others.append(slice(low - foreign.start, high - foreign.start))
        return int(np.count_nonzero(self.voxels[tuple(mine)] & other.voxels[tuple(others)]))


@dataclass(frozen=True)
class Pair:
    """Two masks of one image.

    Attributes:
        prediction: What was predicted.
        reference: What was annotated.
        shape: Of the image, without a single-slice axis.
    """

    prediction: Mask
    reference: Mask
    shape: tuple[int, ...]

    @property
    def status(self) -> Status:
        """Which of the two masks are empty, in the words of the tables."""
        if self.prediction.size and self.reference.size:
            return "scored"
        if self.reference.size:
            return "missed"
        return "spurious" if self.prediction.size else "both_empty"

    @cached_property
    def overlap(self) -> int:
        """Number of voxels in both masks."""
        return self.prediction.overlap(self.reference)

    def dice(self) -> float:
        """Dice; NaN if both masks are empty."""
        total = self.prediction.size + self.reference.size
        return 2 * self.overlap / total if total else np.nan

    def jaccard(self) -> float:
        """Jaccard; NaN if both masks are empty."""
        union = self.prediction.size + self.reference.size - self.overlap
        return self.overlap / union if union else np.nan

    @classmethod
    def of(cls, prediction: ArrayLike, reference: ArrayLike) -> Pair:
        """Pair of two arrays of one shape; what is not zero belongs to the mask.

        Raises:
            ValueError: if the shapes differ.
        """
        first, second = np.asarray(prediction) != 0, np.asarray(reference) != 0
        if first.shape != second.shape:
            raise ValueError(f"shapes differ: prediction {first.shape}, reference {second.shape}.")
        first, second = drop_single_slice(first), drop_single_slice(second)
        return cls(_cropped(first), _cropped(second), first.shape)

    def surfaces(self) -> Surfaces:
        """Surfaces of both masks, neither of which may be empty."""
        return Surfaces(self.prediction.surface(), self.reference.surface())


def _cropped(mask: NDArray[np.bool_]) -> Mask:
    box = bounding_box(mask)
    return Mask.empty(mask.ndim) if box is None else Mask(mask[box], box)


def class_masks(labels: NDArray[np.integer], classes: Sequence[str], what: str) -> list[Mask]:
    """Mask of every foreground class, all bounding boxes from one pass over the foreground's box.

    Args:
        labels: Label map without a single-slice axis.
        classes: Class names, background first; the index is the label value.
        what: Whose labels they are, for messages.

    Returns:
        Masks of classes 1, 2, ...

    Raises:
        ImageError: if a label is not an integer or not an index of ``classes``.
    """
    last = len(classes) - 1
    if labels.dtype.kind not in "iub":
        raise ImageError(f"{what} holds {labels.dtype} values; labels must be integers.")
    if labels.size and not 0 <= labels.min() <= labels.max() <= last:
        strange = labels.max() if labels.max() > last else labels.min()
        raise ImageError(
            f"{what} holds label {int(strange)}, but the classes are 0 to {last} ({', '.join(classes)}); "
            "correct the label or name the class in dataset.json."
        )
    foreground = bounding_box(labels)
    if foreground is None:
        return [Mask.empty(labels.ndim)] * last
    inside = labels[foreground]
    inside = inside.view(np.uint8) if inside.dtype == np.bool_ else inside
    masks = []
    boxes: Sequence[Box | None] = find_objects(inside, max_label=last)
    for value, box in enumerate(boxes, start=1):
        if box is None:
            masks.append(Mask.empty(labels.ndim))
            continue
        place = tuple(
            slice(outer.start + part.start, outer.start + part.stop)
            for outer, part in zip(foreground, box, strict=True)
        )
        masks.append(Mask(inside[box] == value, place))
    return masks
