"""CutMix: a box of each image is replaced by the same box of another image of the batch.

Yun et al., "CutMix", ICCV 2019; boxes as UniMatch draws them (Yang et al., CVPR 2023) in 2D, and as cubes of
the patch's proportions in 3D; or rectangles of half the area, as ARCO draws them (You et al., NeurIPS 2023).
Images, pseudo-labels and confidences are pasted with one set of parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import Field, field_validator
from torch import Tensor

from scantly.settings import Settings
from scantly.views.draws import chance, uniform

__all__ = ["CutMix", "CutMixConfig", "apply_cutmix", "box_mask", "sample_cutmix", "sample_half_area"]

_RATIOS = 1024  # aspect ratios among which one is chosen: boxes of neighboring ones differ by less than a voxel


class CutMixConfig(Settings):
    """How boxes are drawn by :func:`sample_cutmix`."""

    probability: float = Field(0.5, ge=0, le=1, description="Probability that an image is mixed (UniMatch: 0.5)")
    area: tuple[float, float] = Field(
        (0.02, 0.4),
        description="Bounds of the box's share of the area (2D) or volume (3D) (UniMatch: 0.02-0.4)",
    )
    aspect: tuple[float, float] = Field(
        (0.3, 1 / 0.3),
        description="2D: bounds of height over width, both as shares of the patch (UniMatch: 0.3 to 1 / 0.3)",
    )

    @field_validator("area")
    @classmethod
    def _area_is_a_share(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1] <= 1:
            raise ValueError("give two shares in (0, 1], the smaller first")
        return value

    @field_validator("aspect")
    @classmethod
    def _aspect_is_a_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError("give two positive ratios, the smaller first")
        return value


@dataclass(frozen=True)
class CutMix:
    """What is pasted where.

    Attributes:
        mask: True where the partner's content goes, ``(B, 1, *spatial)`` bool; nowhere in unmixed rows.
        partner: Row of the source that each image is mixed with, ``(B,)`` int64.
    """

    mask: Tensor
    partner: Tensor


def sample_cutmix(
    config: CutMixConfig,
    batch: int,
    size: Sequence[int],
    *,
    partner: Tensor | None = None,
    generator: torch.Generator,
) -> CutMix:
    """Draw one box per image.

    In 2D as UniMatch draws them: the share of the area is uniform between its bounds; then aspect ratio and corner,
    both uniform, are drawn again until the box lies in the image. Here they are drawn once, from the distribution that
    this leads to, since drawing again would wait for the device: an aspect ratio is the more probable the more places
    its box has, and the place is uniform among them. Edges are whole voxels, rounded down. Where no ratio between the
    bounds fits, the nearest one that does is taken. In 3D the box has the proportions of the patch.

    Args:
        config: Probability and bounds.
        batch: Number of images B.
        size: ``(H, W)`` or ``(D, H, W)``.
        partner: Row of the source for each image, ``(B,)`` int64; ``None``: the next one, cyclically.
        generator: Source of the draws; its device is the parameters' device.
    """
    device = generator.device
    axes = len(size)
    share = uniform(batch, *config.area, generator=generator)
    # Filled on the device: a tensor made from a list would be copied there and waited for.
    lengths = torch.stack([torch.full((), float(length), device=device) for length in size])
    if axes == 2:
        edges = _edges(share, _fitting_ratios(share, config.aspect, lengths, generator), lengths)
    else:
        edges = (share[:, None].pow(1 / axes) * lengths).round()
    edges = edges.clamp(min=1).minimum(lengths)
    room = lengths - edges
    corners = (uniform((batch, axes), 0, 1, generator=generator) * (room + 1)).floor().minimum(room)
    edges = edges * chance(batch, config.probability, generator=generator)[:, None]
    return CutMix(box_mask(corners, edges, size), _next_row(batch, device) if partner is None else partner)


def _edges(share: Tensor, ratio: Tensor, lengths: Tensor) -> Tensor:
    """Height and width of boxes in whole voxels, ``(..., 2)``."""
    # A little more than 0, so that a whole number that float32 misses is not rounded down to the next.
    return (torch.stack([(share * ratio).sqrt(), (share / ratio).sqrt()], dim=-1) * lengths + 1e-4).floor()


def _fitting_ratios(share: Tensor, bounds: tuple[float, float], lengths: Tensor, generator: torch.Generator) -> Tensor:
    """Aspect ratios, ``(B,)``, each as probable as the share of the corners at which its box lies in the image."""
    low, high = bounds
    cells = torch.arange(_RATIOS, device=share.device) + uniform((len(share), 1), 0, 1, generator=generator)
    ratios = low + (high - low) * cells / _RATIOS
    places = (lengths - _edges(share[:, None], ratios, lengths) + 1).clamp(min=0).prod(-1).cumsum(1)
    drawn = uniform((len(share), 1), 0, 1, generator=generator) * places[:, -1:]
    chosen = (places <= drawn).sum(1, keepdim=True).clamp(max=_RATIOS - 1)
    picked = torch.where(places[:, -1:] > 0, ratios.gather(1, chosen), ratios[:, :1])[:, 0]
    return picked.clamp(share, 1 / share)


def sample_half_area(
    batch: int,
    size: Sequence[int],
    *,
    slices: int = 10,
    partner: Tensor | None = None,
    generator: torch.Generator,
) -> CutMix:
    """Draw one rectangle of half the in-plane area per image, as ARCO does (You et al., NeurIPS 2023, public code).

    Its width w is uniform among the whole numbers above W / 2 and below W, its height ``round(H W / (2 w))``, its
    corner uniform among those that fit. In 3D it covers ``slices`` consecutive slices, whose first is uniform in
    ``[0, D - 2 slices]``, so the last ``slices`` are never mixed; in a patch of fewer than ``2 slices`` it is uniform
    among those that fit. The published code works on patches with D last, 80 deep.

    Args:
        batch: Number of images B.
        size: ``(H, W)`` or ``(D, H, W)``, sides of at least 3 in-plane.
        slices: 3D: how many slices the box covers, at most D.
        partner: Row of the source for each image, ``(B,)`` int64; ``None``: the next one, cyclically.
        generator: Source of the draws; its device is the parameters' device.
    """
    device = generator.device
    height, width = size[-2:]
    narrowest = min(width // 2 + 1, width - 1)
    width_drawn = (narrowest + uniform(batch, 0, width - narrowest, generator=generator).floor()).clamp(max=width - 1)
    edges = [(height * width / (2 * width_drawn)).round(), width_drawn]
    rooms = [height - edges[0], width - edges[1]]
    if len(size) == 3:
        depth = min(slices, size[0])
        edges.insert(0, torch.full_like(width_drawn, depth))
        rooms.insert(0, torch.full_like(width_drawn, size[0] - 2 * depth if size[0] >= 2 * depth else size[0] - depth))
    edge, room = torch.stack(edges, dim=1), torch.stack(rooms, dim=1)
    corners = (uniform((batch, len(size)), 0, 1, generator=generator) * (room + 1)).floor().minimum(room)
    return CutMix(box_mask(corners, edge, size), _next_row(batch, device) if partner is None else partner)


def apply_cutmix(x: Tensor, params: CutMix, *, source: Tensor | None = None) -> Tensor:
    """Paste the partners' boxes.

    Args:
        x: Images ``(B, C, *spatial)``, or label maps, confidences, masks ``(B, *spatial)``; any type.
        params: Boxes and partners.
        source: Where the pasted content comes from, shaped as ``x`` but for B; ``None``: ``x``.

    Returns:
        Same shape and type as ``x``.
    """
    mask = params.mask if x.ndim == params.mask.ndim else params.mask[:, 0]
    return torch.where(mask, (x if source is None else source).index_select(0, params.partner), x)


def box_mask(corners: Tensor, edges: Tensor, size: Sequence[int]) -> Tensor:
    """Mask of axis-parallel boxes.

    Args:
        corners: First voxel of each box, ``(B, n)``.
        edges: Lengths in voxels, ``(B, n)``; a box with an edge of 0 is empty.
        size: The ``n`` spatial lengths.

    Returns:
        ``(B, 1, *size)`` bool.

    Example:
        >>> box_mask(torch.tensor([[1, 0]]), torch.tensor([[1, 2]]), (3, 3)).int().squeeze()
        tensor([[0, 0, 0],
                [1, 1, 0],
                [0, 0, 0]], dtype=torch.int32)
    """
    mask = torch.ones((corners.shape[0], 1, *[1] * len(size)), dtype=torch.bool, device=corners.device)
    for axis, length in enumerate(size):
        voxel = torch.arange(length, device=corners.device)
        first, edge = corners[:, axis, None], edges[:, axis, None]
        within = (voxel >= first) & (voxel < first + edge)
        mask = mask & within.view(-1, 1, *[1] * axis, length, *[1] * (len(size) - axis - 1))
    return mask


def _next_row(batch: int, device: torch.device) -> Tensor:
    return (torch.arange(batch, device=device) + 1) % max(batch, 1)
