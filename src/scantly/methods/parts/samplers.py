"""Which voxels enter a contrastive loss: uniform, stratified and antithetic draws from candidates of known number.

You et al., "Rethinking Semi-Supervised Medical Image Segmentation: A Variance-Reduction Perspective", NeurIPS 2023
(ARCO). A draw is a *rank* among the N candidates of a set; the unit interval over the ranks is cut into M strata:

- ``naive``: n independent uniform draws; the variance of their mean is sigma^2 / n.
- ``sg`` (stratified group): draw j lies in stratum j mod M. The variance is never larger, and smaller by 1/n of the
  variance of the strata's means where M divides n.
- ``sag`` (stratified-antithetic group): half of the draws, and their mirror images within their strata. No variance for
  what is linear in the rank where M divides N and n/2; at most twice that of ``naive``.

All three are unbiased for every N, n and M. Deviations from the released code, which folds the list of candidates into
a square, draws equally often from cells of unequal size and fills up with uniform draws: strata have equal measure
here, the mirror image is of the rank and so always a candidate, left-over draws go to strata chosen at random, and an
odd antithetic draw is uniform. Its groups are runs of the scan order and no regions of the image; :func:`grid_order`
makes them regions.

Several sets, usually one per class, are drawn at once. Nothing here loops over draws, groups or voxels, and nothing
waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "Candidates",
    "Ordering",
    "SamplerKind",
    "candidates",
    "draw_distinct",
    "draw_positions",
    "draw_ranks",
    "grid_order",
    "sample",
]

SamplerKind = Literal["naive", "sg", "sag"]
#: ``scan``: candidates by image, then voxel; ``grid``: first by cell of the image, see :func:`grid_order`.
Ordering = Literal["scan", "grid"]


def draw_positions(kind: SamplerKind, sets: int, draws: int, groups: int, generator: torch.Generator) -> Tensor:
    """Draw positions in the unit interval.

    Args:
        kind: The sampler.
        sets: Number of sets S, drawn independently.
        draws: Draws n per set.
        groups: Strata M; without effect on ``naive``.
        generator: Source of the draws; its device is the result's.

    Returns:
        ``(S, n)`` float64 (float32 is too coarse for millions of candidates) in [0, 1]. ``sg``: stratum 0, 1, ...,
        M - 1, 0, ...; ``sag``: k = n // 2 such draws, then their mirror images in the same order, then the odd one.
    """
    if kind == "naive":
        return _uniform(sets, draws, generator)
    if kind == "sg":
        return (_strata(sets, draws, groups, generator) + _uniform(sets, draws, generator)) / groups
    pairs = draws // 2
    strata = _strata(sets, pairs, groups, generator)
    within = _uniform(sets, pairs, generator)
    parts = [(strata + within) / groups, (strata + (1 - within)) / groups]
    if draws % 2:
        parts.append(_uniform(sets, 1, generator))
    return torch.cat(parts, dim=1)


def draw_ranks(
    kind: SamplerKind, counts: Tensor, draws: int, groups: int, generator: torch.Generator, *, permute: bool = False
) -> Tensor:
    """Draw ranks of candidates, with replacement.

    Args:
        kind: The sampler.
        counts: Candidates N of each set, ``(S,)`` integers.
        draws: Draws n per set.
        groups: Strata M.
        generator: Source of the draws, on the device of ``counts``.
        permute: Put the draws of every set in random order. Needed where they are dealt out in portions, which would
            else hold some strata only.

    Returns:
        ``(S, n)`` int64 in [0, counts); 0 where a set is empty. How many numbers are drawn from the generator depends
        on the other arguments alone, not on ``counts``.

    Example:
        >>> ranks = draw_ranks("sg", torch.tensor([8, 0]), 4, 4, torch.Generator().manual_seed(0))
        >>> (ranks // 2).tolist()
        [[0, 1, 2, 3], [0, 0, 0, 0]]
    """
    positions = draw_positions(kind, len(counts), draws, groups, generator)
    # Naive draws are exchangeable already.
    if permute and kind != "naive":
        orders = [torch.randperm(draws, generator=generator, device=generator.device) for _ in range(len(counts))]
        positions = positions.gather(1, torch.stack(orders))
    last = (counts[:, None] - 1).clamp(min=0)
    return torch.minimum((positions * counts[:, None]).long(), last)


def _uniform(sets: int, draws: int, generator: torch.Generator) -> Tensor:
    return torch.rand((sets, draws), dtype=torch.float64, generator=generator, device=generator.device)


def _strata(sets: int, draws: int, groups: int, generator: torch.Generator) -> Tensor:
    """Stratum of each draw, ``(S, n)``: equally many in each, what is left over in different ones at random."""
    rest = draws % groups
    strata = (torch.arange(draws - rest, device=generator.device) % groups).expand(sets, -1)
    if not rest:
        return strata
    return torch.cat([strata, _uniform(sets, groups, generator).argsort(1)[:, :rest]], dim=1)


def grid_order(batch: int, size: Sequence[int], cells: int, device: torch.device) -> Tensor:
    """Order of the voxels of a batch by cells of the image, so that strata of ranks are regions of it.

    Every axis is cut into ``cells`` parts, so that there are as many cells to the power of the axes, numbered row by
    row. The same cell of all images is adjacent. Strata and cells coincide where the candidates fill the cells evenly;
    the paper's picture shows cells, its released code has the scan order.

    Args:
        batch: Number of images B.
        size: ``(H, W)`` or ``(D, H, W)``.
        cells: Parts per axis G; voxel i of n lies in part ``floor(G i / n)``.
        device: Where the result is kept. The last few results are remembered.

    Returns:
        Flat indices ``image * voxels + voxel``, each once, in the order of (cell, image, z, row, column),
        ``(B * voxels,)`` int64. Not to be changed in place.

    Example:
        >>> grid_order(1, (2, 4), 2, torch.device("cpu")).tolist()
        [0, 1, 2, 3, 4, 5, 6, 7]
        >>> grid_order(1, (4, 4), 2, torch.device("cpu")).tolist()
        [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    """
    return _grid_order(batch, tuple(size), cells, device)


@lru_cache(maxsize=4)
def _grid_order(batch: int, size: tuple[int, ...], cells: int, device: torch.device) -> Tensor:
    cell = torch.zeros((batch, *[1] * len(size)), dtype=torch.int64, device=device)
    for axis, length in enumerate(size):
        part = torch.arange(length, device=device) * cells // length
        cell = cell * cells + part.view(-1, *[1] * (len(size) - 1 - axis))
    return cell.flatten().argsort(stable=True)


@dataclass(frozen=True)
class Candidates:
    """Voxels that may be drawn.

    Attributes:
        counts: Candidates of each set, ``(S,)`` int64.
        voxels: Their flat voxel indices, set after set, in the order of their ranks; ``(S * N + 1,)`` int64, of which
            the first ``counts.sum()`` are meant.
    """

    counts: Tensor
    voxels: Tensor

    def pick(self, ranks: Tensor) -> Tensor:
        """Flat voxel indices of candidates.

        Args:
            ranks: ``(S, n)`` in [0, counts).

        Returns:
            ``(S, n)`` int64 in [0, N); where a set is empty, some voxel that is no candidate.
        """
        first = self.counts.cumsum(0) - self.counts
        return self.voxels[first[:, None] + ranks]


def candidates(mask: Tensor, order: Tensor | None = None) -> Candidates:
    """List the candidates of several sets; costs a few passes over the masks.

    Args:
        mask: Which voxels are candidates, ``(S, N)`` bool over the flat voxels of the batch.
        order: Permutation of the voxels that ranks follow, ``(N,)``, such as :func:`grid_order`; ``None``: theirs.

    Example:
        >>> found = candidates(torch.tensor([[True, False, True], [False, True, False]]))
        >>> found.counts.tolist(), found.pick(torch.tensor([[1, 0], [0, 0]])).tolist()
        ([2, 1], [[2, 0], [1, 1]])
    """
    sets, voxels = mask.shape
    if order is None:
        order = torch.arange(voxels, device=mask.device)
    ordered = mask[:, order]
    # One long row: a device counts it in parallel, but a few rows one after the other.
    flat = ordered.flatten()
    place = torch.where(flat, flat.cumsum(0) - 1, flat.numel())  # what is no candidate goes to the last place
    listed = torch.zeros(flat.numel() + 1, dtype=torch.int64, device=mask.device)
    listed.scatter_(0, place, order.repeat(sets))
    return Candidates(ordered.sum(1), listed)


def sample(
    kind: SamplerKind,
    masks: Tensor,
    draws: int,
    groups: int,
    generator: torch.Generator,
    *,
    order: Tensor | None = None,
    permute: bool = False,
) -> tuple[Tensor, Tensor]:
    """Draw voxels of several sets, with replacement.

    Args:
        kind: The sampler.
        masks: Candidates of each set, ``(S, N)`` bool over the flat voxels of the batch.
        draws: Draws n per set.
        groups: Strata M.
        generator: Source of the draws, on the device of ``masks``.
        order: Permutation of the voxels along which strata lie; ``None``: the scan order.
        permute: As in :func:`draw_ranks`.

    Returns:
        Flat voxel indices ``(S, n)`` int64, and the candidates of each set ``(S,)``; where that is 0 the indices are
        no candidates and must not be used.
    """
    found = candidates(masks, order)
    return found.pick(draw_ranks(kind, found.counts, draws, groups, generator, permute=permute)), found.counts


def draw_distinct(masks: Tensor, draws: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw uniformly without replacement from several sets, independently.

    Args:
        masks: Candidates of each set, ``(S, N)`` bool.
        draws: Draws n per set, at most N.
        generator: Source of the draws, on the device of ``masks``; S N numbers are drawn.

    Returns:
        Indices ``(S, n)`` int64 in [0, N), and which of them are candidates, ``(S, n)`` bool: a set with fewer than n
        candidates gives all of them first, then others.

    Example:
        >>> index, drawn = draw_distinct(torch.tensor([[True, False, True]]), 3, torch.Generator().manual_seed(0))
        >>> sorted(index[drawn].tolist()), drawn.tolist()
        ([0, 2], [[True, True, False]])
    """
    keys = torch.rand(masks.shape, generator=generator, device=masks.device)
    largest = torch.where(masks, keys, -1.0).topk(draws, dim=1)
    return largest.indices, largest.values >= 0
