"""A U-Net whose depth, kernels and strides are planned from the data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from monai.networks.blocks.dynunet_block import UnetBasicBlock, UnetOutBlock, UnetUpBlock
from torch import Tensor, nn

from scantly.errors import ConfigError
from scantly.networks.encoder_decoder import Decoder, EncoderDecoder

__all__ = ["DynUNet"]

_NORM = ("INSTANCE", {"affine": True})
_LARGEST_WIDTH = {2: 512, 3: 320}
_SLOPE = 0.01


class DynUNet(EncoderDecoder):
    """U-Net as nnU-Net plans it, of MONAI's blocks.

    Isensee et al., "nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation",
    Nature Methods 2021: two (conv - instance norm - leaky ReLU) per level, strided convolutions down, transposed
    convolutions up, concatenated skips; a level's convolutions have the same kernel on both ways. Kernels and
    strides come from the plan (fields ``kernel_sizes`` and ``strides``), so that thick slices are neither mixed
    nor thinned out before the planes are as coarse as they are thick.

    Deviations from nnU-Net: convolutions before a normalization have no bias (it would have no effect), and the
    coarsest decoder level has no head under deep supervision, since its weight is 0.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Image channels.
        out_channels: Classes, background included.
        kernel_sizes: Kernel per level, finest first, one number per axis, ``(z, y, x)`` or ``(y, x)``.
        strides: Stride of each level's first convolution; of the finest level all 1.
        widths: Channels per level; ``None``: 32, doubled from level to level up to 320 (2D: 512).
        deep_supervision: Heads on the coarser decoder levels too, for :meth:`decode_all`.
    """

    def __init__(
        self,
        spatial_dims: Literal[2, 3],
        in_channels: int,
        out_channels: int,
        *,
        kernel_sizes: Sequence[Sequence[int]],
        strides: Sequence[Sequence[int]],
        widths: Sequence[int] | None = None,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        _check_topology(spatial_dims, kernel_sizes, strides, widths)
        depth = len(strides)
        largest = _LARGEST_WIDTH[spatial_dims]
        self.spatial_dims = spatial_dims
        self.widths = tuple(widths) if widths is not None else tuple(min(32 * 2**i, largest) for i in range(depth))
        self.factors = tuple(math.prod(axis) for axis in zip(*strides, strict=True))
        self.deep_supervision = deep_supervision
        inputs = [in_channels, *self.widths[:-1]]
        self.encoder = nn.ModuleList(
            UnetBasicBlock(spatial_dims, inputs[i], self.widths[i], tuple(kernel_sizes[i]), tuple(strides[i]), _NORM)
            for i in range(depth)
        )
        self.pool = nn.Identity()
        self.decoder = Decoder(
            UnetUpBlock(
                spatial_dims,
                self.widths[i + 1],
                self.widths[i],
                tuple(kernel_sizes[i]),
                1,
                tuple(strides[i + 1]),
                _NORM,
            )
            for i in reversed(range(depth - 1))
        )
        self.head = UnetOutBlock(spatial_dims, self.widths[0], out_channels)
        coarser = range(1, depth - 2) if deep_supervision else ()
        self.coarser_heads = nn.ModuleList(UnetOutBlock(spatial_dims, self.widths[i], out_channels) for i in coarser)
        self.apply(self.initialize)

    def initialize(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            nn.init.kaiming_normal_(module.weight, a=_SLOPE)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def decode_all(self, features: Sequence[Tensor]) -> list[Tensor]:
        heads = [self.head, *self.coarser_heads]
        decoded = self.decoder(features)
        return [head(x) for head, x in zip(heads, decoded[: len(heads)], strict=True)]


def _check_topology(
    spatial_dims: int,
    kernel_sizes: Sequence[Sequence[int]],
    strides: Sequence[Sequence[int]],
    widths: Sequence[int] | None,
) -> None:
    counts = {len(kernel_sizes), len(strides), *([] if widths is None else [len(widths)])}
    if len(counts) != 1 or len(strides) < 2:
        raise ConfigError(
            f"network dynunet has {len(kernel_sizes)} kernel_sizes, {len(strides)} strides and "
            f"{'planned' if widths is None else len(widths)} widths; give as many of each, for two levels or more."
        )
    for name, entries in (("kernel_sizes", kernel_sizes), ("strides", strides)):
        for entry in entries:
            if len(entry) != spatial_dims or min(entry) < 1:
                raise ConfigError(
                    f"network dynunet: {list(entry)} in {name} is not one positive number per axis; "
                    f"give {spatial_dims} numbers."
                )
    if set(strides[0]) != {1}:
        raise ConfigError(f"network dynunet starts with stride {list(strides[0])}; the finest level has stride 1.")
