"""DAN (Zhang et al., MICCAI 2017)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from scantly.methods.base import Batch, Handles, Method, OptimizerSpec, Progress, Stage, Task
from scantly.methods.parts.consistency import RampConfig
from scantly.methods.parts.modes import evaluation_mode
from scantly.methods.parts.supervision import SupervisionConfig, split_outputs
from scantly.networks.discriminator import Discriminator

__all__ = ["AdversarialNetwork"]


class AdversarialNetwork(Method):
    """A judge tells labeled from unlabeled images by their segmentations; the network makes them look alike.

    Zhang, Yang, Chen, Fredericksen, Hughes and Chen, "Deep Adversarial Networks for Biomedical Image Segmentation
    Utilizing Unannotated Images", MICCAI 2017; as in the public code of SSL4MIS. The judge sees the softmax map and the
    image. First the network learns from the labels, and to have the maps of unlabeled images called labeled by the
    judge (in evaluation mode); then the judge learns to tell maps of the network in evaluation mode apart.

    Deviations: any numbers of labeled and unlabeled rows (the public code needs them equal); see also
    :class:`~scantly.networks.discriminator.Discriminator`.
    """

    class Config(RampConfig, SupervisionConfig):
        """Settings of DAN; defaults are the public code's."""

        judge_lr: float = Field(1e-4, gt=0, description="Learning rate of the judge (Adam), constant.")

    def __init__(self, task: Task, config: Config) -> None:
        super().__init__(task, config)
        self.config = config
        self.network = task.network()
        self.judge = Discriminator(task.spatial_dims, task.num_classes, task.channels)

    def optimizers(self, stage: Stage) -> dict[str, OptimizerSpec]:  # noqa: ARG002
        """``network``, as the recipe says, and ``judge``, Adam."""
        judge = self.judge.parameters()
        return {
            "network": OptimizerSpec(self.network.parameters()),
            "judge": OptimizerSpec(
                judge, name="adam", lr=self.config.judge_lr, betas=(0.9, 0.99), weight_decay=0.0, schedule="constant"
            ),
        }

    def losses(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """``supervised`` and ``adversarial``, weighted: what the network minimizes."""
        labeled, unlabeled = split_outputs(self.network, batch.labeled, batch.unlabeled)
        with evaluation_mode(self.judge):
            judged = self.judge(unlabeled.float().softmax(1), batch.unlabeled).float()
        fooled = F.cross_entropy(judged, torch.ones_like(judged[:, 0], dtype=torch.long))
        weight = self.config.consistency_weight(progress)
        self.log("consistency_weight", torch.tensor(weight))
        self.log("called_labeled", judged.softmax(1)[:, 1].mean())
        return {
            "supervised": self.config.supervised_loss(labeled, batch.labels),
            "adversarial": weight * fooled,
        }

    def judgment(self, batch: Batch) -> Tensor:
        """What the judge minimizes: cross-entropy of its verdicts on maps that take no gradient."""
        with torch.no_grad(), evaluation_mode(self.network):
            probs = self.network(batch.images).float().softmax(1)
        # Made on the device: a tensor from the host would be waited for.
        is_labeled = torch.arange(len(probs), device=probs.device) < len(batch.labeled)
        return F.cross_entropy(self.judge(probs, batch.images).float(), is_labeled.long())

    def step(self, batch: Batch, progress: Progress, handles: Handles) -> dict[str, Tensor]:
        """First the network, then the judge; neither's loss reaches the other's weights."""
        terms = self.losses(batch, progress)
        handles.backward(torch.stack(list(terms.values())).sum(), "network")
        handles.update("network")
        terms["judge"] = self.judgment(batch)
        handles.backward(terms["judge"], "judge")
        handles.update("judge")
        return terms

    @property
    def predictor(self) -> nn.Module:
        """The network."""
        return self.network
