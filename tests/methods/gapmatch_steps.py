"""Small GapMatch methods and batches, and its step written by hand."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from scantly.losses import cross_entropy_dice
from scantly.methods.base import Batch, Progress, Stage, Task
from scantly.methods.gapmatch import GapMatch
from scantly.training.config import TrainingSection
from scantly.training.optimizers import TrainingHandles

CLASSES = ("background", "a", "b")
STEPS = 10
#: Strong view and CutMix that change nothing.
PLAIN = {"strong": {"p_jitter": 0.0, "p_blur": 0.0}, "cutmix": {"probability": 0.0}}
STRONG_ONLY = {"cutmix": {"probability": 0.0}}


def make(part=None, *, dims=2, name="unet", dropout=0.0, dtype=torch.float32, channels=1, **settings):
    """The method with full weights from the first iteration on; ``part`` takes the place of its network."""
    torch.manual_seed(0)
    arguments = {"widths": [4, 8], **({"dropout": [dropout, dropout]} if name == "unet" else {})}
    task = Task(channels, CLASSES, dims, (16,) * dims, name, arguments)
    method = GapMatch(task, GapMatch.Config(**{"confidence_threshold": 0.4, "rampup_share": 0.0, **settings}))
    if part is not None:
        method.network = part
    method.generator.manual_seed(0)
    return method.to(dtype).train()


def make_batch(dims=2, seed=0, dtype=torch.float32, size=16):
    """Two boxes in each noisy image."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.zeros(4, *(size,) * dims, dtype=torch.long)
    for row, start in enumerate(torch.randint(1, 5, (4,), generator=generator).tolist()):
        y[(row, *(slice(start, start + 6),) * dims)] = 1
        y[(row, *(slice(start + 6, start + 10),) * dims)] = 2
    x = (y[:, None] / 2 + 0.5 * torch.randn(4, 1, *y.shape[1:], generator=generator)).to(dtype)
    return Batch(x[:2], y[:2], x[2:], x[:2], y[:2], x[2:])


class Recording(TrainingHandles):
    """Plain SGD of rate 0.1 unless told otherwise; keeps the gradient of every update."""

    def __init__(self, method, **settings):
        plain = {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant"}
        super().__init__(method, Stage(), TrainingSection(**{**plain, **settings}), STEPS)
        self.method, self.gradients = method, []

    def update(self, name="main"):
        self.gradients.append(torch.cat([p.grad.flatten() for p in self._parameters(name)]))
        super().update(name)


class Passes:
    """What the network saw, and its weights and buffers, at the begin of every pass."""

    def __init__(self, network):
        self.seen = []
        network.register_forward_pre_hook(self._see)

    def _see(self, network, args):
        buffers = {key: value.clone() for key, value in network.named_buffers()}
        grad = torch.is_grad_enabled()
        self.seen.append(SimpleNamespace(images=args[0].clone(), weights=flat(network), buffers=buffers, grad=grad))

    @property
    def displacement(self):
        """Of the perturbed pass; before it come the weak, the strong and the labeled one."""
        return self.seen[3].weights - self.seen[0].weights


def flat(network):
    return parameters_to_vector(network.parameters()).detach().clone()


def snapshot(network):
    return {key: value.clone() for key, value in network.state_dict().items()}


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def cosine(first, second):
    return F.cosine_similarity(first, second, dim=0).item()


def run(method, batch, handles=None, *, iteration=0, bf16=False):
    handles = handles or Recording(method)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16, cache_enabled=False):
        terms = method.step(batch, Progress(iteration, STEPS), handles)
    method.after_step(Progress(iteration, STEPS))
    return handles, terms


# what the step does, by hand


def slow_consistency(logits, labels, mask):
    """``(CE + Dice) / 2`` over the trusted voxels, class by class."""
    probs = logits.softmax(1)
    cross_entropy = (-logits.log_softmax(1).gather(1, labels[:, None])[:, 0] * mask).sum() / mask.numel()
    dice = 0
    for c in range(logits.shape[1]):
        p, y = probs[:, c][mask], (labels == c)[mask].to(probs.dtype)
        dice = dice + 1 - (2 * (p * y).sum() + 1e-5) / ((p * p).sum() + y.sum() + 1e-5)
    return 0.5 * (cross_entropy + dice / logits.shape[1])


def slow_labels(network, images, threshold=0.4):
    with torch.no_grad():
        confidence, labels = copy.deepcopy(network)(images).softmax(1).max(1)
    mask = confidence >= threshold
    assert 0 < mask.float().mean() < 1  # else the mask would not be tested
    return labels, mask


def gradient(network, loss, at=None):
    """Of ``loss(network)`` at other weights, on a copy."""
    network = copy.deepcopy(network)
    if at is not None:
        vector_to_parameters(at, network.parameters())
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss(network), list(network.parameters()))])


def slow_losses(network, batch, images):
    """L_u and L_s as functions of a network, without views."""
    labels, mask = slow_labels(network, batch.unlabeled)
    return (
        lambda f: slow_consistency(f(images), labels, mask),
        lambda f: cross_entropy_dice(f(batch.labeled), batch.labels),
    )


def parts(**settings):
    """The gradient of the single update of a step."""
    handles, _ = run(make(**settings), make_batch())
    (whole,) = handles.gradients
    return whole


class Scaled(nn.Module):
    """The images times a weight, 1."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))

    def forward(self, images):
        return self.w * images


class Quadratic(nn.Module):
    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.ones(2))

    def forward(self, images):
        return torch.zeros(len(images), 3, *images.shape[2:])


SECOND = [
    {},
    {"update": "sequential"},
    {"perturbation": "random", "ascent_steps": 2},
    {"perturbation": "layer_relative"},
    {"perturbation": "adaptive", "second_targets": "recomputed", "second_view": "new"},
    {"perturbed": "weights", "perturbation_source": "total", "strong_views": 2},
]
