"""The contrastive branch of PLGCL: from labels and guesses to patches, embeddings, queues and the loss."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from scantly.losses.patch_contrastive import binary_entropy, closed_form_contrast, discrete_contrast
from scantly.methods.base import MethodConfig, Task
from scantly.methods.parts.batch_norm import without_statistics
from scantly.methods.parts.class_queues import ClassQueues
from scantly.methods.parts.ema import Buffers, make_teacher, update_teacher
from scantly.methods.parts.patch_views import augment, box_means, crop, resample, select
from scantly.methods.parts.patches import (
    Boxes,
    HostCopy,
    class_boxes,
    filter_coverage,
    fitting_patch,
    next_thresholds,
)
from scantly.networks import EncoderDecoder
from scantly.networks.heads import pointwise_head
from scantly.ranks import mean_of_rows, rows_of_all_ranks, world_size

__all__ = ["Guide", "PatchContrast", "PatchContrastConfig"]

EMBEDDING = 128


class PatchContrastConfig(MethodConfig):
    """Settings of the contrastive branch; defaults are the released code's unless stated."""

    contrast: Literal["closed", "discrete"] = Field(
        "closed", description="The code's Gaussian upper bound, or the paper's mean over all pairs."
    )
    patch_size: int | None = Field(
        None,
        ge=1,
        description="Side of a patch, voxels; null: a quarter of the shorter side in 2D, 32 in 3D, made to fit the "
        "network (not published).",
    )
    patch_budget: int = Field(128, ge=2, description="Patches per step, shared by the classes that are present.")
    guessed_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Joint stage: of each class at most this share of the patches cut along pseudo-labels is taken, "
        "so that the best are, also where the budget exceeds the supply; 1: as many as the budget allows.",
    )
    sampling_metric: Literal["entropy", "confidence", "cosine", "random"] = Field(
        "entropy",
        description="What makes a patch a good one in the joint stage: low average entropy, high mean probability of "
        "its class, an embedding like its class's mean (the paper's ablation), or nothing.",
    )
    sampling: Literal["lowest", "weighted"] = Field(
        "lowest",
        description="The best patches of each class (lowest entropy), or a draw with weight 1 - entropy, or the "
        "other metrics' score (not published).",
    )
    entropy_source: Literal["probability", "intensity"] = Field(
        "probability",
        description="Entropy of the class's probability, or of the image's intensities, in [0, 1], inside the class "
        "(the paper allows both readings).",
    )
    coverage_filter: Literal["off", "repaired", "published"] = Field(
        "off",
        description="Joint stage: keep patches whose share of voxels of their class is at least an adaptive "
        "threshold; published: at most, as the code does against its own documentation.",
    )
    warmup_temperature: float = Field(0.2, gt=0, description="Temperature in the warm-up.")
    temperature: float = Field(1.0, gt=0, description="Temperature in the joint stage.")
    warmup_covariance_weight: float = Field(4.0, ge=0, description="Weight of the covariances in the warm-up.")
    covariance_weight: float = Field(10.0, ge=0, description="Weight of the covariances in the joint stage.")
    warmup_negative_weight: float = Field(4096.0, gt=0, description="Weight of the negatives in the warm-up.")
    negative_weight: float = Field(
        4096.0, gt=0, description="Weight of the negatives in the joint stage (1 in an older version of the code)."
    )
    queue: int = Field(4096, ge=2, description="Embeddings kept per class.")


@dataclass(frozen=True)
class Guide:
    """What patches are cut along.

    Attributes:
        images: Labeled rows, then unlabeled ones under the weak view, ``(B, C, *spatial)``.
        labels: Labels, then pseudo-labels, ``(B, *spatial)``.
        probs: Probabilities of the classes, one-hot where labeled, ``(B, classes, *spatial)``.
        labeled: Number of labeled rows.
        joint: Joint stage: patches are selected, and its weights hold; else the warm-up.
    """

    images: Tensor
    labels: Tensor
    probs: Tensor
    labeled: int
    joint: bool


class PatchContrast(nn.Module):
    """Draws the student's embedding of a patch to its class and away from the others.

    An embedding is the deepest features of a patch, averaged, through a head (linear, batch norm, ReLU, linear, batch
    norm; as in the released code), of unit length. The teacher's embeddings of random views of the step's patches
    go into a queue per class; the loss compares the student's embeddings of the patches themselves with the queues of
    the classes present in the step. The decoder takes no gradient from it.

    Both networks see patches in train mode, all of a step at once (released code: four at a time; the candidates of
    ``sampling_metric="cosine"``: at most ``patch_budget``), and leave their batch-norm statistics, those of evaluation
    mode, to whole images.

    In a training of several ranks each cuts and selects patches of its own images, ``patch_budget`` of them, and a
    class is present that any rank has; it is compared with the same queues, into which all ranks' embeddings go. How
    many patches there are decides on passes and shapes, so the ranks tell each other, and the host waits for that.

    Args:
        task: What is to be segmented.
        network: Of the kind of student and teacher.
        config: Settings.
        buffers: As for the teacher, see :func:`~scantly.methods.parts.ema.make_teacher`.
        log: Takes the scalars that are watched.

    Attributes:
        contrast_empty: Steps with fewer than two classes, in which the loss was 0.
    """

    coverage: Tensor
    coverage_updates: Tensor
    contrast_empty: Tensor

    def __init__(
        self,
        task: Task,
        network: EncoderDecoder,
        config: PatchContrastConfig,
        *,
        buffers: Buffers,
        log: Callable[[str, Tensor], None],
    ) -> None:
        super().__init__()
        self.config, self.classes, self.log, self.buffers_of_teacher = config, task.classes, log, buffers
        normalized = any(isinstance(each, nn.modules.instancenorm._InstanceNorm) for each in network.modules())
        self.side = fitting_patch(config.patch_size, task.patch_size, network.factors, one_voxel=not normalized)
        width = network.widths[-1]
        self.head = pointwise_head(0, (width, width, EMBEDDING), norm=True, last_norm=True)
        self.teacher_head = make_teacher(self.head, buffers=buffers)
        self.queues = ClassQueues(task.num_classes, config.queue, EMBEDDING)
        self.register_buffer("coverage", torch.full((task.num_classes,), 0.5))
        self.register_buffer("coverage_updates", torch.tensor(0))
        self.register_buffer("contrast_empty", torch.tensor(0))

    def copy(self, guide: Guide) -> HostCopy:
        """Start to copy what the host needs; what is computed before :meth:`loss` runs meanwhile."""
        return HostCopy(guide.labels.to(torch.int16), self.coverage, self.coverage_updates)

    def loss(
        self,
        student: EncoderDecoder,
        teacher: EncoderDecoder,
        guide: Guide,
        copy: HostCopy,
        generator: torch.Generator,
    ) -> Tensor:
        """The loss of one step, a scalar, without its weight; the queues take the step's embeddings first."""
        boxes = self._boxes(copy, guide)
        classes = len(boxes.present)
        if classes:
            number = math.ceil(self.config.patch_budget / classes)
            if guide.joint:
                boxes = self._selected(boxes, number, teacher, guide, generator)
            patches = crop(guide.images, guide.labels, boxes)
            with torch.no_grad():
                views = patches  # without any there is none
                if len(patches):
                    views = augment(patches[resample(boxes.counts, number, generator=generator)], generator=generator)
                self._store(embed(teacher, self.teacher_head, views), boxes, number)
        for name, count in zip(self.classes, boxes.counts, strict=True):
            self.log(f"patches/{name}", torch.tensor(count))
        self.contrast_empty += 1 if classes < 2 else 0
        self.log("contrast_empty", self.contrast_empty)
        self.log("bank_fill", self.queues.fill)
        if classes < 2:
            return torch.stack([parameter.sum() for parameter in self.head.parameters()]).sum() * 0
        return self._compare(embed(student, self.head, patches), boxes, joint=guide.joint)

    def _store(self, embedded: Tensor, boxes: Boxes, number: int) -> None:
        """Put ``number`` embeddings of each class that this rank has into the queues, and those of the other ranks."""
        present = boxes.present
        if world_size() == 1:
            self.queues.push(present, embedded)
            return
        own = iter(torch.split(embedded, number))
        rows = [next(own) if boxes.counts[label] else embedded.new_zeros(number, EMBEDDING) for label in present]
        of_ranks = rows_of_all_ranks(torch.stack(rows)[None])
        for index, label in enumerate(present):
            found = [rows[index] for rows, counts in zip(of_ranks, boxes.of_ranks, strict=True) if counts[label]]
            self.queues.push([label], torch.cat(found))

    def update_teacher(self, decay: float) -> None:
        """The moving average of the head."""
        update_teacher(self.teacher_head, self.head, decay, buffers=self.buffers_of_teacher)

    def _boxes(self, copy: HostCopy, guide: Guide) -> Boxes:
        """Candidates: all patches, or in the joint stage those that pass the coverage filter."""
        labels, thresholds, updates = copy.wait()
        boxes, coverage = class_boxes(labels, len(self.classes), self.side)
        before, filters = boxes.counts, guide.joint and self.config.coverage_filter != "off"
        published = self.config.coverage_filter == "published"
        if filters:
            boxes, following = filter_coverage(boxes, coverage, thresholds, int(updates), published=published)
        if world_size() > 1:
            counts = rows_of_all_ranks(torch.tensor([[before, boxes.counts]], device=guide.labels.device)).tolist()
            boxes = dataclasses.replace(boxes, of_ranks=tuple(tuple(kept) for _, kept in counts))
            if filters:
                found, kept = ([sum(each) for each in zip(*rows, strict=True)] for rows in zip(*counts, strict=True))
                following = next_thresholds(thresholds, found, kept, int(updates), published=published)
        if filters:
            self.coverage.copy_(torch.tensor(following), non_blocking=True)
            self.coverage_updates += 1
        guessed = boxes.label[boxes.image >= guide.labeled].bincount(minlength=len(self.classes)).tolist()
        return dataclasses.replace(boxes, guessed=tuple(guessed)).to(guide.labels.device)

    @torch.no_grad()
    def _selected(
        self, boxes: Boxes, number: int, teacher: EncoderDecoder, guide: Guide, generator: torch.Generator
    ) -> Boxes:
        """The best ``number`` patches of each class."""
        scores = self._scores(boxes, teacher, guide, generator)
        weighted = self.config.sampling == "weighted"
        left = [guessed - math.ceil(self.config.guessed_share * guessed) for guessed in boxes.guessed]
        most = [min(number, count - spared) for count, spared in zip(boxes.counts, left, strict=True)]
        index, counts = select(scores, boxes.counts, most, weighted=weighted, generator=generator)
        selected = boxes.take(index, counts)
        for name, count, before in zip(self.classes, counts, boxes.counts, strict=True):
            self.log(f"kept_patches/{name}", torch.tensor(count / max(before, 1)))
        unlabeled = (boxes.image >= guide.labeled).sum().clamp(min=1)
        self.log("accepted_unlabeled_patches", (selected.image >= guide.labeled).sum() / unlabeled)
        self.log("score_of_patches", mean_of_rows(scores))
        self.log("score_of_accepted_patches", mean_of_rows(scores[index]))
        return selected

    def _scores(self, boxes: Boxes, teacher: EncoderDecoder, guide: Guide, generator: torch.Generator) -> Tensor:
        """How good each patch is, in [0, 1], ``(M,)``."""
        match self.config.sampling_metric:
            case "entropy":
                if self.config.entropy_source == "intensity":
                    return 1 - box_means(binary_entropy(class_intensities(guide, len(self.classes))), boxes)
                return 1 - patch_entropy(guide, boxes)
            case "confidence":
                return box_means(guide.probs, boxes)
            case "cosine":
                return self._likeness(boxes, teacher, guide)
            case "random":
                return torch.rand(len(boxes.label), generator=generator, device=boxes.label.device)

    def _likeness(self, boxes: Boxes, teacher: EncoderDecoder, guide: Guide) -> Tensor:
        """``(1 + cosine) / 2`` of each patch's embedding and the mean of its class's queue, ``(M,)``.

        There may be thousands of candidates, so no pass of the teacher has more than ``patch_budget`` (3 where that
        is 2). Batch norm needs two patches at least, and such that stand for all of them: the passes are of equal
        size but for one patch, and each takes every so-many-th candidate, so that none is of one class alone. A
        single candidate cannot be embedded, is taken anyway, and has 0.5, as with an empty queue. Where there are
        several ranks they all make as many passes.
        """
        candidates = [sum(counts) for counts in boxes.of_ranks or (boxes.counts,)]
        if sum(candidates) == 1:
            return torch.full((len(boxes.label),), 0.5, device=boxes.label.device)
        means = F.normalize(self.queues.statistics(range(len(self.classes)))[0], dim=1)
        passes = math.ceil(max(candidates) / max(self.config.patch_budget, 3))
        scores = means.new_empty(len(boxes.label))
        for rows in (slice(first, None, passes) for first in range(passes)):
            part = dataclasses.replace(boxes, label=boxes.label[rows], image=boxes.image[rows], start=boxes.start[rows])
            embedded = embed(teacher, self.teacher_head, crop(guide.images, guide.labels, part))
            scores[rows] = (1 + (embedded * means[part.label]).sum(1)) / 2
        return scores

    def _compare(self, anchors: Tensor, boxes: Boxes, *, joint: bool) -> Tensor:
        """The contrastive loss of the student's embeddings against the queues."""
        config, present = self.config, boxes.present
        counts = [boxes.counts[label] for label in present]
        groups = torch.cat([torch.full((count,), i, device=anchors.device) for i, count in enumerate(counts)])
        means, covariances = self.queues.statistics(present)
        self._log_similarity(anchors.detach(), groups, means)
        temperature = config.temperature if joint else config.warmup_temperature
        if config.contrast == "discrete":
            keys, key_groups, valid = self.queues.keys(present)
            return discrete_contrast(anchors, groups, keys, key_groups, temperature=temperature, valid=valid)
        return closed_form_contrast(
            anchors,
            groups,
            means,
            covariances,
            temperature=temperature,
            covariance_weight=config.covariance_weight if joint else config.warmup_covariance_weight,
            negative_weight=config.negative_weight if joint else config.warmup_negative_weight,
        )

    def _log_similarity(self, anchors: Tensor, groups: Tensor, means: Tensor) -> None:
        similarity = anchors @ means.T
        own = similarity.gather(1, groups[:, None])
        others = max(similarity.numel() - own.numel(), 1)
        self.log("positive_similarity", mean_of_rows(own))
        self.log("negative_similarity", (similarity.sum() - own.sum()) / others)


def embed(network: EncoderDecoder, head: nn.Module, patches: Tensor) -> Tensor:
    """Unit vectors of patches, ``(M, C, *side)`` -> ``(M, 128)``, float32; batch norms keep their statistics."""
    with without_statistics(network):
        deepest = network.encode(patches)[-1]
    return F.normalize(head(deepest.flatten(2).mean(2)).float(), dim=1)


def patch_entropy(guide: Guide, boxes: Boxes) -> Tensor:
    """Average entropy of each patch in its class's probability map, ``(M,)``, in bits.

    Labels are certain, so that of labeled rows is one constant, and their maps are not gone through.
    """
    certain = binary_entropy(torch.zeros((), device=guide.probs.device))
    guessed = guide.probs[guide.labeled :]
    if not len(guessed):
        return certain.expand(len(boxes.label))
    place = dataclasses.replace(boxes, image=(boxes.image - guide.labeled).clamp(min=0))
    return torch.where(boxes.image < guide.labeled, certain, box_means(binary_entropy(guessed), place))


def class_intensities(guide: Guide, classes: int) -> Tensor:
    """The image, on its own range in [0, 1], inside each class and 0 elsewhere, ``(B, classes, *spatial)``."""
    values = guide.images.float().mean(1, keepdim=True)
    axes = tuple(range(1, values.ndim))
    values = values - values.amin(axes, keepdim=True)
    values = values / values.amax(axes, keepdim=True).clamp(min=1e-12)
    return values * F.one_hot(guide.labels, classes).movedim(-1, 1)
