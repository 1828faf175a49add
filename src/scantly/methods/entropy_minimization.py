"""Entropy minimization (Grandvalet and Bengio, NeurIPS 2004; Vu et al., CVPR 2019)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from scantly.losses import entropy
from scantly.methods.base import Batch, Method, Progress, Task
from scantly.methods.parts.consistency import RampConfig
from scantly.methods.parts.supervision import SupervisionConfig, split_outputs

__all__ = ["EntropyMinimization"]


class EntropyMinimization(Method):
    """Predictions are pushed to be certain.

    Grandvalet and Bengio, "Semi-supervised Learning by Entropy Minimization", NeurIPS 2004; for segmentation Vu et al.,
    "ADVENT: Adversarial Entropy Minimization for Domain Adaptation in Semantic Segmentation", CVPR 2019, equation 3,
    and the public code of SSL4MIS: the mean over voxels of ``-sum_c p log(p + 1e-6) / ln C``.

    As in the public code the mean is over labeled and unlabeled rows (``rows=unlabeled``: the usual definition, which
    with equal numbers of both is twice as strong on the unlabeled ones). Deviation from it: the largest entropy is that
    of the task's C classes, where the code has 4 in 2D and 2 in 3D.
    """

    class Config(RampConfig, SupervisionConfig):
        """Settings of entropy minimization; defaults are the public code's."""

        rows: Literal["unlabeled", "all"] = Field(
            "all", description="Whose entropy counts: of all rows (public code), or of the unlabeled ones."
        )

    def __init__(self, task: Task, config: Config) -> None:
        super().__init__(task, config)
        self.config = config
        self.network = task.network()

    def losses(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """``supervised`` on labeled rows, ``entropy`` in [0, 1], weighted."""
        labeled, unlabeled = split_outputs(self.network, batch.labeled, batch.unlabeled)
        counted = torch.cat([labeled[0], unlabeled]) if self.config.rows == "all" else unlabeled
        uncertainty = entropy(counted.float().softmax(1), epsilon=1e-6).mean() / math.log(self.task.num_classes)
        weight = self.config.consistency_weight(progress)
        self.log("consistency_weight", torch.tensor(weight))
        self.log("uncertainty", uncertainty)
        return {
            "supervised": self.config.supervised_loss(labeled, batch.labels),
            "entropy": weight * uncertainty,
        }

    @property
    def predictor(self) -> nn.Module:
        """The network."""
        return self.network
