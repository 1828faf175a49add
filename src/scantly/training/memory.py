"""Whether a training step can fit the device at all."""

from __future__ import annotations

import math
import os

import torch

from scantly.data.topology import training_bytes
from scantly.errors import DeviceError
from scantly.methods import catalogue
from scantly.training.config import RunConfig

__all__ = ["check_memory", "step_bytes"]

#: Activations in bf16 over those in float32; normalizations keep float32.
_BF16 = 0.6


def step_bytes(config: RunConfig) -> float:
    """What the activations of one forward and backward pass over a batch take, about.

    Weights, averages, further networks and workspaces are not counted; a network of MONAI's counts as a U-Net.
    """
    plan, network = config.plan, config.network
    uses_unlabeled = catalogue.load(config.method_name).uses_unlabeled and config.split["unlabeled"]
    rows = plan.labeled_batch_size + (plan.unlabeled_batch_size if uses_unlabeled else 0)
    per_voxel = training_bytes(network.name, plan.spatial_dims, network.arguments.get("widths"))
    return rows * math.prod(plan.patch_size) * per_voxel * (_BF16 if config.training.precision == "bf16" else 1.0)


def check_memory(config: RunConfig, device: torch.device) -> None:
    """Refuse a step that the whole memory of the device could not hold.

    Raises:
        DeviceError: naming patch, need and memory.
    """
    need = step_bytes(config)
    memory = _memory(device)
    if memory is not None and need > memory:
        plan = config.plan
        patch = " x ".join(str(side) for side in plan.patch_size)
        raise DeviceError(
            f"a step over {plan.labeled_batch_size} + {plan.unlabeled_batch_size} rows of {patch} by network "
            f"{config.network.name} needs about {need / 1e9:.0f} GB, but {device.type} has {memory / 1e9:.0f} GB in "
            "all; choose a smaller --size, or lower plan.labeled_batch_size and plan.unlabeled_batch_size."
        )


def _memory(device: torch.device) -> int | None:
    """All memory of the device, in bytes; ``None`` where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type != "cpu" or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
