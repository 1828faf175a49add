"""The weak and the strong view: which transforms, how often, how far.

``weak`` changes the geometry, the same for an image and its maps; ``strong`` is applied on top and changes
intensities only, so that voxels stay aligned. Both take settings: a protocol is a recipe and not code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from scantly.settings import Settings
from scantly.views import intensity, spatial
from scantly.views.draws import chance, uniform

__all__ = [
    "StrongConfig",
    "StrongParams",
    "WeakConfig",
    "WeakParams",
    "WeakView",
    "apply_strong",
    "apply_weak",
    "invert_weak",
    "sample_strong",
    "sample_weak",
    "strong",
    "weak",
]


def _range_is_ordered(value: tuple[float, float]) -> tuple[float, float]:
    if not 0 < value[0] <= value[1]:
        raise ValueError("give two positive numbers, the smaller first")
    return value


class WeakConfig(Settings):
    """Geometry shared by an image and its labels. Fields are checked in this order.

    The literature's ACDC augmentation is ``rotflip="official", p_rotflip=0.5, p_rotate=0.5, exclusive=True,
    rotate_integer=True, image_interpolation="nearest"``; MC-Net and UniMatch use ``p_rotate=0.25`` there;
    LA uses ``rotflip="official", p_rotate=0``.
    """

    rotflip: spatial.RotFlip = Field(
        "flips",
        description="In-plane symmetries: 'flips' (each axis with probability 0.5), 'independent' (flips and "
        "0 to 3 quarter turns), 'official' (the literature's quarter turns, then always one flip: never the "
        "identity), 'none'",
    )
    p_rotflip: float = Field(1.0, ge=0, le=1, description="Probability that a row takes part in the rot-flip")
    exclusive: bool = Field(
        False,
        description="Each row takes one branch: rot-flip, else rotation, else nothing (the literature's way)",
    )
    p_rotate: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Probability that a row is rotated, scaled and shifted; a share of all rows",
    )
    rotate_degrees: float = Field(20.0, ge=0, le=180, description="In-plane angle from U[-a, a), degrees")
    rotate_integer: bool = Field(False, description="Whole degrees only, -a to a - 1 (literature)")
    scale: tuple[float, float] = Field((1.0, 1.0), description="Bounds of the magnification; above 1 enlarges")
    translate: float = Field(0.0, ge=0, le=1, description="Largest shift, share of each side")
    through_plane: bool = Field(
        False, description="3D: flip along D too, and scale and shift along D; needs near-isotropic voxels"
    )
    image_interpolation: spatial.Interpolation = Field(
        "linear",
        description="Images under rotation: 'linear', or 'nearest' (literature); maps are always nearest",
    )

    @field_validator("scale")
    @classmethod
    def _scale(cls, value: tuple[float, float]) -> tuple[float, float]:
        return _range_is_ordered(value)

    @field_validator("p_rotate")
    @classmethod
    def _branches_fit(cls, value: float, info: ValidationInfo) -> float:
        taken = info.data.get("p_rotflip", 0.0) if info.data.get("exclusive") else 0.0
        if taken + value > 1 + 1e-9:
            raise ValueError(f"exclusive branches share 1, and p_rotflip takes {taken:g}; lower one of them")
        return value

    @field_validator("rotate_integer")
    @classmethod
    def _whole_degrees(cls, value: bool, info: ValidationInfo) -> bool:
        if value and float(info.data.get("rotate_degrees", 0.0)) % 1:
            raise ValueError(f"whole degrees need a whole rotate_degrees, not {info.data['rotate_degrees']:g}")
        return value

    @field_validator("through_plane")
    @classmethod
    def _official_is_in_plane(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("rotflip") == "official":
            raise ValueError("the official rot-flip is in-plane only; choose rotflip 'flips' or 'independent'")
        return value

    @property
    def resamples(self) -> bool:
        """Whether any row may need interpolation."""
        return self.p_rotate > 0 and (self.rotate_degrees > 0 or self.scale != (1.0, 1.0) or self.translate > 0)


class StrongConfig(Settings):
    """Intensity changes on top of the weak view, each drawn per row, in the order of the fields.

    The defaults are UniMatch's (CVPR 2023) without its saturation and hue, which do nothing to gray images.
    Brightness, contrast and gamma act on each row's own range rescaled to [0, 1].
    """

    p_jitter: float = Field(0.8, ge=0, le=1, description="Probability of brightness and contrast changes")
    brightness: float = Field(0.5, ge=0, description="Brightness factor from U[1 - b, 1 + b), not below 0")
    contrast: float = Field(0.5, ge=0, description="Contrast factor about the mean from U[1 - c, 1 + c), not below 0")
    shift: float = Field(0.0, ge=0, description="Value added before, from U[-s, s), share of the row's range")
    clip: bool = Field(True, description="Jittered values stay within the row's own minimum and maximum")
    p_gamma: float = Field(0.0, ge=0, le=1, description="Probability of a gamma change")
    gamma: tuple[float, float] = Field((0.7, 1.5), description="Bounds of the exponent")
    p_blur: float = Field(0.5, ge=0, le=1, description="Probability of a Gaussian blur")
    blur_sigma: tuple[float, float] = Field((0.1, 2.0), description="Bounds of the blur's sigma, voxels")
    blur_through_plane: bool = Field(False, description="3D: blur along D too; needs near-isotropic voxels")
    p_noise: float = Field(0.0, ge=0, le=1, description="Probability of additive Gaussian noise")
    noise_sigma: tuple[float, float] = Field((0.01, 0.1), description="Bounds of the noise's sigma, image units")

    @field_validator("gamma", "blur_sigma", "noise_sigma")
    @classmethod
    def _range(cls, value: tuple[float, float]) -> tuple[float, float]:
        return _range_is_ordered(value)


@dataclass(frozen=True)
class WeakParams:
    """One geometry per row: first the exact part, then at most one resampling; ``None`` does nothing."""

    orthogonal: spatial.Orthogonal | None
    affine: spatial.Affine | None


@dataclass(frozen=True)
class WeakView:
    """The weak view of a batch.

    Attributes:
        images: ``(B, C, *spatial)``.
        maps: The maps that were given, under the same geometry, ``(B, *spatial)`` each.
        params: What was drawn, to be applied to or undone on other tensors.
    """

    images: Tensor
    maps: tuple[Tensor, ...]
    params: WeakParams


@dataclass(frozen=True)
class StrongParams:
    """What was drawn for a strong view; ``None`` does nothing."""

    jitter: intensity.Jitter | None
    gamma: intensity.Gamma | None
    blur: intensity.Blur | None
    noise: intensity.Noise | None


def sample_weak(config: WeakConfig, batch: int, size: Sequence[int], *, generator: torch.Generator) -> WeakParams:
    """Draw a geometry for each of ``batch`` rows of ``size`` ``(H, W)`` or ``(D, H, W)``."""
    branch = uniform(batch, 0.0, 1.0, generator=generator)
    if config.exclusive:
        rotates = (branch >= config.p_rotflip) & (branch < config.p_rotflip + config.p_rotate)
    else:
        rotates = chance(batch, config.p_rotate, generator=generator)
    orthogonal, affine = None, None
    if config.rotflip != "none" and config.p_rotflip > 0:
        orthogonal = spatial.sample_orthogonal(
            config.rotflip,
            batch,
            size,
            flip_depth=config.through_plane,
            active=branch < config.p_rotflip,
            generator=generator,
        )
    if config.resamples:
        affine = spatial.sample_affine(
            batch,
            size,
            rotate_degrees=config.rotate_degrees,
            rotate_integer=config.rotate_integer,
            scale=config.scale,
            translate=config.translate,
            through_plane=config.through_plane,
            active=rotates,
            generator=generator,
        )
    return WeakParams(orthogonal, affine)


def apply_weak(x: Tensor, params: WeakParams, *, interpolation: spatial.Interpolation | None = None) -> Tensor:
    """Bring ``x`` into the view's geometry.

    Args:
        x: ``(B, C, *spatial)`` or ``(B, *spatial)``, any type.
        params: The geometry of each row.
        interpolation: ``None``: linear for floating point, nearest for integers and booleans.

    Returns:
        Same shape and type; rows that were not drawn are bit-identical; 0 comes in from outside.
    """
    if params.orthogonal is not None:
        x = spatial.apply_orthogonal(x, params.orthogonal)
    if params.affine is not None:
        x = spatial.apply_affine(x, params.affine, interpolation=interpolation)
    return x


def invert_weak(x: Tensor, params: WeakParams, *, interpolation: spatial.Interpolation | None = None) -> Tensor:
    """Bring ``x`` from the view's geometry back: exact where only flips and quarter turns were drawn.

    Where a row was resampled, it is resampled once more, and what had left the field of view is 0; the same
    call on a map of ones that went through :func:`apply_weak` tells where.
    """
    if params.affine is not None:
        x = spatial.apply_affine(x, spatial.invert_affine(params.affine), interpolation=interpolation)
    if params.orthogonal is not None:
        x = spatial.apply_orthogonal(x, spatial.invert_orthogonal(params.orthogonal))
    return x


def weak(config: WeakConfig, images: Tensor, maps: Sequence[Tensor] = (), *, generator: torch.Generator) -> WeakView:
    """Draw and apply the weak augmentation of a batch.

    Args:
        config: The policy.
        images: ``(B, C, *spatial)`` on the generator's device.
        maps: Label maps or other maps of the same rows, ``(B, *spatial)`` each; always nearest neighbor, so
            no value appears that was not there (but 0, which comes in from outside).
        generator: Source of the draws.

    Example:
        >>> images, labels = torch.rand(2, 1, 8, 8), torch.ones(2, 8, 8, dtype=torch.int64)
        >>> view = weak(WeakConfig(), images, [labels], generator=torch.Generator().manual_seed(0))
        >>> view.images.shape, view.maps[0].dtype
        (torch.Size([2, 1, 8, 8]), torch.int64)
    """
    params = sample_weak(config, images.shape[0], images.shape[2:], generator=generator)
    return WeakView(
        images=apply_weak(images, params, interpolation=config.image_interpolation),
        maps=tuple(apply_weak(each, params, interpolation="nearest") for each in maps),
        params=params,
    )


def sample_strong(config: StrongConfig, shape: Sequence[int], *, generator: torch.Generator) -> StrongParams:
    """Draw the intensity changes of images of ``shape`` ``(B, C, *spatial)``."""
    batch = shape[0]
    jitter, gamma, blur, noise = None, None, None, None
    if config.p_jitter > 0:
        jitter = intensity.sample_jitter(
            batch,
            brightness=config.brightness,
            contrast=config.contrast,
            shift=config.shift,
            clip=config.clip,
            active=chance(batch, config.p_jitter, generator=generator),
            generator=generator,
        )
    if config.p_gamma > 0:
        active = chance(batch, config.p_gamma, generator=generator)
        gamma = intensity.sample_gamma(batch, gamma=config.gamma, active=active, generator=generator)
    if config.p_blur > 0:
        blur = intensity.sample_blur(
            batch,
            sigma=config.blur_sigma,
            axes=len(shape) - 2 if config.blur_through_plane else 2,
            active=chance(batch, config.p_blur, generator=generator),
            generator=generator,
        )
    if config.p_noise > 0:
        active = chance(batch, config.p_noise, generator=generator)
        noise = intensity.sample_noise(shape, sigma=config.noise_sigma, clamp=None, active=active, generator=generator)
    return StrongParams(jitter, gamma, blur, noise)


def apply_strong(images: Tensor, params: StrongParams) -> Tensor:
    """Change the intensities, ``(B, C, *spatial)`` -> same shape and type; rows not drawn bit-identical."""
    if params.jitter is not None:
        images = intensity.apply_jitter(images, params.jitter)
    if params.gamma is not None:
        images = intensity.apply_gamma(images, params.gamma)
    if params.blur is not None:
        images = intensity.apply_blur(images, params.blur)
    if params.noise is not None:
        images = intensity.apply_noise(images, params.noise)
    return images


def strong(config: StrongConfig, images: Tensor, *, generator: torch.Generator) -> Tensor:
    """Draw and apply a strong view of weakly augmented images, ``(B, C, *spatial)``; voxels stay aligned.

    Example:
        >>> strong(StrongConfig(), torch.rand(2, 1, 8, 8, 8), generator=torch.Generator()).shape
        torch.Size([2, 1, 8, 8, 8])
    """
    return apply_strong(images, sample_strong(config, images.shape, generator=generator))
