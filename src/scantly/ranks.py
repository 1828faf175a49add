"""The processes of a data-parallel training, its ranks: sums and rows of all of them.

In a training of one process, and outside any training, every function here gives back what it is given. Collective:
where there are several ranks all of them must call the same functions in the same order, with tensors of one shape and
on the device of their process group.

A loss is minimized as the mean of what the ranks compute. A mean over the batch is then right as it stands, since all
ranks have the same number of rows. A ratio of sums over the batch (soft Dice, a masked mean, the mean of a class) is
not: its sums go through :func:`sum_over_ranks`, after which every rank has the ratio of the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "any_rank",
    "average_over_ranks",
    "mean_of_rows",
    "mean_over_ranks",
    "of_first_rank",
    "rank",
    "rows_of_all_ranks",
    "sum_over_ranks",
    "sums_over_ranks",
    "true_on_all_ranks",
    "world_size",
]


def world_size() -> int:
    """Number of processes that train together; 1 outside a data-parallel training."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process among them, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum of the ranks' tensors, the same on each of them, differentiable.

    The gradient of a rank's ``values`` is the sum of the gradients that all ranks' results get, so that the mean of the
    ranks' losses has the gradient it would have in one process.

    Args:
        values: Any shape; the same on all ranks. Integers are summed too, without a gradient.
    """
    if world_size() == 1:
        return values
    total: Tensor = _summed(values)
    return total


def sums_over_ranks(*values: Tensor) -> tuple[Tensor, ...]:
    """:func:`sum_over_ranks` of several small tensors in one communication.

    Args:
        values: Of any shapes, all floating point; the result of each has its type.
    """
    if world_size() == 1:
        return values
    kind = values[0].dtype
    for value in values[1:]:
        kind = torch.promote_types(kind, value.dtype)
    total = sum_over_ranks(torch.cat([value.flatten().to(kind) for value in values]))
    parts = torch.split(total, [value.numel() for value in values])
    return tuple(part.view(value.shape).to(value.dtype) for part, value in zip(parts, values, strict=True))


def mean_over_ranks(values: Tensor) -> Tensor:
    """Mean of the ranks' tensors, as :func:`sum_over_ranks`."""
    return sum_over_ranks(values) / world_size() if world_size() > 1 else values


def mean_of_rows(values: Tensor) -> Tensor:
    """Mean of the numbers of all ranks together, which may be more on one than on another; 0 where there are none.

    Args:
        values: Any shape, on one process not empty; differentiable as :func:`sum_over_ranks`.
    """
    if world_size() == 1:
        return values.mean()
    total, count = sum_over_ranks(torch.stack([values.sum(), values.new_full((), float(values.numel()))])).unbind()
    return total / count.clamp(min=1)


@torch.no_grad()
def rows_of_all_ranks(values: Tensor) -> Tensor:
    """All ranks' rows below each other, in the order of the ranks, without a gradient.

    Args:
        values: ``(n, ...)``; the same shape on all ranks.

    Returns:
        ``(n * ranks, ...)``.
    """
    return values.detach() if world_size() == 1 else _gathered(values)


def true_on_all_ranks(flag: Tensor) -> Tensor:
    """Whether a condition holds on every rank, bool, any shape; nothing waits for the device."""
    return flag if world_size() == 1 else sum_over_ranks((~flag).long()) == 0


@torch.no_grad()
def of_first_rank(values: Tensor) -> Tensor:
    """What the first rank has, the same shape on all, without a gradient: for draws that all must share."""
    if world_size() == 1:
        return values.detach()
    sent = values.detach().clone(memory_format=torch.contiguous_format)
    dist.broadcast(sent, 0)
    return sent


def any_rank(*flags: bool) -> tuple[bool, ...]:
    """Which of the flags are true on any rank; all ranks get the same answer, and no device is waited for."""
    if world_size() == 1:
        return flags
    answer = torch.tensor(flags, dtype=torch.uint8)
    dist.all_reduce(answer, op=dist.ReduceOp.MAX)
    return tuple(bool(flag) for flag in answer.tolist())


@torch.no_grad()
def average_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by the mean of the ranks' tensors, all of one kind together."""
    ranks = world_size()
    if ranks == 1:
        return
    for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
        group = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        dist.all_reduce(flat)
        parts = torch.split(flat.div_(ranks), [tensor.numel() for tensor in group])
        torch._foreach_copy_(group, [part.view(tensor.shape) for part, tensor in zip(parts, group, strict=True)])


def _gathered(values: Tensor) -> Tensor:
    sent = values.detach().contiguous()
    # neither gloo nor NCCL gathers booleans everywhere
    carried = sent.view(torch.uint8) if sent.dtype == torch.bool else sent
    received = [torch.empty_like(carried) for _ in range(world_size())]
    dist.all_gather(received, carried)
    return torch.cat(received).view(sent.dtype) if sent.dtype == torch.bool else torch.cat(received)


def _summed(values: Tensor) -> Tensor:
    return cast(Tensor, _Sum.apply(values))  # type: ignore[no-untyped-call]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:  # noqa: ARG004
        return _reduced(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ARG004
        return _reduced(gradients[0])


def _reduced(values: Tensor) -> Tensor:
    total = values.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total
