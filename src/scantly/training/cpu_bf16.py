"""A work-around for wrong gradients of bf16 convolutions on CPUs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["mend_convolutions"]

_WRONG_DEPTH = 2


def mend_convolutions(module: nn.Module) -> None:
    """Let 3D convolutions run in float32 where their bf16 gradient is wrong on a CPU.

    With PyTorch 2.13 on CPUs with bf16 instructions, the weights' gradient of a padded 3x3x3 convolution in bf16 is
    made of memory that was never written when the input is 2 voxels deep, whatever its height and width: it differs
    from run to run and is often not finite. A patch 32 voxels deep reaches that depth at the fifth level. Such maps are
    small; computing them in float32 costs next to nothing.

    Args:
        module: Its convolutions are changed in place; weights and ``state_dict`` stay as they are.
    """
    for conv in module.modules():
        if isinstance(conv, nn.Conv3d) and conv.kernel_size[0] > 1:
            conv.forward = _Forward(conv)  # type: ignore[assignment]


class _Forward:
    """The forward pass of one convolution."""

    def __init__(self, conv: nn.Conv3d) -> None:
        self._conv = conv

    def __call__(self, x: Tensor) -> Tensor:
        conv = self._conv
        if x.shape[2] != _WRONG_DEPTH or not torch.is_autocast_enabled("cpu"):
            return nn.Conv3d.forward(conv, x)
        with torch.autocast("cpu", enabled=False):
            return nn.Conv3d.forward(conv, x.float())
