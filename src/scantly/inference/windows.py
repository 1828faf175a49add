"""Probabilities of prepared arrays, by slices or by sliding windows."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["entropy", "predict_array"]

SLICES_PER_FORWARD = 16


@torch.no_grad()
def predict_array(
    network: nn.Module,
    array: np.ndarray,
    *,
    spatial_dims: Literal[2, 3],
    patch_size: tuple[int, ...],
    device: torch.device,
    overlap: float = 0.5,
) -> np.ndarray:
    """Softmax probabilities of one prepared case.

    In 2D every slice is predicted; slices of the patch size go through in one piece, others by windows of the
    patch size with Gaussian weighting. In 3D the volume goes by windows. Arrays smaller than the patch are
    padded with zeros (as in training) and cropped again.

    Args:
        network: In evaluation mode, on ``device``.
        array: ``(C, D, H, W)``, float32.
        spatial_dims: 2 or 3.
        patch_size: ``(H, W)`` or ``(D, H, W)`` of the training patches.
        device: Where the network is.
        overlap: Share of overlap of neighboring windows.

    Returns:
        ``(classes, D, H, W)``, float32, sums to 1 over classes.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    items = tensor.movedim(1, 0) if spatial_dims == 2 else tensor[None]
    parts = [
        _predict(network, part.to(device), patch_size, overlap).cpu() for part in torch.split(items, SLICES_PER_FORWARD)
    ]
    probs = torch.cat(parts)
    probs = probs.movedim(0, 1) if spatial_dims == 2 else probs[0]
    return probs.contiguous().numpy()


def _predict(network: nn.Module, images: Tensor, patch_size: tuple[int, ...], overlap: float) -> Tensor:
    """``(N, C, *spatial)`` to float32 probabilities on the same grid."""
    sides = images.shape[2:]
    missing = [max(0, patch - side) for patch, side in zip(patch_size, sides, strict=True)]
    before = [total // 2 for total in missing]
    if any(missing):
        pads = [(left, total - left) for left, total in zip(before, missing, strict=True)]
        images = F.pad(images, [value for pair in reversed(pads) for value in pair])
    if tuple(images.shape[2:]) == tuple(patch_size):
        probs: Tensor = network(images).float().softmax(1)
    else:
        from monai.inferers import sliding_window_inference

        probs = sliding_window_inference(
            images,
            patch_size,
            sw_batch_size=SLICES_PER_FORWARD if len(patch_size) == 2 else 1,
            predictor=lambda windows: network(windows).float().softmax(1),
            overlap=overlap,
            mode="gaussian",
        )
    if any(missing):
        crop = [slice(left, left + side) for left, side in zip(before, sides, strict=True)]
        probs = probs[(slice(None), slice(None), *crop)]
    return probs


def entropy(probs: np.ndarray) -> np.ndarray:
    """Entropy of the class probabilities over ``ln C``: 0 certain, 1 uniform.

    Args:
        probs: ``(C, ...)``, sums to 1 over the first axis.

    Returns:
        ``(...)``, float32 in [0, 1].
    """
    clipped = np.clip(probs, 1e-12, 1.0)
    values: np.ndarray = -(clipped * np.log(clipped)).sum(0) / math.log(probs.shape[0])
    return np.asarray(np.clip(values, 0.0, 1.0), dtype=np.float32)
