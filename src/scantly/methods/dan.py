"""DAN (Zhang et al., MICCAI 2017)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scantly.methods.base import Batch, Progress, Task
from scantly.methods.parts.adversarial import AdversarialMethod, JudgeConfig
from scantly.methods.parts.consistency import RampConfig
from scantly.methods.parts.supervision import SupervisionConfig, split_outputs
from scantly.networks.discriminator import Discriminator

__all__ = ["AdversarialNetwork"]


class AdversarialNetwork(AdversarialMethod):
    """A judge tells labeled from unlabeled images by their segmentations; the network makes them look alike.

    Zhang, Yang, Chen, Fredericksen, Hughes and Chen, "Deep Adversarial Networks for Biomedical Image Segmentation
    Utilizing Unannotated Images", MICCAI 2017; as in the public code of SSL4MIS. The judge sees the softmax map and the
    image. First the network learns from the labels, and to have the maps of unlabeled images called labeled by the
    judge (in evaluation mode); then the judge learns to tell maps of the network in evaluation mode apart.

    Deviations: any numbers of labeled and unlabeled rows (the public code needs them equal); see also
    :class:`~scantly.networks.discriminator.Discriminator`.
    """

    class Config(JudgeConfig, RampConfig, SupervisionConfig):
        """Settings of DAN; defaults are the public code's."""

    config: Config

    def __init__(self, task: Task, config: Config) -> None:
        super().__init__(task, config)
        self.config = config
        self.network = task.network()
        self.judge = Discriminator(task.spatial_dims, task.num_classes, task.channels, sides=task.patch_size)

    def losses(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """``supervised`` and ``adversarial``, weighted: what the network minimizes."""
        labeled, unlabeled = split_outputs(self.network, batch.labeled, batch.unlabeled)
        weight = self.config.consistency_weight(progress)
        self.log("consistency_weight", torch.tensor(weight))
        return {
            "supervised": self.config.supervised_loss(labeled, batch.labels),
            "adversarial": weight * self.fooling_loss(unlabeled.float().softmax(1), batch.unlabeled),
        }

    def judged_maps(self, images: Tensor) -> Tensor:
        """Class probabilities."""
        logits: Tensor = self.network(images)
        return logits.float().softmax(1)

    @property
    def predictor(self) -> nn.Module:
        """The network."""
        return self.network
