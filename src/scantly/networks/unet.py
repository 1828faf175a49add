"""The community's U-Net."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from scantly.errors import ConfigError

__all__ = ["UNet"]

_CONV = {2: nn.Conv2d, 3: nn.Conv3d}
_NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_POOL = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
_UPSAMPLE = {2: "bilinear", 3: "trilinear"}


class _Block(nn.Sequential):
    """Conv3 - BN - LeakyReLU - Dropout - Conv3 - BN - LeakyReLU."""

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int, dropout: float) -> None:
        conv, norm = _CONV[spatial_dims], _NORM[spatial_dims]
        super().__init__(
            conv(in_channels, out_channels, 3, padding=1),
            norm(out_channels),
            nn.LeakyReLU(0.01, inplace=True),
            nn.Dropout(dropout),
            conv(out_channels, out_channels, 3, padding=1),
            norm(out_channels),
            nn.LeakyReLU(0.01, inplace=True),
        )


class _Up(nn.Module):
    """Halve the channels (1x1 conv), double the size, concatenate the skip, convolve."""

    def __init__(self, spatial_dims: int, deep: int, skip: int, dropout: float) -> None:
        super().__init__()
        self.reduce = _CONV[spatial_dims](deep, skip, 1)
        self.upsample = nn.Upsample(scale_factor=2, mode=_UPSAMPLE[spatial_dims], align_corners=True)
        self.block = _Block(spatial_dims, 2 * skip, skip, dropout)

    def forward(self, deep: Tensor, skip: Tensor) -> Tensor:
        merged: Tensor = self.block(torch.cat([skip, self.upsample(self.reduce(deep))], dim=1))
        return merged


class UNet(nn.Module):
    """U-Net as the semi-supervised literature uses it on ACDC (public code of SSL4MIS), in 2D or 3D.

    Widths 16-32-64-128-256, max-pooling down, linear upsampling (``align_corners=True``) up. With one
    channel and four classes in 2D it has 1,813,764 parameters. The published configuration says
    ``bilinear: False``, but the flag never reaches the up-block; what the papers trained is this one.
    Linear upsampling has no deterministic CUDA backward: on a GPU, repeated runs agree to rounding only.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Image channels.
        out_channels: Classes, background included.
        widths: Channels per level, finest first. Image sides must be divisible by ``2 ** (levels - 1)``.
        dropout: Dropout probability in the encoder block of each level; the decoder has none.
    """

    def __init__(
        self,
        spatial_dims: Literal[2, 3],
        in_channels: int,
        out_channels: int,
        *,
        widths: Sequence[int] = (16, 32, 64, 128, 256),
        dropout: Sequence[float] = (0.05, 0.1, 0.2, 0.3, 0.5),
    ) -> None:
        super().__init__()
        if len(widths) != len(dropout):
            raise ConfigError(
                f"network.arguments.widths has {len(widths)} levels, dropout {len(dropout)}; give one value per level."
            )
        self.spatial_dims = spatial_dims
        self.widths = tuple(widths)
        levels = zip([in_channels, *widths[:-1]], widths, dropout, strict=True)
        self.encoder = nn.ModuleList(_Block(spatial_dims, a, b, p) for a, b, p in levels)
        self.pool = _POOL[spatial_dims](2)
        self.decoder = nn.ModuleList(_Up(spatial_dims, b, a, 0.0) for a, b in reversed(list(pairwise(widths))))
        self.head = _CONV[spatial_dims](widths[0], out_channels, 3, padding=1)

    def encode(self, images: Tensor) -> list[Tensor]:
        """Features of every level, finest first.

        Args:
            images: ``(B, C, *spatial)``.

        Returns:
            One tensor per level, ``(B, widths[i], *spatial / 2**i)``.
        """
        factor = 2 ** (len(self.encoder) - 1)
        if any(side % factor for side in images.shape[2:]):
            raise ConfigError(
                f"this U-Net halves its input {len(self.encoder) - 1} times, so sides must be multiples of {factor}; "
                f"got {tuple(images.shape[2:])}. Choose another --size."
            )
        features = [self.encoder[0](images)]
        for block in self.encoder[1:]:
            features.append(block(self.pool(features[-1])))
        return features

    def decode(self, features: Sequence[Tensor]) -> Tensor:
        """Logits ``(B, classes, *spatial)`` from the features of :meth:`encode`."""
        x = features[-1]
        for up, skip in zip(self.decoder, reversed(features[:-1]), strict=True):
            x = up(x, skip)
        logits: Tensor = self.head(x)
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, classes, *spatial)``."""
        return self.decode(self.encode(images))
