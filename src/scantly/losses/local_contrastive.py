"""Local contrastive loss: voxels against the mean embeddings of the classes in one image, or in two.

Chaitanya, Erdil, Karani and Konukoglu, "Local contrastive loss with pseudo-label based self-training for
semi-supervised medical image segmentation", Medical Image Analysis 87 (2023). Shapes: ``R`` images, ``B`` pairs of
images, ``K`` classes that take part, ``n`` voxels drawn per class and image, ``D`` channels of an embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from scantly.ranks import rank, sum_over_ranks, world_size

__all__ = [
    "LocalContrast",
    "Normalization",
    "Variant",
    "class_masks",
    "class_means",
    "local_contrastive_loss",
    "mean_over_pairs",
    "pick_voxels",
]

Variant = Literal["intra", "inter"]
Normalization = Literal["correct", "released"]

_LEAST_NORM = 1e-6


@dataclass(frozen=True)
class LocalContrast:
    """The loss, and what shows whether it works (without gradient).

    Attributes:
        loss: Scalar; 0 where no pair can be used, with a gradient of 0. All else is of this rank's pairs alone.
        used: Which pairs have an anchor, ``(B,)`` bool.
        anchors: Anchors of each class, both images of all pairs together, ``(K,)``.
        positive: Mean cosine of anchors and the means of their own class; 0 where there is none.
        negative: Mean cosine of anchors and the means of other classes; 0 where there is none.
    """

    loss: Tensor
    used: Tensor
    anchors: Tensor
    positive: Tensor
    negative: Tensor


def class_masks(labels: Tensor, classes: range) -> Tensor:
    """Which voxels are of which class.

    Args:
        labels: ``(R, *spatial)``, integers.
        classes: Label values of the K classes that take part.

    Returns:
        ``(R, K, voxels)`` bool.
    """
    values = torch.arange(classes.start, classes.stop, device=labels.device)
    return labels.flatten(1)[:, None] == values[:, None]


def class_means(embeddings: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Mean embedding of each class in each image, not normalized; gradient flows through it.

    Args:
        embeddings: ``(R, D, *spatial)``.
        masks: Of :func:`class_masks`, ``(R, K, voxels)``.

    Returns:
        Means ``(R, K, D)``, float32 (float64 stays), 0 for a class that the image does not hold; and which
        classes it holds, ``(R, K)`` bool.
    """
    counts = masks.sum(2)
    # Autocast would round the sums to 8 bits of mantissa.
    with torch.autocast(embeddings.device.type, enabled=False):
        values = _at_least_float32(embeddings).flatten(2).transpose(1, 2)
        sums = masks.to(values.dtype) @ values
    return sums / counts.clamp(min=1)[..., None], counts > 0


def pick_voxels(embeddings: Tensor, indices: Tensor) -> Tensor:
    """Embeddings of single voxels, float32 (float64 stays).

    Args:
        embeddings: ``(R, D, *spatial)``.
        indices: Flat voxel indices, ``(R, K, n)`` int64.

    Returns:
        ``(R, K, n, D)``.
    """
    flat = embeddings.flatten(2)
    columns = indices.flatten(1)[:, None].expand(-1, flat.shape[1], -1)
    picked = flat.gather(2, columns).transpose(1, 2)
    return _at_least_float32(picked).reshape(*indices.shape, -1)


def local_contrastive_loss(
    anchors: Tensor,
    means: Tensor,
    present: Tensor,
    *,
    temperature: float = 0.1,
    variant: Variant = "inter",
    normalization: Normalization = "correct",
) -> LocalContrast:
    """Attract each anchor to the mean of its class, repel it from those of the other classes.

    With ``s`` the cosine over the temperature, an anchor of class c in image x has the term
    ``-log(exp s(c, x) / Z)``. *Intra*: Z sums over the classes of x. *Inter*: Z sums over the classes of both images
    of the pair, and where c is in the other image x' too, there is a second term ``-log(exp s(c, x') / Z)`` with the
    same Z. The positives are part of Z, so a complete inter pair costs at least ``2 ln 2``.

    A class that an image does not hold is left out of every Z, its anchors and the terms toward it are dropped.
    An anchor whose Z covers fewer than two distinct classes is dropped, and pairs without anchors do not count.

    Args:
        anchors: Embeddings of voxels drawn per class, of both images of each pair, ``(B, 2, K, n, D)``.
        means: Class means of both images, ``(B, 2, K, D)``.
        present: Which classes each image holds, ``(B, 2, K)`` bool.
        temperature: Divides the cosine; norms are floored at 1e-6 in it.
        variant: ``intra`` or ``inter``.
        normalization: As for :func:`mean_over_pairs`.
    """
    classes, draws = anchors.shape[2:4]
    keys, held = F.normalize(_at_least_float32(means), dim=-1, eps=_LEAST_NORM), present
    own_class = torch.eye(classes, dtype=torch.bool, device=present.device)
    distinct = present
    if variant == "inter":  # the image's own means first, then those of the other image
        keys, held = torch.cat([keys, keys.flip(1)], dim=2), torch.cat([present, present.flip(1)], dim=2)
        own_class, distinct = own_class.repeat(1, 2), present | present.flip(1)
    directions = F.normalize(_at_least_float32(anchors), dim=-1, eps=_LEAST_NORM).flatten(2, 3)
    with torch.autocast(anchors.device.type, enabled=False):
        cosines = directions @ keys.transpose(-1, -2)
    cosines = cosines.view(*anchors.shape[:4], -1)  # (B, 2, K, n, keys)
    scores = cosines / temperature
    # A finite floor: the partition sum of an image without any class is then finite too, and dropped below.
    floor = torch.finfo(scores.dtype).min
    partition = scores.masked_fill(~held[:, :, None, None], floor).logsumexp(-1, keepdim=True)
    usable = present & (distinct.sum(2, keepdim=True) >= 2)
    pulled = (usable[..., None] & held[:, :, None] & own_class)[:, :, :, None].expand_as(scores)
    pushed = (usable[..., None] & held[:, :, None] & ~own_class)[:, :, :, None].expand_as(scores)
    sums = torch.where(pulled, partition - scores, 0.0).sum((1, 2, 3, 4))
    used = usable.sum((1, 2)) * draws
    return LocalContrast(
        loss=mean_over_pairs(sums, used, classes * draws, variant=variant, normalization=normalization),
        used=used > 0,
        anchors=usable.sum((0, 1)) * draws,
        positive=_masked_mean(cosines.detach(), pulled),
        negative=_masked_mean(cosines.detach(), pushed),
    )


def mean_over_pairs(
    sums: Tensor, anchors: Tensor, complete: int, *, variant: Variant, normalization: Normalization = "correct"
) -> Tensor:
    """From each pair's sum of terms to the loss.

    ``correct``: a pair's sum is divided by its anchors (inter) or half of them (intra), as many as it really has;
    then the mean over the pairs that have any. ``released``: the public code divides inside its loop over the pairs,
    by the number of a complete pair, so pair ``b`` of ``B`` has weight ``divisor ** -(B - b + 1) / B`` and the last
    one nearly all. The pairs are those of all ranks, in the order of the ranks.

    Args:
        sums: ``(B,)``.
        anchors: Anchors of each pair, both images together, ``(B,)``.
        complete: Anchors of one image that holds every class, ``n K``.
        variant: ``intra`` or ``inter``.
        normalization: ``correct`` or ``released``.

    Returns:
        Scalar.

    Example:
        >>> sums, anchors = torch.full((10,), 36.0), torch.full((10,), 18)
        >>> round(mean_over_pairs(sums, anchors, 9, variant="inter").item(), 4)
        2.0
        >>> round(mean_over_pairs(sums, anchors, 9, variant="inter", normalization="released").item(), 4)
        0.2118
    """
    per_anchor = 2 if variant == "intra" else 1
    if normalization == "released":
        divisor = 2 * complete / per_anchor
        later = (world_size() - 1 - rank()) * len(sums)
        powers = torch.arange(later + len(sums), later, -1, device=sums.device)
        return (sums * divisor**-powers).sum() / len(sums)
    per_pair = per_anchor * sums / anchors.clamp(min=1)
    return sum_over_ranks(per_pair.sum()) / sum_over_ranks((anchors > 0).sum()).clamp(min=1)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)
