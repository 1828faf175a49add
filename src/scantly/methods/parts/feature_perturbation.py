"""Perturbations of feature maps, ``(B, C, *spatial)`` -> same shape and type.

Ouali et al., "Semi-Supervised Semantic Segmentation with Cross-Consistency Training", CVPR 2020, section 3.3. All draw
from a generator, on its device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["drop_features", "drop_voxels", "proportional_noise"]


def proportional_noise(features: Tensor, limit: float, generator: torch.Generator) -> Tensor:
    """``x (1 + n)``, n uniform in [-limit, limit) and the same for all images of the batch."""
    return features * (1 + _uniform((1, *features.shape[1:]), features, (-limit, limit), generator))


def drop_features(features: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Single features set to 0 with this probability, the others divided by the rest of it."""
    kept = _uniform(features.shape, features, (0, 1), generator) >= probability
    return features * kept / (1 - probability)


def drop_voxels(features: Tensor, above: tuple[float, float], generator: torch.Generator) -> Tensor:
    """All features of a voxel set to 0 where their mean is among the highest of the image.

    Args:
        features: Feature maps.
        above: Bounds of the share of the image's largest mean from which on voxels go.
        generator: Source of that share, which is one for the batch, as in the public codes.
    """
    ones = [1] * (features.ndim - 1)
    attention = features.mean(1, keepdim=True)
    largest = attention.flatten(1).amax(1).view(-1, *ones)
    share = _uniform((1, *ones), features, above, generator)
    return features * (attention < largest * share)


def _uniform(shape: Sequence[int], like: Tensor, bounds: tuple[float, float], generator: torch.Generator) -> Tensor:
    low, high = bounds
    drawn = torch.rand(tuple(shape), generator=generator, device=like.device)
    return (low + (high - low) * drawn).to(like.dtype)
