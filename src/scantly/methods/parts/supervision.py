"""The supervised loss, at one resolution or, with deep supervision, at several."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from scantly.losses import cross_entropy_dice
from scantly.methods.base import MethodConfig
from scantly.networks import EncoderDecoder

__all__ = ["SupervisionConfig", "outputs", "split_outputs", "supervised_loss"]


class SupervisionConfig(MethodConfig):
    """Settings of the field's supervised loss, for the methods that have it."""

    dice_background: bool = Field(
        True,
        description="Soft Dice counts the background, as the public 2D code does; false: the foreground alone, as "
        "that for LA (UA-MT) does.",
    )

    def supervised_loss(self, logits: Sequence[Tensor], labels: Tensor) -> Tensor:
        """Cross-entropy and soft Dice of :func:`outputs`' logits of the labeled rows, ``(B, *spatial)`` labels."""

        def loss(level: Tensor, target: Tensor) -> Tensor:
            return cross_entropy_dice(level, target, include_background=self.dice_background)

        return supervised_loss(logits, labels, loss)


def outputs(network: nn.Module, images: Tensor) -> list[Tensor]:
    """Logits of every resolution that the network is trained at, the images' own first.

    Args:
        network: One built with ``deep_supervision`` gives several; every other gives its logits.
        images: ``(B, C, *spatial)``.

    Returns:
        ``(B, classes, *spatial)``, then coarser ones.
    """
    if isinstance(network, EncoderDecoder) and network.deep_supervision:
        return network.decode_all(network.encode(images))
    return [network(images)]


def split_outputs(network: nn.Module, labeled: Tensor, unlabeled: Tensor) -> tuple[list[Tensor], Tensor]:
    """Labeled and unlabeled rows in one pass, so that batch-norm statistics are joint.

    Args:
        network: As for :func:`outputs`.
        labeled: Images, ``(Bl, C, *spatial)``.
        unlabeled: Images, ``(Bu, C, *spatial)``.

    Returns:
        Logits of the labeled rows at every resolution, see :func:`outputs`, and those of the unlabeled rows at the
        images' own.
    """
    rows = [len(labeled), len(unlabeled)]
    levels = [torch.split(logits, rows) for logits in outputs(network, torch.cat([labeled, unlabeled]))]
    return [level[0] for level in levels], levels[0][1]


def supervised_loss(
    logits: Sequence[Tensor],
    labels: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """The loss on the labels; over several resolutions its weighted mean with weights 1, 1/2, 1/4, ...

    Deep supervision of Isensee et al., Nature Methods 2021. Labels of coarser resolutions are the nearest voxels'.

    Args:
        logits: Of the labeled rows, finest first, ``(B, classes, *spatial)`` each; see :func:`outputs`.
        labels: ``(B, *spatial)``, int64, on the finest grid.
        loss: Of logits and labels on one grid.
    """
    if len(logits) == 1:
        return loss(logits[0], labels)
    weights = [2.0**-level for level in range(len(logits))]
    terms = [weight * loss(level, _resized(labels, level)) for weight, level in zip(weights, logits, strict=True)]
    total: Tensor = sum(terms[1:], terms[0])
    return total / sum(weights)


def _resized(labels: Tensor, logits: Tensor) -> Tensor:
    if labels.shape[1:] == logits.shape[2:]:
        return labels
    return F.interpolate(labels[:, None].float(), logits.shape[2:], mode="nearest-exact")[:, 0].long()
