"""The community's U-Nets."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import nn

from scantly.errors import ConfigError
from scantly.networks.blocks import CONV, POOL, ConcatenatingUp, Upsampling, conv_layers, interpolation, own_first
from scantly.networks.encoder_decoder import Decoder, EncoderDecoder

__all__ = ["UNet", "UNet3D"]


def _block(spatial_dims: int, in_channels: int, out_channels: int, dropout: float) -> nn.Sequential:
    """Conv3 - BN - LeakyReLU - Dropout - Conv3 - BN - LeakyReLU."""
    return nn.Sequential(
        *conv_layers(spatial_dims, in_channels, out_channels, slope=0.01),
        nn.Dropout(dropout),
        *conv_layers(spatial_dims, out_channels, out_channels, slope=0.01),
    )


class UNet(EncoderDecoder):
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
        upsampling: ``linear`` or ``nearest`` after a 1x1 convolution that halves the channels, or ``transposed``
            convolution (1,944,324 parameters).
    """

    def __init__(
        self,
        spatial_dims: Literal[2, 3],
        in_channels: int,
        out_channels: int,
        *,
        widths: Sequence[int] = (16, 32, 64, 128, 256),
        dropout: Sequence[float] = (0.05, 0.1, 0.2, 0.3, 0.5),
        upsampling: Upsampling = "linear",
    ) -> None:
        super().__init__()
        if len(widths) != len(dropout):
            raise ConfigError(
                f"network.arguments.widths has {len(widths)} levels, dropout {len(dropout)}; give one value per level."
            )
        self.spatial_dims = spatial_dims
        self.widths = tuple(widths)
        self.factors = (2 ** (len(widths) - 1),) * spatial_dims
        levels = zip([in_channels, *widths[:-1]], widths, dropout, strict=True)
        self.encoder = nn.ModuleList(_block(spatial_dims, a, b, p) for a, b, p in levels)
        self.pool = POOL[spatial_dims](2)
        self.decoder = self.new_decoder(upsampling)
        self.upsamplings = own_first(upsampling, ("linear", "transposed", "nearest"))
        self.head = CONV[spatial_dims](widths[0], out_channels, 3, padding=1)

    def new_decoder(self, upsampling: str) -> Decoder:
        return Decoder(self._up(deep, skip, upsampling) for skip, deep in reversed(list(pairwise(self.widths))))

    def _up(self, deep: int, skip: int, kind: str) -> ConcatenatingUp:
        dims = self.spatial_dims
        if kind == "transposed":
            transposed = conv_layers(dims, deep, skip, kernel=2, stride=2, transposed=True)[0]
            return ConcatenatingUp(nn.Identity(), transposed, _block(dims, 2 * skip, skip, 0.0))
        return ConcatenatingUp(CONV[dims](deep, skip, 1), interpolation(kind, dims), _block(dims, 2 * skip, skip, 0.0))


class UNet3D(EncoderDecoder):
    """The 3D U-Net of the semi-supervised literature's BraTS experiments (public code of SSL4MIS); 2D too.

    Widths 16-32-64-128-256, two (Conv3 - instance norm - ReLU) per level, max-pooling down, linear upsampling
    (``align_corners=False``) of all channels up, concatenated skips, dropout after the bottom block and before
    the 1x1 head, Kaiming initialization. The instance norm has neither affine parameters nor running
    statistics; the public code calls its flag "batchnorm". One channel and two classes in 3D: 5,884,050
    parameters.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Image channels.
        out_channels: Classes, background included.
        widths: Channels per level, finest first. Image sides must be divisible by ``2 ** (levels - 1)``.
        dropout: Probability with which a value is dropped at both places.
        norm: ``instance``, ``batch``, ``group`` or ``none``.
    """

    def __init__(
        self,
        spatial_dims: Literal[2, 3],
        in_channels: int,
        out_channels: int,
        *,
        widths: Sequence[int] = (16, 32, 64, 128, 256),
        dropout: float = 0.3,
        norm: str = "instance",
    ) -> None:
        super().__init__()
        self.spatial_dims = spatial_dims
        self.widths = tuple(widths)
        self.factors = (2 ** (len(widths) - 1),) * spatial_dims

        def block(inputs: int, outputs: int, *, drops: bool) -> nn.Sequential:
            layers = [
                *conv_layers(spatial_dims, inputs, outputs, norm=norm),
                *conv_layers(spatial_dims, outputs, outputs, norm=norm),
            ]
            return nn.Sequential(*layers, *([nn.Dropout(dropout)] if drops else []))

        self.encoder = nn.ModuleList(
            block(a, b, drops=level == len(widths)) for level, (a, b) in enumerate(pairwise([in_channels, *widths]), 1)
        )
        self.pool = POOL[spatial_dims](2)
        self.decoder = Decoder(
            ConcatenatingUp(
                nn.Identity(),
                interpolation("linear", spatial_dims, align_corners=False),
                block(deep + skip, skip, drops=level == 0),
            )
            for level, (skip, deep) in reversed(list(enumerate(pairwise(widths))))
        )
        self.head = CONV[spatial_dims](widths[0], out_channels, 1)
        self.apply(self.initialize)

    def initialize(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(module.weight)
