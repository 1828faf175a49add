"""The community's V-Net."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, cast

from torch import Tensor, nn

from scantly.errors import ConfigError
from scantly.networks.blocks import CONV, DROP_CHANNELS, AddingUp, Upsampling, conv_layers, interpolation, own_first
from scantly.networks.encoder_decoder import Decoder, EncoderDecoder

__all__ = ["VNet"]


class VNet(EncoderDecoder):
    """V-Net as the semi-supervised literature uses it on LA and Pancreas (public code of UA-MT), in 3D or 2D.

    After Milletari et al., "V-Net: Fully Convolutional Neural Networks for Volumetric Medical Image
    Segmentation", 3DV 2016, but with 3x3x3 kernels, batch norm, and without the residual connections. Widths
    16-32-64-128-256 with 1, 2, 3, 3, 3 convolutions per level on the way down and 3, 3, 2, 1 up; convolutions of
    kernel and stride 2 halve, transposed ones double the sides (each with norm and ReLU); the skip is added. In
    training, whole channels are dropped after the bottom block and after the last decoder block. One channel
    and two classes in 3D: 9,448,866 parameters.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Image channels.
        out_channels: Classes, background included.
        widths: Channels per level, finest first. Image sides must be divisible by ``2 ** (levels - 1)``.
        blocks: Convolutions per level, the same on the way up; ``None``: 1, 2, then 3.
        norm: ``batch``, ``instance`` (no affine parameters), ``group`` (16 groups) or ``none``.
        dropout: Probability with which a channel is dropped at both places.
        upsampling: ``transposed`` convolution, or ``linear`` or ``nearest`` interpolation and a 3x3x3 convolution.
    """

    def __init__(
        self,
        spatial_dims: Literal[2, 3],
        in_channels: int,
        out_channels: int,
        *,
        widths: Sequence[int] = (16, 32, 64, 128, 256),
        blocks: Sequence[int] | None = None,
        norm: str = "batch",
        dropout: float = 0.5,
        upsampling: Upsampling = "transposed",
    ) -> None:
        super().__init__()
        self.spatial_dims = spatial_dims
        self.widths = tuple(widths)
        self.factors = (2 ** (len(widths) - 1),) * spatial_dims
        self.blocks = tuple(min(level + 1, 3) for level in range(len(widths))) if blocks is None else tuple(blocks)
        if len(self.blocks) != len(widths):
            raise ConfigError(
                f"network.arguments.widths has {len(widths)} levels, blocks {len(self.blocks)}; give one number of "
                "convolutions per level."
            )
        self._norm, self._dropout = norm, dropout
        levels = [nn.Sequential(*self._convs(in_channels, 0))]
        for level, (fine, coarse) in enumerate(pairwise(widths), start=1):
            down = conv_layers(spatial_dims, fine, coarse, kernel=2, stride=2, norm=norm)
            levels.append(nn.Sequential(*down, *self._convs(coarse, level)))
        levels[-1].append(DROP_CHANNELS[spatial_dims](dropout))
        self.encoder = nn.ModuleList(levels)
        self.pool = nn.Identity()
        self.decoder = self.new_decoder(upsampling)
        self.upsamplings = own_first(upsampling, ("transposed", "linear", "nearest"))
        self.head = CONV[spatial_dims](widths[0], out_channels, 1)

    def _convs(self, in_channels: int, level: int) -> list[nn.Module]:
        width = self.widths[level]
        inputs = [in_channels, *[width] * (self.blocks[level] - 1)]
        return [
            layer for channels in inputs for layer in conv_layers(self.spatial_dims, channels, width, norm=self._norm)
        ]

    def new_decoder(self, upsampling: str) -> Decoder:
        steps = []
        for level, (fine, coarse) in reversed(list(enumerate(pairwise(self.widths)))):
            up = nn.Sequential(*self._upsample(coarse, fine, upsampling))
            block = nn.Sequential(*self._convs(fine, level))
            steps.append(AddingUp(up, block))
        block.append(DROP_CHANNELS[self.spatial_dims](self._dropout))
        return Decoder(steps)

    @property
    def pyramid_widths(self) -> tuple[int, ...]:
        return (*self.widths[-2::-1], self.widths[0])

    def pyramid(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Features of every level on the way up, coarsest first; costs no more than :meth:`decode_features`.

        Args:
            features: Those of :meth:`encode`.

        Returns:
            The sum of upsampled features and skip at every decoder level, as the public code of ARCO takes them, then
            the features of :meth:`decode_features`, from which ``head`` makes logits; the last two have one size.
        """
        maps, x = [], features[-1]
        for step, skip in zip(self.decoder, reversed(features[:-1]), strict=True):
            step = cast(AddingUp, step)
            maps.append(step.merge(x, skip))
            x = step.block(maps[-1])
        return [*maps, x]

    def _upsample(self, coarse: int, fine: int, kind: str) -> list[nn.Module]:
        dims, norm = self.spatial_dims, self._norm
        if kind == "transposed":
            return conv_layers(dims, coarse, fine, kernel=2, stride=2, transposed=True, norm=norm)
        return [interpolation(kind, dims), *conv_layers(dims, coarse, fine, norm=norm)]
