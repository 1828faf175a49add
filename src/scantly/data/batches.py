"""Batches: streams of rows, each a pure function of (seed, stream, rank, iteration).

What is drawn depends on nothing else: not on the number of loader workers, not on what was drawn before. A
run that is resumed at any iteration sees what the undisturbed run saw.

Items are slices in 2D and cases in 3D.

- *Labeled stream*: an epoch is one shuffled pass over the labeled items in groups of ``Bl`` (times the number
  of ranks); the incomplete last group is dropped. With fewer items than a group holds, the stream is an
  endless chain of shuffles, and an item that comes twice comes with another patch.
- *Extra stream*: further labeled rows for methods that need two groups per step, an endless chain of shuffles.
- *Unlabeled stream*: an endless chain of shuffles. Its label files are never opened.

A stream may be narrowed to items with several classes; of unlabeled items the pseudo-labels count. All ranks draw
from one shuffle and take disjoint shares of each group.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from scantly.data.arrays import Recent
from scantly.data.patches import Corner, Patches, any_voxel
from scantly.data.plan import Plan
from scantly.data.presence import Presence
from scantly.data.pseudo_labels import PseudoLabels
from scantly.data.store import Store
from scantly.errors import ConfigError, DatasetError

__all__ = ["BatchSource", "RawBatch"]

_LABELED, _UNLABELED, _EXTRA = 0, 1, 2
_NAMES = ("labeled", "unlabeled", "labeled")
_SHUFFLE, _POSITION = 0, 1
#: Items that are enough to draw from.
_ENOUGH = 5
_LOGGER = logging.getLogger("scantly")


@dataclass
class RawBatch:
    """One step's data before any augmentation, on the CPU.

    Attributes:
        labeled: (Bl, C, *patch) float32.
        labels: (Bl, *patch) uint8 (int16 beyond 255 classes).
        unlabeled: (Bu, C, *patch) float32; Bu may be 0.
        labeled_cases: Case name of each labeled row.
        unlabeled_cases: Case name of each unlabeled row.
        pseudo_labels: (Bu, *patch) integers, -1 where there is none, on the patches of ``unlabeled``; ``None`` without.
        extra: (Be, C, *patch) float32; ``None`` without extra rows.
        extra_labels: (Be, *patch), as ``labels``; ``None`` without extra rows.
    """

    labeled: Tensor
    labels: Tensor
    unlabeled: Tensor
    labeled_cases: tuple[str, ...]
    unlabeled_cases: tuple[str, ...]
    pseudo_labels: Tensor | None = None
    extra: Tensor | None = None
    extra_labels: Tensor | None = None

    def pin_memory(self) -> RawBatch:
        """A copy in page-locked memory; called by torch's loader."""
        pinned: dict[str, Any] = {k: v.pin_memory() for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **pinned)


@dataclass(frozen=True)
class _Items:
    """What a stream shuffles, in the order given: slices in 2D, cases (all with slice 0) in 3D."""

    cases: tuple[str, ...]
    case_index: NDArray[np.int64]
    slice_index: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.case_index)

    def at(self, item: int) -> tuple[str, int]:
        """Case name and slice of an item."""
        return self.cases[self.case_index[item]], int(self.slice_index[item])

    def only(self, keep: NDArray[np.bool_]) -> _Items:
        """The items that are marked."""
        return _Items(self.cases, self.case_index[keep], self.slice_index[keep])


class BatchSource(Dataset[RawBatch]):
    """Batches by iteration: ``source[iteration]``.

    Streams with ``classes`` draw only items with at least so many classes, background counted, and patches that hold
    them. Where fewer than five items (fewer than all, if there are not five) have so many, one class less is asked
    for, and so on, with a message.

    Args:
        store: The prepared cases.
        labeled: Names of the labeled cases, in the official order.
        unlabeled: Names of the unlabeled cases; their labels are never read.
        plan: Patch size, dimensions and foreground share.
        labeled_batch_size: Rows ``Bl`` per rank.
        unlabeled_batch_size: Rows ``Bu`` per rank; 0 for none.
        extra_batch_size: Further labeled rows ``Be`` per rank; 0 for none.
        labeled_classes: Classes of the labeled stream's items; 0: any.
        unlabeled_classes: Classes of the unlabeled stream's items, by their pseudo-labels.
        extra_classes: Classes of the extra stream's items.
        seed: Of all draws; not negative.
        rank: This process.
        world_size: Number of processes.
        pseudo_labels: Labels for the unlabeled rows, read on the same patches.

    Raises:
        DatasetError: if a labeled case has no label in the store, or a stream with rows has no item.
        ConfigError: if a number is out of range, or ``unlabeled_classes`` is asked for without pseudo-labels.
    """

    def __init__(
        self,
        store: Store,
        labeled: Sequence[str],
        unlabeled: Sequence[str],
        plan: Plan,
        *,
        labeled_batch_size: int,
        unlabeled_batch_size: int,
        extra_batch_size: int = 0,
        labeled_classes: int = 0,
        unlabeled_classes: int = 0,
        extra_classes: int = 0,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        pseudo_labels: PseudoLabels | None = None,
    ) -> None:
        if labeled_batch_size < 1 or unlabeled_batch_size < 0 or seed < 0 or not 0 <= rank < world_size:
            raise ConfigError(
                f"batches of {labeled_batch_size} labeled, {unlabeled_batch_size} unlabeled rows, "
                f"seed {seed}, rank {rank} of {world_size}: give at least 1 labeled row, no negative "
                "number, and a rank below the number of processes."
            )
        if unlabeled_batch_size and unlabeled_classes and pseudo_labels is None:
            raise ConfigError(
                f"unlabeled rows with {unlabeled_classes} classes need pseudo-labels; let a stage relabel first."
            )
        self.store = store
        self.plan = plan
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.pseudo_labels = pseudo_labels
        self.rows = (labeled_batch_size, unlabeled_batch_size, extra_batch_size)
        self._patches = Patches(plan, store.shape)
        hidden = [name for name in labeled if not store.has_label(name)]
        if hidden:
            raise DatasetError(f"labeled case '{hidden[0]}' has no label in the store {store.url}; prepare it.")
        narrowed = [
            self._narrowed(stream, names, classes)
            for stream, (names, classes) in enumerate(
                ((labeled, labeled_classes), (unlabeled, unlabeled_classes), (labeled, extra_classes))
            )
        ]
        self.items = tuple(items for items, _ in narrowed)
        self.classes = tuple(classes for _, classes in narrowed)
        for stream, name in ((_LABELED, "labeled"), (_UNLABELED, "unlabeled")):
            if self.rows[stream] and not len(self.items[stream]):
                raise DatasetError(f"there is no {name} case to draw {self.rows[stream]} rows from; give one.")
        self._epochs: Recent[tuple[int, int], NDArray[np.int64]] = Recent(6)

    @property
    def iterations_per_epoch(self) -> int:
        """Labeled groups per pass over the labeled items; 0 if one group holds more than all of them."""
        return len(self.items[_LABELED]) // (self.rows[_LABELED] * self.world_size)

    def __getitem__(self, iteration: int) -> RawBatch:
        """The batch of an iteration, counted from 0 without end."""
        images, labels, labeled_cases = self._labeled_rows(_LABELED, iteration)
        unlabeled, pseudo, unlabeled_cases = self._unlabeled_rows(iteration)
        extra, extra_labels, _ = self._labeled_rows(_EXTRA, iteration)
        return RawBatch(
            labeled=torch.from_numpy(np.stack(images)),
            labels=torch.from_numpy(np.stack(labels)),
            unlabeled=torch.from_numpy(np.stack(unlabeled)) if unlabeled else self._no_rows(images[0]),
            labeled_cases=labeled_cases,
            unlabeled_cases=unlabeled_cases,
            pseudo_labels=torch.from_numpy(np.stack(pseudo)) if pseudo else None,
            extra=torch.from_numpy(np.stack(extra)) if extra else None,
            extra_labels=torch.from_numpy(np.stack(extra_labels)) if extra else None,
        )

    def _labeled_rows(self, stream: int, iteration: int) -> tuple[list[Any], list[Any], tuple[str, ...]]:
        images, labels, cases = [], [], []
        generator = self._generator(stream, iteration)
        drawn = self._drawn(stream, iteration)
        around_foreground = len(drawn) - round(len(drawn) * self.plan.foreground_fraction)
        for row, item in enumerate(drawn):
            case, depth = self.items[stream].at(item)
            corner = self._corner(stream, case, depth, generator, foreground=row >= around_foreground)
            images.append(self._patches.cut(self.store.read_image, case, corner))
            labels.append(self._patches.cut(self.store.read_label, case, corner))
            cases.append(case)
        return images, labels, tuple(cases)

    def _unlabeled_rows(self, iteration: int) -> tuple[list[Any], list[Any], tuple[str, ...]]:
        images, pseudo, cases = [], [], []
        generator = self._generator(_UNLABELED, iteration)
        for item in self._drawn(_UNLABELED, iteration):
            case, depth = self.items[_UNLABELED].at(item)
            corner = self._corner(_UNLABELED, case, depth, generator, foreground=False)
            images.append(self._patches.cut(self.store.read_image, case, corner))
            if self.pseudo_labels is not None:
                pseudo.append(self._patches.cut(self.pseudo_labels.read, case, corner))
            cases.append(case)
        return images, pseudo, tuple(cases)

    def _narrowed(self, stream: int, names: Sequence[str], classes: int) -> tuple[_Items, int]:
        """The stream's items, and how many classes each of them holds at least."""
        items = self._all_items(names)
        if not classes or not len(items) or not self.rows[stream]:
            return items, 0
        if self.plan.spatial_dims == 2:
            counts = np.concatenate([self._presence(stream, name).counts for name in names])
        else:
            counts = np.array([self._presence(stream, name).count for name in names])
        least = classes
        while least > 1 and (counts >= least).sum() < min(_ENOUGH, len(items)):
            least -= 1
        if least < classes:
            _LOGGER.info(
                "fewer than %d %s %s hold %d classes: those with %d are drawn%s",
                min(_ENOUGH, len(items)),
                _NAMES[stream],
                "slices" if self.plan.spatial_dims == 2 else "cases",
                classes,
                least,
                ", which is all" if least == 1 else "",
            )
        return items.only(counts >= least), least

    def _all_items(self, names: Sequence[str]) -> _Items:
        if self.plan.spatial_dims == 3:
            return _Items(tuple(names), np.arange(len(names)), np.zeros(len(names), dtype=np.int64))
        depths = np.array([self.store.shape(name)[0] for name in names], dtype=np.int64)
        slices = [np.arange(depth) for depth in depths] or [np.arange(0)]
        return _Items(tuple(names), np.repeat(np.arange(len(names)), depths), np.concatenate(slices))

    def _presence(self, stream: int, case: str) -> Presence:
        if stream == _UNLABELED and self.pseudo_labels is not None:
            return self.pseudo_labels.presence(case)
        return self.store.presence(case)

    def _drawn(self, stream: int, iteration: int) -> list[int]:
        """Item numbers of this rank's rows."""
        rows, count = self.rows[stream], len(self.items[stream])
        group = rows * self.world_size
        per_epoch = self.iterations_per_epoch if stream == _LABELED else 0
        epoch, step = divmod(iteration, per_epoch) if per_epoch else (0, iteration)
        first = step * group + self.rank * rows
        drawn = []
        for position in range(first, first + rows):
            # an endless chain runs on into the next shuffle; whole epochs never reach their end
            further, place = divmod(position, count)
            drawn.append(int(self._shuffle(stream, epoch + further)[place]))
        return drawn

    def _shuffle(self, stream: int, epoch: int) -> NDArray[np.int64]:
        def draw() -> NDArray[np.int64]:
            generator = np.random.default_rng([self.seed, stream, _SHUFFLE, epoch])
            return generator.permutation(len(self.items[stream]))

        return self._epochs.get((stream, epoch), draw)

    def _generator(self, stream: int, iteration: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, stream, _POSITION, self.rank, iteration])

    def _corner(
        self, stream: int, case: str, depth: int, generator: np.random.Generator, *, foreground: bool
    ) -> Corner:
        if self.classes[stream] > 1:
            voxels = self._known_voxels(stream, case, depth)
            return self._patches.with_classes(case, depth, voxels, generator, wanted=self.classes[stream] - 1)
        if foreground:
            voxels = self.store.foreground(case)
            if voxels:
                return self._patches.around(case, any_voxel(voxels, generator))
        return self._patches.random(case, depth, generator)

    def _known_voxels(self, stream: int, case: str, depth: int) -> dict[int, NDArray[np.int64]]:
        """Foreground voxels by class: the drawn ones in 3D, all of the slice in 2D."""
        if self.plan.spatial_dims == 3:
            found, shape = self._presence(stream, case).foreground, self.store.shape(case)
            return {value: np.stack(np.unravel_index(flat, shape), axis=1) for value, flat in found.items()}
        read = self.store.read_label
        if stream == _UNLABELED and self.pseudo_labels is not None:
            read = self.pseudo_labels.read
        plane = read(case, (slice(depth, depth + 1), slice(None), slice(None)))
        offset = np.array([depth, 0, 0])
        return {int(value): np.argwhere(plane == value) + offset for value in np.unique(plane[plane > 0])}

    def _no_rows(self, image: NDArray[np.float32]) -> Tensor:
        return torch.empty((0, *image.shape), dtype=torch.float32)
