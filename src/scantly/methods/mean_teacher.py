"""Mean Teacher (Tarvainen and Valpola, NeurIPS 2017)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scantly.methods.base import Batch, Method, Progress, Task
from scantly.methods.parts.consistency import NoiseConfig, RampConfig, TeacherConfig
from scantly.methods.parts.supervision import SupervisionConfig, split_outputs

__all__ = ["MeanTeacher"]


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

    class Config(TeacherConfig, NoiseConfig, RampConfig, SupervisionConfig):
        """Settings of Mean Teacher; defaults are the public segmentation code's unless stated."""

    def __init__(self, task: Task, config: Config) -> None:
        super().__init__(task, config)
        self.config = config
        self.student = task.network()
        self.teacher = config.make_teacher(self.student)

    def losses(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """``supervised`` on labeled rows, ``consistency`` on unlabeled rows, weighted."""
        config = self.config
        with torch.no_grad():
            targets = self.teacher(config.noisy(batch.unlabeled, self.generator)).float().softmax(1)
        config.gather_statistics(self.teacher, batch.unlabeled, progress)
        labeled, unlabeled = split_outputs(self.student, batch.labeled, batch.unlabeled)
        difference = (unlabeled.float().softmax(1) - targets).square().mean()
        weight = config.consistency_weight(progress)
        self.log("consistency_weight", torch.tensor(weight))
        self.log("disagreement", difference)
        return {
            "supervised": config.supervised_loss(labeled, batch.labels),
            "consistency": weight * difference,
        }

    def after_step(self, progress: Progress) -> None:
        """Update the teacher's average."""
        self.config.update_teacher(self.teacher, self.student, progress)

    @property
    def predictor(self) -> nn.Module:
        """Teacher or student, as ``predict_with`` says."""
        return self.teacher if self.config.predict_with == "teacher" else self.student
