"""Weak-to-strong consistency: labels of the weak view, and strong views that they are pasted onto."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from scantly.errors import ConfigError
from scantly.methods.base import MethodConfig
from scantly.views import CutMix, CutMixConfig, StrongConfig, apply_cutmix, sample_cutmix, strong

__all__ = ["StrongView", "StrongViewConfig", "WeakLabels"]

_STRONG = {2: StrongConfig(), 3: StrongConfig(p_blur=0.2, blur_sigma=(0.1, 1.0), p_noise=0.2)}


@dataclass(frozen=True)
class WeakLabels:
    """Pseudo-labels of the weak view and the voxels that are trusted.

    Attributes:
        targets: ``(B, *spatial)`` int64, or probabilities ``(B, C, *spatial)``.
        mask: ``(B, *spatial)`` bool.
    """

    targets: Tensor
    mask: Tensor


@dataclass(frozen=True)
class StrongView:
    """A strong view of the unlabeled rows, and where it shows other rows.

    Attributes:
        images: ``(B, C, *spatial)``.
        box: What of each row is another one's.
    """

    images: Tensor
    box: CutMix

    def paste(self, labels: WeakLabels) -> WeakLabels:
        """Labels and trust of what the view shows."""
        return WeakLabels(apply_cutmix(labels.targets, self.box), apply_cutmix(labels.mask, self.box))


class StrongViewConfig(MethodConfig):
    """Settings of strong views."""

    strong: StrongConfig | None = Field(
        None,
        description="The strong view; none: UniMatch's in 2D, jitter, slight blur and noise in 3D. Where some "
        "settings of it are given (strong.p_blur, ...) the others are UniMatch's.",
    )
    cutmix: CutMixConfig = Field(CutMixConfig(), description="Boxes of other images in the strong view.")

    def strong_settings(self, spatial_dims: Literal[2, 3]) -> StrongConfig:
        """Those that are given, or the defaults of the dimension."""
        return self.strong or _STRONG[spatial_dims]

    def strong_view(self, images: Tensor, generator: torch.Generator) -> StrongView:
        """Draw intensities, and boxes of other images of the batch.

        Args:
            images: Weak views, ``(B, C, *spatial)``.
            generator: Source of the draws.

        Raises:
            ConfigError: if there are no images.
        """
        if not len(images):
            raise ConfigError(
                "consistency of weak and strong views needs unlabeled rows; set plan.unlabeled_batch_size to 1 or more."
            )
        dims: Literal[2, 3] = 2 if images.ndim == 4 else 3
        box = sample_cutmix(self.cutmix, len(images), images.shape[2:], generator=generator)
        return StrongView(apply_cutmix(strong(self.strong_settings(dims), images, generator=generator), box), box)
