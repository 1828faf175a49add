"""DTC (Luo et al., AAAI 2021)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from scantly.losses import soft_mask
from scantly.methods.base import Batch, Method, Progress, Task
from scantly.methods.parts.consistency import RampConfig
from scantly.methods.parts.distances import DistanceConfig, distance_network

__all__ = ["DualTaskConsistency"]


class DualTaskConsistency(Method):
    """A predicted distance map, turned into a mask, must agree with the predicted mask.

    Luo, Chen, Song and Wang, "Semi-supervised Medical Image Segmentation through Dual-task Consistency", AAAI 2021, and
    its public code (left atrium). The network gives a mask and a signed distance map
    (:func:`~scantly.losses.signed_distance`) of every foreground class, and learns both from the labels: soft Dice of
    the mask, and squared error of the distances. On all images, labeled ones too, the mask must match (mean squared
    error) a steep sigmoid of the distances, and both take the gradient. The mask's head predicts.

    Deviations: published with one foreground class; with several each has a mask (sigmoid) and a distance map of its
    own, and the Dice is their mean. A patch without a class has distance 1 everywhere (``empty_distance=zero``: 0, the
    public code, which makes its mask one half everywhere), one full of it -1 (there: not a number). In 2D, of which
    there is no official version, the same on the 2D network. The public evaluation keeps the largest component of a
    prediction; here that is a setting of the evaluation.
    """

    class Config(DistanceConfig, RampConfig):
        """Settings of DTC; defaults are the public code's unless stated."""

        consistency: float = Field(1.0, ge=0, description="Largest weight of the consistency term.")
        rampup_iterations: int = Field(
            6_000, ge=0, description="Iterations until the full weight, of `published_iterations`."
        )
        published_iterations: int = Field(6_000, ge=1, description="Length of the published training, iterations.")
        steepness: float = Field(1500.0, gt=0, description="Slope of the sigmoid that turns distances into a mask.")

    def __init__(self, task: Task, config: Config) -> None:
        super().__init__(task, config)
        self.config = config
        self.network = distance_network(task)
        self.distances_of = config.label_distances(task.num_classes)

    def losses(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """``supervised``, ``distance`` and ``consistency``, weighted."""
        config, labeled = self.config, len(batch.labeled)
        logits, distances = self.network.both(batch.images)
        terms = config.distance_losses(logits[:labeled], distances[:labeled], batch.labels, self.distances_of)
        difference = (soft_mask(distances, steepness=config.steepness) - logits.float().sigmoid()).square().mean()
        weight = config.consistency_weight(progress)
        self.log("consistency_weight", torch.tensor(weight))
        self.log("disagreement", difference)
        return {**terms, "consistency": weight * difference}

    @property
    def predictor(self) -> nn.Module:
        """The network, which answers with its masks."""
        return self.network
