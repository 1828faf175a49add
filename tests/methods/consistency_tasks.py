"""Small tasks, batches and networks for the tests of the consistency methods."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scantly.methods import catalogue
from scantly.methods.base import Batch, Method, Task

ARGUMENTS = {"widths": [4, 8], "dropout": [0.0, 0.0]}


def make(name: str, *, classes: int = 2, dims: int = 2, dropout: float = 0.0, **settings: object) -> Method:
    """A method in train mode with a small U-Net."""
    torch.manual_seed(0)
    kind = catalogue.load(name)
    names = ("background", "a", "b", "c")[:classes]
    task = Task(1, names, dims, (16,) * dims, "unet", {**ARGUMENTS, "dropout": [dropout, dropout]})
    method = kind(task, kind.Config(**settings)).train()
    method.generator.manual_seed(0)
    return method


def make_batch(labeled: int = 2, unlabeled: int = 2, *, classes: int = 2, dims: int = 2, seed: int = 0) -> Batch:
    """Random images and labels."""
    generator = torch.Generator().manual_seed(seed)
    side = (16,) * dims
    x, u = (torch.rand(rows, 1, *side, generator=generator) for rows in (labeled, unlabeled))
    y = torch.randint(classes, (labeled, *side), generator=generator)
    return Batch(x, y, u, x, y, u)


class Fixed(nn.Module):
    """Gives the same probabilities for every image, one column per voxel: ``(C, voxels)``."""

    def __init__(self, probs: list[list[float]]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(probs).log()[None, :, None])

    def forward(self, images: Tensor) -> Tensor:
        return self.logits.expand(len(images), *self.logits.shape[1:])


def row_of(voxels: int) -> Batch:
    """One labeled and one unlabeled image of a single line of voxels."""
    x, y = torch.zeros(1, 1, 1, voxels), torch.zeros(1, 1, voxels, dtype=torch.long)
    return Batch(x, y, x, x, y, x)
