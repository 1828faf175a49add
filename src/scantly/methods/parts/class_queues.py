"""One memory bank per class, and what a contrastive loss needs of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from scantly.methods.parts.memory_bank import MemoryBank

__all__ = ["ClassQueues"]


class ClassQueues(nn.Module):
    """First-in-first-out queues of embeddings, one per class; part of ``state_dict``, without gradient.

    Sums and second moments follow each push, so that statistics cost no pass over the queues; in double precision,
    in which products of embeddings are exact, they stay those of the rows that are held.

    Args:
        classes: Number of classes, background included.
        capacity: Embeddings kept per class.
        width: Length of an embedding.
    """

    sums: Tensor
    moments: Tensor

    def __init__(self, classes: int, capacity: int, width: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.banks = nn.ModuleList(MemoryBank(capacity, (width,)) for _ in range(classes))
        self.register_buffer("sums", torch.zeros(classes, width, dtype=torch.float64))
        self.register_buffer("moments", torch.zeros(classes, width, width, dtype=torch.float64))

    def __getitem__(self, label: int) -> MemoryBank:
        """The queue of one class."""
        return cast(MemoryBank, self.banks[label])

    @property
    def fill(self) -> Tensor:
        """Mean share of the queues that holds something, a scalar in [0, 1] for the log."""
        return torch.stack([self[label].fill for label in range(len(self.banks))]).mean()

    @torch.no_grad()
    def push(self, labels: Sequence[int], rows: Tensor) -> None:
        """Append to several classes, equally many to each, ``(len(labels) * n, width)``, class by class.

        Where there are several ranks each of them must be given the same.
        """
        for label, embedded in zip(labels, rows.chunk(len(labels)), strict=True):
            bank, new = self[label], embedded[-self.capacity :].float()
            old, came = bank.values[bank.next_slots(len(new))].double(), new.double()
            self.sums[label] += came.sum(0) - old.sum(0)
            with torch.autocast(new.device.type, enabled=False):
                self.moments[label] += came.T @ came - old.T @ old
            bank.append(new)

    def statistics(self, labels: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Of each of G classes the mean, not normalized, and the biased covariance (division by n).

        Returns:
            ``(G, width)`` and ``(G, width, width)``, float32; 0 where a queue is empty.
        """
        count = torch.stack([self[label].filled for label in labels]).clamp(min=1)
        means = torch.stack([self.sums[label] for label in labels]) / count[:, None]
        moments = torch.stack([self.moments[label] for label in labels]) / count[:, None, None]
        return means.float(), (moments - means[:, :, None] * means[:, None]).float()

    def keys(self, labels: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """All rows of G classes.

        Returns:
            Rows ``(G * capacity, width)``; position in ``labels`` of each row's class; whether the row holds anything.
        """
        values = torch.cat([self[label].values for label in labels])
        groups = torch.arange(len(labels), device=values.device).repeat_interleave(self.capacity)
        return values, groups, torch.cat([self[label].valid for label in labels])
