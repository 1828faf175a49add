"""PLGCL: pseudo-label guided patch contrastive learning (Basak and Yin, CVPR 2023)."""

from __future__ import annotations

from typing import Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from scantly.losses import cross_entropy
from scantly.methods.base import Batch, Method, OptimizerSpec, Progress, Rows, Stage, Task
from scantly.methods.parts.batch_norm import without_statistics
from scantly.methods.parts.ema import ema_decay, gather_statistics, make_teacher, update_teacher
from scantly.methods.parts.modes import evaluation_mode
from scantly.methods.parts.patch_contrast import Guide, PatchContrast, PatchContrastConfig
from scantly.methods.parts.supervision import SupervisionConfig, outputs, supervised_loss
from scantly.networks import EncoderDecoder
from scantly.views import StrongConfig, strong

__all__ = ["PLGCL"]

WARMUP, JOINT = "warmup", "joint"
STATISTICS_EVERY = 2


class PLGCL(Method):
    """Patches of one class attract, patches of different classes repel, cut along labels and along guesses.

    Basak and Yin, "Pseudo-label Guided Contrastive Learning for Semi-supervised Medical Image Segmentation", CVPR
    2023. Warm-up on labeled images: cross-entropy plus the contrastive term on patches cut along the labels. Joint
    stage: a teacher, the moving average of the student, predicts weak views of unlabeled images; patches are cut
    along its labels too, and those of least average entropy are taken; the student must predict the teacher's
    probabilities on strong views. Total: ``cross-entropy + beta * consistency + gamma * contrast``.

    The contrastive term draws the student's embedding of a patch to the Gaussian of its class, fitted to a queue of
    the teacher's embeddings, and away from those of the other classes
    (:class:`~scantly.methods.parts.patch_contrast.PatchContrast`).

    The settings per dataset are not published, and the released code neither runs as it is nor trains on
    pseudo-labels. Where this differs from it, or had to choose:

    * Pseudo-labels are the teacher's, in evaluation mode (code: the student's, overwritten before their use).
    * Patches are selected by entropy (code: not at all). Labeled ones have next to none and come first. Of a class's
      patches cut along pseudo-labels at most half are taken (``guessed_share``): the code's budget of 128 exceeds the
      supply of small images, and then selects nothing.
    * Consistency targets are probabilities (paper: silent).
    * The contrastive loss is the code's closed form; the paper's expectation over all pairs is ``discrete``.
    * Negative weight 4096 in both stages; the code's call in the joint stage suits an older version, 1.
    * Labeled images pass the student apart from strong views and patches, which leave its running batch-norm
      statistics alone: it predicts whole images as they are. With labeled and strong rows in one batch the student and
      its teacher soon agree on background alone.
    * The learning rate of the joint stage falls at every iteration; there, as meant, after every epoch.
    * What is done at the patches' borders and overlaps: :mod:`scantly.methods.parts.patches`. Synthetic hard
      negatives of the code, which the paper does not mention, are left out.
    * The teacher's decay begins at 0 (``ema_rampup``): at a constant 0.999, 0.37 of the random start are left after
      1,000 iterations, and a short run learns from that. From iteration 1,000 on both are the same.
    * The teacher's batch-norm statistics come from clean passes (``teacher_buffers``), there from none. Those of the
      student fit neither the teacher's weights nor weak views; with them pseudo-labels became background alone.

    A step with fewer than two classes has no contrastive term; ``contrast_empty`` counts these steps.
    """

    class Config(PatchContrastConfig, SupervisionConfig):
        """Settings of PLGCL; defaults are the released code's unless stated."""

        warmup_share: float = Field(1 / 3, ge=0, lt=1, description="Share of the warm-up; 0: none (ablation).")
        consistency_weight: float = Field(4.0, ge=0, description="Weight of the consistency term, beta.")
        contrast_weight: float = Field(0.5, ge=0, description="Weight of the contrastive term, gamma; 0: off.")
        supervised: Literal["ce", "ce_dice"] = Field(
            "ce", description="Loss on labels: cross-entropy, or (cross-entropy + soft Dice) / 2 as the baselines."
        )
        hard_targets: bool = Field(False, description="The teacher's most probable classes are the targets.")
        strong: StrongConfig = Field(
            default_factory=lambda: StrongConfig(p_noise=0.5), description="The student's strong view (not published)."
        )
        pseudo_labels_by: Literal["teacher", "student"] = Field(
            "teacher", description="Whose labels patches are cut along."
        )
        ema_decay: float = Field(0.999, ge=0, lt=1, description="Decay of the teacher's average.")
        ema_rampup: bool = Field(
            True,
            description="Decay min(1 - 1/(t+1), ema_decay) at iteration t, so that the random start is forgotten; "
            "false: ema_decay throughout, as the code.",
        )
        teacher_buffers: Literal["predicting", "student"] = Field(
            "predicting",
            description="Batch-norm statistics of the teacher: of clean passes without dropout, or the student's.",
        )
        optimizer: Literal["published", "recipe"] = Field(
            "published",
            description="Adam at 0.001, then SGD from 0.007 to 0.0001 without momentum and weight decay; or "
            "section training in both stages.",
        )
        predict_with: Literal["student", "teacher"] = Field("student", description="Which network predicts.")

    consistency_empty: Tensor

    def __init__(self, task: Task, config: Config) -> None:
        super().__init__(task, config)
        self.config = config
        buffers = config.teacher_buffers
        self.student = task.encoder_decoder()
        self.teacher = cast(EncoderDecoder, make_teacher(self.student, buffers=buffers))
        self.contrast = PatchContrast(task, self.student, config, buffers=buffers, log=self.log)
        self.contrast.head.requires_grad_(config.contrast_weight > 0)
        self.register_buffer("consistency_empty", torch.tensor(0))

    def stages(self) -> list[Stage]:
        """Warm-up on labeled images, then the joint stage with a new optimizer."""
        share = self.config.warmup_share
        warmup = [Stage(WARMUP, share, unlabeled=Rows(0))] if share else []
        return [*warmup, Stage(JOINT, 1 - share)]

    def optimizers(self, stage: Stage) -> dict[str, OptimizerSpec]:
        """Adam at a constant rate, then SGD with a quadratic decay to 1e-4; or as the recipe says."""
        if self.config.optimizer == "recipe":
            return {"main": OptimizerSpec()}
        if stage.name == WARMUP:
            return {"main": OptimizerSpec(name="adam", lr=1e-3, weight_decay=0.0, schedule="constant")}
        sgd = OptimizerSpec(
            name="sgd", lr=0.007, momentum=0.0, weight_decay=0.0, schedule="poly", power=2.0, end_lr=1e-4
        )
        return {"main": sgd}

    def losses(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """``supervised``, in the joint stage ``consistency``, and ``contrast``, weighted."""
        joint = progress.stage != WARMUP
        self._gather(batch.unlabeled if joint else batch.labeled, progress)
        guide = self._guide(batch, joint=joint)
        contrasts = self.config.contrast_weight > 0
        copy = self.contrast.copy(guide) if contrasts else None
        terms = {"supervised": self._supervised(outputs(self.student, batch.labeled), batch.labels)}
        if joint:
            views = strong(self.config.strong, batch.unlabeled, generator=self.generator)
            with without_statistics(self.student):
                logits = outputs(self.student, views)[0]
            terms["consistency"] = self._consistency(logits, guide.probs[len(batch.labeled) :])
        if copy is not None:
            contrast = self.contrast.loss(self.student, self.teacher, guide, copy, self.generator)
            terms["contrast"] = self.config.contrast_weight * contrast
        return terms

    def _gather(self, images: Tensor, progress: Progress) -> None:
        """A clean pass of the teacher, every other iteration where its statistics come from there and are used."""
        used = progress.stage != WARMUP or self.config.predict_with == "teacher"
        if used and self.config.teacher_buffers == "predicting" and progress.iteration % STATISTICS_EVERY == 0:
            gather_statistics(self.teacher, images, progress.iteration // STATISTICS_EVERY)

    @torch.no_grad()
    def _guide(self, batch: Batch, *, joint: bool) -> Guide:
        """Labels, and in the joint stage the teacher's probabilities and the pseudo-labels."""
        probs = F.one_hot(batch.labels, self.task.num_classes).movedim(-1, 1).float()
        if not joint:
            return Guide(batch.labeled, batch.labels, probs, len(batch.labeled), joint)
        targets = predict(self.teacher, batch.unlabeled)
        by_teacher = self.config.pseudo_labels_by == "teacher"
        pseudo_labels = (targets if by_teacher else predict(self.student, batch.unlabeled)).argmax(1)
        labels, probs = torch.cat([batch.labels, pseudo_labels]), torch.cat([probs, targets])
        return Guide(batch.images, labels, probs, len(batch.labeled), joint)

    def _supervised(self, logits: list[Tensor], labels: Tensor) -> Tensor:
        if self.config.supervised == "ce_dice":
            return self.config.supervised_loss(logits, labels)
        return supervised_loss(logits, labels, cross_entropy)

    def _consistency(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of the student on strong views against the teacher on weak ones, weighted."""
        self.consistency_empty += 0 if len(targets) else 1
        self.log("consistency_empty", self.consistency_empty)
        if not len(targets):
            return logits.float().sum() * 0
        self.log("confidence", targets.amax(1).mean())
        expected = targets.argmax(1) if self.config.hard_targets else targets
        return self.config.consistency_weight * F.cross_entropy(logits.float(), expected)

    def after_step(self, progress: Progress) -> None:
        """Update the teacher's average, its head's included."""
        decay = self.config.ema_decay
        if self.config.ema_rampup:
            decay = ema_decay(progress.run_iteration, decay)
        update_teacher(self.teacher, self.student, decay, buffers=self.config.teacher_buffers)
        self.contrast.update_teacher(decay)

    @property
    def predictor(self) -> nn.Module:
        """Student or teacher, as ``predict_with`` says."""
        return self.teacher if self.config.predict_with == "teacher" else self.student


def predict(network: nn.Module, images: Tensor) -> Tensor:
    """Probabilities in evaluation mode, ``(B, classes, *spatial)``, float32."""
    with evaluation_mode(network):
        probs: Tensor = network(images).float().softmax(1)
    return probs
