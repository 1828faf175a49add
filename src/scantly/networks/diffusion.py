"""Segmentation by diffusion: the noise process, and a network that restores label maps."""

from __future__ import annotations

import math
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from scantly.errors import ConfigError
from scantly.networks.blocks import BATCH_NORM, INSTANCE_NORM
from scantly.networks.skips import SkipNetwork

__all__ = ["DiffusionNetwork", "NoiseSchedule", "signed_one_hot", "time_embedding"]

_SINUSOID, _HIDDEN = 128, 512
_SLOWEST = 10_000.0
_NORMS = (*BATCH_NORM.values(), *INSTANCE_NORM.values(), nn.GroupNorm)


def signed_one_hot(labels: Tensor, classes: int) -> Tensor:
    """Label maps as a diffusion process takes them: 1 for a voxel's class, -1 for the others.

    Args:
        labels: ``(B, *spatial)``, integers in ``[0, classes)``.
        classes: Number of classes C.

    Returns:
        ``(B, C, *spatial)``, float32.
    """
    return 2 * functional.one_hot(labels, classes).movedim(-1, 1).float() - 1


def time_embedding(t: Tensor, width: int = _SINUSOID) -> Tensor:
    """Sines, then cosines, of a step number at frequencies from 1 down to 1 / 10,000.

    ``exp(-ln(10000) i / (h - 1))`` with ``h = width / 2``, as in Ho et al., "Denoising Diffusion Probabilistic Models",
    NeurIPS 2020 (public code).

    Args:
        t: Steps, ``(B,)``.
        width: Even, 4 or more.

    Returns:
        ``(B, width)``, float32.

    Example:
        >>> time_embedding(torch.tensor([10]), 4)
        tensor([[-0.5440,  0.0010, -0.8391,  1.0000]])
    """
    half = width // 2
    frequencies = torch.exp(-math.log(_SLOWEST) / (half - 1) * torch.arange(half, device=t.device))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class NoiseSchedule(nn.Module):
    """How much of a clean map is left after t steps of Gaussian noise, t from 0 to T - 1.

    ``Y_t = sqrt(a_t) Y_0 + sqrt(1 - a_t) noise`` with ``a_t`` the product of ``1 - beta_i`` up to t and linear betas
    (Ho et al., NeurIPS 2020, equation 4); and the deterministic way back (Song et al., "Denoising Diffusion Implicit
    Models", ICLR 2021, equation 12 with sigma = 0).

    Args:
        steps: T.
        betas: First and last beta.

    Attributes:
        kept: ``a_t``, the share of the variance that is the map's, ``(T,)``, float64. Not in ``state_dict``: it follows
            from the settings.

    Example:
        >>> [round(float(NoiseSchedule().kept[t]), 6) for t in (0, 99, 499)]
        [0.9999, 0.897018, 0.078587]
    """

    kept: Tensor

    def __init__(self, steps: int = 1000, betas: tuple[float, float] = (1e-4, 2e-2)) -> None:
        super().__init__()
        self.steps = steps
        kept = (1 - torch.linspace(*betas, steps, dtype=torch.float64)).cumprod(0)
        self.register_buffer("kept", kept, persistent=False)

    def noised(self, clean: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Maps after t steps.

        Args:
            clean: ``Y_0``, ``(B, C, *spatial)``.
            t: Step of each row, ``(B,)`` int64.
            noise: Standard normal numbers, shaped as ``clean``.
        """
        signal, spread = (self._rows(weight, t, clean) for weight in (self.kept, 1 - self.kept))
        return signal * clean + spread * noise

    def step_back(self, noisy: Tensor, clean: Tensor, t: Tensor, earlier: Tensor) -> Tensor:
        """What a map would have been at an earlier step, if ``clean`` is what it came from.

        Args:
            noisy: ``Y_t``, ``(B, C, *spatial)``.
            clean: The estimate of ``Y_0``.
            t: Step of each row, ``(B,)`` int64.
            earlier: Step to go to, ``(B,)`` int64, below ``t``.
        """
        noise = (noisy - self._rows(self.kept, t, noisy) * clean) / self._rows(1 - self.kept, t, noisy)
        return self.noised(clean, earlier, noise)

    def way_back(self, count: int) -> list[int]:
        """Steps at which a map is restored, from ``T - 1`` to 0 in equal distances, rounded; one alone is ``T - 1``.

        There are at most T.

        Example:
            >>> NoiseSchedule().way_back(4)
            [999, 666, 333, 0]
        """
        return [
            round(t) for t in torch.linspace(self.steps - 1, 0, min(count, self.steps), dtype=torch.float64).tolist()
        ]

    @staticmethod
    def _rows(weights: Tensor, t: Tensor, like: Tensor) -> Tensor:
        """Square roots of weights at the rows' steps, taken in float64 and then cast."""
        return weights[t].sqrt().to(like.dtype).view(-1, *[1] * (like.ndim - 1))


class DiffusionNetwork(nn.Module):
    """A segmentation network that restores label maps from noisy ones, given the image and the step.

    Image and noisy map enter as channels. The step's embedding (128 sines and cosines, a linear layer to 512, SiLU, a
    linear layer), through SiLU and a linear layer per place, is added after a normalization: in each level, on the way
    down and up, after all normalizations but the last one. In the V-Net these are those of the convolutions
    that change the size and of all but the last one of a block, in the U-Net the first of each block, as Diff-UNet
    (Xing et al., arXiv 2303.10326) and DiffVNet (Wang and Li, NeurIPS 2023) do. It predicts the clean map, as logits.

    Args:
        network: With ``image channels + classes`` input channels and ``classes`` outputs; its normalizations are given
            hooks.
        classes: Channels C of a label map, background included.
        schedule: The noise process.

    Raises:
        ConfigError: if the network has no normalizations at which the step could enter.
    """

    def __init__(self, network: SkipNetwork, classes: int, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.network = network
        self.schedule = schedule
        self.classes = classes
        self.embedding = nn.Sequential(nn.Linear(_SINUSOID, _HIDDEN), nn.SiLU(), nn.Linear(_HIDDEN, _HIDDEN), nn.SiLU())
        backbone = network.backbone
        places = [norm for level in [*backbone.encoder, *backbone.decoder] for norm in _normalizations(level)[:-1]]
        if not places:
            raise ConfigError(
                "the diffusion network is told the step behind normalizations, and this network has too few; remove "
                "network.arguments.norm, or choose another network.name."
            )
        self.shifts = nn.ModuleList(nn.Linear(_HIDDEN, _channels(norm)) for norm in places)
        self._shifts_now: list[Tensor] = []
        for index, norm in enumerate(places):
            norm.register_forward_hook(partial(self._shift, index))

    def _shift(self, index: int, norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:  # noqa: ARG002
        shift = self._shifts_now[index]
        return output + shift.view(*shift.shape, *[1] * (output.ndim - 2))

    def forward(self, images: Tensor, noisy: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Restore label maps in one step.

        Args:
            images: ``(B, M, *spatial)``.
            noisy: ``Y_t``, ``(B, C, *spatial)``.
            t: Step of each row, ``(B,)`` int64.

        Returns:
            Logits of the clean map, ``(B, C, *spatial)``, and the decoder's features, see
            :class:`SkipNetwork`.
        """
        embedded = self.embedding(time_embedding(t))
        self._shifts_now = [shift(embedded) for shift in self.shifts]
        try:
            restored: tuple[Tensor, Tensor] = self.network(torch.cat([images, noisy.to(images.dtype)], dim=1))
            return restored
        finally:
            self._shifts_now = []

    def sample(self, images: Tensor, noise: Tensor, *, steps: int, clip: bool = False) -> Tensor:
        """Restore label maps from noise, step by step.

        Args:
            images: ``(B, M, *spatial)``.
            noise: Standard normal numbers, ``(B, C, *spatial)``.
            steps: Passes of the network, at equal distances from the last step to 0.
            clip: The estimate of the clean map between two steps is ``clip(logits, -1, 1)`` instead of
                ``2 softmax - 1``.

        Returns:
            Logits of the last pass, ``(B, C, *spatial)``.
        """
        times = [torch.full((len(images),), t, device=images.device) for t in self.schedule.way_back(steps)]
        noisy = noise
        for t, earlier in zip(times, [*times[1:], None], strict=True):
            logits = self(images, noisy, t)[0]
            if earlier is not None:
                clean = logits.float().clamp(-1, 1) if clip else 2 * logits.float().softmax(1) - 1
                noisy = self.schedule.step_back(noisy, clean, t, earlier)
        return cast(Tensor, logits)


def _normalizations(level: nn.Module) -> list[nn.Module]:
    """The normalizations of a level, in the order in which they are passed."""
    return [module for module in level.modules() if isinstance(module, _NORMS)]


def _channels(norm: nn.Module) -> int:
    return int(norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features)  # type: ignore[arg-type]
