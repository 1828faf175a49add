"""Losses: pure functions of tensors."""

from scantly.losses.consistency import (
    IGNORED,
    confident_cross_entropy,
    entropy,
    masked_cross_entropy,
    masked_divergence,
    masked_quantiles,
    mutual_consistency,
    pyramid_consistency,
    sharpened,
)
from scantly.losses.contrastive import (
    cosine_similarities,
    info_nce,
    label_propagation,
    nearest_neighbor_loss,
    sampled_similarities,
    similarity_divergence,
    unit,
)
from scantly.losses.distance_maps import Empty, signed_distance, soft_mask, squared_distance
from scantly.losses.overlap import (
    cross_entropy,
    cross_entropy_dice,
    soft_dice,
    soft_dice_per_image,
    weighted_cross_entropy,
)

__all__ = [
    "IGNORED",
    "Empty",
    "confident_cross_entropy",
    "cosine_similarities",
    "cross_entropy",
    "cross_entropy_dice",
    "entropy",
    "info_nce",
    "label_propagation",
    "masked_cross_entropy",
    "masked_divergence",
    "masked_quantiles",
    "mutual_consistency",
    "nearest_neighbor_loss",
    "pyramid_consistency",
    "sampled_similarities",
    "sharpened",
    "signed_distance",
    "similarity_divergence",
    "soft_dice",
    "soft_dice_per_image",
    "soft_mask",
    "squared_distance",
    "unit",
    "weighted_cross_entropy",
]
