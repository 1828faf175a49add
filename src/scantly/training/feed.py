"""From the prepared cases to a method's batches: what a stage draws, and the way to the device."""

from __future__ import annotations

import torch
from torch import Tensor

from scantly.data.batches import BatchSource, RawBatch
from scantly.data.plan import Plan
from scantly.data.pseudo_labels import PseudoLabels
from scantly.data.splits import Split
from scantly.data.store import Store
from scantly.methods.base import Batch, Stage
from scantly.views import WeakConfig, weak

__all__ = ["batch_source", "make_batch", "stage_rows"]


def stage_rows(stage: Stage, plan: Plan, *, pool: bool) -> tuple[int, int, int]:
    """Labeled, unlabeled and extra rows of a stage's steps.

    Args:
        stage: What it does not say is as the plan says; without a say there are no extra rows.
        plan: The plan.
        pool: Whether there are unlabeled cases.
    """
    planned = plan.labeled_batch_size, plan.unlabeled_batch_size if pool else 0, 0
    streams = stage.labeled, stage.unlabeled, stage.extra
    labeled, unlabeled, extra = (
        default if rows.count is None else rows.count for rows, default in zip(streams, planned, strict=True)
    )
    return labeled, unlabeled, extra


def batch_source(
    store: Store,
    split: Split,
    plan: Plan,
    stage: Stage,
    *,
    seed: int,
    rank: int,
    world_size: int,
    pseudo_labels: PseudoLabels | None,
) -> BatchSource:
    """The batches of a stage, see :class:`~scantly.data.batches.BatchSource`."""
    labeled_rows, unlabeled_rows, extra_rows = stage_rows(stage, plan, pool=bool(split.unlabeled))
    return BatchSource(
        store,
        split.labeled,
        split.unlabeled if unlabeled_rows else (),
        plan,
        labeled_batch_size=labeled_rows,
        unlabeled_batch_size=unlabeled_rows,
        extra_batch_size=extra_rows,
        labeled_classes=stage.labeled.classes,
        unlabeled_classes=stage.unlabeled.classes,
        extra_classes=stage.extra.classes,
        seed=seed,
        rank=rank,
        world_size=world_size,
        pseudo_labels=pseudo_labels,
    )


def make_batch(raw: RawBatch, augmentation: WeakConfig, generator: torch.Generator, *, channels_last: bool) -> Batch:
    """To the device, through the shared weak augmentation.

    Args:
        raw: On the CPU.
        augmentation: The weak view's settings.
        generator: Source of its draws; its device is the batch's.
        channels_last: Memory layout of 2D images.
    """

    def moved(values: Tensor) -> Tensor:
        return values.to(generator.device, non_blocking=True)

    def laid_out(images: Tensor) -> Tensor:
        if channels_last and images.ndim == 4:
            return images.contiguous(memory_format=torch.channels_last)
        return images

    labeled, unlabeled, labels = moved(raw.labeled), moved(raw.unlabeled), moved(raw.labels)
    pseudo = None if raw.pseudo_labels is None else moved(raw.pseudo_labels)
    seen = weak(augmentation, labeled, [labels], generator=generator)
    maps = [] if pseudo is None else [pseudo]
    unseen = weak(augmentation, unlabeled, maps, generator=generator) if len(unlabeled) else None
    return Batch(
        labeled=laid_out(seen.images),
        labels=seen.maps[0].long(),
        unlabeled=laid_out(unlabeled if unseen is None else unseen.images),
        labeled_raw=labeled,
        labels_raw=labels.long(),
        unlabeled_raw=unlabeled,
        labeled_cases=raw.labeled_cases,
        unlabeled_cases=raw.unlabeled_cases,
        pseudo_labels=unseen.maps[0].long() if unseen is not None and maps else None,
        pseudo_labels_raw=None if pseudo is None else pseudo.long(),
        extra=None if raw.extra is None else laid_out(moved(raw.extra)),
        extra_labels=None if raw.extra_labels is None else moved(raw.extra_labels).long(),
    )
