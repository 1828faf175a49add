"""What the networks are built of, in 2D and 3D by the same code."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from scantly.errors import ConfigError, unknown_name

__all__ = [
    "BATCH_NORM",
    "CONV",
    "DROP_CHANNELS",
    "INSTANCE_NORM",
    "LINEAR",
    "POOL",
    "POOL_TO",
    "AddingUp",
    "ConcatenatingUp",
    "Upsampling",
    "conv_layers",
    "interpolation",
    "own_first",
]

CONV: dict[int, type[nn.Module]] = {2: nn.Conv2d, 3: nn.Conv3d}
POOL: dict[int, type[nn.Module]] = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
#: Averages over a given number of cells per axis.
POOL_TO: dict[int, type[nn.Module]] = {2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
#: Dropout of whole channels.
DROP_CHANNELS: dict[int, type[nn.Module]] = {2: nn.Dropout2d, 3: nn.Dropout3d}
_TRANSPOSED: dict[int, type[nn.Module]] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORM: dict[int, type[nn.Module]] = {0: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORM: dict[int, type[nn.Module]] = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
#: Name of linear interpolation along all axes.
LINEAR = {2: "bilinear", 3: "trilinear"}
_NORMS = ("batch", "instance", "group", "none")
_GROUPS = 16

Upsampling = Literal["transposed", "linear", "nearest"]
_UPSAMPLINGS = ("transposed", "linear", "nearest")


def _norm(name: str, spatial_dims: int, channels: int) -> list[nn.Module]:
    if name == "batch":
        return [BATCH_NORM[spatial_dims](channels)]
    if name == "instance":
        return [INSTANCE_NORM[spatial_dims](channels)]
    if name == "group":
        return [nn.GroupNorm(min(_GROUPS, channels), channels)]
    if name == "none":
        return []
    raise ConfigError(unknown_name("normalization in network.arguments.norm", name, _NORMS))


def conv_layers(
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    *,
    kernel: int = 3,
    stride: int = 1,
    transposed: bool = False,
    norm: str = "batch",
    slope: float = 0.0,
) -> list[nn.Module]:
    """Convolution (with bias), normalization, rectifier.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel: Side of the kernel; padding keeps the size at stride 1, and divides it by the stride else.
        stride: Stride; 2 with kernel 2 halves the sides, transposed it doubles them.
        transposed: Transposed convolution.
        norm: ``batch``, ``instance`` (no affine parameters, no running statistics), ``group`` (16 groups, or one
            per channel where there are fewer) or ``none``.
        slope: Slope of the rectifier for negative values; 0 is ReLU.

    Raises:
        ConfigError: for another normalization.
    """
    kind = (_TRANSPOSED if transposed else CONV)[spatial_dims]
    conv = kind(in_channels, out_channels, kernel, stride=stride, padding=(kernel - stride + 1) // 2)
    act = nn.LeakyReLU(slope, inplace=True) if slope else nn.ReLU(inplace=True)
    return [conv, *_norm(norm, spatial_dims, out_channels), act]


def interpolation(kind: str, spatial_dims: int, *, align_corners: bool = True) -> nn.Upsample:
    """Interpolation to the double size, ``linear`` or ``nearest``.

    Raises:
        ConfigError: for another kind.
    """
    if kind == "linear":
        return nn.Upsample(scale_factor=2, mode=LINEAR[spatial_dims], align_corners=align_corners)
    if kind == "nearest":
        return nn.Upsample(scale_factor=2, mode="nearest")
    raise ConfigError(unknown_name("upsampling of a decoder", kind, _UPSAMPLINGS))


def own_first(own: str, kinds: tuple[str, ...]) -> tuple[str, ...]:
    """The kinds of upsampling, the network's own in front."""
    return (own, *(kind for kind in kinds if kind != own))


class ConcatenatingUp(nn.Module):
    """One level up: change channels, double the size, concatenate the skip in front, convolve.

    Args:
        reduce: Changes the channels of the deeper level; ``nn.Identity()`` keeps them.
        upsample: Doubles its size.
        block: Convolutions on skip and upsampled features.
    """

    def __init__(self, reduce: nn.Module, upsample: nn.Module, block: nn.Module) -> None:
        super().__init__()
        self.reduce = reduce
        self.upsample = upsample
        self.block = block

    def forward(self, deep: Tensor, skip: Tensor) -> Tensor:
        merged: Tensor = self.block(torch.cat([skip, self.upsample(self.reduce(deep))], dim=1))
        return merged


class AddingUp(nn.Module):
    """One level up: double the size, add the skip, convolve.

    Args:
        upsample: Doubles the deeper level's size and gives it the skip's channels.
        block: Convolutions on the sum.
    """

    def __init__(self, upsample: nn.Module, block: nn.Module) -> None:
        super().__init__()
        self.upsample = upsample
        self.block = block

    def merge(self, deep: Tensor, skip: Tensor) -> Tensor:
        """What the block works on."""
        merged: Tensor = self.upsample(deep) + skip
        return merged

    def forward(self, deep: Tensor, skip: Tensor) -> Tensor:
        decoded: Tensor = self.block(self.merge(deep, skip))
        return decoded
