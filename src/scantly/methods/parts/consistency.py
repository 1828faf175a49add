"""Settings that consistency methods share: the weight's ramp, the teacher and its noise."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from scantly.methods.base import MethodConfig, Progress
from scantly.methods.parts.ema import Buffers, ema_decay, gather_statistics, make_teacher, update_teacher
from scantly.methods.parts.ramps import gaussian_rampup
from scantly.views import noise

__all__ = ["NoiseConfig", "RampConfig", "TeacherConfig"]

_STATISTICS_EVERY = 2


class RampConfig(MethodConfig):
    """The weight of the unsupervised term; defaults are those of the public 2D segmentation code (SSL4MIS)."""

    consistency: float = Field(0.1, ge=0, description="Largest weight of the consistency term.")
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

    def consistency_weight(self, progress: Progress) -> float:
        """Weight of the unsupervised term at this iteration."""
        iteration = progress.scaled(self.published_iterations)
        if iteration < self.start_iteration:
            return 0.0
        ramp = gaussian_rampup(iteration // self.rampup_interval, self.rampup_iterations // self.rampup_interval)
        return self.consistency * ramp


class TeacherConfig(MethodConfig):
    """A teacher that is the moving average of the student; defaults are the public code's unless stated."""

    ema_decay: float = Field(0.99, ge=0, lt=1, description="Largest decay of the teacher's average.")
    teacher_buffers: Buffers = Field(
        "predicting",
        description="Batch-norm statistics of the teacher: of clean passes without dropout, the student's, or "
        "those of its own passes.",
    )
    predict_with: Literal["teacher", "student"] = Field("teacher", description="Which network predicts.")

    def make_teacher(self, student: nn.Module) -> nn.Module:
        """A copy of the student without gradient."""
        return make_teacher(student, buffers=self.teacher_buffers)

    def gather_statistics(self, teacher: nn.Module, images: Tensor, progress: Progress) -> None:
        """Every other iteration, with ``predicting``: the clean unlabeled images pass the teacher without dropout."""
        if self.teacher_buffers == "predicting" and progress.iteration % _STATISTICS_EVERY == 0:
            gather_statistics(teacher, images, progress.iteration // _STATISTICS_EVERY)

    def update_teacher(self, teacher: nn.Module, student: nn.Module, progress: Progress) -> None:
        """One step of the average; the first copies the student."""
        decay = ema_decay(progress.iteration, self.ema_decay)
        update_teacher(teacher, student, decay, buffers=self.teacher_buffers)


class NoiseConfig(MethodConfig):
    """Noise on the teacher's images; defaults are the public code's."""

    noise_std: float = Field(0.1, ge=0, description="Standard deviation of the teacher's input noise, in image units.")
    noise_limit: float = Field(0.2, ge=0, description="The noise is clamped to plus or minus this.")

    def noisy(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Images with noise of their own, of the same shape."""
        return noise(images, sigma=self.noise_std, clamp=self.noise_limit, generator=generator)
