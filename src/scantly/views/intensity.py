"""Intensity transforms of a batch: noise, jitter, gamma and blur; voxels stay where they are.

Images may be in any unit: [0, 1], z-scores, Hounsfield units. Jitter and gamma therefore work on each row and
channel rescaled from its own minimum and maximum to [0, 1], and go back afterwards; noise is in the images'
own unit. Values are computed in float32 (float64 stays) and returned in the images' type; rows that are not
active pass bit-identical.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from scantly.views.draws import as_rows, uniform, working_dtype

__all__ = [
    "Blur",
    "Gamma",
    "Jitter",
    "Noise",
    "apply_blur",
    "apply_gamma",
    "apply_jitter",
    "apply_noise",
    "noise",
    "sample_blur",
    "sample_gamma",
    "sample_jitter",
    "sample_noise",
]


@dataclass(frozen=True)
class Noise:
    """Additive noise: ``values`` in the images' unit, ``(B, C, *spatial)``, float32."""

    values: Tensor


@dataclass(frozen=True)
class Jitter:
    """Brightness and contrast change, on the row's own [0, 1] range.

    Attributes:
        shift: Added first, share of the range, ``(B,)``.
        brightness: Factor applied next, ``(B,)``.
        contrast: Factor applied last to the distance from the mean, ``(B,)``.
        active: ``(B,)`` bool.
        clip: Values are kept within the row's own minimum and maximum after each change.
    """

    shift: Tensor
    brightness: Tensor
    contrast: Tensor
    active: Tensor
    clip: bool


@dataclass(frozen=True)
class Gamma:
    """Power law on the row's own [0, 1] range: ``exponent`` ``(B,)``, ``active`` ``(B,)`` bool."""

    exponent: Tensor
    active: Tensor


@dataclass(frozen=True)
class Blur:
    """Gaussian blur of the last ``axes`` axes.

    Attributes:
        sigma: Standard deviation in voxels, ``(B,)``.
        active: ``(B,)`` bool.
        radius: Half width of the kernel in voxels, the same for all rows.
        axes: 2 (in-plane) or 3.
    """

    sigma: Tensor
    active: Tensor
    radius: int
    axes: int


def sample_noise(
    shape: Sequence[int],
    *,
    sigma: float | tuple[float, float] = 0.1,
    clamp: float | None = 0.2,
    active: Tensor | None = None,
    generator: torch.Generator,
) -> Noise:
    """Draw Gaussian noise, clamped as Mean Teacher does (Tarvainen and Valpola, 2017).

    Args:
        shape: Shape of the images, ``(B, C, *spatial)``.
        sigma: Standard deviation before clamping, or its bounds, drawn uniformly per row.
        clamp: Largest absolute value; ``None``: no bound.
        active: Rows that get noise, ``(B,)`` bool; ``None``: all.
        generator: Source of the draws.
    """
    values = torch.randn(tuple(shape), generator=generator, device=generator.device)
    if isinstance(sigma, tuple):
        values = values * as_rows(uniform(shape[0], *sigma, generator=generator), values)
    else:
        values = values * sigma
    if clamp is not None:
        values = values.clamp(-clamp, clamp)
    if active is not None:
        values = values * as_rows(active, values)
    return Noise(values)


def apply_noise(images: Tensor, params: Noise) -> Tensor:
    """Add the noise, ``(B, C, *spatial)`` -> the same shape and type."""
    return (images.to(working_dtype(images)) + params.values).to(images.dtype)


def noise(images: Tensor, *, sigma: float = 0.1, clamp: float | None = 0.2, generator: torch.Generator) -> Tensor:
    """Images with fresh clamped Gaussian noise: :func:`sample_noise` and :func:`apply_noise` in one.

    Example:
        >>> view = noise(torch.zeros(2, 1, 8, 8), generator=torch.Generator().manual_seed(0))
        >>> bool(view.abs().max() <= 0.2)
        True
    """
    return apply_noise(images, sample_noise(images.shape, sigma=sigma, clamp=clamp, generator=generator))


def sample_jitter(
    batch: int,
    *,
    brightness: float = 0.5,
    contrast: float = 0.5,
    shift: float = 0.0,
    clip: bool = True,
    active: Tensor | None = None,
    generator: torch.Generator,
) -> Jitter:
    """Draw brightness and contrast changes; the channels of a row share them.

    Args:
        batch: Number of rows B.
        brightness: Factor from U[max(0, 1 - b), 1 + b).
        contrast: Factor from U[max(0, 1 - c), 1 + c).
        shift: Added value from U[-s, s), share of the row's range.
        clip: Keep values within the row's own minimum and maximum, as 8-bit images do.
        active: Rows that change, ``(B,)`` bool; ``None``: all.
        generator: Source of the draws.
    """
    return Jitter(
        shift=uniform(batch, -shift, shift, generator=generator),
        brightness=uniform(batch, max(0.0, 1 - brightness), 1 + brightness, generator=generator),
        contrast=uniform(batch, max(0.0, 1 - contrast), 1 + contrast, generator=generator),
        active=_all_rows(batch, generator) if active is None else active,
        clip=clip,
    )


def apply_jitter(images: Tensor, params: Jitter) -> Tensor:
    """Shift, then brightness, then contrast about the mean, ``(B, C, *spatial)`` -> same shape and type.

    The order is fixed. A constant channel can only become another constant within its range, so it stays.
    """

    def change(unit: Tensor) -> Tensor:
        lower, upper = (0.0, 1.0) if params.clip else (-math.inf, math.inf)
        shift, brightness = as_rows(params.shift, unit), as_rows(params.brightness, unit)
        bright = ((unit + shift) * brightness).clamp(lower, upper)
        mean = bright.mean(_spatial(unit), keepdim=True)
        return (mean + as_rows(params.contrast, unit) * (bright - mean)).clamp(lower, upper)

    return _on_own_range(images, params.active, change)


def sample_gamma(
    batch: int,
    *,
    gamma: tuple[float, float] = (0.7, 1.5),
    active: Tensor | None = None,
    generator: torch.Generator,
) -> Gamma:
    """Draw exponents log-uniformly between the bounds ``gamma`` (both above 0)."""
    exponent = uniform(batch, math.log(gamma[0]), math.log(gamma[1]), generator=generator).exp()
    return Gamma(exponent, _all_rows(batch, generator) if active is None else active)


def apply_gamma(images: Tensor, params: Gamma) -> Tensor:
    """Raise each row, on its own [0, 1] range, to its exponent; minimum and maximum stay."""
    return _on_own_range(images, params.active, lambda unit: unit ** as_rows(params.exponent, unit))


def sample_blur(
    batch: int,
    *,
    sigma: tuple[float, float] = (0.1, 2.0),
    truncate: float = 3.0,
    axes: int = 2,
    active: Tensor | None = None,
    generator: torch.Generator,
) -> Blur:
    """Draw the widths of Gaussian blurs.

    Args:
        batch: Number of rows B.
        sigma: Bounds in voxels, drawn uniformly.
        truncate: The kernel ends at this many of the **largest** sigma, for all rows alike.
        axes: Blur the last 2 axes (in-plane) or 3.
        active: Rows that are blurred, ``(B,)`` bool; ``None``: all.
        generator: Source of the draws.
    """
    return Blur(
        sigma=uniform(batch, *sigma, generator=generator),
        active=_all_rows(batch, generator) if active is None else active,
        radius=int(truncate * sigma[1] + 0.5),
        axes=axes,
    )


def apply_blur(images: Tensor, params: Blur) -> Tensor:
    """Blur each active row along each axis, ``(B, C, *spatial)`` -> the same shape and type.

    Equals ``scipy.ndimage.gaussian_filter(..., mode="nearest", radius=params.radius)`` row by row.
    """
    if images.shape[0] == 0:
        return images
    taps = torch.arange(-params.radius, params.radius + 1, device=images.device)
    kernel = torch.exp(-0.5 * (taps / params.sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).to(working_dtype(images))
    blurred = images.to(kernel.dtype)
    # Under autocast the convolutions would round the images to 8 bits of mantissa.
    with torch.autocast(images.device.type, enabled=False):
        for axis in range(-params.axes, 0):
            blurred = _convolve(blurred, kernel, axis)
    return torch.where(as_rows(params.active, images), blurred.to(images.dtype), images)


def _convolve(x: Tensor, kernel: Tensor, axis: int) -> Tensor:
    # Every row, and every slice in it, is a group of one 2D convolution with a kernel of one column or row.
    radius = kernel.shape[1] // 2
    if axis == -1:
        planes, weight_shape, padding = x.reshape(1, -1, *x.shape[-2:]), (1, 1, -1), (radius, radius, 0, 0)
    else:
        trailing = math.prod(x.shape[axis + 1 :])
        planes, weight_shape = x.reshape(1, -1, x.shape[axis], trailing), (1, -1, 1)
        padding = (0, 0, radius, radius)
    groups = planes.shape[1]
    weight = kernel.repeat_interleave(groups // x.shape[0], dim=0).view(groups, *weight_shape)
    padded = functional.pad(planes, padding, mode="replicate")
    return functional.conv2d(padded, weight, groups=groups).view(x.shape)


def _on_own_range(images: Tensor, active: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    values = images.to(working_dtype(images))
    lowest = values.amin(_spatial(values), keepdim=True)
    span = values.amax(_spatial(values), keepdim=True) - lowest
    unit = (values - lowest) / torch.where(span > 0, span, torch.ones_like(span))
    changed = (change(unit) * span + lowest).to(images.dtype)
    return torch.where(as_rows(active, images), changed, images)


def _spatial(x: Tensor) -> tuple[int, ...]:
    return tuple(range(2, x.ndim))


def _all_rows(batch: int, generator: torch.Generator) -> Tensor:
    return torch.ones(batch, dtype=torch.bool, device=generator.device)
