"""An encoder-decoder with high-frequency Mamba blocks in its skip connections."""

from __future__ import annotations

from torch import Tensor, nn

from scantly.networks.encoder_decoder import EncoderDecoder
from scantly.networks.mamba import HighFrequencySkips

__all__ = ["SkipNetwork"]


class SkipNetwork(nn.Module):
    """A segmentation network whose encoder features pass Mamba blocks on their way to the decoder.

    Args:
        backbone: The network.
        skips: The blocks; ``None``: features pass unchanged.
    """

    def __init__(self, backbone: EncoderDecoder, skips: HighFrequencySkips | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.skips = skips

    def undecayed(self) -> list[nn.Parameter]:
        """Parameters that weight decay leaves alone."""
        return [] if self.skips is None else self.skips.undecayed()

    def gates(self) -> dict[int, Tensor]:
        """How much each block adds to the skip of its level, by level; scalars."""
        return {} if self.skips is None else self.skips.gates()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the features from which the head makes them.

        Args:
            images: ``(B, C, *spatial)``.

        Returns:
            ``(B, classes, *spatial)`` and ``(B, widths[0], *spatial)``.
        """
        features = self.backbone.encode(images)
        decoded = self.backbone.decode_features(features if self.skips is None else self.skips(features))
        return self.backbone.head(decoded), decoded
