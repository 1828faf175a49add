"""What a run was computed with."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from scantly._version import __version__

__all__ = ["describe_environment"]

_PACKAGES = ("torch", "lightning", "monai", "numpy", "scipy", "nibabel", "blosc2")


def describe_environment(device: torch.device, *, world_size: int) -> dict[str, Any]:
    """Versions, device, threads: enough to tell why two runs differ.

    Args:
        device: Training device.
        world_size: Number of processes.
    """
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "scantly": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "device": device.type,
        "device_name": name,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "world_size": world_size,
    }
