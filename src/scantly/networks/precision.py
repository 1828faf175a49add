"""Full precision inside a network that runs under autocast."""

from __future__ import annotations

import torch

__all__ = ["without_autocast"]


def without_autocast(device: torch.device) -> torch.autocast:
    """Context in which nothing is cast; also for tensors without data, for which autocast does not exist."""
    return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)
