"""What patches contain, which of them are taken, and views of them; nothing here waits for the device.

After PLGCL (Basak and Yin, CVPR 2023) and its released code, in 2D and 3D by the same code. ``M`` patches, ``side``
their sides; where they lie says :mod:`scantly.methods.parts.patches`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from scantly.methods.parts.patches import Boxes
from scantly.views import (
    Affine,
    Noise,
    Orthogonal,
    apply_affine,
    apply_jitter,
    apply_noise,
    apply_orthogonal,
    sample_jitter,
    sample_noise,
)
from scantly.views.draws import as_rows, chance, uniform

__all__ = ["augment", "box_means", "crop", "resample", "select"]

_FLIP = 0.7
_CROP = 0.5
_LARGEST_CROP = 0.2
_LARGEST_NOISE = 0.05
_LEAST_WEIGHT = 1e-3


def crop(images: Tensor, labels: Tensor, boxes: Boxes) -> Tensor:
    """Contents of the patches; voxels of other classes than the patch's are exactly 0.

    Args:
        images: ``(B, C, *spatial)``.
        labels: ``(B, *spatial)``, integers.
        boxes: On the same device.

    Returns:
        ``(M, C, *side)``.
    """
    axes = len(boxes.sides)

    def along(values: Tensor, axis: int) -> Tensor:  # (M, n) -> (M, 1, .., n, .., 1)
        return values.view(len(values), *[values.shape[1] if axis == other else 1 for other in range(axes)])

    places = [
        along(boxes.start[:, axis, None] + torch.arange(side, device=images.device), axis)
        for axis, side in enumerate(boxes.sides)
    ]
    row = along(boxes.image[:, None], 0)
    inside = labels[(row, *places)] == along(boxes.label[:, None], 0)
    content = images.movedim(1, -1)[(row, *places)].movedim(-1, 1)
    return content * inside[:, None]


def box_means(maps: Tensor, boxes: Boxes) -> Tensor:
    """Mean over each patch of the map of its class.

    From sums over all voxels before each one, so the cost does not grow with the number of patches; they are
    double, and the result is rounded to float32, so that patches of equal content have equal means.

    Args:
        maps: One per class, ``(B, classes, *spatial)``.
        boxes: On the same device.

    Returns:
        ``(M,)``, float32.
    """
    axes = len(boxes.sides)
    sums = F.pad(maps.double(), (1, 0) * axes)
    for axis in range(2, 2 + axes):
        sums = sums.cumsum(axis)
    total = torch.zeros(len(boxes.label), dtype=sums.dtype, device=maps.device)
    for corner in itertools.product((0, 1), repeat=axes):
        place = [boxes.start[:, axis] + far * boxes.sides[axis] for axis, far in enumerate(corner)]
        total = total + (-1) ** (axes - sum(corner)) * sums[(boxes.image, boxes.label, *place)]
    return (total / math.prod(boxes.sides)).float()


def select(
    scores: Tensor, counts: Sequence[int], most: Sequence[int], *, weighted: bool, generator: torch.Generator
) -> tuple[Tensor, list[int]]:
    """The best patches of each class.

    Args:
        scores: Of all patches, class by class, ``(M,)``; higher is better.
        counts: Patches of each class.
        most: Patches to be taken of each class; a class with fewer keeps all.
        weighted: Draw without replacement with weight ``max(score, 0.001)`` instead of taking the highest scores,
            of which equal ones are taken in their order.
        generator: Source of the draws, on the device of the scores; used where ``weighted``.

    Returns:
        Indices into the patches, class by class, and how many there are of each class.
    """
    keys = -scores
    if weighted:  # an exponential variate over the weight: the smallest are such a draw (Efraimidis and Spirakis)
        keys = -torch.log1p(-uniform(len(scores), 0, 1, generator=generator)) / scores.clamp(min=_LEAST_WEIGHT)
    ordered = [first + each.sort(stable=True).indices for first, each in _by_class(keys, counts)]
    taken = [min(pair) for pair in zip(counts, most, strict=True)]
    return torch.cat([index[:number] for index, number in zip(ordered, taken, strict=True)]), taken


def resample(counts: Sequence[int], number: int, *, generator: torch.Generator) -> Tensor:
    """``number`` patches of each class that is present.

    Without replacement where a class has so many; else all of its patches and then random repeats.

    Args:
        counts: Patches per class.
        number: Draws per class.
        generator: Source of the draws.

    Returns:
        Indices into the patches, ``(present * number,)``, class by class.
    """
    index = []
    for first, keys in _by_class(torch.rand(sum(counts), generator=generator, device=generator.device), counts):
        count = len(keys)
        if not count:
            continue
        repeats = (uniform(max(number - count, 0), 0, count, generator=generator)).long().clamp(max=count - 1)
        index.append(first + torch.cat([keys.argsort()[:number], repeats]))
    return torch.cat(index)


def _by_class(values: Tensor, counts: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    firsts = itertools.accumulate(counts, initial=0)
    return zip(firsts, torch.split(values, list(counts)), strict=False)


def augment(patches: Tensor, *, generator: torch.Generator) -> Tensor:
    """A random view of each patch, as the teacher of PLGCL sees it.

    Released code: mirrored along the last axis (probability 0.7); 0 to 20 % of each side cut off and the rest
    resized back (0.5); then one, two or all of Gaussian noise with a standard deviation up to 0.05 of the range,
    contrast and brightness by factors from 0.5 to 1.5. Hue, saturation and the blend with grayscale there need
    colors and are left out. Here the range is the patch's own, in which contrast, about its mean, and brightness
    are changed too, since scans have any unit; in 3D all six sides are cut.

    Args:
        patches: ``(M, C, *side)``.
        generator: Source of the draws, on the device of the patches.
    """
    count, axes = len(patches), patches.ndim - 2
    flip = torch.zeros(count, 2, dtype=torch.bool, device=generator.device)
    flip[:, -1] = chance(count, _FLIP, generator=generator)
    patches = apply_orthogonal(patches, Orthogonal(None, flip))
    patches = apply_affine(patches, _sample_crop(count, patches.shape[-axes:], generator))
    number = 1 + uniform(count, 0, 3, generator=generator).long()
    rank = uniform((count, 3), 0, 1, generator=generator).argsort(1).argsort(1)
    noisy, bright, contrasted = (rank < number[:, None]).unbind(1)
    jitter = sample_jitter(count, clip=False, active=bright | contrasted, generator=generator)
    one = torch.ones_like(jitter.brightness)
    jitter = dataclasses.replace(
        jitter,
        brightness=torch.where(bright, jitter.brightness, one),
        contrast=torch.where(contrasted, jitter.contrast, one),
    )
    flat = patches.flatten(1)
    noise = sample_noise(
        patches.shape, sigma=(0.0, _LARGEST_NOISE), clamp=None, active=noisy, generator=generator
    ).values * as_rows(flat.amax(1) - flat.amin(1), patches)
    return apply_noise(apply_jitter(patches, jitter), Noise(noise))


def _sample_crop(count: int, size: Sequence[int], generator: torch.Generator) -> Affine:
    """Cut a share from both ends of each axis of some rows and stretch the rest to the whole."""
    near, far = uniform((2, count, len(size)), 0, _LARGEST_CROP, generator=generator).unbind()
    lengths = torch.stack([torch.full_like(near[:, 0], length) for length in size], 1)
    scale, shift = 1 - near - far, (near - far) / 2 * lengths
    return Affine(
        to_input=torch.cat([torch.diag_embed(scale), shift[:, :, None]], 2),
        to_output=torch.cat([torch.diag_embed(1 / scale), (-shift / scale)[:, :, None]], 2),
        active=chance(count, _CROP, generator=generator),
    )
