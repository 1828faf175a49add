"""UniMatch (Yang et al., CVPR 2023)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from scantly.errors import ConfigError
from scantly.losses import soft_dice
from scantly.methods.base import Batch, Method, Progress, Task
from scantly.methods.parts.strong_views import StrongViewConfig, WeakLabels
from scantly.methods.parts.supervision import SupervisionConfig
from scantly.networks.blocks import DROP_CHANNELS

__all__ = ["UniMatch"]


class UniMatch(Method):
    """Confident labels of the weak view supervise two strong views and one with perturbed features.

    Yang, Qi, Feng, Zhang and Shi, "Revisiting Weak-to-Strong Consistency in Semi-Supervised Semantic Segmentation",
    CVPR 2023, and its public code for ACDC. FixMatch with two strong views, drawn apart, and a third prediction from
    the weak view's own features, of which whole channels are dropped at every level of the encoder. Dice over the
    confident voxels, ``(L_x + L_s1 / 4 + L_s2 / 4 + L_fp / 2) / 2``, no ramp.

    Deviations from the public code: boxes show other unlabeled images of the batch; there a second unlabeled batch is
    loaded for them, and labeled by a pass in evaluation mode. Images keep their precision (8 bits there), and
    saturation and hue, which do nothing to gray images, are not changed. In 3D, for which there is no public code, the
    strong view has less blur, and noise.
    """

    class Config(StrongViewConfig, SupervisionConfig):
        """Settings of UniMatch; defaults are the public code's."""

        confidence_threshold: float = Field(0.95, ge=0, description="From which a pseudo-label counts; above 1: never.")
        supervised_weight: float = Field(0.5, gt=0, description="Weight of the supervised loss.")
        strong_weight: float = Field(0.25, ge=0, description="Weight of both strong views together.")
        feature_weight: float = Field(0.25, ge=0, description="Weight of the view with perturbed features.")
        feature_dropout: float = Field(0.5, ge=0, lt=1, description="Probability with which a channel is dropped.")

    def __init__(self, task: Task, config: Config) -> None:
        super().__init__(task, config)
        self.config = config
        self.network = task.encoder_decoder()
        if self.network.deep_supervision:
            raise ConfigError("unimatch trains one resolution; remove deep_supervision from network.arguments.")
        self.perturb = DROP_CHANNELS[task.spatial_dims](config.feature_dropout)

    def losses(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:  # noqa: ARG002
        """``supervised``, ``strong`` and ``features``, weighted.

        Raises:
            ConfigError: if there are no unlabeled rows.
        """
        config, labeled = self.config, len(batch.labeled)
        views = [config.strong_view(batch.unlabeled, self.generator) for _ in range(2)]
        features = self.network.encode(batch.images)
        doubled = [torch.cat([level, self.perturb(level)]) for level in features]
        weak, perturbed = self.network.decode(doubled).chunk(2)
        confidence, labels = weak[labeled:].detach().float().softmax(1).max(1)
        trusted = WeakLabels(labels, confidence >= config.confidence_threshold)
        self.log("confident", trusted.mask.float().mean())
        strong = self.network(torch.cat([view.images for view in views])).chunk(2)
        apart = [_masked_dice(logits, view.paste(trusted)) for logits, view in zip(strong, views, strict=True)]
        return {
            "supervised": config.supervised_weight * config.supervised_loss([weak[:labeled]], batch.labels),
            "strong": config.strong_weight * 0.5 * (apart[0] + apart[1]),
            "features": config.feature_weight * _masked_dice(perturbed[labeled:], trusted),
        }

    @property
    def predictor(self) -> nn.Module:
        """The network."""
        return self.network


def _masked_dice(logits: Tensor, labels: WeakLabels) -> Tensor:
    return soft_dice(logits.float().softmax(1), labels.targets, mask=labels.mask)
