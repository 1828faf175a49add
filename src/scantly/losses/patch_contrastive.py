"""Class-wise contrastive losses on embeddings of patches, and the entropy that chooses the patches.

Basak and Yin, "Pseudo-label Guided Contrastive Learning for Semi-supervised Medical Image Segmentation", CVPR 2023
(PLGCL), and its released code. Vectors have unit length; ``M`` anchors, ``G`` groups (the classes that are present),
``d`` dimensions. Everything is computed in float32, products of matrices too. Means over the anchors are those of all
ranks' anchors, of which one may have fewer than another, or none; the groups and their statistics are the same on all.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scantly.ranks import mean_of_rows, sum_over_ranks, world_size

__all__ = ["binary_entropy", "closed_form_contrast", "discrete_contrast"]

_LEAST_PROBABILITY = 1e-7


def binary_entropy(probs: Tensor, *, base: float = 2.0) -> Tensor:
    """``-x log x - (1 - x) log(1 - x)`` of each value: the map whose mean over a patch is its average patch entropy.

    ``F`` of the PLGCL paper. The logarithm's base is not stated there; with base 2, as in a region sampler of the
    released code, the values are in [0, 1]. Values are kept ``1e-7`` away from 0 and 1, so a certain voxel has
    2.5e-6 and not 0. ``x`` and ``1 - x`` have exactly the same entropy.

    Args:
        probs: In [0, 1], any shape.
        base: Of the logarithm.

    Returns:
        Same shape, float32.

    Example:
        >>> round(binary_entropy(torch.tensor([0.9, 0.8])).mean().item(), 6)
        0.595462
    """
    probs = probs.float()
    rarer = torch.minimum(probs, 1 - probs).clamp(min=_LEAST_PROBABILITY)
    other = 1 - rarer
    return (rarer * rarer.log() + other * other.log()) / -math.log(base)


def closed_form_contrast(
    anchors: Tensor,
    groups: Tensor,
    means: Tensor,
    covariances: Tensor,
    *,
    temperature: float,
    covariance_weight: float,
    negative_weight: float,
) -> Tensor:
    """Upper bound of the expected InfoNCE loss when each class is a Gaussian, mean over the anchors.

    With ``tau``, ``lam`` and ``psi`` the three weights, for an anchor ``f`` of class ``i``::

        s_j  = f.mu_j / tau + lam / (2 tau^2) f' Sigma_j f
        L(f) = -f.mu_i / tau + log(exp(s_i) + psi / G * sum over j != i of exp(s_j))

    This is what the released code of PLGCL evaluates; it follows from the expectation over the joint distribution
    of positives and negatives by Jensen's inequality and the Gaussian moment-generating function. ``psi / G`` stands
    for the number of negatives per class, so the value is near ``log(psi)`` and only its differences have a meaning.

    Args:
        anchors: ``(M, d)``.
        groups: Which of the G classes each anchor belongs to, ``(M,)``, int64.
        means: ``mu``, ``(G, d)``; takes no gradient.
        covariances: ``Sigma``, ``(G, d, d)``; takes no gradient.
        temperature: ``tau``, above 0.
        covariance_weight: ``lam``, at least 0; 0 leaves the covariances out.
        negative_weight: ``psi``, above 0.

    Returns:
        Scalar, float32; 0, connected to the anchors, where there are fewer than two classes or no anchor.
    """
    count = len(means)
    if count < 2 or (not len(anchors) and world_size() == 1):
        return anchors.float().sum() * 0
    with torch.autocast(anchors.device.type, enabled=False):
        anchors, means, covariances = anchors.float(), means.detach().float(), covariances.detach().float()
        similarity = anchors @ means.T / temperature
        spread = ((anchors @ covariances) * anchors).sum(2).T  # f' Sigma_j f, (M, G)
        scores = similarity + covariance_weight / (2 * temperature**2) * spread
    own = groups[:, None] == torch.arange(count, device=groups.device)
    scores = torch.where(own, scores, scores + math.log(negative_weight / count))
    return mean_of_rows(scores.logsumexp(1) - similarity.gather(1, groups[:, None])[:, 0])


def discrete_contrast(
    anchors: Tensor,
    groups: Tensor,
    keys: Tensor,
    key_groups: Tensor,
    *,
    temperature: float,
    valid: Tensor | None = None,
    exclude: Tensor | None = None,
) -> Tensor:
    """InfoNCE with each key of the same class as the positive in turn and all keys of other classes as negatives.

    The discrete estimate of the PLGCL paper's expectation: per anchor the mean over its positives ``v`` of
    ``-log(exp(f.v / tau) / (exp(f.v / tau) + sum over negatives n of exp(f.n / tau)))``, then the mean over the
    anchors. Anchors without a positive or without a negative are not counted.

    Args:
        anchors: ``(M, d)``.
        groups: Class of each anchor, ``(M,)``.
        keys: ``(N, d)``; take no gradient.
        key_groups: Class of each key, ``(N,)``.
        temperature: ``tau``, above 0.
        valid: Keys that count, ``(N,)`` bool; ``None``: all.
        exclude: Pairs that do not count, for instance an anchor's own copy, ``(M, N)`` bool; ``None``: none.

    Returns:
        Scalar, float32; 0, connected to the anchors, where no anchor counts.
    """
    with torch.autocast(anchors.device.type, enabled=False):
        similarity = anchors.float() @ keys.detach().float().T / temperature
    same = groups[:, None] == key_groups
    counts = torch.ones_like(same) if exclude is None else ~exclude
    if valid is not None:
        counts = counts & valid
    positive, negative = same & counts, ~same & counts
    # A large finite number instead of infinity: rows without negatives must have finite gradients.
    negatives = similarity.masked_fill(~negative, -1e30).logsumexp(1, keepdim=True)
    losses = (torch.logaddexp(similarity, negatives) - similarity).masked_fill(~positive, 0)
    positives = positive.sum(1)
    counted = (positives > 0) & negative.any(1)
    per_anchor = losses.sum(1) / positives.clamp(min=1)
    return sum_over_ranks((per_anchor * counted).sum()) / sum_over_ranks(counted.sum()).clamp(min=1)
