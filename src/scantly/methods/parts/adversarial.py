"""A network and a judge trained in turn: the judge tells labeled from unlabeled images by the network's maps."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from scantly.methods.base import Batch, Handles, Method, MethodConfig, OptimizerSpec, Progress, Stage
from scantly.methods.parts.modes import evaluation_mode
from scantly.networks.discriminator import Discriminator

__all__ = ["AdversarialMethod", "JudgeConfig"]


class JudgeConfig(MethodConfig):
    """Settings of the judge; defaults are those of the public code of DAN and SASSNet."""

    judge_lr: float = Field(1e-4, gt=0, description="Learning rate of the judge (Adam), constant.")


class AdversarialMethod(Method):
    """Base of methods with a ``judge``: what each of the two minimizes, and the order of their steps.

    The network learns first, with the judge in evaluation mode; then the judge, from maps of the network in evaluation
    mode, which take no gradient. Neither loss reaches the other's weights.
    """

    judge: Discriminator
    config: JudgeConfig

    @abstractmethod
    def judged_maps(self, images: Tensor) -> Tensor:
        """What the judge sees of the network's answer, ``(B, channels, *spatial)``."""

    def optimizers(self, stage: Stage) -> dict[str, OptimizerSpec]:  # noqa: ARG002
        """``network``, as the recipe says, and ``judge``, Adam."""
        judge = list(self.judge.parameters())
        theirs = {id(p) for p in judge}
        return {
            "network": OptimizerSpec([p for p in self.parameters() if p.requires_grad and id(p) not in theirs]),
            "judge": OptimizerSpec(
                judge, name="adam", lr=self.config.judge_lr, betas=(0.9, 0.99), weight_decay=0.0, schedule="constant"
            ),
        }

    def fooling_loss(self, maps: Tensor, images: Tensor) -> Tensor:
        """Cross-entropy with which the network wants its maps of unlabeled images called labeled.

        Args:
            maps: Of unlabeled rows, with gradient, ``(B, channels, *spatial)``.
            images: ``(B, C, *spatial)``.
        """
        with evaluation_mode(self.judge):
            judged = self.judge(maps, images).float()
        self.log("called_labeled", judged.softmax(1)[:, 1].mean())
        return F.cross_entropy(judged, torch.ones_like(judged[:, 0], dtype=torch.long))

    def judgment(self, batch: Batch) -> Tensor:
        """What the judge minimizes: cross-entropy of its verdicts on maps that take no gradient."""
        with torch.no_grad(), evaluation_mode(self):
            maps = self.judged_maps(batch.images)
        # Made on the device: a tensor from the host would be waited for.
        is_labeled = torch.arange(len(maps), device=maps.device) < len(batch.labeled)
        return F.cross_entropy(self.judge(maps, batch.images).float(), is_labeled.long())

    def step(self, batch: Batch, progress: Progress, handles: Handles) -> dict[str, Tensor]:
        """First the network, then the judge."""
        terms = self.losses(batch, progress)
        handles.backward(torch.stack(list(terms.values())).sum(), "network")
        handles.update("network")
        terms["judge"] = self.judgment(batch)
        handles.backward(terms["judge"], "judge")
        handles.update("judge")
        return terms
