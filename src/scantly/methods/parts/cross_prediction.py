"""One predictor made of a convolutional and a diffusion network."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from scantly.networks.diffusion import DiffusionNetwork
from scantly.networks.skips import SkipNetwork

__all__ = ["CrossPredictor"]


class CrossPredictor(nn.Module):
    """Predicts with the convolutional network, the diffusion network, or both.

    Args:
        cs: The convolutional network.
        ds: The diffusion network, where there is one.
        infer: ``cs``: its logits; ``ds``: those of a sample from noise; ``mean``: logarithms of the mean probabilities.
        steps: Passes of a sample.
        seed: Of the noise.
        clip: See :meth:`DiffusionNetwork.sample`.

    Attributes:
        factors: What each side of an image must be divisible by.

    Raises:
        ValueError: if the diffusion network is asked for and not there.
    """

    def __init__(
        self,
        cs: SkipNetwork,
        ds: DiffusionNetwork | None,
        *,
        infer: Literal["cs", "ds", "mean"],
        steps: int,
        seed: int,
        clip: bool,
    ) -> None:
        super().__init__()
        if ds is None and infer != "cs":
            raise ValueError(f"infer={infer} needs a diffusion network.")
        self.cs, self.ds = cs, ds
        self.factors = cs.backbone.factors
        self.infer, self.steps, self.seed, self.clip = infer, steps, seed, clip

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, classes, *spatial)``; the same for an image whatever batch it is in."""
        if self.ds is None or self.infer == "cs":
            logits: Tensor = self.cs(images)[0]
            return logits
        sampled = self.ds.sample(images, self._noise(images, self.ds.classes), steps=self.steps, clip=self.clip)
        if self.infer == "ds":
            return sampled
        probs = [logits.float().softmax(1) for logits in (self.cs(images)[0], sampled)]
        return (torch.stack(probs).mean(0) + torch.finfo(torch.float32).tiny).log()

    def _noise(self, images: Tensor, classes: int) -> Tensor:
        """One map for all rows, drawn on the CPU: the same on every device, and no global generator is touched."""
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(1, classes, *images.shape[2:], generator=generator)
        return noise.to(images.device).expand(len(images), *noise.shape[1:])
