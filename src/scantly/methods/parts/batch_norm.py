"""Passes through a network that leave its batch-norm statistics alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["without_statistics"]


@contextmanager
def without_statistics(network: nn.Module) -> Iterator[None]:
    """Within it, batch norms in train mode normalize by the batch and do not update their running mean and variance.

    For passes on inputs that are never predicted, such as cropped or masked patches: their statistics, mixed with
    those of whole images, would spoil the network in evaluation mode. In evaluation mode nothing changes.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    tracked = [norm.track_running_stats for norm in norms]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm, value in zip(norms, tracked, strict=True):
            norm.track_running_stats = value
