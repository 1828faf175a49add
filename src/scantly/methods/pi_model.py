"""The Pi-model (Laine and Aila, ICLR 2017)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from scantly.methods.base import Batch, Method, Progress, Task
from scantly.methods.parts.consistency import NoiseConfig, RampConfig
from scantly.methods.parts.supervision import SupervisionConfig, outputs

__all__ = ["PiModel"]


class PiModel(Method):
    """Two passes of one network, each with noise and dropout of its own, must agree.

    Laine and Aila, "Temporal Ensembling for Semi-Supervised Learning", ICLR 2017. The probabilities of both passes must
    match (mean squared error over images, classes and voxels), labeled images included; both take the gradient. The
    first pass learns from the labels. Noise and ramp are those of Mean Teacher, with which it compares: the same but
    for the teacher.

    Deviations: there is no public code for segmentation. The paper moves and mirrors images between the passes; here
    both see the same geometry, since masks would have to be moved back, and differ in noise and dropout alone: with
    neither they are the same, and the term vanishes. The paper adds noise in both passes (``noisy_passes=2``); the
    default adds it in the second, so that the first, and half of the batch-norm statistics, are those of clean images.
    The largest weight is the field's 0.1, the paper's grows with the share of labeled images.
    """

    class Config(NoiseConfig, RampConfig, SupervisionConfig):
        """Settings of the Pi-model; defaults are those of Mean Teacher's public segmentation code unless stated."""

        rows: Literal["all", "unlabeled"] = Field("all", description="Images whose passes must agree (paper: all).")
        noisy_passes: Literal[1, 2] = Field(1, description="1: the second pass sees noise; 2: both do (paper).")

    def __init__(self, task: Task, config: Config) -> None:
        super().__init__(task, config)
        self.config = config
        self.network = task.network()

    def losses(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """``supervised`` on labeled rows of the first pass, ``consistency`` between the passes, weighted."""
        config, labeled = self.config, len(batch.labeled)
        images = batch.images
        first = outputs(self.network, config.noisy(images, self.generator) if config.noisy_passes == 2 else images)
        start = 0 if config.rows == "all" else labeled
        second = outputs(self.network, config.noisy(images[start:], self.generator))[0]
        difference = (first[0][start:].float().softmax(1) - second.float().softmax(1)).square().mean()
        weight = config.consistency_weight(progress)
        self.log("consistency_weight", torch.tensor(weight))
        self.log("disagreement", difference)
        return {
            "supervised": config.supervised_loss([level[:labeled] for level in first], batch.labels),
            "consistency": weight * difference,
        }

    @property
    def predictor(self) -> nn.Module:
        """The network."""
        return self.network
