"""SASSNet (Li, Zhang and He, MICCAI 2020)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from scantly.methods.base import Batch, Progress, Task
from scantly.methods.parts.adversarial import AdversarialMethod, JudgeConfig
from scantly.methods.parts.consistency import RampConfig
from scantly.methods.parts.distances import DistanceConfig, distance_network
from scantly.networks.discriminator import Discriminator

__all__ = ["ShapeAware"]


class ShapeAware(AdversarialMethod):
    """A judge tells labeled from unlabeled images by their predicted distance maps; the shapes become alike.

    Li, Zhang and He, "Shape-aware Semi-supervised 3D Semantic Segmentation for Medical Images", MICCAI 2020, and its
    public code (left atrium). The network gives a mask and a signed distance map
    (:func:`~scantly.losses.signed_distance`) of every foreground class, and learns both from the labels: soft Dice of
    the mask, and squared error of the distances. A judge sees distances and image; first the network learns to have
    its distances of unlabeled images called labeled, then the judge learns to tell them apart. The judge's gradient
    reaches the mask through shared features alone. The mask's head predicts.

    Deviations: published with one foreground class; with several each has a mask (sigmoid) and a distance map of its
    own, and the Dice is their mean. Any numbers of labeled and unlabeled rows (the public code needs them equal). The
    judge pools to a fixed number of cells, so patches may have any size. A patch without a class has distance 1
    everywhere (``empty_distance=zero``: 0, the public code), one full of it -1 (there: not a number). In 2D, of which
    there is no official version, the same on the 2D network. The public code takes a largest weight of 0.01 for 16
    labeled scans, the default here, and of 0.015 for 8.
    """

    class Config(JudgeConfig, DistanceConfig, RampConfig):
        """Settings of SASSNet; defaults are the public code's unless stated."""

        consistency: float = Field(0.01, ge=0, description="Largest weight of the adversarial term.")
        rampup_iterations: int = Field(
            6_000, ge=0, description="Iterations until the full weight, of `published_iterations`."
        )
        published_iterations: int = Field(6_000, ge=1, description="Length of the published training, iterations.")

    config: Config

    def __init__(self, task: Task, config: Config) -> None:
        super().__init__(task, config)
        self.config = config
        self.network = distance_network(task)
        maps = task.num_classes - 1
        self.judge = Discriminator(task.spatial_dims, maps, task.channels, sides=task.patch_size)
        self.distances_of = config.label_distances(task.num_classes)

    def losses(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """``supervised``, ``distance`` and ``adversarial``, weighted: what the network minimizes."""
        labeled = len(batch.labeled)
        logits, distances = self.network.both(batch.images)
        terms = self.config.distance_losses(logits[:labeled], distances[:labeled], batch.labels, self.distances_of)
        weight = self.config.consistency_weight(progress)
        self.log("consistency_weight", torch.tensor(weight))
        return {**terms, "adversarial": weight * self.fooling_loss(distances[labeled:], batch.unlabeled)}

    def judged_maps(self, images: Tensor) -> Tensor:
        """Signed distances."""
        return self.network.both(images)[1]

    @property
    def predictor(self) -> nn.Module:
        """The network, which answers with its masks."""
        return self.network
