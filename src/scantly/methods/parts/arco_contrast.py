"""ARCO's contrast of voxels: which are drawn, and what they are drawn to and away from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from scantly.errors import ConfigError
from scantly.losses import cosine_similarities, entropy, info_nce, masked_quantiles, sampled_similarities, unit
from scantly.methods.base import MethodConfig, Task
from scantly.methods.parts.arco_sets import (
    VoxelSets,
    class_sets,
    complement_negatives,
    rank_bounds,
    rank_negatives,
    released_negatives,
    released_rank_bounds,
)
from scantly.methods.parts.memory_bank import MemoryBank
from scantly.methods.parts.samplers import Ordering, SamplerKind, draw_ranks, grid_order, sample
from scantly.ranks import sum_over_ranks

__all__ = ["ContrastConfig", "Seen", "VoxelContrast"]


class ContrastConfig(MethodConfig):
    """Settings of the contrast of voxels; defaults are the paper's, or its public code's where it says nothing."""

    sampler: SamplerKind = Field("sg", description="How voxels are drawn: stratified, antithetic or uniform.")
    groups_per_axis: int = Field(
        4, ge=1, description="Strata per image axis G: G^2 in 2D, G^3 in 3D (paper, 2D: 9, 16 and 25 strata)."
    )
    ordering: Ordering = Field(
        "grid", description="Strata are regions of the image, or runs of the candidates in scan order."
    )
    contrast_weight: float = Field(0.01, ge=0, description="Weight of the contrast of voxels; 0: off.")
    temperature: float = Field(0.5, gt=0, description="Temperature of the contrast.")
    anchors: int = Field(256, ge=1, description="Anchors drawn per class.")
    negatives_per_anchor: int = Field(512, ge=1, description="Negatives drawn per anchor.")
    anchor_probability: float = Field(
        0.3, ge=0, le=1, description="The teacher gives an anchor's class more than this."
    )
    entropy_percent: float = Field(
        20.0, ge=0, le=50, description="Share of unlabeled voxels of low entropy at first, percent; falls to 0."
    )
    published_epochs: int = Field(200, ge=1, description="The entropy share falls in so many steps over the stage.")
    negatives: Literal["complement", "rank", "released"] = Field(
        "complement",
        description="Confident voxels of other classes (paper); a bank of voxels that may be mistaken for the class "
        "(U2PL); or the released code's bank of voxels of the class itself.",
    )
    negative_confidence: float = Field(
        0.7, ge=0, le=1, description="complement, and equivariance: from which a pseudo-label is trusted."
    )
    negative_probability: float = Field(
        0.97, ge=0, le=1, description="rank, released: the teacher gives the class less than this."
    )
    rank_low: int | None = Field(
        None,
        ge=0,
        description="rank, released: first rank of an improbable class; none: 3, with rank less for few classes.",
    )
    rank_high: int | None = Field(
        None, ge=1, description="rank, released: ranks are below this; none: 20, or the classes."
    )
    bank_size: int = Field(30_000, ge=1, description="rank, released: stored voxels per class.")
    bank_size_background: int = Field(
        50_000, ge=1, description="rank, released: stored voxels of the background's bank."
    )

    @field_validator("rank_high")
    @classmethod
    def _ranks_are_a_range(cls, value: int | None, info: ValidationInfo) -> int | None:
        low = info.data.get("rank_low")
        if value is not None and low is not None and value <= low:
            raise ValueError(f"no rank lies from rank_low, {low}, to below this; give a larger one")
        return value


@dataclass(frozen=True)
class Seen:
    """What is known of the labeled and the mixed unlabeled images of a step, labeled rows first.

    Attributes:
        labels: Labels and pseudo-labels, ``(B, *spatial)``.
        trusted: Labeled voxels, and others with a confident pseudo-label, ``(B, *spatial)`` bool.
        probs: The student's probabilities of the unlabeled rows, ``(Bu, C, *spatial)``.
        teacher_probs: The teacher's of all rows, ``(B, C, *spatial)``.
        teacher_features: The teacher's dense features of all rows, ``(B, D, *spatial)``.
    """

    labels: Tensor
    trusted: Tensor
    probs: Tensor
    teacher_probs: Tensor
    teacher_features: Tensor


class VoxelContrast(nn.Module):
    """InfoNCE per class between the student's voxels, the teacher's mean of the class and other classes' voxels.

    Section 4.2 of You et al., NeurIPS 2023 (after ReCo, Liu et al., ICLR 2022), equation E.2 as the public code has it:
    cosines, averaged over anchors and over the classes that have anchors and negatives (the code divides by the number
    of classes with valid voxels). Anchors and negatives are drawn by the same sampler. With fewer than two classes
    the term is 0.

    In a training of several ranks the means of the classes, the quantiles of the entropy and the classes that take part
    are those of all ranks' images; every rank draws anchors, and negatives where there is no bank, from its own images,
    and a class's anchors on a rank that lacks either count nowhere. The term is that of all ranks' draws together.

    Args:
        config: Settings.
        task: What is segmented.
        channels: Length D of a voxel's features.

    Raises:
        ConfigError: if ``negatives="rank"`` and the ranks are no range among those of the classes.
    """

    def __init__(self, config: ContrastConfig, task: Task, channels: int) -> None:
        super().__init__()
        self.config = config
        self.groups = config.groups_per_axis**task.spatial_dims
        self.ranks = (0, 0)  # of no use without a bank
        self.banks = nn.ModuleList()
        if config.negatives == "complement":
            return
        sizes = [config.bank_size_background, *[config.bank_size] * (task.num_classes - 1)]
        self.banks.extend(MemoryBank(size, (channels,)) for size in sizes)
        if config.negatives == "rank":
            self.ranks = rank_bounds(task.num_classes, config.rank_low, config.rank_high)
            _check_ranks(*self.ranks, task.num_classes)
        else:
            self.ranks = released_rank_bounds(config.rank_low, config.rank_high)
            for bank in self.banks:  # what the released banks begin with
                first = torch.zeros(1, channels) if task.spatial_dims == 2 else unit(torch.randn(1, channels))
                cast(MemoryBank, bank).append(first)

    def forward(
        self,
        features_at: Callable[[Tensor], Tensor],
        seen: Seen,
        share: float,
        generator: torch.Generator,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The unweighted term, and what is watched.

        Args:
            features_at: The student's features of voxels, flat indices ``(n,)`` -> ``(n, D)``.
            seen: The step's images; nothing in it gets a gradient.
            share: Share of the unlabeled voxels that count as of low entropy (and of high), in [0, 0.5].
            generator: Source of the draws.

        Returns:
            A scalar connected to the student's graph, and what is watched: ``contrast_classes`` (how many are in the
            term), ``positive_similarity``, ``negative_similarity``, and, of each class ``(C,)``, the candidates
            ``anchors`` and ``negatives``.
        """
        config = self.config
        with torch.no_grad():
            by_voxel = seen.teacher_features.flatten(2).transpose(1, 2)
            rows = torch.empty(by_voxel.shape, device=by_voxel.device).copy_(by_voxel).flatten(0, 1)
            sets, uncertain = self._sets(seen, share)
            order = None
            if config.ordering == "grid":
                order = grid_order(len(seen.labels), seen.labels.shape[1:], config.groups_per_axis, seen.labels.device)
            drawn, anchors = sample(config.sampler, sets.anchors, config.anchors, self.groups, generator, order=order)
            counts = sum_over_ranks(sets.valid.sum(1))
            with torch.autocast(rows.device.type, enabled=False):
                prototypes = unit(sum_over_ranks(sets.valid.float() @ rows) / counts.clamp(min=1)[:, None])
            tables, places, negatives = self._negatives(
                seen, sets, uncertain, unit(rows, in_place=True), order=order, generator=generator
            )
        features = features_at(drawn.flatten()).view(*drawn.shape, -1)
        drawn_here = (anchors > 0) & (negatives > 0) & ((counts > 0).sum() >= 2)
        terms, positive, negative = [], [], []
        for row, table, place, prototype in zip(features, tables, places, prototypes, strict=True):
            near = cosine_similarities(row, prototype[None])[:, 0]
            far = sampled_similarities(row, table, place.view(config.anchors, config.negatives_per_anchor))
            terms.append(info_nce(near, far, temperature=config.temperature))
            positive.append(near.detach().mean())
            negative.append(far.detach().mean())
        ranks = sum_over_ranks(drawn_here.long())  # that have drawn, equally many anchors each, of each class
        active = ranks > 0
        per_class = sum_over_ranks(torch.where(drawn_here, torch.stack(terms), 0)) / ranks.clamp(min=1)
        watched = {
            "contrast_classes": active.sum(),
            "positive_similarity": _mean(positive, drawn_here),
            "negative_similarity": _mean(negative, drawn_here),
            "anchors": anchors,
            "negatives": negatives,
        }
        # 0 without any class, connected to the graph all the same
        return per_class.sum() / active.sum().clamp(min=1), watched

    def _sets(self, seen: Seen, share: float) -> tuple[VoxelSets, Tensor]:
        """The classes' voxels, and which voxels are of high entropy."""
        labeled = len(seen.labels) - len(seen.probs)
        h = entropy(seen.probs)
        low, high = masked_quantiles(h, seen.labels[labeled:] >= 0, (share, 1 - share))
        always = torch.ones_like(seen.labels[:labeled], dtype=torch.bool)
        sets = class_sets(
            seen.labels,
            torch.cat([always, h <= low]),
            seen.teacher_probs,
            anchor_probability=self.config.anchor_probability,
        )
        return sets, torch.cat([always, h >= high])

    def _negatives(
        self,
        seen: Seen,
        sets: VoxelSets,
        uncertain: Tensor,
        units: Tensor,
        *,
        order: Tensor | None,
        generator: torch.Generator,
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Per class a table of unit vectors, the places drawn from it ``(C, n)``, and its candidates ``(C,)``."""
        config = self.config
        draws = config.anchors * config.negatives_per_anchor
        if config.negatives == "complement":
            masks = complement_negatives(sets, seen.trusted)
            places, counts = sample(config.sampler, masks, draws, self.groups, generator, order=order, permute=True)
            return [units] * len(masks), places, counts
        masks = (rank_negatives if config.negatives == "rank" else released_negatives)(
            sets,
            seen.labels,
            seen.teacher_probs,
            uncertain,
            len(seen.labels) - len(seen.probs),
            low=self.ranks[0],
            high=self.ranks[1],
            largest_probability=config.negative_probability,
        )
        banks = [cast(MemoryBank, bank) for bank in self.banks]
        for bank, mask in zip(banks, masks, strict=True):
            bank.push(units, mask)
        # Stored rows have no place in an image, so their strata are those of the bank's own order.
        counts = torch.stack([bank.filled for bank in banks])
        places = draw_ranks(config.sampler, counts, draws, self.groups, generator, permute=True)
        return [bank.values for bank in banks], places, counts


def _check_ranks(low: int, high: int, classes: int) -> None:
    if not 0 < low < min(high, classes):
        raise ConfigError(
            f"method.rank_low is {low} and method.rank_high {high}, and with {classes} classes 0 < rank_low < rank_high"
            f" and rank_low < {classes} must hold; change them or leave both out."
        )


def _mean(values: list[Tensor], active: Tensor) -> Tensor:
    """Mean over the active classes; 0 without any."""
    return torch.where(active, torch.stack(values), 0).sum() / active.sum().clamp(min=1)
