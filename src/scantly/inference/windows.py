"""Probabilities of prepared arrays, by slices, by sliding windows, or in one pass."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from scantly.errors import DeviceError
from scantly.inference.fitting import Demand, divisor
from scantly.inference.grid import Tiling, gaussian_weights, tile
from scantly.inference.memory import available_bytes, is_out_of_memory
from scantly.inference.settings import DEFAULT_INFERENCE, InferenceSettings

__all__ = ["entropy", "predict_array"]

SLICES_PER_FORWARD = 16
#: A GPU is kept busy by about four of the literature's windows of 112 x 112 x 80; a CPU by one.
_VOXELS_PER_GPU_FORWARD = 2**22


@torch.no_grad()
def predict_array(
    network: nn.Module,
    array: np.ndarray,
    *,
    spatial_dims: Literal[2, 3],
    patch_size: tuple[int, ...],
    device: torch.device,
    settings: InferenceSettings = DEFAULT_INFERENCE,
) -> np.ndarray:
    """Softmax probabilities of one prepared case.

    Slices (2D) or the volume (3D) go through the network window by window; the probabilities of overlapping
    windows are averaged with the windows' weights. Arrays smaller than a window are padded with zeros on both
    sides (as in training) and cropped again. Only sums over windows are kept: memory grows with the volume, not
    with the number of windows.

    Args:
        network: In evaluation mode, on ``device``.
        array: ``(C, D, H, W)``, float32.
        spatial_dims: 2 or 3.
        patch_size: ``(H, W)`` or ``(D, H, W)`` of the training patches.
        device: Where the network is.
        settings: Windows, weights and flips.

    Returns:
        ``(classes, D, H, W)``, float32, sums to 1 over classes.

    Raises:
        ConfigError: if the settings do not fit the dimensions.
        DeviceError: if the memory does not suffice; the sentence says what would fit.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    items = tensor.movedim(1, 0) if spatial_dims == 2 else tensor[None]
    tiling = tile(items.shape[2:], patch_size, settings, divisor(network, spatial_dims))
    pass_ = _Pass(network, tiling, settings, device)
    demand = pass_.demand(items, patch_size)
    demand.check()
    try:
        return _predict(pass_, items, spatial_dims)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        cause = error.with_traceback(None)  # whose frames would keep the memory that is counted next
    raise DeviceError(demand.sentence()) from cause


def _predict(pass_: _Pass, items: Tensor, spatial_dims: int) -> np.ndarray:
    group = max(SLICES_PER_FORWARD, pass_.batch)
    if len(items) <= group:
        probs = pass_.probabilities(items).cpu()
        return (probs.movedim(0, 1) if spatial_dims == 2 else probs[0]).contiguous().numpy()
    result: Tensor | None = None
    for first in range(0, len(items), group):
        probs = pass_.probabilities(items[first : first + group])
        if result is None:
            result = torch.empty(probs.shape[1], len(items), *probs.shape[2:])
        result[:, first : first + group] = probs.movedim(0, 1)
    assert result is not None
    return result.numpy()


@dataclass(frozen=True)
class _Pass:
    """A network that goes over images by windows."""

    network: nn.Module
    tiling: Tiling
    settings: InferenceSettings
    device: torch.device

    @property
    def batch(self) -> int:
        """Windows per forward pass."""
        if self.settings.batch is not None:
            return self.settings.batch
        if len(self.tiling.window) == 2:
            return SLICES_PER_FORWARD
        if self.device.type == "cpu":
            return 1
        return min(SLICES_PER_FORWARD, max(1, _VOXELS_PER_GPU_FORWARD // math.prod(self.tiling.window)))

    def probabilities(self, images: Tensor) -> Tensor:
        """``(N, C, *sides)`` to float32 probabilities ``(N, K, *sides)``."""
        windows = self.tiling.windows
        places = list(itertools.product(range(len(images)), windows))
        padded = self.tiling.pad(images.to(self._home(images.nbytes)))
        if len(places) <= self.batch and len(windows) == 1:
            return self.tiling.crop(self._forward(padded.to(self.device)))
        weights = self._weights() if len(windows) > 1 else None
        total: Tensor | None = None
        for first in range(0, len(places), self.batch):
            part = places[first : first + self.batch]
            rows = torch.cat([padded[(slice(item, item + 1), slice(None), *index)] for item, index in part])
            probs = self._forward(rows.to(self.device))
            if weights is not None:
                probs *= weights
            if total is None:
                shape = (len(images), probs.shape[1], *self.tiling.padded)
                total = torch.zeros(shape, device=self._home(4 * math.prod(shape)))
            for (item, index), values in zip(part, probs.to(total.device), strict=True):
                total[item][(slice(None), *index)] += values
        assert total is not None
        if weights is not None:
            total /= self._visits(weights, total.device)
        return self.tiling.crop(total)

    def _forward(self, windows: Tensor) -> Tensor:
        """Probabilities of a batch of windows, averaged over all flips if asked for."""
        axes = range(2, windows.ndim) if self.settings.flips else ()
        flips = [chosen for count in range(len(axes) + 1) for chosen in itertools.combinations(axes, count)]
        total: Tensor = self.network(windows).float().softmax(1)
        for chosen in flips[1:]:
            total += self.network(windows.flip(chosen)).float().softmax(1).flip(chosen)
        return total.div_(len(flips)) if len(flips) > 1 else total

    def _weights(self) -> Tensor:
        if self.settings.window == "gaussian":
            return gaussian_weights(self.tiling.window, self.device)
        return torch.ones((), device=self.device)

    def _visits(self, weights: Tensor, device: torch.device) -> Tensor:
        """Sum of the weights that each voxel got, ``(*padded)``."""
        visits = torch.zeros(self.tiling.padded, device=device)
        for index in self.tiling.windows:
            visits[index] += weights.to(device)
        return visits

    def _home(self, count: int) -> torch.device:
        """Where ``count`` bytes of a whole image are kept: on the device, unless they would crowd out the windows."""
        free = available_bytes(self.device) if self.device.type == "cuda" else None
        return self.device if free is None or count < free // 4 else torch.device("cpu")

    def demand(self, items: Tensor, patch_size: tuple[int, ...]) -> Demand:
        """What the windows of these images take."""
        together = min(len(items), max(SLICES_PER_FORWARD, self.batch))
        rows = min(self.batch, together * len(self.tiling.windows))
        direct = len(self.tiling.windows) == 1 and together <= self.batch
        return Demand(
            self.network,
            self.device,
            channels=items.shape[1],
            window=self.tiling.window,
            rows=rows,
            patch_size=patch_size,
            whole=self.settings.window == "whole",
            kept=0 if direct else together * math.prod(self.tiling.padded),
            sides=self.tiling.sides,
        )


def entropy(probs: np.ndarray | Iterator[np.ndarray]) -> np.ndarray:
    """Entropy of the class probabilities over ``ln C``: 0 certain, 1 uniform.

    Args:
        probs: ``(C, ...)``, sums to 1 over the first axis; or the maps of the classes one by one.

    Returns:
        ``(...)``, float32 in [0, 1].
    """
    total, classes = np.zeros((), np.float32), 0
    for values in probs:
        clipped = np.clip(values, 1e-12, 1.0)
        total = total - clipped * np.log(clipped)
        classes += 1
    return np.asarray(np.clip(total / math.log(classes), 0.0, 1.0), dtype=np.float32)
