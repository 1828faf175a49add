"""URPC (Luo et al., MICCAI 2021)."""

from __future__ import annotations

from typing import Annotated, Literal

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
from scantly.networks.blocks import CONV, DROP_CHANNELS, LINEAR

__all__ = ["PyramidConsistency"]

_RESIZING = {2: "nearest", 3: LINEAR[3]}
_KERNEL = {2: 3, 3: 1}
_PERTURBATION = {2: "features", 3: "channels"}


class PyramidConsistency(Method):
    """Predictions at several scales of one decoder must match their mean, except where they diverge from it.

    Luo et al., "Efficient Semi-supervised Gross Target Volume of Nasopharyngeal Carcinoma Segmentation via Uncertainty
    Rectified Pyramid Consistency", MICCAI 2021, and its public code (SSL4MIS). Heads on the coarser decoder levels give
    logits that are resized to the image. On unlabeled images each scale must match the mean of all; voxels where it
    diverges from that are weighted down, and the divergence is lessened itself. All scales learn from the labels. The
    finest head predicts. What makes the scales differ in training is another thing in 2D and 3D, as in the public code:

    - 2D: the features before the coarser heads are perturbed, from the coarsest dropped singly (p = 0.5), dropped where
      they are highest, changed in proportion;
    - 3D: whole channels are dropped after every level of the decoder, also for the levels above (p = 0.5, 0.3, 0.2, 0.1
      from the coarsest).

    Deviations: the public 3D code has a 3D U-Net without any other dropout (``network.arguments.dropout=0`` of
    ``unet3d``, as the literature kind of recipe ``brats2019`` says); here every backbone is possible, with its own
    dropout beside this one. A network with more or fewer than four decoder levels has a head on each: the three kinds
    of perturbation go in turn, and the rates belong to the scales, the first to all that are coarser. The divergence is
    that of the code, KL(mean || scale).
    """

    class Config(RampConfig, SupervisionConfig):
        """Settings of URPC; defaults are the public code's."""

        perturbation: Literal["auto", "features", "channels"] = Field(
            "auto",
            description="features: those before the coarser heads are perturbed. channels: whole channels are dropped "
            "on the way up. auto: the former in 2D, the latter in 3D.",
        )
        decoder_dropout: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = Field(
            (0.5, 0.3, 0.2, 0.1),
            min_length=1,
            description="Probabilities with which channels are dropped, coarsest decoder level first.",
        )
        dropout: float = Field(
            0.5, ge=0, lt=1, description="Of features: probability with which single ones are dropped."
        )
        dropped_above: tuple[float, float] = Field(
            (0.7, 0.9),
            description="Of features: bounds of the share of the largest mean feature above which voxels are dropped.",
        )
        noise: float = Field(0.3, ge=0, description="Of features: largest share by which noise changes one.")

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
        ).apply(self.network.initialize)
        self.perturbation = _PERTURBATION[dims] if config.perturbation == "auto" else config.perturbation
        levels, rates = len(self.network.decoder), config.decoder_dropout[-len(self.network.decoder) :]
        rates = (rates[0],) * (levels - len(rates)) + rates
        self.drops = nn.ModuleList(DROP_CHANNELS[dims](rate) for rate in rates)  # coarsest first

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
        dropped = self.drops if self.perturbation == "channels" else None
        finest, *coarser = self.network.decoder(self.network.encode(images), dropped)
        mode = _RESIZING[self.task.spatial_dims]
        found = [self.network.head(finest)]
        for index, (features, head) in enumerate(zip(reversed(coarser), self.heads, strict=True)):
            found.append(F.interpolate(head(self._perturbed(features, index)), images.shape[2:], mode=mode))
        return found

    def _perturbed(self, features: Tensor, index: int) -> Tensor:
        if not self.training or self.perturbation == "channels":
            return features
        config, generator = self.config, self.generator
        if index % 3 == 0:
            return drop_features(features, config.dropout, generator)
        if index % 3 == 1:
            return drop_voxels(features, config.dropped_above, generator)
        return proportional_noise(features, config.noise, generator)

    @property
    def predictor(self) -> nn.Module:
        """The network with its finest head."""
        return self.network
