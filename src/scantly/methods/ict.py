"""ICT (Verma et al., IJCAI 2019)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from scantly.errors import ConfigError
from scantly.methods.base import Batch, Method, Progress, Task
from scantly.methods.parts.consistency import RampConfig, TeacherConfig
from scantly.methods.parts.supervision import SupervisionConfig, split_outputs

__all__ = ["InterpolationConsistency"]


class InterpolationConsistency(Method):
    """The prediction of a mixture of two images is the mixture of the teacher's predictions.

    Verma et al., "Interpolation Consistency Training for Semi-Supervised Learning", IJCAI 2019; for segmentation as in
    the public code of SSL4MIS. The unlabeled rows are split in two halves. Pairs are mixed with a factor from
    Beta(0.2, 0.2), the student sees the mixtures beside the labeled images, and must match the same mixture of the
    probabilities that the teacher, its moving average, gives the two clean images (mean squared error). Labeled images
    are not mixed.

    Deviations from the public code: the halves are those of the unlabeled rows (there of the labeled ones, which need
    to be as many), and of an odd number the last row takes no part; statistics of the teacher and who predicts as for
    Mean Teacher here (``teacher_buffers``, ``predict_with``); the ramp keeps its proportions in a shortened run.
    """

    class Config(TeacherConfig, RampConfig, SupervisionConfig):
        """Settings of ICT; defaults are the public code's unless stated."""

        beta: float = Field(0.2, gt=0, description="Both parameters of the mixing factor's beta distribution.")

    def __init__(self, task: Task, config: Config) -> None:
        super().__init__(task, config)
        self.config = config
        self.student = task.network()
        self.teacher = config.make_teacher(self.student)

    def losses(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """``supervised`` on labeled rows, ``consistency`` on mixtures of unlabeled rows, weighted.

        Raises:
            ConfigError: if there are fewer than two unlabeled rows.
        """
        config, pairs = self.config, len(batch.unlabeled) // 2
        if not pairs:
            raise ConfigError("method 'ict' mixes pairs of unlabeled rows; set plan.unlabeled_batch_size to 2 or more.")
        first, second = batch.unlabeled[:pairs], batch.unlabeled[pairs : 2 * pairs]
        share = self.shares(first)
        with torch.no_grad():
            one, other = (self.teacher(images).float().softmax(1) for images in (first, second))
        targets = torch.lerp(one, other, share)
        config.gather_statistics(self.teacher, batch.unlabeled, progress)
        labeled, mixed = split_outputs(self.student, batch.labeled, torch.lerp(first, second, share))
        difference = (mixed.float().softmax(1) - targets).square().mean()
        weight = config.consistency_weight(progress)
        self.log("consistency_weight", torch.tensor(weight))
        self.log("disagreement", difference)
        return {
            "supervised": config.supervised_loss(labeled, batch.labels),
            "consistency": weight * difference,
        }

    def shares(self, images: Tensor) -> Tensor:
        """The second image's share of each mixture, from Beta(beta, beta), ``(rows, 1, ...)``."""
        # A quotient of gamma variables: torch's beta distribution takes no generator. In float64, as small ones are 0.
        alpha = torch.full((2, len(images)), self.config.beta, device=images.device, dtype=torch.float64)
        one, other = torch._standard_gamma(alpha, generator=self.generator)
        share: Tensor = one / (one + other)
        return share.to(images.dtype).view(-1, *[1] * (images.ndim - 1))

    def after_step(self, progress: Progress) -> None:
        """Update the teacher's average."""
        self.config.update_teacher(self.teacher, self.student, progress)

    @property
    def predictor(self) -> nn.Module:
        """Teacher or student, as ``predict_with`` says."""
        return self.teacher if self.config.predict_with == "teacher" else self.student
