"""Whether a prediction fits into the memory, and the sentence that says what would fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from scantly.errors import DeviceError, times
from scantly.inference.memory import Footprint, available_bytes, footprint, megabytes

__all__ = ["Demand", "divisor"]

#: No network of the catalogue needs so much per voxel; below this no count of its memory is made before a pass.
_BYTES_PER_VOXEL = 4000
#: Few tasks have so many classes (250, of 4 bytes) that sums take more per voxel; below this they are not counted.
_BYTES_PER_SUMMED_VOXEL = 1000
#: Sides of a whole image when the network does not say by what they must be divisible.
_USUAL_DIVISOR = 16


def divisor(network: nn.Module, spatial_dims: int) -> tuple[int, ...]:
    """By what the network wants the sides of its input to be divisible; 16 where it does not say."""
    told = getattr(network, "factors", None)
    return (_USUAL_DIVISOR,) * spatial_dims if told is None else tuple(told)


@dataclass(frozen=True)
class Demand:
    """What the windows of a prediction take.

    Attributes:
        network: In evaluation mode.
        device: Where it is.
        channels: Image channels.
        window: Sides of a window, (z, y, x) or (y, x); of the padded image for a pass over the whole.
        rows: Windows per forward pass.
        patch_size: Sides of the training patch.
        whole: Whether the window is the whole image.
        kept: Voxels of which the sums over windows are kept meanwhile; 0 if none are.
        sides: Extent of the image, without padding.
    """

    network: nn.Module
    device: torch.device
    channels: int
    window: tuple[int, ...]
    rows: int
    patch_size: tuple[int, ...]
    whole: bool
    kept: int
    sides: tuple[int, ...]

    def check(self) -> None:
        """Refuse what exceeds the memory beforehand: on a CPU the process would be killed without a word.

        Where the free memory cannot be known, or the network cannot be counted, nothing is refused.

        Raises:
            DeviceError: saying what would fit.
        """
        free = available_bytes(self.device)
        bound = self.rows * math.prod(self.window) * _BYTES_PER_VOXEL + self.kept * _BYTES_PER_SUMMED_VOXEL
        need = None if free is None or bound < free else self._need(self.window)
        if free is None or need is None:
            return
        sums = self._sums(need, free, self.kept)
        if self.rows * need.peak + sums > free:
            raise DeviceError(self.sentence())
        if self.kept and not sums:
            self._check_main_memory(_bytes_of_sums(need, self.kept))

    def _check_main_memory(self, sums: int) -> None:
        """For sums that are kept there, beside a GPU."""
        free = available_bytes(torch.device("cpu"))
        if free is not None and sums > free:
            raise DeviceError(
                f"cpu has too little memory for the sums over the windows of {_named(self.sides)} voxels (about "
                f"{megabytes(sums)} are needed, {megabytes(free)} are free); free memory, or predict scans of fewer "
                "voxels."
            )

    def sentence(self) -> str:
        """What was too much, how much it needs, and what would fit."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        free, need = available_bytes(self.device), self._need(self.window)
        what = "one pass over the whole of" if self.whole else "windows of"
        counted = f"{self.rows} x {what}" if self.rows > 1 else what
        story = f"{self.device.type} has too little memory for {counted} {_named(self.window)} voxels"
        if need is None or free is None:
            return f"{story}; {self._cure(need, None)}."
        sums = self._sums(need, free, self.kept)
        total, budget = self.rows * need.peak + sums, free - sums
        numbers = f"about {megabytes(total)} are needed, {megabytes(free)} are free"
        return f"{story} ({numbers}); {self._cure(need, budget)}."

    def _need(self, window: Sequence[int]) -> Footprint | None:
        bf16 = torch.is_autocast_enabled(self.device.type)
        return footprint(self.network, self.channels, window, bf16=bf16)

    def _sums(self, need: Footprint, free: int, voxels: int) -> int:
        """Bytes of the sums on the network's device: none where they would crowd a GPU."""
        elsewhere = self.device.type == "cuda" and 4 * need.classes * voxels >= free // 4
        return 0 if elsewhere else _bytes_of_sums(need, voxels)

    def _cure(self, need: Footprint | None, budget: int | None) -> str:
        """The largest batch that fits, else the largest window, as options and as settings."""
        verb = "may fit" if need is None or budget is None else "fits"
        if self.rows > 1:
            fitting = self.rows // 2
            if need is not None and budget is not None:
                fitting = min(fitting, budget // need.peak)
            if fitting >= 1:
                return f"a batch of {fitting} {verb}: --batch {fitting} (evaluation.inference.batch)"
        window: tuple[int, ...] | None = self._capped(self.patch_size if self.whole else self.window)
        if window == self.window:
            window = _half(window, divisor(self.network, len(self.window)))
        if self.whole and not self.kept and need is not None and budget is not None:
            budget -= self._sums(need, budget, self.rows * math.prod(self.window))  # which one pass has not
        options = "--window gaussian" if self.whole else ""
        need = self._need(self.patch_size) if self.whole else need
        fitting_window = self._fitting(window, need, budget)
        if fitting_window is None:
            return "no window of this network fits: free memory, or predict scans of fewer voxels"
        if fitting_window != self.patch_size or not self.whole:
            *depth, height, width = fitting_window
            options += f" --size {height} {width}{''.join(f' {side}' for side in depth)}"
        options += " --batch 1" if self.rows > 1 else ""
        return f"windows of {_named(fitting_window)} {verb.removesuffix('s')}: {options.strip()} (evaluation.inference)"

    def _capped(self, window: Sequence[int]) -> tuple[int, ...]:
        """No larger than the training patch, nor than the image with the padding that the network wants."""
        factors = divisor(self.network, len(window))
        padded = (-(-side // factor) * factor for side, factor in zip(self.sides, factors, strict=True))
        return tuple(map(min, window, self.patch_size, padded))

    def _fitting(
        self, window: tuple[int, ...] | None, need: Footprint | None, budget: int | None
    ) -> tuple[int, ...] | None:
        """``window`` cut until it fits; the memory of a pass grows with its voxels."""
        factors = divisor(self.network, len(self.window))
        counted = self.patch_size if self.whole else self.window
        while window is not None and need is not None and budget is not None:
            if need.peak * math.prod(window) <= budget * math.prod(counted):
                break
            window = _half(window, factors)
        return window


def _bytes_of_sums(need: Footprint, voxels: int) -> int:
    """Of the classes and of the weights, in float32."""
    return 4 * (need.classes + 1) * voxels


def _half(window: Sequence[int], factors: Sequence[int]) -> tuple[int, ...] | None:
    """The window with its longest side halved and rounded to a multiple of the factor; ``None`` if it cannot be."""
    axis = max(range(len(window)), key=lambda index: window[index] / factors[index])
    steps = window[axis] // factors[axis]
    if steps < 2:
        return None
    return tuple(steps // 2 * factors[axis] if index == axis else side for index, side in enumerate(window))


def _named(sides: Sequence[int]) -> str:
    return times(sides) + (" (z, y, x)" if len(sides) == 3 else " (y, x)")
