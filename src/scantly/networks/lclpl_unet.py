"""The six-level U-Net of the local contrastive loss."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import nn

from scantly.errors import ConfigError
from scantly.networks.blocks import BATCH_NORM, CONV, POOL, ConcatenatingUp, conv_layers, interpolation
from scantly.networks.encoder_decoder import Decoder, EncoderDecoder

__all__ = ["UNet6", "as_published"]

_PAD: dict[int, type[nn.Module]] = {2: nn.ZeroPad2d, 3: nn.ZeroPad3d}


def as_published(module: nn.Module) -> None:
    """Initialize convolutions from N(0, 2 / fan_in) and biases with 0; batch norm as in the public code.

    Epsilon is 1e-3 there, and running averages keep 0.99 of their value per step.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, tuple(BATCH_NORM.values())):
            part.eps, part.momentum = 1e-3, 0.01  # type: ignore[assignment]


class UNet6(EncoderDecoder):
    """U-Net of the local contrastive loss (Chaitanya et al., Medical Image Analysis 2023; public code), 2D and 3D.

    Every level of the encoder has two (Conv3 - batch norm - ReLU), max-pooling lies between them. A step up is
    nearest-neighbor upsampling, a convolution with kernel 2 (zeros beyond the last row and column) - batch norm -
    ReLU, concatenation, and two (Conv3 - batch norm - ReLU), at full resolution one. The head has two more and a last
    Conv3 without bias. With one channel and four classes in 2D it has 2,095,760 parameters. The paper is 2D; 3D has
    the same widths.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Image channels.
        out_channels: Classes, background included.
        widths: Channels per level, finest first, two levels or more. Image sides must be divisible by
            ``2 ** (levels - 1)``.
    """

    def __init__(
        self,
        spatial_dims: Literal[2, 3],
        in_channels: int,
        out_channels: int,
        *,
        widths: Sequence[int] = (16, 32, 64, 128, 128, 128),
    ) -> None:
        super().__init__()
        if len(widths) < 2:
            raise ConfigError(f"network.arguments.widths is {list(widths)}; give one number per level, two or more.")
        self.spatial_dims = spatial_dims
        self.widths = tuple(widths)
        self.factors = (2 ** (len(widths) - 1),) * spatial_dims
        self.encoder = nn.ModuleList(self._convs(a, b, 2) for a, b in pairwise([in_channels, *widths]))
        self.pool = POOL[spatial_dims](2)
        self.decoder = Decoder(
            ConcatenatingUp(nn.Identity(), self._upsample(deep, skip), self._convs(2 * skip, skip, 2 if level else 1))
            for level, (skip, deep) in reversed(list(enumerate(pairwise(widths))))
        )
        last = CONV[spatial_dims](widths[0], out_channels, 3, padding=1, bias=False)
        self.head = nn.Sequential(*self._convs(widths[0], widths[0], 2), last)
        as_published(self)

    def _convs(self, inputs: int, outputs: int, count: int) -> nn.Sequential:
        sides = pairwise([inputs, *[outputs] * count])
        return nn.Sequential(*(layer for a, b in sides for layer in conv_layers(self.spatial_dims, a, b)))

    def _upsample(self, deep: int, skip: int) -> nn.Sequential:
        dims = self.spatial_dims
        norm_act = conv_layers(dims, deep, skip, kernel=1)[1:]
        pad, conv = _PAD[dims]((0, 1) * dims), CONV[dims](deep, skip, 2)
        return nn.Sequential(interpolation("nearest", dims), pad, conv, *norm_act)
