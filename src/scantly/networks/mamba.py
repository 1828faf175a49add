"""State-space attention to high frequencies in skip connections."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint as recomputed

from scantly.errors import ConfigError
from scantly.networks.blocks import CONV, LINEAR
from scantly.networks.high_frequency import Extractor, high_frequency
from scantly.networks.precision import without_autocast
from scantly.networks.selective_scan import selective_scan

__all__ = ["HighFrequencyMamba", "HighFrequencySkips", "MambaMixer"]

_EXPAND = 2
_KERNEL = 4
_CHANNELS_PER_RANK = 16
_STEPS = (1e-3, 1e-1)
#: Numbers of scans: one, forward and backward, or both along every cyclic order of the axes.
_DIRECTIONS = {2: (1, 2, 4), 3: (1, 2, 6)}
_POOL: dict[int, Callable[..., Tensor]] = {2: functional.adaptive_avg_pool2d, 3: functional.adaptive_avg_pool3d}


class MambaMixer(nn.Module):
    """Mamba's mixer: every token takes up what is relevant of those before it.

    Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, with inner width
    ``d = 2 channels``, causal convolutions of width 4 and steps of rank ``channels / 16``, rounded up:

        u, z = split(W_1 x);  u = SiLU(conv(u));  r, B, C = split(W_2 u)
        y = SSM(u, softplus(W_3 r + b), -exp(A_log), B, C) + Dskip u;  out = W_4 (y SiLU(z))

    The paper has a state of 16, ours is smaller by default. As there, the steps ``softplus(b)`` are initially
    log-uniform in [0.001, 0.1]. Under autocast the linear layers run in its precision, steps and scan in float32.

    Args:
        channels: Channels of a token.
        state: Numbers N that the scan remembers per inner channel.

    Example:
        >>> mixer = MambaMixer(32)
        >>> mixer(torch.zeros(1, 10, 32)).shape, sum(p.numel() for p in mixer.parameters())
        (torch.Size([1, 10, 32]), 8384)
    """

    def __init__(self, channels: int, *, state: int = 8) -> None:
        super().__init__()
        inner, rank = _EXPAND * channels, -(-channels // _CHANNELS_PER_RANK)
        self.sizes = (rank, state, state)
        self.expand = nn.Linear(channels, 2 * inner, bias=False)
        self.conv = nn.Conv1d(inner, inner, _KERNEL, groups=inner)
        self.select = nn.Linear(inner, sum(self.sizes), bias=False)
        self.step = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.arange(1.0, state + 1).log().repeat(inner, 1))
        self.Dskip = nn.Parameter(torch.ones(inner))
        self.contract = nn.Linear(inner, channels, bias=False)
        with torch.no_grad():
            low, high = map(math.log, _STEPS)
            step = torch.empty(inner).uniform_(low, high).exp()
            self.step.bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus

    def undecayed(self) -> list[nn.Parameter]:
        """Parameters that weight decay leaves alone."""
        return [self.A_log, self.Dskip]

    def forward(self, tokens: Tensor) -> Tensor:
        """Mix along the sequence; no token sees later ones.

        Args:
            tokens: ``(B, L, channels)``.

        Returns:
            ``(B, L, channels)``.
        """
        u, z = self.expand(tokens).chunk(2, dim=-1)
        u = self.conv(functional.pad(u.transpose(1, 2), (_KERNEL - 1, 0))).transpose(1, 2)
        u = functional.silu(u)
        rank, b, c = self.select(u).split(self.sizes, dim=-1)
        with without_autocast(tokens.device):
            # Steps near 0.001 come from biases near -7, of which bf16 keeps one percent.
            delta = functional.softplus(self.step(rank.to(self.step.weight.dtype)))
            y = selective_scan(u, delta, -self.A_log.exp(), b, c, self.Dskip)
        mixed: Tensor = self.contract((y * functional.silu(z)).to(z.dtype))
        return mixed


class HighFrequencyMamba(nn.Module):
    """The HF-Mamba block: attention, from scans over the whole map, to its high frequencies.

    X. Guo et al., "Diff-CL: A Novel Cross Pseudo-Supervision Method for Semi-supervised Medical Image Segmentation",
    arXiv 2503.09408, 2025. From the paper is that a three-dimensional block looks at high-frequency content, scans
    the volume with Mamba and acts as high-frequency attention. Its inside is not public; the following is our choice,
    and so is the block in 2D. With features F, E = :func:`high_frequency` of F, and tokens of ``channels / reduction``
    channels (rounded up), one per voxel:

        h = W_1 E;  q = LayerNorm(h);  h = h + Mix_f(q) + flip(Mix_b(flip(q)))
        A = sigmoid(W_2 LayerNorm(h));  F' = F + gamma A E

    gamma is a learnable number, initially 0: a new block returns its input, and the first gradient reaches only gamma.
    With 64 channels the block has 21,089 parameters, with 128 it has 75,969, in 2D and in 3D.

    Args:
        spatial_dims: 2 or 3.
        channels: Channels of the features.
        reduction: Channels of the features per channel of a token.
        state: Numbers that a scan remembers per inner channel, of which there are twice as many as a token has.
        extractor: How high frequencies are extracted.
        cutoff: For the extractor ``fft``, in cycles per voxel.
        directions: Scans, each with weights of its own. 1: forward in row-major order; 2: also backward; 4 in 2D and
            6 in 3D: both along each cyclic order of the axes (HW, WH; DHW, HWD, WDH). We read "averaged" as: what the
            pairs add to h is averaged over the orders.
        token_stride: Side of the boxes of E that are averaged to one token; the attention is interpolated linearly
            (``align_corners=False``) to the size of F. A side that is no multiple has boxes of nearly equal size, some
            sharing a voxel, one for each begun ``token_stride`` voxels, because the centers of such boxes are where
            the interpolation takes its values to be. On a GPU the backward pass of both is not deterministic. Averages
            over blocks of two voxels are what ``haar`` takes away: it has no even stride.
        checkpoint: Do not keep what is computed between E and A for the backward pass, but compute it again:
            less memory, more time, the same numbers.

    Raises:
        ConfigError: for a number of directions that these dimensions do not have, or for ``haar`` with an even stride.

    Example:
        >>> block = HighFrequencyMamba(3, 64)
        >>> sum(p.numel() for p in block.parameters())
        21089
        >>> features = torch.rand(1, 64, 2, 3, 4)
        >>> torch.equal(block(features), features)
        True
    """

    def __init__(
        self,
        spatial_dims: Literal[2, 3],
        channels: int,
        *,
        reduction: int = 2,
        state: int = 8,
        extractor: Extractor = "avgpool",
        cutoff: float = 0.125,
        directions: int = 2,
        token_stride: int = 1,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if directions not in _DIRECTIONS[spatial_dims]:
            *others, most = map(str, _DIRECTIONS[spatial_dims])
            raise ConfigError(
                f"{directions} directions do not exist in {spatial_dims}D; set method.hf_directions to "
                f"{', '.join(others)} or {most}."
            )
        if extractor == "haar" and token_stride % 2 == 0:
            raise ConfigError(
                f"boxes {token_stride} voxels wide average away all that the extractor haar leaves; choose another "
                "method.hf_extractor or set method.hf_token_stride to 1."
            )
        self.spatial_dims: Literal[2, 3] = spatial_dims
        self.extractor: Extractor = extractor
        self.cutoff = cutoff
        self.token_stride = token_stride
        self.checkpoint = checkpoint
        width = -(-channels // reduction)
        self.reduce = CONV[spatial_dims](channels, width, 1)
        self.norm = nn.LayerNorm(width)
        #: Forward, then backward, for one order of the axes after the other.
        self.mixers = nn.ModuleList(MambaMixer(width, state=state) for _ in range(directions))
        self.last_norm = nn.LayerNorm(width)
        self.restore = CONV[spatial_dims](width, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(()))

    def undecayed(self) -> list[nn.Parameter]:
        """Parameters that weight decay leaves alone: gamma, and A_log and Dskip of every mixer."""
        mixers = [cast(MambaMixer, mixer) for mixer in self.mixers]
        return [self.gamma, *(parameter for mixer in mixers for parameter in mixer.undecayed())]

    def forward(self, features: Tensor) -> Tensor:
        """Features with high frequencies added where they matter.

        Args:
            features: ``(B, channels, *spatial)``, of any size.

        Returns:
            Of the same shape and type.
        """
        high = high_frequency(features, self.extractor, cutoff=self.cutoff)
        if self.checkpoint:
            # Nothing is drawn inside, so the state of the generators need not be kept.
            attention: Tensor = recomputed(self.attention, high, use_reentrant=False, preserve_rng_state=False)
        else:
            attention = self.attention(high)
        return (features + self.gamma * (attention * high)).to(features.dtype)

    def attention(self, high: Tensor) -> Tensor:
        """Attention A, in (0, 1), from the high frequencies E; both ``(B, channels, *spatial)``."""
        sizes = high.shape[2:]
        if self.token_stride > 1:
            high = _POOL[self.spatial_dims](high, [-(-size // self.token_stride) for size in sizes])
        h = self.reduce(high).movedim(1, -1)
        h = h + self._mixed(self.norm(h))
        attention: Tensor = self.restore(self.last_norm(h).movedim(-1, 1)).sigmoid()
        if self.token_stride > 1:
            attention = functional.interpolate(attention, sizes, mode=LINEAR[self.spatial_dims], align_corners=False)
        return attention

    def _mixed(self, grid: Tensor) -> Tensor:
        """What the mixers make of tokens on a grid, ``(B, *spatial, width)``, averaged over the orders of the axes."""
        pairs = [self.mixers[first : first + 2] for first in range(0, len(self.mixers), 2)]
        axes = list(range(1, 1 + self.spatial_dims))
        parts = []
        for shift, pair in enumerate(pairs):
            order = axes[shift:] + axes[:shift]
            turned = grid.movedim(order, axes)
            tokens = turned.flatten(1, -2)
            mixed = pair[0](tokens)
            for backward in pair[1:]:
                mixed = mixed + backward(tokens.flip(1)).flip(1)
            parts.append(mixed.unflatten(1, turned.shape[1:-1]).movedim(axes, order))
        return parts[0] if len(parts) == 1 else torch.stack(parts).mean(0)


class HighFrequencySkips(nn.Module):
    """HF-Mamba blocks in skip connections of a segmentation network (Diff-CL, see :class:`HighFrequencyMamba`).

    The block's result replaces the encoder's feature in the skip connection only: the encoder's next level does not
    see it. That the blocks sit there is our choice.

    Args:
        widths: Channels per level of the network, finest first.
        levels: Levels with a block, counted from 1, the finest. The deepest level has no skip.
        block: Makes the block of a level from its channels.

    Raises:
        ConfigError: for a level that has no skip.

    Example:
        >>> skips = HighFrequencySkips((4, 8, 16), levels=(2,), block=lambda channels: HighFrequencyMamba(2, channels))
        >>> features = [torch.rand(1, 4, 8, 8), torch.rand(1, 8, 4, 4), torch.rand(1, 16, 2, 2)]
        >>> [a is b for a, b in zip(skips(features), features)]
        [True, False, True]
    """

    def __init__(
        self, widths: Sequence[int], levels: Sequence[int], block: Callable[[int], HighFrequencyMamba]
    ) -> None:
        super().__init__()
        for level in levels:
            if not 1 <= level < len(widths):
                raise ConfigError(
                    f"level {level} of method.hf_levels has no skip connection: the network has {len(widths)} levels, "
                    f"with skip connections at levels 1 to {len(widths) - 1}; choose method.hf_levels among those."
                )
        self.levels = tuple(sorted(set(levels)))
        self.blocks = nn.ModuleList(block(widths[level - 1]) for level in self.levels)

    def undecayed(self) -> list[nn.Parameter]:
        """Parameters that weight decay leaves alone, of all blocks."""
        return [parameter for block in self.blocks for parameter in cast(HighFrequencyMamba, block).undecayed()]

    def gates(self) -> dict[int, Tensor]:
        """Gamma of each block by level, scalars without gradient."""
        blocks = [cast(HighFrequencyMamba, block) for block in self.blocks]
        return {level: block.gamma.detach() for level, block in zip(self.levels, blocks, strict=True)}

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Features for a decoder.

        Args:
            features: Those of :meth:`EncoderDecoder.encode`, one ``(B, widths[i], *spatial)`` per level, finest first.

        Returns:
            A new list; levels without a block hold the same tensors.
        """
        replaced = list(features)
        for level, block in zip(self.levels, self.blocks, strict=True):
            replaced[level - 1] = block(replaced[level - 1])
        return replaced
