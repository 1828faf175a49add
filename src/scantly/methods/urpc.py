"""URPC (Luo et al., MICCAI 2021)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from scantly.errors import ConfigError
from scantly.losses import pyramid_consistency
from scantly.methods.base import Batch, Method, Progress, Task
from scantly.methods.parts.consistency import RampConfig
from scantly.methods.parts.feature_perturbation import drop_features, drop_voxels, proportional_noise
from scantly.methods.parts.supervision import SupervisionConfig
from scantly.networks.blocks import CONV, LINEAR

__all__ = ["PyramidConsistency"]

_RESIZING = {2: "nearest", 3: LINEAR[3]}
_KERNEL = {2: 3, 3: 1}


class PyramidConsistency(Method):
    """Predictions at several scales of one decoder must match their mean, except where they diverge from it.

    Luo et al., "Efficient Semi-supervised Gross Target Volume of Nasopharyngeal Carcinoma Segmentation via Uncertainty
    Rectified Pyramid Consistency", MICCAI 2021, and its public code (SSL4MIS). Heads on the coarser decoder levels give
    logits that are resized to the image. On unlabeled images each scale must match the mean of all; voxels where it
    diverges from that are weighted down, and the divergence is lessened itself. All scales learn from the labels. In
    training the features before the coarser heads are perturbed: from the coarsest dropped singly (p = 0.5), dropped
    where they are highest, changed in proportion. The finest head predicts.

    Deviations: in 3D the public code has dropout (0.5 to 0.1) on the way up instead of these perturbations, and a 3D
    U-Net; here both dimensions and all backbones have the same ones. A network with more or fewer than four decoder
    levels has a head on each; the three kinds of perturbation go in turn. The divergence is that of the code,
    KL(mean || scale).
    """

    class Config(RampConfig, SupervisionConfig):
        """Settings of URPC; defaults are the public 2D code's."""

        dropout: float = Field(0.5, ge=0, lt=1, description="Probability with which single features are dropped.")
        dropped_above: tuple[float, float] = Field(
            (0.7, 0.9), description="Bounds of the share of the largest mean feature above which voxels are dropped."
        )
        noise: float = Field(0.3, ge=0, description="Largest share by which noise changes a feature.")

    def __init__(self, task: Task, config: Config) -> None:
        super().__init__(task, config)
        self.config = config
        self.network = task.encoder_decoder()
        if self.network.deep_supervision:
            raise ConfigError("urpc has heads of its own; remove deep_supervision from network.arguments.")
        if len(self.network.widths) < 3:
            raise ConfigError(
                f"urpc compares levels of the decoder, and this network of {len(self.network.widths)} levels has one; "
                "give network.arguments.widths three numbers or more."
            )
        dims, kernel = task.spatial_dims, _KERNEL[task.spatial_dims]
        self.heads = nn.ModuleList(  # coarsest first
            CONV[dims](width, task.num_classes, kernel, padding=kernel // 2) for width in self.network.widths[-2:0:-1]
        )

    def losses(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """``supervised``, the mean over scales, and ``consistency``, weighted."""
        labeled = len(batch.labeled)
        logits = self._scales(batch.images)
        supervised = [self.config.supervised_loss([scale[:labeled]], batch.labels) for scale in logits]
        consistency, divergence = pyramid_consistency([scale[labeled:] for scale in logits])
        weight = self.config.consistency_weight(progress)
        self.log("consistency_weight", torch.tensor(weight))
        self.log("disagreement", consistency)
        self.log("divergence", divergence)
        return {"supervised": torch.stack(supervised).mean(), "consistency": weight * consistency}

    def _scales(self, images: Tensor) -> list[Tensor]:
        """Logits of every scale at the images' size, the finest first."""
        finest, *coarser = self.network.decoder(self.network.encode(images))
        mode = _RESIZING[self.task.spatial_dims]
        found = [self.network.head(finest)]
        for index, (features, head) in enumerate(zip(reversed(coarser), self.heads, strict=True)):
            found.append(F.interpolate(head(self._perturbed(features, index)), images.shape[2:], mode=mode))
        return found

    def _perturbed(self, features: Tensor, index: int) -> Tensor:
        if not self.training:
            return features
        config, generator = self.config, self.generator
        if index % 3 == 0:
            return drop_features(features, config.dropout, generator)
        if index % 3 == 1:
            return drop_voxels(features, config.dropped_above, generator, per_image=False)
        return proportional_noise(features, config.noise, generator)

    @property
    def predictor(self) -> nn.Module:
        """The network with its finest head."""
        return self.network
