"""Contrastive label propagation: stored features of labeled voxels, class by class, against unlabeled voxels."""

from __future__ import annotations

import math
from typing import Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from scantly.errors import ConfigError
from scantly.losses import label_propagation, unit
from scantly.methods.base import MethodConfig, Task
from scantly.methods.parts.memory_bank import MemoryBank
from scantly.methods.parts.modes import evaluation_mode
from scantly.methods.parts.samplers import draw_distinct
from scantly.networks.heads import pointwise_head

__all__ = ["LabelPropagation", "PropagationConfig"]

_POOL = {2: F.avg_pool2d, 3: F.avg_pool3d}


class PropagationConfig(MethodConfig):
    """Settings of contrastive label propagation; all values are our choice, none of the paper's is known."""

    temperature: float = Field(0.1, gt=0, description="Temperature of the contrast.")
    embedding: int = Field(32, ge=1, description="Length of an embedded voxel.")
    queue: int = Field(2048, ge=1, description="Embedded labeled voxels kept per class.")
    pushed: int = Field(256, ge=1, description="Labeled voxels that a step stores, at most, per class.")
    correct_only: bool = Field(True, description="Only those that the diffusion network gives their class are stored.")
    anchors: int = Field(64, ge=1, description="Stored voxels drawn per class; a class that has fewer is left out.")
    candidates: int = Field(1024, ge=2, description="Unlabeled voxels drawn per step, for all classes together.")
    positives: int = Field(32, ge=1, description="The so many most similar candidates are pulled to a class.")
    negatives: int = Field(
        256, ge=1, description="The so many least similar ones that are predicted as another class are pushed away."
    )
    pair_level: Literal["class", "anchor"] = Field(
        "class", description="Candidates are ranked by their mean similarity to a class, or by each anchor."
    )
    candidate_sampling: Literal["uniform", "stratified"] = Field(
        "stratified",
        description="stratified: equally many of each predicted class, so that each has negatives of other classes; "
        "uniform: of all voxels, most of which are background.",
    )
    share_head: bool = Field(
        True, description="One embedding for both networks; false: the diffusion network's stays as it was drawn."
    )
    proj_stride: int = Field(1, ge=1, description="Features are averaged over boxes of this side first, voxels.")


class LabelPropagation(nn.Module):
    """Embeddings of voxels, the bank of labeled ones, and the loss on unlabeled ones.

    The banks are filled after the loss, with features from before the step and the head from after it. Nothing here
    waits for the device. Of several ranks each draws anchors from the same banks and candidates from its own images,
    of which it ranks its own; the loss is the mean of theirs. What each draws of its labeled voxels, up to ``pushed``
    of a class, goes into the banks of all.

    Args:
        config: Settings.
        task: Classes and dimensions.
        width: Channels of the features.
    """

    def __init__(self, config: PropagationConfig, task: Task, width: int) -> None:
        super().__init__()
        if config.positives + config.negatives > config.candidates:
            raise ConfigError(
                f"method.positives + method.negatives is {config.positives + config.negatives}, and only "
                f"{config.candidates} candidates are drawn; raise method.candidates."
            )
        if config.proj_stride > min(task.patch_size):
            raise ConfigError(
                f"method.proj_stride is {config.proj_stride}, and the patch's shortest side {min(task.patch_size)} "
                "voxels; lower it."
            )
        if config.anchors > config.queue:
            raise ConfigError(
                f"method.anchors is {config.anchors}, and a queue holds {config.queue}; lower it or raise method.queue."
            )
        self.config = config
        self.spatial_dims = task.spatial_dims
        self.classes = task.num_classes
        widths = (width, width, config.embedding)
        self.head = pointwise_head(task.spatial_dims, widths, norm=True)
        if not config.share_head:
            self.bank_head = pointwise_head(task.spatial_dims, widths, norm=True).requires_grad_(False)
        self.banks = nn.ModuleList(MemoryBank(config.queue, (config.embedding,)) for _ in task.classes)

    def check(self, features: Tensor) -> None:
        """Refuse features of unlabeled rows with fewer voxels than positives and negatives.

        Raises:
            ConfigError: naming the settings.
        """
        config = self.config
        voxels = len(features) * math.prod(side // config.proj_stride for side in features.shape[2:])
        if voxels < config.positives + config.negatives:
            raise ConfigError(
                f"the unlabeled rows have {voxels} voxels at method.proj_stride={config.proj_stride}, but the contrast "
                f"takes method.positives + method.negatives = {config.positives + config.negatives}; lower these."
            )

    def loss(self, features: Tensor, predicted: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The contrast of unlabeled voxels with the banks.

        Args:
            features: Of unlabeled rows, ``(B, width, *spatial)``.
            predicted: Their predicted classes, ``(B, *spatial)`` int64: no voxel is a negative of its own class.
            generator: Source of the draws.

        Returns:
            Scalar, and what is worth logging.
        """
        config = self.config
        predicted = self._strided(predicted).flatten()
        embedded = self.head(self._pooled(features))
        drawn = self._candidates(predicted, generator)
        candidates = unit(_at(embedded, drawn))
        others = predicted[drawn] != torch.arange(self.classes, device=predicted.device)[:, None]
        banks = [cast(MemoryBank, bank) for bank in self.banks]
        stored, _ = draw_distinct(torch.stack([bank.valid for bank in banks]), config.anchors, generator)
        anchors = torch.stack([bank.values[places] for bank, places in zip(banks, stored, strict=True)])
        used = torch.stack([bank.filled for bank in banks]) >= config.anchors
        loss, near, far = label_propagation(
            anchors,
            candidates,
            used,
            positives=config.positives,
            negatives=config.negatives,
            temperature=config.temperature,
            level=config.pair_level,
            allowed=others,
        )
        watched = {
            "positive_similarity": near,
            "negative_similarity": far,
            "contrast_classes": used.sum(),
        }
        return loss, watched

    def _candidates(self, predicted: Tensor, generator: torch.Generator) -> Tensor:
        """Voxels for the contrast, all different, ``(n,)`` int64."""
        count = min(self.config.candidates, len(predicted))
        keys = torch.rand(len(predicted), generator=generator, device=generator.device)
        if self.config.candidate_sampling == "stratified":
            labels = torch.arange(self.classes, device=predicted.device)
            index, drawn = draw_distinct(predicted == labels[:, None], count // self.classes, generator)
            # Drawn ones first; what is missing is filled up uniformly from the others.
            spare = torch.cat([keys, keys[:1]])
            keys = spare.scatter(0, torch.where(drawn, index, len(keys)).flatten(), 2.0)[:-1]
        return keys.topk(count).indices

    @torch.no_grad()
    def store(self, features: Tensor, labels: Tensor, predicted: Tensor, generator: torch.Generator) -> None:
        """Put labeled voxels into the banks.

        Args:
            features: The diffusion network's of labeled rows, ``(B, width, *spatial)``.
            labels: ``(B, *spatial)`` int64.
            predicted: What the diffusion network predicts there, ``(B, *spatial)`` int64.
            generator: Source of the draws.
        """
        head = self.head if self.config.share_head else self.bank_head
        labels, predicted = self._strided(labels).flatten(), self._strided(predicted).flatten()
        eligible = labels == torch.arange(self.classes, device=labels.device)[:, None]
        if self.config.correct_only:
            eligible = eligible & (predicted == labels)
        index, drawn = draw_distinct(eligible, min(self.config.pushed, len(labels)), generator)
        # The head acts on each voxel alone, so drawing may come first; its averages are those of the loss's passes.
        chosen = _at(self._pooled(features.float()), index.flatten()).T
        with evaluation_mode(head):
            embedded = unit(head(chosen[(None, ..., *[None] * (self.spatial_dims - 1))]).flatten(2)[0].T)
        for bank, vectors, keep in zip(self.banks, embedded.chunk(self.classes), drawn, strict=True):
            cast(MemoryBank, bank).push(vectors, keep)

    @property
    def fill(self) -> Tensor:
        """Mean share of the queues that is filled, for the log."""
        return torch.stack([cast(MemoryBank, bank).fill for bank in self.banks]).mean()

    def _pooled(self, features: Tensor) -> Tensor:
        stride = self.config.proj_stride
        return features if stride == 1 else _POOL[self.spatial_dims](features, stride)

    def _strided(self, labels: Tensor) -> Tensor:
        """Every ``proj_stride``-th voxel, as many as boxes."""
        stride = self.config.proj_stride
        sides = [slice(0, side // stride * stride, stride) for side in labels.shape[1:]]
        return labels[(slice(None), *sides)]


def _at(maps: Tensor, index: Tensor) -> Tensor:
    """Vectors of single voxels, ``(n, C)``, of maps ``(B, C, *spatial)``; ``index`` is ``image * voxels + voxel``."""
    columns = maps.flatten(2).movedim(1, 2)
    return columns[index // columns.shape[1], index % columns.shape[1]]
