"""Small Diff-CL methods and batches, and what their steps do."""

from __future__ import annotations

import torch
from torch.nn import functional

from scantly.methods.base import Batch, Progress, Stage, Task
from scantly.methods.diffcl import DiffCL
from scantly.training.config import TrainingSection
from scantly.training.optimizers import TrainingHandles

CLASSES = ("background", "a", "b")
STEPS = 1000
SMALL = {"queue": 64, "pushed": 8, "anchors": 8, "candidates": 64, "positives": 4, "negatives": 8, "embedding": 8}
#: A step with the whole ramp and the contrast.
LATE = 999


def task(dims=2, network="unet", size=16, channels=1, widths=(4, 8), **arguments):
    arguments = {"widths": list(widths), **arguments}
    if network == "unet":
        arguments.setdefault("dropout", [0.1] * len(widths))
    if network == "dynunet":
        arguments |= {"kernel_sizes": [[3] * dims] * len(widths)}
        arguments |= {"strides": [[1] * dims, *[[2] * dims] * (len(widths) - 1)]}
    return Task(channels, CLASSES, dims, (size,) * dims, network, arguments)


def make(dims=2, network="unet", size=16, channels=1, widths=(4, 8), arguments=None, **settings):
    torch.manual_seed(0)
    method = DiffCL(
        task(dims, network, size, channels, widths, **(arguments or {})), DiffCL.Config(**{**SMALL, **settings})
    )
    method.generator.manual_seed(0)
    return method.train()


def make_batch(dims=2, rows=2, unlabeled=2, size=16, channels=1, seed=0):
    """A box of each class in each image, noise on top."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.zeros(rows + unlabeled, *(size,) * dims, dtype=torch.long)
    half = size // 2
    y[(slice(None), *(slice(1, half - 1),) * dims)] = 1
    y[(slice(None), *(slice(half + 1, size - 1),) * dims)] = 2
    x = y[:, None] / 2 + 0.1 * torch.randn(len(y), channels, *y.shape[1:], generator=generator)
    return Batch(x[:rows], y[:rows], x[rows:], x[:rows], y[:rows], x[rows:])


def at(iteration, total=STEPS):
    return Progress(iteration, total, "train", iteration, total)


def train(method, batch, steps, *, bf16=False, lr=0.05, handles=None):
    """The last steps of a training, so that all losses count."""
    handles = handles or TrainingHandles(method, Stage(), TrainingSection(lr=lr), STEPS)
    history = []
    for iteration in range(STEPS - steps, STEPS):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16, cache_enabled=False):
            terms = method.step(batch, at(iteration), handles)
        method.after_step(at(iteration))
        history.append({name: value.item() for name, value in terms.items()})
    return history


def warmed(batch=None, **settings):
    """A method whose banks are filled and whose Mamba blocks do something."""
    method = make(**{"correct_only": False, **settings})
    open_gates(method)
    train(method, batch or make_batch(), 3)
    assert method.contrast is None or all(bank.filled >= 8 for bank in method.contrast.banks)
    return method


def open_gates(method):
    with torch.no_grad():
        for name, parameter in method.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(0.5)


def seg(logits, labels):
    """Half of cross-entropy and squared soft Dice, by their formulas."""
    probs, target = logits.softmax(1), functional.one_hot(labels, logits.shape[1]).movedim(-1, 1)
    entropy = -(target * probs.log()).sum(1).mean()
    axes = [0, *range(2, logits.ndim)]
    dice = 1 - (2 * (probs * target).sum(axes) + 1e-5) / ((probs**2).sum(axes) + target.sum(axes) + 1e-5)
    return (entropy + dice.mean()) / 2


class Watch:
    """What the diffusion network is given and gives, and what the other one gives."""

    def __init__(self, method):
        self.noised, self.ds, self.cs = [], [], []
        noised = method.ds.schedule.noised
        method.ds.schedule.noised = lambda *values: self.noised.append(values) or noised(*values)
        method.ds.register_forward_hook(lambda module, inputs, output: self.ds.append((inputs, output[0])))
        method.cs.backbone.head.register_forward_hook(lambda module, inputs, output: self.cs.append(output))


ISOLATED = [
    {},
    {"ds_pseudo": "ddim", "ds_pseudo_steps": 2},
    {"share_head": False},
    {"pseudo_confidence": 0.4},
    {"ds_mse": True, "hf_in": ("cs", "ds")},
    {"candidate_sampling": "stratified", "pair_level": "anchor", "proj_stride": 2},
]


def groups(method):
    return {
        "cs": [p for p in method.cs.parameters() if p.requires_grad],
        "ds": [p for p in method.ds.parameters() if p.requires_grad],
        "head": [] if method.contrast is None else list(method.contrast.head.parameters()),
    }
