"""The conditional random field that smooths LCLPL's pseudo-labels."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["smooth_labels"]

_LEAST_PROBABILITY = 1e-5
_TRUNCATE = 4.0


@torch.no_grad()
def smooth_labels(
    probs: Tensor,
    *,
    sigma: float = 10.0,
    spatial_weight: float = 30.0,
    self_weight: float = 10.0,
    iterations: int = 30,
) -> Tensor:
    """Most probable labels of slices after mean-field steps of a fully connected conditional random field.

    ``U = -log max(p, 1e-5)``, ``Q = softmax(-U)``, then ``iterations`` times
    ``Q <- softmax(-U + spatial_weight G(Q) + self_weight Q)``. ``G`` is a Gaussian filter with zeros outside the
    slice, normalized symmetrically: ``G(Q) = blur(Q d) d`` with ``d = blur(1) ** -1/2`` and the kernel
    ``exp(-r^2 / (2 sigma^2))``, its center included.

    Krähenbühl and Koltun, NeurIPS 2011, with the numbers of the public code of Chaitanya et al., Medical Image
    Analysis 2023. Its bilateral kernel has a spatial deviation of 0.01 pixels, which is 0 between distinct pixels and
    1 at the pixel itself; ``self_weight`` is what remains of it, so image edges play no part. Deviations: that code
    filters with a library's permutohedral lattice, which approximates ``G``; here it is exact but for the window,
    which ends at 4 sigma along each axis. Labels may differ at borders.

    Args:
        probs: Class probabilities of slices, ``(C, S, H, W)``, float32.
        sigma: Deviation of the Gaussian, pixels.
        spatial_weight: Weight of the Gaussian term (Potts model).
        self_weight: Weight of the pixel's own distribution.
        iterations: Mean-field steps.

    Returns:
        ``(S, H, W)``, int64.

    Example:
        >>> probs = torch.full((2, 1, 9, 9), 0.8)
        >>> probs[1] = 0.2
        >>> probs[:, 0, 4, 4] = torch.tensor([0.3, 0.7])  # one pixel that disagrees
        >>> int(smooth_labels(probs, sigma=2.0).sum())
        0
    """
    rows, columns = (_filter(side, sigma, probs.device) for side in probs.shape[2:])
    labels = torch.empty(probs.shape[1:], dtype=torch.int64, device=probs.device)
    for index, one in enumerate(probs.float().unbind(1)):  # slice by slice, so that memory stays small
        log_probs = one.clamp(min=_LEAST_PROBABILITY).log()
        q = log_probs.softmax(0)
        with torch.autocast(probs.device.type, enabled=False):
            for _ in range(iterations):
                q = (log_probs + spatial_weight * (rows @ q @ columns) + self_weight * q).softmax(0)
        labels[index] = q.argmax(0)
    return labels


def _filter(side: int, sigma: float, device: torch.device) -> Tensor:
    """The symmetrically normalized filter along one axis as a matrix, ``(side, side)``."""
    place = torch.arange(side, device=device, dtype=torch.float32)
    distance = place[:, None] - place
    kernel = torch.exp(-0.5 * (distance / sigma) ** 2) * (distance.abs() <= _TRUNCATE * sigma)
    scale = kernel.sum(1).rsqrt()
    return scale[:, None] * kernel * scale
