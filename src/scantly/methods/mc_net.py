"""MC-Net (Wu et al., MICCAI 2021) and MC-Net+ (Wu et al., Medical Image Analysis 2022)."""

from __future__ import annotations

from typing import ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from scantly.errors import ConfigError
from scantly.losses import mutual_consistency, soft_dice
from scantly.methods.base import Batch, Method, Progress, Task
from scantly.methods.parts.consistency import RampConfig
from scantly.methods.parts.supervision import SupervisionConfig
from scantly.networks import Decoder

__all__ = ["MCNet", "MCNetPlus"]

_SUPERVISED_WEIGHT = {2: 1.0, 3: 0.5}


class MCNet(Method):
    """Two decoders that differ in their upsampling must match each other's sharpened prediction.

    Wu, Xu, Ge, Cai and Zhang, "Semi-supervised Left Atrium Segmentation with Mutual Consistency Training", MICCAI 2021,
    and its public code. One encoder, decoders with transposed convolutions and with linear interpolation. On all
    images, labeled ones too, each decoder's probabilities must match (mean squared error) the sharpened ones of the
    other, so that disagreement and uncertainty shrink together. The network's own decoder predicts.

    The supervised loss is the code's: Dice alone, summed over the decoders; in 3D over the foreground with plain
    denominators; in 2D over all classes with squared ones, where an absent class gives no gradient, and without the
    factor 2, ``1 - sum(p y) / (sum(p^2) + sum(y^2) + 1e-10)``: a perfect prediction costs 1/2, and gradients are half
    of the usual Dice's. Whether that is meant is not known; the published weight of the consistency was tuned beside
    it, so it holds under every protocol (``supervised_weight=2``: the usual gradient; ``supervised=ce_dice``: the loss
    of the other methods).

    Deviations: a backbone of which there is one kind of decoder alone has further ones of the same kind, initialized
    anew. The ramp is that of the 2D code (0.1); for the left atrium it is 1 after 6,000 of 15,000 iterations (recipe
    ``la``). The public code keeps the learning rate constant (``training.schedule=constant``) and reads
    the ramp one iteration later.
    """

    class Config(RampConfig, SupervisionConfig):
        """Settings of MC-Net; defaults are the public code's."""

        supervised: Literal["dice", "ce_dice"] = Field("dice", description="Dice alone (public code), or with CE.")
        supervised_weight: float | None = Field(
            None, gt=0, description="Weight of the supervised loss; none: 1 in 2D, 0.5 in 3D."
        )
        temperature: float = Field(0.1, gt=0, le=1, description="Temperature of the sharpening.")
        normalized_sharpening: bool = Field(
            False, description="Sharpened classes sum to 1; else, as published, each is sharpened against all others."
        )
        detach_targets: bool = Field(False, description="Sharpened predictions take no gradient (published: they do).")

    further_decoders: ClassVar[int] = 1

    def __init__(self, task: Task, config: Config) -> None:
        super().__init__(task, config)
        self.config = config
        self.network = task.encoder_decoder()
        if self.network.deep_supervision:
            raise ConfigError("mc_net trains one resolution; remove deep_supervision from network.arguments.")
        others = [task.encoder_decoder() for _ in range(self.further_decoders)]  # for heads, and decoders of its kind
        kinds = self.network.upsamplings[1:]
        self.decoders = nn.ModuleList(
            self.network.new_decoder(kinds[i]) if i < len(kinds) else other.decoder for i, other in enumerate(others)
        )
        self.heads = nn.ModuleList(other.head for other in others)
        given = config.supervised_weight
        self.supervised_weight = _SUPERVISED_WEIGHT[task.spatial_dims] if given is None else given

    def losses(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """``supervised``, summed over the decoders, and ``consistency`` between them, weighted."""
        config, labeled = self.config, len(batch.labeled)
        features = self.network.encode(batch.images)
        logits = [self.network.decode(features)]
        logits += [head(cast(Decoder, d)(features)[0]) for d, head in zip(self.decoders, self.heads, strict=True)]
        supervised = torch.stack([self.supervised_loss(each[:labeled], batch.labels) for each in logits]).sum()
        consistency = mutual_consistency(
            logits,
            temperature=config.temperature,
            normalized=config.normalized_sharpening,
            detached=config.detach_targets,
        )
        weight = config.consistency_weight(progress)
        self.log("consistency_weight", torch.tensor(weight))
        self.log("disagreement", consistency)
        return {"supervised": self.supervised_weight * supervised, "consistency": weight * consistency}

    def supervised_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of one decoder on labeled rows."""
        if self.config.supervised == "ce_dice":
            return self.config.supervised_loss([logits], labels)
        probs = logits.float().softmax(1)
        if self.task.spatial_dims == 2:
            return (1 + soft_dice(probs, labels, smooth=1e-10, smooth_numerator=False)) / 2  # without the factor 2
        return soft_dice(probs, labels, smooth=1e-8, include_background=False, squared=False)

    @property
    def predictor(self) -> nn.Module:
        """The encoder with the network's own decoder."""
        return self.network


class MCNetPlus(MCNet):
    """MC-Net with a third decoder, of nearest-neighbor upsampling.

    Wu, Ge, Zhang, Xu, Zhang, Xia and Cai, "Mutual Consistency Learning for Semi-supervised Medical Image Segmentation",
    Medical Image Analysis 2022, and its public code. All else, deviations included, as for MC-Net.
    """

    further_decoders: ClassVar[int] = 2
