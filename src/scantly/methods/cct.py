"""CCT (Ouali et al., CVPR 2020)."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from pydantic import Field
from torch import Tensor, nn

from scantly.errors import ConfigError
from scantly.methods.base import Batch, Method, Progress, Task
from scantly.methods.parts.consistency import RampConfig
from scantly.methods.parts.feature_perturbation import drop_features, drop_voxels, proportional_noise
from scantly.methods.parts.supervision import SupervisionConfig
from scantly.networks import Decoder

__all__ = ["CrossConsistency"]


class CrossConsistency(Method):
    """Auxiliary decoders that see perturbed features must agree with the main decoder.

    Ouali, Hudelot and Tami, "Semi-Supervised Semantic Segmentation with Cross-Consistency Training", CVPR 2020; for
    medical images as in the public code of SSL4MIS: three auxiliary decoders on the features of one encoder, every
    level of which is perturbed. One sees noise in proportion to the features, ``x (1 + n)`` with n uniform in [-0.3,
    0.3) and the same for the batch; one features dropped singly (p = 0.3); one features dropped where their mean over
    the channels is high (above a share of its largest in the image, drawn from 0.7 to 0.9 once for the batch). On
    unlabeled images the auxiliary decoders' probabilities must match the main one's (mean squared error); all decoders
    learn from the labeled ones.

    Deviations: the target takes no gradient, as in the paper (``official=true``: gradients both ways, as the public
    medical code). Auxiliary decoders have the supervised loss, as in that code; in the paper they have none
    (``supervised_auxiliary=false``).
    """

    class Config(RampConfig, SupervisionConfig):
        """Settings of CCT; defaults are the public medical code's unless stated."""

        official: bool = Field(False, description="Gradients reach the main decoder from the consistency too.")
        supervised_auxiliary: bool = Field(True, description="Auxiliary decoders learn from the labels.")
        noise: float = Field(0.3, ge=0, description="Largest share by which noise changes a feature.")
        dropout: float = Field(0.3, ge=0, lt=1, description="Probability with which single features are dropped.")
        dropped_above: tuple[float, float] = Field(
            (0.7, 0.9), description="Bounds of the share of the largest mean feature above which voxels are dropped."
        )

    def __init__(self, task: Task, config: Config) -> None:
        super().__init__(task, config)
        self.config = config
        self.network = task.encoder_decoder()
        if self.network.deep_supervision:
            raise ConfigError("cct trains one resolution; remove deep_supervision from network.arguments.")
        self.perturbations: list[Callable[[Tensor], Tensor]] = [self._noise, self._drop_features, self._drop_voxels]
        others = [task.encoder_decoder() for _ in self.perturbations]  # for their decoders, of whatever backbone
        self.decoders = nn.ModuleList(other.decoder for other in others)
        self.heads = nn.ModuleList(other.head for other in others)

    def losses(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """``supervised``, the mean over decoders, and ``consistency``, weighted."""
        config, labeled = self.config, len(batch.labeled)
        features = self.network.encode(batch.images)
        main = self.network.decode(features)
        others = [
            head(cast(Decoder, decoder)([perturb(level) for level in features])[0])
            for perturb, decoder, head in zip(self.perturbations, self.decoders, self.heads, strict=True)
        ]
        target = main[labeled:].float().softmax(1)
        target = target if config.official else target.detach()
        differences = [(target - logits[labeled:].float().softmax(1)).square().mean() for logits in others]
        learning = [main, *others] if config.supervised_auxiliary else [main]
        supervised = [config.supervised_loss([logits[:labeled]], batch.labels) for logits in learning]
        weight = config.consistency_weight(progress)
        difference = torch.stack(differences).mean()
        self.log("consistency_weight", torch.tensor(weight))
        self.log("disagreement", difference)
        return {"supervised": torch.stack(supervised).mean(), "consistency": weight * difference}

    def _noise(self, features: Tensor) -> Tensor:
        return proportional_noise(features, self.config.noise, self.generator)

    def _drop_features(self, features: Tensor) -> Tensor:
        return drop_features(features, self.config.dropout, self.generator)

    def _drop_voxels(self, features: Tensor) -> Tensor:
        return drop_voxels(features, self.config.dropped_above, self.generator)

    @property
    def predictor(self) -> nn.Module:
        """The encoder with the main decoder."""
        return self.network
