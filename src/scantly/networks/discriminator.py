"""Judges of segmentations: which kind of image a map belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from scantly.networks.blocks import CONV, DROP_CHANNELS, POOL_TO

__all__ = ["Discriminator"]

_WIDTHS = (64, 128, 256, 512)
_SLOPE, _DROPOUT = 0.2, 0.5
_CELLS = {2: 2, 3: 1}


class Discriminator(nn.Module):
    """Convolutional network that tells from a map and its image which of two kinds they are.

    That of the adversarial methods in the public code of SSL4MIS, after Zhang et al., "Deep Adversarial Networks for
    Biomedical Image Segmentation Utilizing Unannotated Images", MICCAI 2017, and of Li et al. (SASSNet), MICCAI 2020.
    Map and image enter by convolutions of their own, whose results are added; three more halve the sides to a
    sixteenth. Leaky ReLU (0.2) and dropout of whole channels (0.5) stand between the convolutions, in 2D not between
    the sum and the next one; the last is followed by leaky ReLU alone. With one image channel and four map channels it
    has 2,762,754 parameters in 2D, with one of both 11,020,290 in 3D.

    Deviation: averages over 2 x 2 cells in 2D, one in 3D, whatever the size of the image (there windows that fit
    256 x 256 and 96 x 96 x 96).

    Args:
        spatial_dims: 2 or 3.
        map_channels: Channels of the map.
        image_channels: Channels of the image.
        sides: Sides of the maps, 16 or more unless given; an axis that has come down to one voxel is halved no further.
    """

    def __init__(
        self,
        spatial_dims: Literal[2, 3],
        map_channels: int,
        image_channels: int,
        *,
        sides: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        left = [2 ** len(_WIDTHS)] * spatial_dims if sides is None else list(sides)

        def halving(inputs: int, outputs: int) -> nn.Module:
            kernel, stride = ([value if side > 1 else value - 1 for side in left] for value in (4, 2))
            return CONV[spatial_dims](inputs, outputs, kernel, stride=stride, padding=1)

        self.of_map = halving(map_channels, _WIDTHS[0])
        self.of_image = halving(image_channels, _WIDTHS[0])
        layers: list[nn.Module] = []
        for a, b in pairwise(_WIDTHS):
            left = [max(1, side // 2) for side in left]
            if layers or spatial_dims == 3:
                layers += [nn.LeakyReLU(_SLOPE), DROP_CHANNELS[spatial_dims](_DROPOUT)]
            layers.append(halving(a, b))
        cells = _CELLS[spatial_dims]
        self.layers = nn.Sequential(*layers, nn.LeakyReLU(_SLOPE))
        self.pool = POOL_TO[spatial_dims](cells)
        self.classify = nn.Linear(_WIDTHS[-1] * cells**spatial_dims, 2)

    def forward(self, maps: Tensor, images: Tensor) -> Tensor:
        """Logits of the two kinds, ``(B, 2)``.

        Args:
            maps: ``(B, map_channels, *spatial)``, with sides as given when it was made.
            images: ``(B, image_channels, *spatial)``.
        """
        judged: Tensor = self.classify(self.pool(self.layers(self.of_map(maps) + self.of_image(images))).flatten(1))
        return judged
