"""ARCO's first stage: the student reproduces the teacher's similarities to stored vectors of past images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from scantly.errors import ConfigError, times
from scantly.losses import cosine_similarities, similarity_divergence, unit
from scantly.methods.base import MethodConfig, Task
from scantly.methods.parts.ema import make_teacher, update_teacher
from scantly.methods.parts.memory_bank import MemoryBank
from scantly.networks.heads import pointwise_head

__all__ = [
    "CropPooling",
    "GlobalHead",
    "InstanceConfig",
    "InstanceDiscrimination",
    "LocalHead",
    "crop_geometry",
    "instance_terms",
]

_BINS = 8
_SHARE = {2: 64 / 256, 3: 20 / 112}
_LEAST_CROP = 4


class InstanceConfig(MethodConfig):
    """Settings of the first stage; defaults are the paper's, or its public code's where it says nothing."""

    instance_global_weight: float = Field(1.0, ge=0, description="Weight of the global first-stage term; 0: off.")
    instance_local_weight: float = Field(1.0, ge=0, description="Weight of the local first-stage term; 0: off.")
    queue_length: int = Field(36, ge=1, description="Stored images K of the instance and neighbor terms.")
    student_temperature: float = Field(0.1, gt=0, description="Temperature of the student, first stage.")
    teacher_temperature: float = Field(0.01, gt=0, description="Temperature of the teacher, first stage.")
    global_channels: int = Field(512, ge=1, description="Length of the global vector.")
    crop_size: int | None = Field(
        None, ge=1, description="Side of the local crops, voxels; none: 64 / 256 of the patch in 2D, 20 / 112 in 3D."
    )
    crop_stride: int | None = Field(None, ge=1, description="Step between crops, voxels; none: half their side.")
    head_activation: Literal["relu", "none"] = Field(
        "relu", description="Between the two layers of the first stage's heads (paper: nonlinear; code: none)."
    )


def crop_geometry(
    size: Sequence[int], crop: int | None, stride: int | None
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Side, stride and number of overlapping crops along each axis of a patch; a remainder is left out.

    Args:
        size: ``(H, W)`` or ``(D, H, W)``.
        crop: Side in voxels; ``None``: the published share of the longest side, 64 of 256 in 2D and 20 of 112 in
            3D, at least 4, and no longer than an axis.
        stride: Step in voxels; ``None``: half the side.

    Raises:
        ConfigError: if a crop does not fit into the patch.

    Example:
        >>> crop_geometry((80, 112, 112), None, None)
        ((20, 20, 20), (10, 10, 10), (7, 10, 10))
    """
    if crop is not None and crop > min(size):
        raise ConfigError(
            f"method.crop_size is {crop}, and the patch is {times(tuple(size))}; choose at most {min(size)}."
        )
    side = max(_LEAST_CROP, round(_SHARE[len(size)] * max(size))) if crop is None else crop
    sides = tuple(min(side, length) for length in size)
    steps = tuple(max(1, each // 2) if stride is None else stride for each in sides)
    counts = tuple((length - each) // step + 1 for length, each, step in zip(size, sides, steps, strict=True))
    return sides, steps, counts


class CropPooling(nn.Module):
    """Adaptive average pooling of every overlapping crop to at most 8 cells along each axis.

    A cell's mean is a product of means along the axes, so all crops are pooled by one small matrix per axis, and
    voxels that several crops share are read once.

    Args:
        size: ``(H, W)`` or ``(D, H, W)`` of the maps.
        crop: As for :func:`crop_geometry`.
        stride: As for :func:`crop_geometry`.

    Attributes:
        crops: Number of crops S.
        cells: Cells of a crop, at most 8 along each axis.
    """

    def __init__(self, size: Sequence[int], crop: int | None, stride: int | None) -> None:
        super().__init__()
        sides, steps, self._counts = crop_geometry(size, crop, stride)
        self._bins = tuple(min(_BINS, side) for side in sides)
        self.crops, self.cells = math.prod(self._counts), math.prod(self._bins)
        for axis, length in enumerate(size):
            matrix = _pooling_matrix(length, sides[axis], steps[axis], self._counts[axis], self._bins[axis])
            self.register_buffer(f"axis{axis}", matrix, persistent=False)

    def forward(self, maps: Tensor) -> Tensor:
        """Maps ``(B, C, *size)`` -> ``(B, S, cells, C)``, float32."""
        pooled = maps.float()
        axes = len(self._counts)
        with torch.autocast(maps.device.type, enabled=False):
            for axis in range(axes):  # each pooled axis moves to the end, so the next one stands third again
                pooled = pooled.movedim(2, -1) @ cast(Tensor, getattr(self, f"axis{axis}"))
        shape = [length for pair in zip(self._counts, self._bins, strict=True) for length in pair]
        pooled = pooled.reshape(*maps.shape[:2], *shape)
        crops, cells = range(2, 2 + 2 * axes, 2), range(3, 3 + 2 * axes, 2)
        return pooled.permute(0, *crops, *cells, 1).reshape(len(maps), self.crops, self.cells, maps.shape[1])


def _pooling_matrix(length: int, side: int, step: int, crops: int, bins: int) -> Tensor:
    """``(length, crops * bins)``: column ``s * bins + j`` averages cell j of crop s."""
    voxel = torch.arange(length)[:, None]
    start = (torch.arange(crops) * step)[:, None]
    cell = torch.arange(bins)
    first = (start + cell * side // bins).flatten()
    stop = (start + -(-(cell + 1) * side // bins)).flatten()
    return ((voxel >= first) & (voxel < stop)).float() / (stop - first)


class GlobalHead(nn.Module):
    """Mean of the coarsest features over space, then two linear layers.

    Args:
        in_channels: Channels of the features.
        width: Length of the vector.
        activation: ReLU between the layers.
    """

    def __init__(self, in_channels: int, width: int, *, activation: bool) -> None:
        super().__init__()
        self.projector = pointwise_head(0, (in_channels, in_channels, width), activation=activation)

    def forward(self, features: Tensor) -> Tensor:
        """Features ``(B, C, *spatial)`` -> ``(B, 1, 1, width)``."""
        vectors: Tensor = self.projector(features.flatten(2).mean(2))
        return vectors[:, None, None]


class LocalHead(nn.Module):
    """Pooled crops of the logits, each cell through two linear layers.

    Args:
        classes: Channels C of the logits.
        pooling: Cuts and pools the crops.
        activation: ReLU between the layers.
    """

    def __init__(self, classes: int, pooling: CropPooling, *, activation: bool) -> None:
        super().__init__()
        self.pooling = pooling
        self.projector = pointwise_head(0, (classes, 2 * classes, classes), activation=activation)

    def forward(self, logits: Tensor) -> Tensor:
        """Logits ``(B, C, *spatial)`` -> ``(B, S, cells, C)``."""
        cells: Tensor = self.projector(self.pooling(logits))
        return cells


class InstanceDiscrimination(nn.Module):
    """Student and teacher compare their views of an image with the same vectors of past images.

    You et al., NeurIPS 2023 (ARCO), after ISD (Tejankar et al., ICCV 2021): the loss is the divergence of the
    student's similarity distribution over the queue from the teacher's. An image has S places (its crops, or one),
    and a vector is compared with the stored ones of its own place. The published code mixes places and channels by
    its reshapes. The teacher's head is a copy of the student's and follows it as a moving average; there it is
    drawn apart and trained by the gradient.

    Args:
        head: Of the student, to ``(B, S, cells, C)``; the teacher has a copy.
        predictor: Of the student alone, on the last axis.
        places: S.
        length: ``cells * C``.
        queue_length: Stored images K; they are random unit vectors at first.
    """

    def __init__(self, head: nn.Module, predictor: nn.Module, *, places: int, length: int, queue_length: int) -> None:
        super().__init__()
        self.head, self.predictor = head, predictor
        self.teacher_head = make_teacher(head)
        self.queue = MemoryBank(queue_length, (places, length), initial=unit(torch.randn(queue_length, places, length)))
        self._arrived: Tensor | None = None

    def forward(
        self, seen: Tensor, target: Tensor, *, student_temperature: float, teacher_temperature: float
    ) -> tuple[Tensor, Tensor]:
        """The loss, and the share of images whose nearest stored vector is the same for student and teacher.

        Args:
            seen: What the student's head works on, ``(B, C, *spatial)``.
            target: The same of the teacher.
            student_temperature: As for :func:`scantly.losses.similarity_divergence`.
            teacher_temperature: Likewise.
        """
        stored = self.queue.values.transpose(0, 1)
        student = self.predictor(self.head(seen)).flatten(2).transpose(0, 1)
        with torch.no_grad():
            teacher = unit(self.teacher_head(target).flatten(2))
            targets = cosine_similarities(teacher.transpose(0, 1), stored)
        similarities = cosine_similarities(student, stored)
        self._arrived = teacher
        loss = similarity_divergence(
            similarities,
            targets,
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
        )
        agree = similarities.detach().argmax(-1) == targets.argmax(-1)
        return loss, agree.float().mean()

    def after_step(self, decay: float) -> None:
        """Update the teacher's head and append the step's vectors; not before, the gradient needs the queue."""
        update_teacher(self.teacher_head, self.head, decay)
        if self._arrived is not None:
            self.queue.push(self._arrived)
            self._arrived = None


def instance_terms(config: InstanceConfig, task: Task, channels: int) -> nn.ModuleDict:
    """The first stage's terms by name, ``global`` and ``local``, without those of weight 0.

    Args:
        config: Settings.
        task: What is segmented.
        channels: Channels of the features that the global term works on.
    """
    terms = nn.ModuleDict()
    relu, width, classes = config.head_activation == "relu", config.global_channels, task.num_classes
    if config.instance_global_weight > 0:
        terms["global"] = InstanceDiscrimination(
            GlobalHead(channels, width, activation=relu),
            pointwise_head(0, (width, width, width), activation=relu),
            places=1,
            length=width,
            queue_length=config.queue_length,
        )
    if config.instance_local_weight > 0:
        pooling = CropPooling(task.patch_size, config.crop_size, config.crop_stride)
        terms["local"] = InstanceDiscrimination(
            LocalHead(classes, pooling, activation=relu),
            pointwise_head(0, (classes, classes, classes), activation=relu),
            places=pooling.crops,
            length=pooling.cells * classes,
            queue_length=config.queue_length,
        )
    return terms
