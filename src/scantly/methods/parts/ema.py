"""Exponential moving average of a network."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["Buffers", "copy_buffers", "ema_decay", "make_teacher", "update_teacher"]

Buffers = Literal["student", "own"]


def make_teacher(student: nn.Module) -> nn.Module:
    """A copy of the student that takes no gradient (parameters and buffers equal at first)."""
    return copy.deepcopy(student).requires_grad_(False)


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
        buffers: What becomes of batch-norm running mean and variance. ``"student"`` copies the student's:
            the teacher in evaluation mode then normalizes with statistics that fit its weights and the data.
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
