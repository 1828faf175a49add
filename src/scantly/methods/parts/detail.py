"""High-frequency Mamba blocks as a method's settings have them."""

from __future__ import annotations

from functools import partial
from typing import Literal

from pydantic import Field

from scantly.methods.base import MethodConfig
from scantly.networks import EncoderDecoder
from scantly.networks.high_frequency import Extractor
from scantly.networks.mamba import HighFrequencyMamba, HighFrequencySkips

__all__ = ["DetailConfig"]

_LEVELS = (3, 4)


class DetailConfig(MethodConfig):
    """Settings of Diff-CL's high-frequency Mamba blocks; that there are such blocks is the paper's, all else ours."""

    use_hf: bool = Field(True, description="The high-frequency Mamba blocks.")
    hf_in: tuple[Literal["cs", "ds"], ...] = Field(("cs",), description="Networks that have Mamba blocks.")
    hf_levels: tuple[int, ...] | None = Field(
        None, description="Levels whose skip has one, 1 the finest; none: 3 and 4, else the deepest there is."
    )
    hf_extractor: Extractor = Field("avgpool", description="How high frequencies are extracted.")
    hf_cutoff: float = Field(0.125, ge=0, lt=0.5, description="Cutoff of the extractor fft, cycles per voxel.")
    hf_directions: int = Field(2, description="Scans: 1, 2, or along all orders of the axes 4 (2D), 6 (3D).")
    hf_token_stride: int = Field(1, ge=1, description="Side of the boxes of voxels that become one token.")
    hf_reduction: int = Field(2, ge=1, description="Channels of the features per channel of a token.")
    hf_state: int = Field(8, ge=1, description="Numbers that a scan remembers per inner channel.")
    hf_checkpoint: bool = Field(False, description="Compute the blocks again for the gradient: less memory.")

    def high_frequency_skips(self, backbone: EncoderDecoder) -> HighFrequencySkips:
        """Blocks for the skip connections of a network."""
        deepest = len(backbone.widths) - 1
        usual = [level for level in _LEVELS if level <= deepest] or [deepest]
        block = partial(
            HighFrequencyMamba,
            backbone.spatial_dims,
            reduction=self.hf_reduction,
            state=self.hf_state,
            extractor=self.hf_extractor,
            cutoff=self.hf_cutoff,
            directions=self.hf_directions,
            token_stride=self.hf_token_stride,
            checkpoint=self.hf_checkpoint,
        )
        return HighFrequencySkips(backbone.widths, usual if self.hf_levels is None else self.hf_levels, block)
