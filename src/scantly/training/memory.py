"""Whether a training step can fit the device at all."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from scantly.data.parallel import total_memory
from scantly.data.topology import training_bytes
from scantly.errors import DeviceError, times
from scantly.methods import catalogue
from scantly.methods.base import Stage
from scantly.networks import side_factors
from scantly.training.config import RunConfig
from scantly.training.feed import stage_rows

__all__ = ["check_memory", "step_bytes"]

#: Activations in bf16 over those in float32; normalizations keep float32.
_BF16 = 0.6


def step_bytes(config: RunConfig, stages: Sequence[Stage] = (Stage(),)) -> float:
    """What the activations of one forward and backward pass over the largest batch of the stages take, about.

    Weights, averages, further networks and workspaces are not counted; a network of MONAI's counts as a U-Net.
    """
    plan, network = config.plan, config.network
    per_voxel = training_bytes(network.name, plan.spatial_dims, network.arguments.get("widths"))
    scale = _BF16 if config.training.precision == "bf16" else 1.0
    return sum(_rows(config, stages)) * math.prod(plan.patch_size) * per_voxel * scale


def check_memory(config: RunConfig, device: torch.device, stages: Sequence[Stage] = (Stage(),)) -> None:
    """Refuse a step that the whole memory of the device could not hold.

    Raises:
        DeviceError: naming patch, need, memory, and a patch that needs half of it.
    """
    need, memory = step_bytes(config, stages), _memory(device)
    if memory is None or need <= memory:
        return
    rows = " + ".join(str(count) for count in _rows(config, stages))
    sides = _smaller(config, memory / need / 2)
    raise DeviceError(
        f"a step over {rows} rows of {times(config.plan.patch_size)} by network {config.network.name} "
        f"needs about {need / 1e9:.0f} GB, but {device.type} has {memory / 1e9:.0f} GB in all; choose for instance "
        f"--size {' '.join(str(side) for side in [*sides[-2:], *sides[:-2]])}, or fewer rows "
        "(plan.labeled_batch_size, or the method's own settings)."
    )


def _rows(config: RunConfig, stages: Sequence[Stage]) -> list[int]:
    """Labeled, unlabeled and extra rows of the largest step, without those that are not loaded."""
    pool = catalogue.load(config.method_name).uses_unlabeled and bool(config.split["unlabeled"])
    largest = max((stage_rows(stage, config.plan, pool=pool) for stage in stages), key=sum)
    return [count for count in largest if count]


def _smaller(config: RunConfig, share: float) -> list[int]:
    """Sides of a patch with at most this share of the voxels that the network takes; the largest are shortened."""
    network, sides = config.network, list(config.plan.patch_size)
    dims = config.plan.spatial_dims
    factors = side_factors(network.name, spatial_dims=dims, arguments=network.arguments) or (32,) * dims
    voxels = math.prod(sides) * share
    while math.prod(sides) > voxels and any(side > factor for side, factor in zip(sides, factors, strict=True)):
        axis = max(range(dims), key=lambda axis: sides[axis] if sides[axis] > factors[axis] else 0)
        sides[axis] = max(factors[axis], (sides[axis] - 1) // factors[axis] * factors[axis])
    return sides


def _memory(device: torch.device) -> int | None:
    """All memory of the device, in bytes; ``None`` where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return total_memory() if device.type == "cpu" else None
