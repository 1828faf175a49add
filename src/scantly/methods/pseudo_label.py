"""Self-training with pseudo-labels (Lee, ICML workshop 2013)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from scantly.losses import IGNORED, masked_cross_entropy, soft_dice
from scantly.methods.base import Batch, Method, Progress, Rows, Stage, Task
from scantly.methods.parts.consistency import RampConfig
from scantly.methods.parts.ema import make_teacher, update_teacher
from scantly.methods.parts.supervision import SupervisionConfig, outputs, split_outputs, supervised_loss

__all__ = ["PseudoLabel"]


class PseudoLabel(Method):
    """The network's own confident predictions are its labels.

    Lee, "Pseudo-Label: The Simple and Efficient Semi-Supervised Learning Method for Deep Neural Networks", ICML
    workshop on Challenges in Representation Learning, 2013, voxel by voxel, in two forms:

    * ``form=online``: at every step the most probable class of each voxel of the unlabeled images is its label where
      its probability reaches ``confidence_threshold``; cross-entropy, divided by all voxels.
    * ``form=rounds``: train on the labeled images, label the whole pool, begin anew and train on both; so ``rounds``
      times. Labels of the pool come from the last iteration of the stage before, never from a choice by test cases.

    There is no public code of the field for either. In rounds every stage begins with the weights that the first began
    with, and labels of the pool count as much as given ones, all of them unless ``rounds_threshold`` leaves doubtful
    voxels out; structures keep all their components.
    """

    class Config(RampConfig, SupervisionConfig):
        """Settings of self-training; the ramp is for the online form."""

        form: Literal["online", "rounds"] = Field(
            "online", description="Labels at every step, or of the pool per round."
        )
        confidence_threshold: float = Field(
            0.95, ge=0, description="Online: from which a pseudo-label counts; above 1: never."
        )
        mask_normalization: Literal["all", "masked"] = Field(
            "all", description="Cross-entropy is divided by all voxels or by the trusted ones."
        )
        dice_weight: float = Field(0.0, ge=0, description="Online: weight of Dice over the trusted voxels beside it.")
        rounds: int = Field(1, ge=1, description="Rounds of relabeling, each with an equal share of the iterations.")
        rounds_threshold: float = Field(
            0.0, ge=0, lt=1, description="Rounds: probability below which a voxel of the pool gets no label; 0: all do."
        )

    def __init__(self, task: Task, config: Config) -> None:
        super().__init__(task, config)
        self.config = config
        self.network = task.network()
        if config.form == "rounds":
            self.initial = make_teacher(self.network)

    def stages(self) -> list[Stage]:
        """One, or ``supervised`` and ``round1``, ``round2``, ..."""
        if self.config.form == "online":
            return [Stage()]
        rounds = [Stage(f"round{number}", relabel=True) for number in range(1, self.config.rounds + 1)]
        return [Stage("supervised", unlabeled=Rows(0)), *rounds]

    def enter_stage(self, stage: Stage, *, first: bool) -> None:
        """A round begins with the weights that the training began with."""
        if first and stage.relabel:
            update_teacher(self.network, self.initial, 0.0)

    def losses(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """``supervised``; online ``pseudo`` on unlabeled rows, weighted, in rounds ``supervised`` on all rows."""
        if self.config.form == "online":
            return self._online(batch, progress)
        if batch.pseudo_labels is None:
            return {"supervised": self.config.supervised_loss(outputs(self.network, batch.labeled), batch.labels)}
        labels = torch.cat([batch.labels, batch.pseudo_labels])
        loss = self.config.supervised_loss if self.config.rounds_threshold == 0 else self._partly_labeled_loss
        self.log("confident", (batch.pseudo_labels != IGNORED).float().mean())
        return {"supervised": loss(outputs(self.network, batch.images), labels)}

    def pseudo_labels(self, probs: Tensor) -> Tensor:
        """The most probable class, or none where its probability is below ``rounds_threshold``."""
        confidence, labels = probs.max(0)
        return labels.where(confidence >= self.config.rounds_threshold, IGNORED)

    def _partly_labeled_loss(self, logits: Sequence[Tensor], labels: Tensor) -> Tensor:
        """The supervised loss over the voxels that have a label."""
        config = self.config

        def loss(level: Tensor, target: Tensor) -> Tensor:
            mask, target = target != IGNORED, target.clamp(min=0)
            dice = soft_dice(level.float().softmax(1), target, include_background=config.dice_background, mask=mask)
            return 0.5 * (masked_cross_entropy(level, target, mask, normalize=config.mask_normalization) + dice)

        return supervised_loss(logits, labels, loss)

    def _online(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        config = self.config
        labeled, unlabeled = split_outputs(self.network, batch.labeled, batch.unlabeled)
        probs = unlabeled.float().softmax(1)
        confidence, labels = probs.detach().max(1)
        mask = confidence >= config.confidence_threshold
        term = masked_cross_entropy(unlabeled, labels, mask, normalize=config.mask_normalization)
        if config.dice_weight > 0:
            term = term + config.dice_weight * soft_dice(probs, labels, mask=mask)
        weight = config.consistency_weight(progress)
        self.log("consistency_weight", torch.tensor(weight))
        self.log("confident", mask.float().mean())
        return {"supervised": config.supervised_loss(labeled, batch.labels), "pseudo": weight * term}

    @property
    def predictor(self) -> nn.Module:
        """The network."""
        return self.network
