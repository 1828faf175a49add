"""Mean Teacher (Tarvainen and Valpola, NeurIPS 2017)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from scantly.methods.base import Batch, Method, Progress, Task
from scantly.methods.parts.ema import Buffers, ema_decay, gather_statistics, make_teacher, update_teacher
from scantly.methods.parts.ramps import gaussian_rampup
from scantly.methods.parts.supervision import SupervisionConfig, outputs
from scantly.views import noise

__all__ = ["MeanTeacher"]

STATISTICS_EVERY = 2


class MeanTeacher(Method):
    """A teacher, the moving average of the student's weights, tells the student what to predict.

    Tarvainen and Valpola, "Mean teachers are better role models: Weight-averaged consistency targets improve
    semi-supervised deep learning results", NeurIPS 2017; for segmentation as in the public code of SSL4MIS.
    On unlabeled images the student's probabilities must match (mean squared error over batch, classes and
    voxels) the teacher's on a noisy copy. Both networks stay in train mode; labeled and unlabeled rows pass
    the student in one forward, so batch-norm statistics are joint.

    Deviations from the public segmentation code:

    * The teacher starts as a copy of the student, there it is drawn on its own; the first update copies the
      student anyway (decay 0 at iteration 0), so only the target of iteration 0 differs.
    * ``teacher_buffers="predicting"``: every other iteration the teacher also sees the clean unlabeled images,
      without dropout, and its batch-norm statistics are those of these passes; in the public code they are those
      of its passes on noisy images with dropout (``"own"``), which makes it unusable in evaluation mode.
    * ``predict_with="teacher"``; the public scripts test the student (the literature recipes say so).
    * ``start_iteration=0``; the 2D public script has no consistency before iteration 1,000, the 3D one does
      (the literature recipes set it).
    * Iterations of the ramp and the start are on the clock of ``published_iterations``, so that a shortened
      run keeps its proportions; the decay of the average is not scaled.
    """

    class Config(SupervisionConfig):
        """Settings of Mean Teacher; defaults are the public segmentation code's unless stated."""

        consistency: float = Field(0.1, ge=0, description="Largest weight of the consistency term.")
        ema_decay: float = Field(0.99, ge=0, lt=1, description="Largest decay of the teacher's average.")
        noise_std: float = Field(
            0.1, ge=0, description="Standard deviation of the teacher's input noise, in image units."
        )
        noise_limit: float = Field(0.2, ge=0, description="The noise is clamped to plus or minus this.")
        rampup_iterations: int = Field(
            30_000, ge=0, description="Iterations until the full weight, of `published_iterations`."
        )
        rampup_interval: int = Field(
            150, ge=1, description="The weight changes every so many iterations, of `published_iterations`."
        )
        start_iteration: int = Field(
            0, ge=0, description="No consistency before this iteration, of `published_iterations`."
        )
        published_iterations: int = Field(30_000, ge=1, description="Length of the published training, iterations.")
        teacher_buffers: Buffers = Field(
            "predicting",
            description="Batch-norm statistics of the teacher: of clean passes without dropout, the student's, or "
            "those of its own passes.",
        )
        predict_with: Literal["teacher", "student"] = Field("teacher", description="Which network predicts.")

    def __init__(self, task: Task, config: Config) -> None:
        super().__init__(task, config)
        self.config = config
        self.student = task.network()
        self.teacher = make_teacher(self.student, buffers=config.teacher_buffers)

    def losses(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """``supervised`` on labeled rows, ``consistency`` on unlabeled rows, weighted."""
        with torch.no_grad():
            noisy = noise(
                batch.unlabeled,
                sigma=self.config.noise_std,
                clamp=self.config.noise_limit,
                generator=self.generator,
            )
            targets = self.teacher(noisy).float().softmax(1)
        if self.config.teacher_buffers == "predicting" and progress.iteration % STATISTICS_EVERY == 0:
            gather_statistics(self.teacher, batch.unlabeled, progress.iteration // STATISTICS_EVERY)
        rows = [len(batch.labeled), len(batch.unlabeled)]
        labeled, unlabeled = zip(
            *(torch.split(logits, rows) for logits in outputs(self.student, batch.images)), strict=True
        )
        difference = (unlabeled[0].float().softmax(1) - targets).square().mean()
        weight = self.weight(progress)
        self.log("consistency_weight", torch.tensor(weight))
        self.log("disagreement", difference)
        return {
            "supervised": self.config.supervised_loss(labeled, batch.labels),
            "consistency": weight * difference,
        }

    def weight(self, progress: Progress) -> float:
        """Weight of the consistency term at this iteration."""
        iteration = progress.scaled(self.config.published_iterations)
        if iteration < self.config.start_iteration:
            return 0.0
        interval = self.config.rampup_interval
        ramp = gaussian_rampup(iteration // interval, self.config.rampup_iterations // interval)
        return self.config.consistency * ramp

    def after_step(self, progress: Progress) -> None:
        """Update the teacher's average."""
        decay = ema_decay(progress.iteration, self.config.ema_decay)
        update_teacher(self.teacher, self.student, decay, buffers=self.config.teacher_buffers)

    @property
    def predictor(self) -> nn.Module:
        """Teacher or student, as ``predict_with`` says."""
        return self.teacher if self.config.predict_with == "teacher" else self.student
