"""Projection and prediction heads: a few layers that act on each vector or each voxel alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import nn

from scantly.networks.blocks import BATCH_NORM, CONV

__all__ = ["pointwise_head"]


def pointwise_head(
    spatial_dims: Literal[0, 2, 3],
    widths: Sequence[int],
    *,
    norm: bool = False,
    last_norm: bool = False,
    activation: bool = True,
    bias: bool = True,
) -> nn.Sequential:
    """Linear layers, on vectors or on every voxel of a map.

    Args:
        spatial_dims: 0: vectors ``(B, widths[0])``; 2 or 3: maps ``(B, widths[0], *spatial)``, convolutions with
            kernel 1.
        widths: Channels of the input and of each layer's output.
        norm: Batch normalization after every layer but the last.
        last_norm: Batch normalization after the last.
        activation: ReLU after every layer but the last, behind the normalization.
        bias: Whether the layers have one.

    Returns:
        Maps the input to ``(B, widths[-1])`` or ``(B, widths[-1], *spatial)``.

    Example:
        >>> len(pointwise_head(0, (256, 256, 128), norm=True))
        4
    """
    layers: list[nn.Module] = []
    for index, (a, b) in enumerate(pairwise(widths), 1):
        last = index == len(widths) - 1
        layers.append(CONV[spatial_dims](a, b, 1, bias=bias) if spatial_dims else nn.Linear(a, b, bias=bias))
        if last_norm if last else norm:
            layers.append(BATCH_NORM[spatial_dims](b))
        if activation and not last:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)
