"""Masks and signed distances together: the labels' distance maps, and what a network with both outputs learns."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from scantly.errors import ConfigError
from scantly.losses import Empty, signed_distance, soft_dice
from scantly.methods.base import MethodConfig, Task
from scantly.networks import DistanceNetwork

__all__ = ["DistanceConfig", "LabelDistances", "distance_network", "foreground_masks"]

_CACHE_BYTES = 64 * 2**20


def distance_network(task: Task) -> DistanceNetwork:
    """A backbone of the task that gives a mask and a signed distance map of every foreground class.

    Raises:
        ConfigError: if the backbone gives logits only, or has heads at several resolutions.
    """
    backbone, other = (task.encoder_decoder(out_channels=task.num_classes - 1) for _ in range(2))
    if backbone.deep_supervision:
        raise ConfigError(
            "this method learns distances at one resolution; remove deep_supervision from network.arguments."
        )
    return DistanceNetwork(backbone, other.head)


def foreground_masks(labels: Tensor, num_classes: int) -> Tensor:
    """Labels ``(B, *spatial)`` as one mask per foreground class, ``(B, num_classes - 1, *spatial)``, bool."""
    classes = torch.arange(1, num_classes, device=labels.device).view(1, -1, *[1] * (labels.ndim - 1))
    return labels[:, None] == classes


class LabelDistances:
    """Signed distance maps of label patches; on the CPU those of patches seen before are kept.

    Slices that are not cropped come again and again, in one of eight orientations where the augmentation turns them by
    right angles; random crops do not. A map belongs to its patch, since it is normalized by the patch's own
    distances, so whole scans cannot be transformed beforehand. On a GPU all are made anew: to look a patch up would
    mean to wait for the device.

    Args:
        num_classes: Background included.
        empty: See :func:`~scantly.losses.signed_distance`.
        limit: Bytes of maps that are kept; the patch not asked for the longest goes first.
    """

    def __init__(self, num_classes: int, empty: Empty, limit: int = _CACHE_BYTES) -> None:
        self.num_classes, self.empty, self.limit = num_classes, empty, limit
        self._kept: OrderedDict[tuple[torch.Size, bytes], Tensor] = OrderedDict()
        self._bytes = 0

    def __call__(self, labels: Tensor) -> Tensor:
        """Maps of every foreground class, ``(B, num_classes - 1, *spatial)``, float32 in [-1, 1].

        Args:
            labels: ``(B, *spatial)``, integers in ``[0, num_classes)``.
        """
        if labels.device.type != "cpu":
            return self._made(labels)
        keys = [(row.shape, hashlib.blake2b(row.numpy().tobytes()).digest()) for row in labels]
        missing = [index for index, key in enumerate(keys) if key not in self._kept]
        found = {key: self._kept[key] for key in keys if key in self._kept}
        if missing:
            found |= zip([keys[index] for index in missing], self._made(labels[missing]), strict=True)
        for key in keys:
            self._keep(key, found[key])
        return torch.stack([found[key] for key in keys])

    def _made(self, labels: Tensor) -> Tensor:
        masks = foreground_masks(labels, self.num_classes)
        return signed_distance(masks.flatten(0, 1), empty=self.empty).view(masks.shape)

    def _keep(self, key: tuple[torch.Size, bytes], maps: Tensor) -> None:
        if key in self._kept:
            self._kept.move_to_end(key)
            return
        self._kept[key] = maps.clone()
        self._bytes += maps.nbytes
        while self._bytes > self.limit:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes


class DistanceConfig(MethodConfig):
    """Settings of the supervised loss on masks and signed distances; defaults are the public code's unless stated."""

    distance_weight: float = Field(0.3, ge=0, description="Weight of the squared error of the signed distances.")
    empty_distance: Empty = Field(
        "outside",
        description="Signed distance where a patch does not hold a class: 1 (outside), or 0 (zero, public code).",
    )

    def label_distances(self, num_classes: int) -> LabelDistances:
        """What makes the targets."""
        return LabelDistances(num_classes, self.empty_distance)

    def distance_losses(
        self, logits: Tensor, distances: Tensor, labels: Tensor, targets: LabelDistances
    ) -> dict[str, Tensor]:
        """``supervised``: soft Dice of the sigmoids, mean over classes; ``distance``: squared error, weighted.

        Args:
            logits: Of the labeled rows, ``(B, foreground classes, *spatial)``.
            distances: Their signed distances, same shape.
            labels: ``(B, *spatial)``, int64.
            targets: What makes signed distances of labels.
        """
        masks = foreground_masks(labels, targets.num_classes).float()
        error = F.mse_loss(distances.float(), targets(labels))
        return {
            "supervised": soft_dice(logits.float().sigmoid(), masks),
            "distance": self.distance_weight * error,
        }
