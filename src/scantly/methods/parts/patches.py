"""Where the patches of each class lie, in 2D and 3D by the same code.

After PLGCL (Basak and Yin, CVPR 2023) and its released code. Where patches lie depends on connected components, which
have no form on the device: the label map is copied to the host once per step (:class:`HostCopy`), and the boxes come
back as one small tensor. How many there are is then known to the host, and nothing after it waits for the device
(:mod:`scantly.methods.parts.patch_views`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import Tensor

from scantly.errors import ConfigError, times

__all__ = [
    "Boxes",
    "HostCopy",
    "class_boxes",
    "filter_coverage",
    "fitting_patch",
    "next_thresholds",
    "suppress",
    "tile_starts",
]

_LEAST_BOX = 10  # bounding boxes of no more voxels are noise
_LARGEST_OVERLAP = 0.8
_SIDE_3D = 32
_TARGET_KEPT = 0.8
_COVERAGE_STEP = 0.01

Integers = npt.NDArray[np.integer]
Floats = npt.NDArray[np.floating]


class HostCopy:
    """Copies of tensors on the host, started at once and waited for later.

    On a GPU what is launched between the two runs while the host works on the copy.

    Args:
        tensors: On any device.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._copies = [tensor.detach().to("cpu", non_blocking=True) for tensor in tensors]
        self._event = torch.cuda.current_stream().record_event() if tensors[0].is_cuda else None

    def wait(self) -> list[npt.NDArray[Any]]:
        """The copies as arrays, once they are complete."""
        if self._event is not None:
            self._event.synchronize()
        return [copy.numpy() for copy in self._copies]


@dataclass(frozen=True)
class Boxes:
    """Where patches lie: class by class, and within a class by image, component and position.

    Attributes:
        label: Class of each patch, ``(M,)``, int64.
        image: Row of the batch it is cut from, ``(M,)``, int64.
        start: First voxel along each axis, ``(M, axes)``, int64.
        sides: Sides of all patches, voxels.
        counts: Patches of each class, known to the host; classes without any are 0.
        of_ranks: The same of every rank, where there are several, before any selection.
        guessed: How many of ``counts`` are cut along pseudo-labels, before any selection; none where it is empty.
    """

    label: Tensor
    image: Tensor
    start: Tensor
    sides: tuple[int, ...]
    counts: tuple[int, ...]
    of_ranks: tuple[tuple[int, ...], ...] = ()
    guessed: tuple[int, ...] = ()

    @property
    def present(self) -> list[int]:
        """Classes that have a patch, on any rank."""
        ranks = self.of_ranks or (self.counts,)
        return [label for label in range(len(self.counts)) if any(counts[label] for counts in ranks)]

    def take(self, index: Tensor, counts: Sequence[int]) -> Boxes:
        """Those of ``index`` ``(n,)``, class by class, of which there are ``counts``."""
        return replace(
            self, label=self.label[index], image=self.image[index], start=self.start[index], counts=tuple(counts)
        )

    def to(self, device: torch.device) -> Boxes:
        """The same on a device, without waiting for it."""
        table = torch.cat([self.label[:, None], self.image[:, None], self.start], 1).to(device, non_blocking=True)
        return replace(self, label=table[:, 0], image=table[:, 1], start=table[:, 2:])


def tile_starts(start: int, length: int, side: int, size: int) -> list[int]:
    """Where patches begin that cover a stretch of one axis.

    A stretch shorter than a patch gets one, centered and moved into the image; a longer one is tiled from its
    beginning, and the last patch ends where it ends. All of the axis (``0, size``) is how the background is tiled.

    Args:
        start: First voxel of the stretch.
        length: Its length.
        side: Length of a patch, at most ``size``.
        size: Length of the axis.

    Example:
        >>> tile_starts(100, 300, 256, 512), tile_starts(450, 40, 256, 512)
        ([100, 144], [256])
    """
    if length < side:
        return [min(max(start + length // 2 - side // 2, 0), size - side)]
    return [*range(start, start + length - side, side), start + length - side]


def suppress(starts: Integers, sides: Sequence[int], *, largest_overlap: float = _LARGEST_OVERLAP) -> list[int]:
    """Indices of the boxes that non-maximum suppression keeps, ascending.

    The remaining box farthest along the last axis (of equals the last) is kept, all that overlap it by more than a
    share of their volume are dropped, and so on.

    Args:
        starts: First voxels, ``(n, axes)``.
        sides: Sides of all boxes.
        largest_overlap: Share of a box's volume.
    """
    order = np.argsort(starts[:, -1], kind="stable")[::-1]
    volume = math.prod(sides)
    kept = []
    while len(order):
        first, order = order[0], order[1:]
        kept.append(int(first))
        shared = np.maximum(np.asarray(sides) - np.abs(starts[order] - starts[first]), 0).prod(1)
        order = order[shared <= largest_overlap * volume]
    return sorted(kept)


def _components(labels: Integers, classes: int) -> Iterator[tuple[int, list[tuple[slice, ...]]]]:
    """Bounding boxes of the connected components (8 neighbors in 2D, 26 in 3D) of each foreground class."""
    # Components are searched within the class's own bounding box, mostly a small part of the image.
    regions: list[tuple[slice, ...] | None] = list(ndimage.find_objects(labels, max_label=classes - 1))
    for label, region in enumerate(regions, 1):
        if region is None:
            continue
        found, _ = ndimage.label(labels[region] == label, structure=np.ones((3,) * labels.ndim))
        offsets = [axis.start for axis in region]
        yield (
            label,
            [
                tuple(slice(a.start + o, a.stop + o) for a, o in zip(box, offsets, strict=True))
                for box in ndimage.find_objects(found)
            ],
        )


def _tiles(box: Sequence[slice], sides: Sequence[int], size: Sequence[int]) -> list[tuple[int, ...]]:
    axes = zip(box, sides, size, strict=True)
    return list(itertools.product(*(tile_starts(a.start, a.stop - a.start, side, s) for a, side, s in axes)))


def _image_tiles(labels: Integers, classes: int, sides: Sequence[int]) -> Iterator[tuple[int, list[tuple[int, ...]]]]:
    """First voxels of the patches of each class of one image."""
    size = labels.shape
    yield 0, _tiles([slice(0, s) for s in size], sides, size)
    for label, components in _components(labels, classes):
        large = [box for box in components if math.prod(axis.stop - axis.start for axis in box) > _LEAST_BOX]
        tiles = [tile for box in large for tile in _tiles(box, sides, size)]
        if tiles:
            yield label, [tiles[index] for index in suppress(np.array(tiles), sides)]


def class_boxes(labels: Integers, classes: int, patch_size: int) -> tuple[Boxes, Floats]:
    """Patches of every class of every image.

    Foreground: the bounding box of each connected component of more than 10 voxels is tiled along each axis, then
    non-maximum suppression per class and image. Background: the whole image is tiled.

    Choices where the source is silent or broken: components within the hole of another count; suppressed boxes
    leave the order as it was; an axis shorter than a patch gives its whole length instead of zeros; a tile without
    a voxel of its class (its content would be zero throughout) is left out.

    Args:
        labels: ``(B, *spatial)``, labeled images first, so that they come first in every class.
        classes: Number of classes; class 0 is the background.
        patch_size: Side of a patch, voxels.

    Returns:
        The boxes, on the host, and the share of voxels of its class in each, ``(M,)``.
    """
    sides = tuple(min(patch_size, size) for size in labels.shape[1:])
    rows: list[list[tuple[int, ...]]] = [[] for _ in range(classes)]
    coverage: list[list[float]] = [[] for _ in range(classes)]
    for image, values in enumerate(labels):
        for label, tiles in _image_tiles(values, classes, sides):
            for tile in tiles:
                cut = values[tuple(slice(start, start + side) for start, side in zip(tile, sides, strict=True))]
                voxels = np.count_nonzero(cut == label)
                if voxels:
                    rows[label].append((label, image, *tile))
                    coverage[label].append(voxels / cut.size)
    table = np.array(list(itertools.chain(*rows)), np.int64).reshape(-1, labels.ndim + 1)
    boxes = torch.from_numpy(table)
    counts = tuple(len(each) for each in rows)
    return Boxes(boxes[:, 0], boxes[:, 1], boxes[:, 2:], sides, counts), np.array(list(itertools.chain(*coverage)))


def filter_coverage(
    boxes: Boxes, coverage: Floats, thresholds: Floats, updates: int, *, published: bool
) -> tuple[Boxes, list[float]]:
    """Drop patches with few voxels of their class, by a threshold per class that adapts.

    Args:
        boxes: Candidates, on the host.
        coverage: Share of voxels of its class in each, ``(M,)``.
        thresholds: ``t`` per class, ``(classes,)``.
        updates: Number of updates before.
        published: Do as the released code does, which keeps patches of *at most* that share, and moves the threshold
            the other way; its documentation says that patches above it qualify.

    Returns:
        The patches that remain, and the next thresholds, by these patches alone: see :func:`next_thresholds`.
    """
    limit = torch.from_numpy(thresholds)[boxes.label]
    keep = torch.from_numpy(coverage <= limit.numpy() if published else coverage >= limit.numpy())
    kept = [int(part.sum()) for part in torch.split(keep, list(boxes.counts))]
    following = next_thresholds(thresholds, boxes.counts, kept, updates, published=published)
    return boxes.take(keep.nonzero()[:, 0], kept), following


def next_thresholds(
    thresholds: Floats, counts: Sequence[int], kept: Sequence[int], updates: int, *, published: bool
) -> list[float]:
    """The coverage thresholds after a step.

    ``t`` becomes ``clip(t - a (0.8 num - kept), 0, 1)`` when ``kept`` of a class's ``num`` patches remain; ``a`` is
    0.01 at first and 0.01 / n at the n-th later update. So four in five remain in the long run.

    Args:
        thresholds: ``t`` per class, ``(classes,)``.
        counts: Patches of each class.
        kept: Those that remain.
        updates: Number of updates before.
        published: The other way round, as the released code.
    """
    step = (1 if published else -1) * _COVERAGE_STEP / max(updates, 1)
    return [
        min(max(float(t) + step * (_TARGET_KEPT * count - left), 0.0), 1.0)
        for t, count, left in zip(thresholds, counts, kept, strict=True)
    ]


def fitting_patch(size: int | None, image: Sequence[int], factors: Sequence[int], *, one_voxel: bool) -> int:
    """The side of patches that the network can take.

    Args:
        size: The setting ``method.patch_size``; ``None``: 32 in 3D; in 2D a quarter of the shorter side, rounded to
            a multiple of the network's factor; always at least two factors, so that the deepest features, which are
            averaged, are more than one voxel; at most the longest side.
        image: Sides of the training images.
        factors: What each side must be divisible by.
        one_voxel: Whether the deepest features may be a single voxel; instance normalization cannot have that.

    Raises:
        ConfigError: if the setting does not fit the network or is larger than the images.
    """
    factor = math.lcm(*factors)
    if size is None:
        wished = _SIDE_3D if len(image) == 3 else min(image) / 4
        return min(max(int(wished / factor + 0.5), 2) * factor, max(image))
    if size > max(image):
        raise ConfigError(
            f"method.patch_size is {size}, training images are {times(image)}; choose at most {max(image)}."
        )
    least = factor if one_voxel else 2 * factor
    if size < least or size % factor:
        raise ConfigError(
            f"method.patch_size is {size}, but the network takes sides that are multiples of {factor}, and patches "
            f"of at least {least}; choose {max(round(size / factor) * factor, least)}."
        )
    return size
