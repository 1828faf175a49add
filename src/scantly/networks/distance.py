"""A network that tells masks and signed distances from the same features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scantly.networks.encoder_decoder import EncoderDecoder

__all__ = ["DistanceNetwork"]


class DistanceNetwork(nn.Module):
    """Two heads on the finest decoder features: a logit, and a signed distance in (-1, 1), per foreground class.

    As the V-Net of Luo et al. (DTC), AAAI 2021, and Li et al. (SASSNet), MICCAI 2020, on any backbone that splits: with
    one class, 9,448,866 parameters on V-Net. As a segmentation network it gives logits of all classes, 0 for the
    background: of one foreground class the softmax is the sigmoid of its logit; of several the most probable is the
    one with the largest logit, or the background where all are below 0.

    Args:
        backbone: A network with one output per foreground class.
        head: A further head like the backbone's own, for the distances.
    """

    def __init__(self, backbone: EncoderDecoder, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.distance_head = head

    def both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and signed distances of the foreground classes, negative inside, ``(B, classes - 1, *spatial)``."""
        features = self.backbone.decode_features(self.backbone.encode(images))
        return self.backbone.head(features), torch.tanh(self.distance_head(features).float())

    def forward(self, images: Tensor) -> Tensor:
        """Logits of all classes, background (0) first, ``(B, classes, *spatial)``."""
        logits: Tensor = self.backbone(images)
        return F.pad(logits, (0, 0) * self.backbone.spatial_dims + (1, 0))
