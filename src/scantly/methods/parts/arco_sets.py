"""Which voxels are prototypes, anchors and negatives of a class in ARCO's contrast."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scantly.losses import IGNORED

__all__ = [
    "VoxelSets",
    "class_sets",
    "complement_negatives",
    "rank_bounds",
    "rank_negatives",
    "released_negatives",
    "released_rank_bounds",
]


@dataclass(frozen=True)
class VoxelSets:
    """Sets over all N voxels of a batch, image by image, ``(C, N)`` bool each.

    Attributes:
        members: Voxels of each class by label or pseudo-label.
        valid: Members whose prediction is certain; their mean is the prototype.
        anchors: Valid voxels that the teacher gives to the class with at least some probability.
    """

    members: Tensor
    valid: Tensor
    anchors: Tensor


def class_sets(labels: Tensor, certain: Tensor, probs: Tensor, *, anchor_probability: float) -> VoxelSets:
    """Sort the voxels of labeled and unlabeled images into classes.

    Args:
        labels: Labels or pseudo-labels, ``(B, *spatial)``; ignored voxels are in no set.
        certain: Labeled voxels, and unlabeled ones of low entropy, ``(B, *spatial)`` bool.
        probs: The teacher's probabilities, ``(B, C, *spatial)``.
        anchor_probability: An anchor's own class has more than this.
    """
    members = labels.flatten() == torch.arange(probs.shape[1], device=labels.device)[:, None]
    valid = members & certain.flatten()
    return VoxelSets(members, valid, valid & (_by_class(probs) > anchor_probability))


def complement_negatives(sets: VoxelSets, trusted: Tensor) -> Tensor:
    """Trusted voxels of the other classes (ARCO, equation E.3).

    Args:
        sets: Of :func:`class_sets`.
        trusted: Labeled voxels, and unlabeled ones with a confident pseudo-label, ``(B, *spatial)`` bool.

    Returns:
        ``(C, N)`` bool.
    """
    return sets.members.any(0) & trusted.flatten() & ~sets.members


def rank_bounds(classes: int, low: int | None, high: int | None) -> tuple[int, int]:
    """Ranks from which on, and below which, a class counts as improbable.

    The published 3 and 20 are those of U2PL for natural images and admit nothing with three classes or fewer, so
    the lower one is at most ``classes - 1``, and 1 with two classes. Given bounds are taken as they are.

    Example:
        >>> [rank_bounds(classes, None, None) for classes in (2, 3, 4, 21)]
        [(1, 2), (2, 3), (3, 4), (3, 20)]
    """
    standard = 1 if classes == 2 else min(3, classes - 1)
    return standard if low is None else low, min(20, classes) if high is None else high


def rank_negatives(
    sets: VoxelSets,
    labels: Tensor,
    probs: Tensor,
    uncertain: Tensor,
    labeled: int,
    *,
    low: int,
    high: int,
    largest_probability: float,
) -> Tensor:
    """Voxels of other classes for which the class is a likely confusion, as in U2PL (Wang et al., CVPR 2022).

    The class's rank is its place among the teacher's probabilities, 0 the largest. Labeled voxels count where it is
    below ``low``, unlabeled uncertain ones where it is in ``[low, high)``.

    Args:
        sets: Of :func:`class_sets`.
        labels: ``(B, *spatial)``, labeled rows first.
        probs: The teacher's probabilities, ``(B, C, *spatial)``.
        uncertain: Voxels of high entropy, ``(B, *spatial)`` bool.
        labeled: Number of labeled rows.
        low: Of :func:`rank_bounds`.
        high: Of :func:`rank_bounds`.
        largest_probability: The class's probability is below this.

    Returns:
        ``(C, N)`` bool.
    """
    rank, of_labeled = _ranks(probs), _of_labeled(labels, labeled)
    confused = (rank >= low) & (rank < high) & uncertain.flatten()
    admitted = torch.where(of_labeled, rank < low, confused) & (_by_class(probs) < largest_probability)
    return admitted & ~sets.members & (labels.flatten() != IGNORED)


def released_rank_bounds(low: int | None, high: int | None) -> tuple[int, int]:
    """Those of :func:`released_negatives`: 3 and 20 unless given, whatever the number of classes."""
    return 3 if low is None else low, 20 if high is None else high


def released_negatives(
    sets: VoxelSets,
    labels: Tensor,
    probs: Tensor,
    uncertain: Tensor,
    labeled: int,
    *,
    low: int,
    high: int,
    largest_probability: float,
) -> Tensor:
    """What ARCO's released code appends to the bank of a class: voxels *of* it that its teacher finds unlikely to be.

    Unlabeled uncertain voxels with the class as pseudo-label, whose rank among the probabilities on the mixed image is
    in ``[low, high)``. Labeled voxels would have to have the label and not to have it, so there are none.

    Args:
        sets: Of :func:`class_sets`.
        labels: As for :func:`rank_negatives`.
        probs: As for :func:`rank_negatives`.
        uncertain: As for :func:`rank_negatives`.
        labeled: As for :func:`rank_negatives`.
        low: Of :func:`released_rank_bounds`.
        high: Of :func:`released_rank_bounds`.
        largest_probability: The class's probability is below this.

    Returns:
        ``(C, N)`` bool.
    """
    rank, of_labeled = _ranks(probs), _of_labeled(labels, labeled)
    unlikely = (rank >= low) & (rank < high) & (_by_class(probs) < largest_probability)
    return unlikely & uncertain.flatten() & sets.members & ~of_labeled


def _ranks(probs: Tensor) -> Tensor:
    """Place of each class among the probabilities of a voxel, 0 the largest, ``(C, N)``; equal ones in their order."""
    return _by_class(probs.argsort(dim=1, descending=True, stable=True).argsort(dim=1))


def _of_labeled(labels: Tensor, labeled: int) -> Tensor:
    """Which voxels are of labeled rows, ``(N,)``."""
    voxel = torch.arange(labels.numel(), device=labels.device)
    return voxel < labeled * (labels.numel() // max(len(labels), 1))


def _by_class(maps: Tensor) -> Tensor:
    return maps.transpose(0, 1).flatten(1)
