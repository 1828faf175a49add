"""First-in-first-out memory of vectors from past steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from scantly.ranks import rank, rows_of_all_ranks, sum_over_ranks, world_size

__all__ = ["MemoryBank"]


class MemoryBank(nn.Module):
    """A ring buffer whose oldest rows are overwritten first; it is part of ``state_dict`` and takes no gradient.

    Rows are stored in the order in which they came; until the bank is full they are rows ``0`` to ``filled - 1``.
    Nothing here waits for the device. In a training of several ranks each has the same bank: all ranks' rows of a push,
    in the order of the ranks.

    Args:
        capacity: Rows K.
        shape: Shape of one row.
        initial: What the bank is full of at first, ``(K, *shape)``; ``None``: it starts empty.

    Attributes:
        values: ``(K, *shape)``, float32; rows that were never written are 0.
        filled: Number of rows that hold something, a scalar tensor on the bank's device, at most K.
        pointer: Where the next row goes, a scalar tensor.
    """

    values: Tensor
    filled: Tensor
    pointer: Tensor

    def __init__(self, capacity: int, shape: Sequence[int], *, initial: Tensor | None = None) -> None:
        super().__init__()
        self.capacity = capacity
        values = torch.zeros(capacity, *shape) if initial is None else initial.detach().clone().float()
        self.register_buffer("values", values)
        self.register_buffer("filled", torch.tensor(0 if initial is None else capacity))
        self.register_buffer("pointer", torch.tensor(0))

    @torch.no_grad()
    def push(self, rows: Tensor, keep: Tensor | None = None) -> None:
        """Append this rank's rows behind those of the ranks before it, in their order; of more than K the last K stay.

        Args:
            rows: ``(n, *shape)``; n is the same on all ranks.
            keep: Which of them to append, ``(n,)`` bool; ``None``: all.
        """
        if not len(rows):
            return
        if keep is None:
            self.append(rows_of_all_ranks(rows))
            return
        place = keep.cumsum(0) - 1
        count = keep.sum()
        if world_size() > 1:
            counts = rows_of_all_ranks(count[None])
            place, count = place + counts[: rank()].sum(), counts.sum()
        stays = keep & (place >= count - self.capacity)
        slots = torch.where(stays, (self.pointer + place) % self.capacity, self.capacity)
        source = torch.full((self.capacity + 1,), -1, device=rows.device)
        source[slots] = torch.arange(len(rows), device=rows.device)
        source = source[: self.capacity]
        written = (source >= 0).view(-1, *[1] * (rows.ndim - 1))
        new = rows.to(self.values.dtype)[source.clamp(min=0)]
        if world_size() > 1:  # every slot is one rank's, and the others add 0: exact, and no more than the bank is sent
            new = sum_over_ranks(torch.where(written, new, 0))
            written = sum_over_ranks(written.long()) > 0
        self.values.copy_(torch.where(written, new, self.values))
        self._advance(count)

    @torch.no_grad()
    def append(self, rows: Tensor) -> None:
        """Append rows that all ranks have, in their order; of more than K the last K stay.

        Args:
            rows: ``(n, *shape)``.
        """
        kept = rows[-self.capacity :]
        slots = self.next_slots(len(kept), skipped=len(rows) - len(kept))
        self.values.index_copy_(0, slots, kept.to(self.values.dtype))
        self._advance(torch.full_like(self.pointer, len(rows)))

    def next_slots(self, count: int, *, skipped: int = 0) -> Tensor:
        """Where the next rows go, ``(count,)`` int64, after some that are not stored."""
        return (self.pointer + skipped + torch.arange(count, device=self.pointer.device)) % self.capacity

    def _advance(self, count: Tensor) -> None:
        self.pointer.copy_((self.pointer + count) % self.capacity)
        self.filled.copy_((self.filled + count).clamp(max=self.capacity))

    @property
    def valid(self) -> Tensor:
        """Which rows hold something, ``(K,)`` bool."""
        return torch.arange(self.capacity, device=self.values.device) < self.filled

    @property
    def fill(self) -> Tensor:
        """Share of rows that hold something, a scalar in [0, 1] for the log."""
        return self.filled / self.capacity
