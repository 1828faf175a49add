"""Batch normalization over the batches of all ranks."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from scantly.ranks import rows_of_all_ranks, sum_over_ranks

__all__ = ["synchronize_batch_norm"]


def synchronize_batch_norm(module: nn.Module) -> None:
    """Let every batch norm of a module normalize by the batch of all ranks, in place.

    The modules stay instances of ``nn.BatchNorm1d``, ``2d`` and ``3d`` with the same parameters, buffers and settings,
    and copies of them are synchronized too. In train mode all ranks must call them equally often; the number of rows
    may differ, and be 0. In evaluation mode they are what they were, and nothing is communicated. Unlike
    ``nn.SyncBatchNorm`` they work on the CPU, too.

    Args:
        module: Searched with all its parts; subclasses of the three classes are left alone.
    """
    for part in module.modules():
        if type(part) in _KINDS:
            part.__class__ = _KINDS[type(part)]


class _AcrossRanks(nn.modules.batchnorm._BatchNorm):
    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        normalized: Tensor
        normalized, mean, variance, count = _normalized(input, self.weight, self.bias, self.eps)
        if self.track_running_stats and self.running_mean is not None:
            self._follow(mean, variance, count)
        return normalized

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None
        share: float | Tensor = 0.0 if self.momentum is None else self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # the mean of all batches
                share = 1 / self.num_batches_tracked.double()
        unbiased = variance * (count / (count - 1).clamp(min=1))
        for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            running.copy_(share * new + (1 - share) * running)


class _BatchNorm1d(_AcrossRanks, nn.BatchNorm1d):
    pass


class _BatchNorm2d(_AcrossRanks, nn.BatchNorm2d):
    pass


class _BatchNorm3d(_AcrossRanks, nn.BatchNorm3d):
    pass


_KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: _BatchNorm1d,
    nn.BatchNorm2d: _BatchNorm2d,
    nn.BatchNorm3d: _BatchNorm3d,
}


def _normalized(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    """The normalized batch, in its own type, and its mean, biased variance and number of values per channel."""
    with torch.autocast(x.device.type, enabled=False):
        return cast(tuple[Tensor, ...], _Normalize.apply(x, weight, bias, eps))  # type: ignore[no-untyped-call]


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, variance, count = _statistics(x)
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt(), count)
        ctx.mark_non_differentiable(mean, variance, count)
        return torch.batch_norm(x, weight, bias, mean, variance, False, 0.0, eps, False), mean, variance, count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x, weight, mean, scale, count = ctx.saved_tensors
        gradient = gradients[0].to(mean.dtype)
        axes = [0, *range(2, x.ndim)]
        units = (x.to(mean.dtype) - _per_channel(mean, x)) * _per_channel(scale, x)
        to_bias, to_weight = gradient.sum(axes), (gradient * units).sum(axes)
        # the statistics are those of all ranks, and so is what they pass back; parameters are averaged by the handles
        shared = sum_over_ranks(torch.stack([to_bias, to_weight])) / count.clamp(min=1)
        factor = scale if weight is None else scale * weight.to(mean.dtype)
        to_x = gradient - _per_channel(shared[0], x) - units * _per_channel(shared[1], x)
        to_x = (to_x * _per_channel(factor, x)).to(x.dtype)
        if weight is None:
            return to_x, None, None, None
        return to_x, to_weight.to(weight.dtype), to_bias.to(weight.dtype), None


def _statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and number of values per channel, of all ranks together: float32, or float64 if x is.

    Each rank's mean and squares about it are combined (Chan, Golub and LeVeque, 1979), which is stable where the mean
    is large.
    """
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    axes = [0, *range(2, x.ndim)]
    channels = x.shape[1]
    number = x.numel() // channels
    if number:
        variance, mean = torch.var_mean(exact, axes, correction=0)
    else:
        variance, mean = exact.new_zeros(channels), exact.new_zeros(channels)
    own = torch.cat([mean, variance, mean.new_full((1,), float(number))])
    of_ranks = rows_of_all_ranks(own[None])
    means, variances, numbers = of_ranks[:, :channels], of_ranks[:, channels:-1], of_ranks[:, -1:]
    count = numbers.sum()
    shares = numbers / count.clamp(min=1)
    mean = (shares * means).sum(0)
    return mean, (shares * (variances + (means - mean).square())).sum(0), count


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 2))
