"""Full precision inside a network that runs under autocast, and where bf16 does not pay."""

from __future__ import annotations

import functools
import logging

import torch

__all__ = ["emulates_bf16", "say_slow_bf16", "without_autocast"]

_LOGGER = logging.getLogger("scantly")
_EMULATES_BF16 = ("NO AVX", "AVX2")  # measured with AVX2: a convolution is 11 times slower


def emulates_bf16(device: str) -> bool:
    """Whether bf16 is emulated on a device: on x86 processors with no more than AVX2.

    Args:
        device: Its type, for instance ``cpu``.
    """
    return device == "cpu" and torch.backends.cpu.get_cpu_capability() in _EMULATES_BF16


@functools.cache
def say_slow_bf16(device: str) -> None:
    """Warn, once per process, of bf16 on a processor without instructions for it.

    Args:
        device: Type of the device that bf16 is asked for on, for instance ``cpu``.
    """
    if emulates_bf16(device):
        _LOGGER.warning(
            "this processor has no instructions for bf16, which makes convolutions more than ten times slower than in "
            "float32; use --precision 32."
        )


def without_autocast(device: torch.device) -> torch.autocast:
    """Context in which nothing is cast; also for tensors without data, for which autocast does not exist."""
    return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)
