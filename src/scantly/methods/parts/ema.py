"""Exponential moving average of a network."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from scantly.methods.parts.modes import evaluation_mode

__all__ = ["Buffers", "copy_buffers", "ema_decay", "gather_statistics", "make_teacher", "update_teacher"]

Buffers = Literal["predicting", "student", "own"]

_LEAST_MOMENTUM = 0.2


def make_teacher(student: nn.Module, *, buffers: Buffers = "student") -> nn.Module:
    """A copy of the student that takes no gradient (parameters and buffers equal at first).

    Args:
        student: Network to be copied.
        buffers: As for :func:`update_teacher`. With ``"predicting"`` the teacher's passes leave its batch-norm
            statistics alone, but for those of :func:`gather_statistics`.
    """
    teacher = copy.deepcopy(student).requires_grad_(False)
    if buffers == "predicting":
        for module in _batch_norms(teacher):
            module.momentum = 0.0
    return teacher


@torch.no_grad()
def gather_statistics(teacher: nn.Module, images: Tensor, passes: int) -> None:
    """Update batch-norm statistics by a pass as in prediction, without dropout.

    Networks without such statistics are not run.

    Args:
        teacher: Of :func:`make_teacher` with ``"predicting"``; every module's mode is left as it was.
        images: As they come in prediction, without noise, ``(B, C, *spatial)``.
        passes: How many there were before: the first ones count equally, later ones a fifth.
    """
    norms = _batch_norms(teacher)
    if not norms:
        return
    with evaluation_mode(teacher):
        for norm in norms:
            norm.train()
            norm.momentum = max(_LEAST_MOMENTUM, 1 / (passes + 1))
        teacher(images)
        for norm in norms:
            norm.momentum = 0.0


def _batch_norms(network: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    return [module for module in network.modules() if isinstance(module, kinds) and module.track_running_stats]


def ema_decay(iteration: int, maximum: float) -> float:
    """``min(1 - 1/(t + 1), maximum)`` for ``t = iteration``: the running mean first, then a fixed horizon.

    Tarvainen and Valpola, NeurIPS 2017 (public code). The first step (``t = 0``) copies the student.
    """
    return min(1.0 - 1.0 / (iteration + 1), maximum)


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, decay: float, *, buffers: Buffers = "student") -> None:
    """In place: ``teacher <- decay * teacher + (1 - decay) * student`` for all parameters.

    Args:
        teacher: Network to be updated.
        student: Network of the same structure.
        decay: In [0, 1]; 0 copies.
        buffers: What becomes of batch-norm running mean and variance. ``"predicting"`` leaves them to
            :func:`gather_statistics`: they fit the weights, the data and the absence of dropout.
            ``"student"`` copies the student's, which are gathered under dropout and fit worse where there is much.
            ``"own"`` leaves those that the teacher's own train-mode passes gathered, as public scripts do;
            they lag, and such a teacher is often useless in evaluation mode.
    """
    averages: list[Tensor] = list(teacher.parameters())
    values: list[Tensor] = list(student.parameters())
    torch._foreach_lerp_(averages, values, 1.0 - decay)
    if buffers == "student":
        copy_buffers(teacher, student)


@torch.no_grad()
def copy_buffers(teacher: nn.Module, student: nn.Module) -> None:
    """Copy all buffers (batch-norm statistics and counters) from the student."""
    targets, sources = list(teacher.buffers()), list(student.buffers())
    if targets:
        torch._foreach_copy_(targets, sources)
