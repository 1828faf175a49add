"""UA-MT (Yu et al., MICCAI 2019)."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor, nn

from scantly.losses import entropy
from scantly.methods.base import Batch, Method, Progress, Task
from scantly.methods.parts.consistency import NoiseConfig, RampConfig, TeacherConfig
from scantly.methods.parts.ramps import gaussian_rampup
from scantly.methods.parts.supervision import SupervisionConfig, split_outputs
from scantly.ranks import sum_over_ranks

__all__ = ["UncertaintyAwareMeanTeacher"]

_EPSILON = 1e-6


class UncertaintyAwareMeanTeacher(Method):
    """Mean Teacher that learns from the voxels of which the teacher is certain.

    Yu, Wang, Li, Fu and Heng, "Uncertainty-aware Self-ensembling Model for Semi-supervised 3D Left Atrium
    Segmentation", MICCAI 2019; public code for the left atrium, ported to 2D in SSL4MIS. The teacher looks at the
    unlabeled images T more times, each time with other noise and dropout. Where the entropy of its mean probabilities
    is below a threshold, the student must match a pass of the teacher, and the threshold rises from 3/4 of the largest
    entropy to all of it. The target is one pass of its own, not the mean.

    Deviations from the public code:

    * The largest entropy is ln C, and squared differences are averaged over C classes; the code has ln 2 and 2 for any
      number of classes (``official=true``), which for four classes stays below half of the largest entropy.
    * As for Mean Teacher here: statistics of the teacher (``teacher_buffers``), who predicts (``predict_with``),
      published iterations as the clock of the weight's ramp.
    * Two of the T passes share a forward, as in the code; an odd one has its own.
    """

    class Config(TeacherConfig, NoiseConfig, RampConfig, SupervisionConfig):
        """Settings of UA-MT; defaults are the public code's unless stated."""

        passes: int = Field(8, ge=1, description="Passes T of the teacher for its uncertainty.")
        official: bool = Field(
            False, description="Threshold from ln 2 and divisor 2 whatever the number of classes, as the public code."
        )

    def __init__(self, task: Task, config: Config) -> None:
        super().__init__(task, config)
        self.config = config
        self.student = task.network()
        self.teacher = config.make_teacher(self.student)
        self.counted_classes = 2 if config.official else task.num_classes

    def losses(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """``supervised`` on labeled rows, ``consistency`` on certain voxels of unlabeled rows, weighted."""
        config = self.config
        labeled, unlabeled = split_outputs(self.student, batch.labeled, batch.unlabeled)
        with torch.no_grad():
            targets = self._teach(batch.unlabeled)
            uncertainty = self.uncertainty(batch.unlabeled)
        config.gather_statistics(self.teacher, batch.unlabeled, progress)
        certain = (uncertainty < self.threshold(progress))[:, None]
        squares = (unlabeled.float().softmax(1) - targets).square()
        count = sum_over_ranks(certain.sum())
        difference = sum_over_ranks((certain * squares).sum()) / (self.counted_classes * count + 1e-16)
        weight = config.consistency_weight(progress)
        self.log("consistency_weight", torch.tensor(weight))
        self.log("certain", certain.float().mean())
        self.log("uncertainty", uncertainty.mean())
        self.log("disagreement", difference)
        return {
            "supervised": config.supervised_loss(labeled, batch.labels),
            "consistency": weight * difference,
        }

    def uncertainty(self, images: Tensor) -> Tensor:
        """Entropy of the teacher's mean probabilities over T passes, ``(B, *spatial)``, in nats."""
        parts, left = [], self.config.passes
        while left:
            times = min(left, 2)
            probs = self._teach(images.repeat(times, *[1] * (images.ndim - 1)))
            parts.append(torch.stack(probs.chunk(times)).sum(0))
            left -= times
        return entropy(torch.stack(parts).sum(0) / self.config.passes, epsilon=_EPSILON)

    def _teach(self, images: Tensor) -> Tensor:
        """Probabilities of the teacher for images with new noise."""
        probs: Tensor = self.teacher(self.config.noisy(images, self.generator)).float().softmax(1)
        return probs

    def threshold(self, progress: Progress) -> float:
        """``(3/4 + 1/4 exp(-5 (1 - t/T)^2)) ln C`` at iteration t of T."""
        return (0.75 + 0.25 * gaussian_rampup(progress.iteration, progress.total)) * math.log(self.counted_classes)

    def after_step(self, progress: Progress) -> None:
        """Update the teacher's average."""
        self.config.update_teacher(self.teacher, self.student, progress)

    @property
    def predictor(self) -> nn.Module:
        """Teacher or student, as ``predict_with`` says."""
        return self.teacher if self.config.predict_with == "teacher" else self.student
