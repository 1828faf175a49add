"""Small PLGCL methods and batches."""

from __future__ import annotations

import torch
from torch import nn

from scantly.methods.base import Batch, Progress, Task
from scantly.methods.plgcl import PLGCL
from scantly.training.config import TrainingSection
from scantly.training.optimizers import TrainingHandles

CLASSES = ("background", "a", "b")
STEPS = 10


def task(dims=2, network="unet", size=16, classes=CLASSES):
    arguments = {"widths": [4, 8], **({"dropout": [0.0, 0.0]} if network == "unet" else {})}
    return Task(1, classes, dims, (size,) * dims, network, arguments)


def make(dims=2, network="unet", size=16, classes=CLASSES, **settings):
    torch.manual_seed(0)
    method = PLGCL(task(dims, network, size, classes), PLGCL.Config(**{"queue": 256, **settings})).train()
    method.generator.manual_seed(0)
    return method


def make_batch(dims=2, rows=2, unlabeled=2, size=16, labels=(1, 2), seed=0):
    """Two boxes of the given labels in each image, noise on top."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.zeros(rows + unlabeled, *(size,) * dims, dtype=torch.long)
    half = size // 2
    y[(slice(None), *(slice(1, half - 1),) * dims)] = labels[0]
    y[(slice(None), *(slice(half + 1, size - 1),) * dims)] = labels[1]
    x = y[:, None] / 2 + 0.1 * torch.randn(len(y), 1, *y.shape[1:], generator=generator)
    return Batch(x[:rows], y[:rows], x[rows:], x[:rows], y[:rows], x[rows:])


def at(stage="joint", iteration=0):
    return Progress(iteration, STEPS, stage, iteration, STEPS)


def train(method, batch, stage, steps, bf16=False):
    handles = TrainingHandles(method, stage, TrainingSection(lr=0.05), STEPS)
    history = []
    for iteration in range(steps):
        handles.set_iteration(iteration)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16, cache_enabled=False):
            terms = method.step(batch, at(stage.name, iteration), handles)
        method.after_step(at(stage.name, iteration))
        history.append({name: value.item() for name, value in terms.items()})
    return history


class Fixed(nn.Module):
    """The same probabilities everywhere."""

    def __init__(self, probs):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(probs).log())

    def forward(self, images):
        shape = (1, -1, *[1] * (images.ndim - 2))
        return self.logits.view(shape).expand(len(images), -1, *images.shape[2:])
