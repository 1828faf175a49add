"""Batches: a labeled and an unlabeled stream, each a pure function of (seed, stream, rank, iteration).

What is drawn depends on nothing else: not on the number of loader workers, not on what was drawn before. A
run that is resumed at any iteration sees what the undisturbed run saw.

Items are slices in 2D and cases in 3D.

- *Labeled stream*: an epoch is one shuffled pass over the labeled items in groups of ``Bl`` (times the number
  of ranks); the incomplete last group is dropped. With fewer items than a group holds, the stream is an
  endless chain of shuffles, and an item that comes twice comes with another patch.
- *Unlabeled stream*: an endless chain of shuffles. Its label files are never opened.

All ranks draw from one shuffle and take disjoint shares of each group.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from scantly.data.arrays import Recent
from scantly.data.parallel import worker_count
from scantly.data.plan import Plan
from scantly.data.pseudo_labels import PseudoLabels
from scantly.data.store import Store
from scantly.errors import ConfigError, DatasetError, ScantlyError

__all__ = ["BatchSource", "RawBatch", "make_loader"]

Corner: TypeAlias = tuple[int, int, int]
Read: TypeAlias = Callable[[str, tuple[slice, slice, slice]], NDArray[Any]]

_LABELED, _UNLABELED = 0, 1
_SHUFFLE, _POSITION = 0, 1
#: Patches tried around foreground voxels for one that holds every class.
_TRIES = 32
_MOST_WORKERS = 4


@dataclass
class RawBatch:
    """One step's data before any augmentation, on the CPU.

    Attributes:
        labeled: (Bl, C, *patch) float32.
        labels: (Bl, *patch) uint8 (int16 beyond 255 classes).
        unlabeled: (Bu, C, *patch) float32; Bu may be 0.
        labeled_cases: Case name of each labeled row.
        unlabeled_cases: Case name of each unlabeled row.
        pseudo_labels: (Bu, *patch) uint8, on the patches of ``unlabeled``; ``None`` without pseudo-labels.
    """

    labeled: Tensor
    labels: Tensor
    unlabeled: Tensor
    labeled_cases: tuple[str, ...]
    unlabeled_cases: tuple[str, ...]
    pseudo_labels: Tensor | None = None

    def pin_memory(self) -> RawBatch:
        """A copy in page-locked memory; called by torch's loader."""
        return RawBatch(
            labeled=self.labeled.pin_memory(),
            labels=self.labels.pin_memory(),
            unlabeled=self.unlabeled.pin_memory(),
            labeled_cases=self.labeled_cases,
            unlabeled_cases=self.unlabeled_cases,
            pseudo_labels=None if self.pseudo_labels is None else self.pseudo_labels.pin_memory(),
        )


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

    Args:
        store: The prepared cases.
        labeled: Names of the labeled cases, in the official order.
        unlabeled: Names of the unlabeled cases; their labels are never read.
        plan: Patch size, dimensions and foreground share.
        labeled_batch_size: Rows ``Bl`` per rank.
        unlabeled_batch_size: Rows ``Bu`` per rank; 0 for none.
        seed: Of all draws; not negative.
        rank: This process.
        world_size: Number of processes.
        all_classes: Only labeled slices that hold every class, and patches that do, where there are any.
        pseudo_labels: Labels for the unlabeled rows, read on the same patches.

    Raises:
        DatasetError: if a labeled case has no label in the store, or a stream with rows has no item.
        ConfigError: if a number is out of range.
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
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        all_classes: bool = False,
        pseudo_labels: PseudoLabels | None = None,
    ) -> None:
        if labeled_batch_size < 1 or unlabeled_batch_size < 0 or seed < 0 or not 0 <= rank < world_size:
            raise ConfigError(
                f"batches of {labeled_batch_size} labeled, {unlabeled_batch_size} unlabeled rows, "
                f"seed {seed}, rank {rank} of {world_size}: give at least 1 labeled row, no negative "
                "number, and a rank below the number of processes."
            )
        self.store = store
        self.plan = plan
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.all_classes = all_classes
        self.pseudo_labels = pseudo_labels
        self.rows = (labeled_batch_size, unlabeled_batch_size)
        hidden = [name for name in labeled if not store.has_label(name)]
        if hidden:
            raise DatasetError(f"labeled case '{hidden[0]}' has no label in the store {store.url}; prepare it.")
        self.items = (self._labeled_items(labeled), self._all_items(unlabeled))
        for stream, name in ((_LABELED, "labeled"), (_UNLABELED, "unlabeled")):
            if self.rows[stream] and not len(self.items[stream]):
                raise DatasetError(f"there is no {name} case to draw {self.rows[stream]} rows from; give one.")
        self._epochs: Recent[tuple[int, int], NDArray[np.int64]] = Recent(4)

    @property
    def iterations_per_epoch(self) -> int:
        """Labeled groups per pass over the labeled items; 0 if one group holds more than all of them."""
        return len(self.items[_LABELED]) // (self.rows[_LABELED] * self.world_size)

    def __getitem__(self, iteration: int) -> RawBatch:
        """The batch of an iteration, counted from 0 without end."""
        images, labels = [], []
        generator = self._generator(_LABELED, iteration)
        labeled = self._drawn(_LABELED, iteration)
        around_foreground = len(labeled) - round(len(labeled) * self.plan.foreground_fraction)
        for row, item in enumerate(labeled):
            case, corner = self._labeled_patch(item, generator, foreground=row >= around_foreground)
            images.append(self._cut(self.store.read_image, case, corner))
            labels.append(self._cut(self.store.read_label, case, corner))
        others, pseudo = [], []
        generator = self._generator(_UNLABELED, iteration)
        unlabeled = self._drawn(_UNLABELED, iteration)
        for item in unlabeled:
            case, depth = self.items[_UNLABELED].at(item)
            corner = self._random_corner(case, depth, generator)
            others.append(self._cut(self.store.read_image, case, corner))
            if self.pseudo_labels is not None:
                pseudo.append(self._cut(self.pseudo_labels.read, case, corner))
        return RawBatch(
            labeled=torch.from_numpy(np.stack(images)),
            labels=torch.from_numpy(np.stack(labels)),
            unlabeled=torch.from_numpy(np.stack(others)) if others else self._no_rows(images[0]),
            labeled_cases=tuple(self.items[_LABELED].at(item)[0] for item in labeled),
            unlabeled_cases=tuple(self.items[_UNLABELED].at(item)[0] for item in unlabeled),
            pseudo_labels=torch.from_numpy(np.stack(pseudo)) if pseudo else None,
        )

    def _labeled_items(self, names: Sequence[str]) -> _Items:
        items = self._all_items(names)
        if not self.all_classes:
            return items
        complete = [self.store.classes_per_slice(name)[:, 1:] for name in names]
        if self.plan.spatial_dims == 2:
            keep = np.concatenate([present.all(axis=1) for present in complete])
        else:
            keep = np.array([present.any(axis=0).all() for present in complete])
        return items.only(keep) if keep.any() else items

    def _all_items(self, names: Sequence[str]) -> _Items:
        if self.plan.spatial_dims == 3:
            return _Items(tuple(names), np.arange(len(names)), np.zeros(len(names), dtype=np.int64))
        depths = np.array([self.store.shape(name)[0] for name in names], dtype=np.int64)
        slices = [np.arange(depth) for depth in depths] or [np.arange(0)]
        return _Items(tuple(names), np.repeat(np.arange(len(names)), depths), np.concatenate(slices))

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

    def _labeled_patch(self, item: int, generator: np.random.Generator, *, foreground: bool) -> tuple[str, Corner]:
        case, depth = self.items[_LABELED].at(item)
        if self.all_classes:
            return case, self._complete_corner(case, depth, generator)
        if foreground:
            voxels = self.store.foreground(case)
            if voxels:
                return case, self._corner_around(case, _any_voxel(voxels, generator))
        return case, self._random_corner(case, depth, generator)

    def _complete_corner(self, case: str, depth: int, generator: np.random.Generator) -> Corner:
        """The first patch around drawn foreground voxels that holds every class, else the one with most."""
        voxels = self._known_voxels(case, depth)
        best, most = self._random_corner(case, depth, generator), 0
        for _ in range(_TRIES if voxels else 0):
            corner = self._corner_around(case, _any_voxel(voxels, generator))
            end = np.add(corner, self._patch)
            held = sum(bool(((v >= corner) & (v < end)).all(axis=1).any()) for v in voxels.values())
            if held > most:
                best, most = corner, held
            if most == len(voxels):
                break
        return best

    def _known_voxels(self, case: str, depth: int) -> dict[int, NDArray[np.int64]]:
        """Foreground voxels by class: the store's sample in 3D, all of the slice in 2D."""
        if self.plan.spatial_dims == 3:
            return self.store.foreground(case)
        plane = self.store.read_label(case, (slice(depth, depth + 1), slice(None), slice(None)))
        offset = np.array([depth, 0, 0])
        return {int(value): np.argwhere(plane == value) + offset for value in np.unique(plane[plane > 0])}

    @property
    def _patch(self) -> Corner:
        height, width = self.plan.patch_size[-2:]
        return (self.plan.patch_size[0] if self.plan.spatial_dims == 3 else 1), height, width

    def _limits(self, case: str) -> tuple[Corner, Corner]:
        """First and last corner of a patch; negative ones begin in the zeros that surround a small case.

        The padding is the plan's: what is missing, or, with a margin, the literature's for LA. That one is on
        every axis as soon as one side of the case is not larger than the patch.
        """
        lows, highs = [], []
        sides, shape = self._patch, self.store.shape(case)
        first = 3 - self.plan.spatial_dims
        margin = self.plan.pad_margin
        small = margin > 0 and any(n <= side for n, side in zip(shape[first:], sides[first:], strict=True))
        for axis, (n, side) in enumerate(zip(shape, sides, strict=True)):
            if small and axis >= first:
                pad = max((side - n) // 2 + margin, 0)
                low, high = -pad, n + pad - side
            else:
                low = -(max(side - n, 0) // 2)
                high = low + max(n - side, 0)
            lows.append(low)
            highs.append(high)
        return (lows[0], lows[1], lows[2]), (highs[0], highs[1], highs[2])

    def _random_corner(self, case: str, depth: int, generator: np.random.Generator) -> Corner:
        """Any position at which the patch lies inside the case and its padding; in 2D on the given slice."""
        lows, highs = self._limits(case)
        z, y, x = (int(value) for value in generator.integers(0, np.subtract(highs, lows) + 1) + lows)
        return (z if self.plan.spatial_dims == 3 else depth), y, x

    def _corner_around(self, case: str, voxel: NDArray[np.int64]) -> Corner:
        """The patch with the voxel in its middle, moved as far as needed to lie inside the case and its padding."""
        sides = zip(voxel, self._patch, *self._limits(case), strict=True)
        z, y, x = (min(max(int(v) - side // 2, low), high) for v, side, low, high in sides)
        return z, y, x

    def _cut(self, read: Read, case: str, corner: Corner) -> NDArray[Any]:
        """Read a patch (..., *patch), with zeros where it reaches beyond the case."""
        window, beyond = [], []
        for start, side, n in zip(corner, self._patch, self.store.shape(case), strict=True):
            window.append(slice(max(start, 0), min(start + side, n)))
            beyond.append((max(-start, 0), max(start + side - n, 0)))
        part = read(case, (window[0], window[1], window[2]))
        if any(before or after for before, after in beyond):
            part = np.pad(part, [*[(0, 0)] * (part.ndim - 3), *beyond])
        return part[..., 0, :, :] if self.plan.spatial_dims == 2 else part

    def _no_rows(self, image: NDArray[np.float32]) -> Tensor:
        return torch.empty((0, *image.shape), dtype=torch.float32)


def _any_voxel(voxels: Mapping[int, NDArray[np.int64]], generator: np.random.Generator) -> NDArray[np.int64]:
    """A random voxel of a random class, every class equally often."""
    values = sorted(voxels)
    of_class = voxels[values[int(generator.integers(len(values)))]]
    voxel: NDArray[np.int64] = of_class[int(generator.integers(len(of_class)))]
    return voxel


def make_loader(
    source: BatchSource, start: int, stop: int, workers: int | None, pin_memory: bool
) -> Iterator[RawBatch]:
    """The batches of iterations ``start`` to ``stop - 1`` in order, made by worker processes ahead of time.

    They do not depend on the number of workers, and torch's global generator is left alone.

    Args:
        source: What to draw.
        start: First iteration.
        stop: Iteration after the last one.
        workers: Processes; 0 makes each batch in this process when it is asked for. ``None``: 0 for the CPU, whose
            steps take a hundred times as long as a batch; for a GPU (``pin_memory``) one per core but one, up to 4.
        pin_memory: Whether batches lie in page-locked memory, from which they reach a GPU faster.

    Raises:
        ScantlyError: what a worker met, as one sentence.
    """
    # forked workers start in milliseconds, others import torch first (seconds); they touch numpy only, so
    # threads and CUDA contexts of this process, which do not survive a fork, are not missed
    if workers is None:
        workers = min(_MOST_WORKERS, max(worker_count(None, _MOST_WORKERS + 1) - 1, 0)) if pin_memory else 0
    forks = "fork" in multiprocessing.get_all_start_methods()
    loader: DataLoader[RawBatch | ScantlyError] = DataLoader(
        _Answers(source),
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        multiprocessing_context=("fork" if forks else "spawn") if workers else None,
        prefetch_factor=4 if workers else None,
        generator=torch.Generator(),
    )
    for answer in loader:
        if isinstance(answer, ScantlyError):
            raise answer
        yield answer


@dataclass
class _Answers(Dataset[RawBatch | ScantlyError]):
    """Batches, or the error: torch would hand an error from a worker on with the worker's traceback as text."""

    source: BatchSource

    def __getitem__(self, iteration: int) -> RawBatch | ScantlyError:
        try:
            return self.source[iteration]
        except ScantlyError as error:
            return error.with_traceback(None)


def _unchanged(batch: Any) -> Any:
    return batch


def _start_worker(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a forked worker inherits the training's handler
    torch.set_num_threads(1)
