"""GapMatch: the worked numbers of its specification, its step against one written by hand, and its settings."""

from __future__ import annotations

import copy
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from scantly.errors import ConfigError
from scantly.losses import cross_entropy_dice
from scantly.methods.base import Batch, Progress, Stage, Task
from scantly.methods.gapmatch import GapMatch
from scantly.methods.parts.strong_views import StrongView, WeakLabels
from scantly.settings import parse
from scantly.training.config import TrainingSection
from scantly.training.optimizers import TrainingHandles
from scantly.views import CutMix, apply_cutmix, sample_cutmix, strong

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


# worked numbers


class Quadratic(nn.Module):
    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.ones(2))

    def forward(self, images):
        return torch.zeros(len(images), 3, *images.shape[2:])


class Margin(nn.Module):
    """One weight, 0.5: logits ``(0, w x)``."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.5))

    def forward(self, images):
        return torch.cat([torch.zeros_like(images), self.w * images], dim=1)


def test_a_step_on_the_quadratic(monkeypatch):
    method = make(Quadratic(), dtype=torch.float64, epsilon=0.1)
    factors = torch.tensor([2.0, 1.0]).double()
    monkeypatch.setattr(method, "_consistency", lambda *_: 0.5 * (factors * method.network.theta**2).sum())
    monkeypatch.setattr(method, "_supervised", lambda _: 0 * method.network.theta.sum())
    handles, terms = run(method, make_batch(dtype=torch.float64))
    logged = {name: value.item() for name, value in method.pop_logged().items()}
    assert handles.gradients[0].tolist() == pytest.approx([4.178885, 2.044721], abs=1e-6)
    assert method.network.theta.tolist() == pytest.approx([1 - 0.4178885, 1 - 0.2044721], abs=1e-6)
    assert terms["unsupervised"].item() == pytest.approx(1.5)
    assert logged["loss_after"] == pytest.approx(1.732607, abs=1e-6)
    assert logged["gradient_norm"] == pytest.approx(2.236068, abs=1e-6)
    assert logged["perturbation_norm"] == pytest.approx(0.1, rel=1e-6)
    cosine = (2 * 2.178885 + 1.044721) / (2.236068 * math.hypot(2.178885, 1.044721))
    assert logged["gradient_agreement"] == pytest.approx(cosine, abs=1e-6)


@pytest.mark.parametrize(
    ("update", "gradients", "ends"),
    [
        ("joint", [0.2 - 1.157934], 0.595793),
        ("sequential", [0.2 - 0.537883, -0.591518], 0.592940),
    ],
)
def test_the_updates_of_the_worked_classifier(update, gradients, ends, monkeypatch):
    settings = {"epsilon": 0.1, "confidence_threshold": 0.5, "consistency_loss": "ce", "update": update, **PLAIN}
    method = make(Margin(), dtype=torch.float64, **settings)
    monkeypatch.setattr(method, "_supervised", lambda _: 0.2 * method.network.w)
    x = torch.full((1, 1, 1, 1), 2.0).double()
    passes = Passes(method.network)
    handles, terms = run(method, Batch(x, x[:, 0].long(), x, x, x[:, 0].long(), x))
    assert terms["unsupervised"].item() == pytest.approx(0.313262, abs=1e-6)
    assert [g.item() for g in handles.gradients] == pytest.approx(gradients, abs=1e-6)
    assert method.network.w.item() == pytest.approx(ends, abs=1e-6)
    weights = [each.weights.item() for each in passes.seen]  # weak, strong, then what _second and the updates see
    expected = [0.5, 0.5, 0.4] if update == "joint" else [0.5, 0.5, 0.533788, 0.433788]
    assert weights == pytest.approx(expected, abs=1e-6)


class Scaled(nn.Module):
    """The images times a weight, 1."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))

    def forward(self, images):
        return self.w * images


NOWHERE = CutMix(torch.zeros(1, 1, 1, 3, dtype=torch.bool), torch.zeros(1, dtype=torch.long))


@pytest.mark.parametrize(("normalization", "expected"), [("all", 0.058505), ("masked", 0.087758)])
def test_the_worked_mask(normalization, expected):
    settings = {"confidence_threshold": 0.95, "consistency_loss": "ce", "mask_normalization": normalization}
    method = make(Scaled(), **settings)
    confidence = torch.tensor([0.97, 0.80, 0.99])
    weak = torch.where(torch.tensor([[True, True, False], [False, False, True]]), confidence, 1 - confidence)
    labels = method._label(weak.log().view(1, 2, 1, 3))
    assert labels.targets.flatten().tolist() == [0, 0, 1]
    assert labels.mask.flatten().tolist() == [True, False, True]
    strong_logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 3.0]]).view(1, 2, 1, 3)
    loss = method._consistency([StrongView(strong_logits, NOWHERE)], labels)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_a_voxel_at_the_threshold_is_trusted():
    for threshold, trusted in ((0.5, True), (0.5000001, False)):
        assert make(Scaled(), confidence_threshold=threshold)._label(torch.zeros(1, 2, 1, 1)).mask.item() == trusted


@pytest.mark.parametrize(("kind", "weight"), [("ce_dice", 1.0), ("ce_dice", 0.3), ("ce", 1.0), ("dice", 1.0)])
def test_the_forms_of_the_consistency(kind, weight):
    method = make(Scaled(), consistency_loss=kind, dice_weight=weight)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3, 1, 3, generator=generator)
    labels, mask = torch.tensor([[[0, 2, 1]]]), torch.tensor([[[True, True, False]]])
    cross_entropy = -(logits.log_softmax(1)[0, 0, 0, 0] + logits.log_softmax(1)[0, 2, 0, 1]).item() / 3
    dice = 2 * slow_consistency(logits, labels, mask).item() - cross_entropy
    expected = {"ce_dice": 0.5 * (cross_entropy + weight * dice), "ce": cross_entropy, "dice": dice}[kind]
    assert method._consistency([StrongView(logits, NOWHERE)], WeakLabels(labels, mask)).item() == pytest.approx(
        expected, abs=1e-6
    )


def test_settings_of_the_specification_are_the_defaults():
    config = GapMatch.Config()
    assert (config.epsilon, config.alpha, config.alpha_rampup_share) == (0.01, 1, 0)
    assert (config.unsupervised_weight, config.rampup_share, config.perturbation_start) == (1, 0.2, 0)
    assert (config.update, config.perturbation, config.perturbed) == ("joint", "global_l2", "all")
    assert (config.consistency_loss, config.dice_weight, config.mask_normalization) == ("ce_dice", 1, "all")
    assert (config.hard_labels, config.strong_views, config.ascent_steps, config.ema_decay) == (True, 1, 1, None)
    assert (config.perturbation_source, config.second_targets, config.second_view) == ("unsupervised", "same", "same")
    assert (config.second_statistics, config.replay_dropout, config.pseudo_label_mode) == ("unchanged", True, "train")
    assert (config.cutmix.probability, config.cutmix.area, config.cutmix.aspect) == (0.5, (0.02, 0.4), (0.3, 3.33))


@pytest.mark.parametrize(
    ("dims", "threshold", "p_blur", "blur", "p_noise"), [(2, 0.95, 0.5, 2.0, 0.0), (3, 0.7, 0.2, 1.0, 0.2)]
)
def test_threshold_and_strong_view_follow_the_dimension(dims, threshold, p_blur, blur, p_noise):
    method = make(dims=dims, confidence_threshold=None)
    view = method.config.strong_settings(dims)
    assert method.threshold == threshold
    assert (view.p_jitter, view.brightness, view.contrast) == (0.8, 0.5, 0.5)
    assert (view.p_blur, view.blur_sigma, view.p_noise) == (p_blur, (0.1, blur), p_noise)
    assert make(dims=dims, confidence_threshold=0.6, strong={"p_blur": 0.9}).threshold == 0.6
    assert make(dims=dims, strong={"p_blur": 0.9}).config.strong_settings(dims).p_blur == 0.9


RAMP = math.exp(-5)


@pytest.mark.parametrize(
    ("settings", "iteration", "weight", "alpha"),
    [
        ({}, 0, RAMP, 1.0),
        ({}, 100, math.exp(-5 / 4), 1.0),
        ({}, 200, 1.0, 1.0),
        ({}, 999, 1.0, 1.0),
        ({"unsupervised_weight": 3.0, "alpha": 0.5}, 0, 3 * RAMP, 0.5),
        ({"rampup_share": 0.0, "unsupervised_weight": 3.0}, 0, 3.0, 1.0),
        ({"perturbation_start": 0.3}, 0, RAMP, 0.0),
        ({"perturbation_start": 0.3}, 299, 1.0, 0.0),
        ({"perturbation_start": 0.3}, 300, 1.0, 1.0),
        ({"alpha_rampup_share": 0.4, "alpha": 2.0}, 0, RAMP, 2 * RAMP),
        ({"alpha_rampup_share": 0.4, "alpha": 2.0}, 200, 1.0, 2 * math.exp(-5 / 4)),
        ({"alpha_rampup_share": 0.4, "alpha": 2.0}, 400, 1.0, 2.0),
    ],
)
def test_ramps(settings, iteration, weight, alpha):
    method = make(**{"rampup_share": 0.2, **settings})
    assert method._weights(Progress(iteration, 1000)) == pytest.approx((weight, alpha))


# the whole step by hand


@pytest.mark.parametrize("update", ["joint", "sequential"])
@pytest.mark.parametrize(("epsilon", "alpha", "weight"), [(0.05, 1.0, 1.0), (0.3, 0.5, 2.0), (0.05, 0.0, 1.0)])
def test_a_step_is_that_written_by_hand(update, epsilon, alpha, weight):
    settings = {"update": update, "epsilon": epsilon, "alpha": alpha, "unsupervised_weight": weight}
    method = make(dtype=torch.float64, **settings, **STRONG_ONLY)
    batch, start, passes = make_batch(dtype=torch.float64), copy.deepcopy(method.network), Passes(method.network)
    run(method, batch)
    assert torch.equal(passes.seen[0].images, batch.unlabeled)
    assert not torch.equal(passes.seen[1].images, batch.unlabeled)
    assert torch.equal(passes.seen[2].images, batch.labeled)
    unsupervised, supervised = slow_losses(start, batch, passes.seen[1].images)
    theta = flat(start)
    first, own = gradient(start, unsupervised), gradient(start, supervised)
    if update == "joint":
        second = gradient(start, unsupervised, theta + epsilon * first / first.norm())
        expected = theta - 0.1 * (own + weight * (first + alpha * second))
    else:
        theta = theta - 0.1 * (own + weight * first)
        first = gradient(start, unsupervised, theta)
        second = gradient(start, unsupervised, theta + epsilon * first / first.norm())
        expected = theta - 0.1 * weight * alpha * second
    moved = flat(method.network) - flat(start)
    assert (flat(method.network) - expected).norm() < 1e-5 * moved.norm()
    # The second gradient is far from nothing, and from the first.
    assert (second - first).norm() > 1e-3 * first.norm()


def test_without_alpha_the_weights_are_those_of_fixmatch_by_hand():
    """Two steps with momentum and weight decay, dropout, strong views and CutMix."""
    settings = {"dropout": 0.5, "cutmix": {"probability": 1.0}}
    method, other = make(alpha=0.0, **settings), make(**settings)
    network, batch = other.network, make_batch()
    usual = {"momentum": 0.9, "weight_decay": 1e-2}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, **usual)
    torch.manual_seed(1)
    for _ in range(2):
        with torch.no_grad():
            confidence, labels = network(batch.unlabeled).softmax(1).max(1)
        box = sample_cutmix(other.config.cutmix, 2, (16, 16), generator=other.generator)
        images = apply_cutmix(strong(other.config.strong_settings(2), batch.unlabeled, generator=other.generator), box)
        labels, mask = apply_cutmix(labels, box), apply_cutmix(confidence, box) >= 0.4
        unsupervised = slow_consistency(network(images), labels, mask)
        (cross_entropy_dice(network(batch.labeled), batch.labels) + unsupervised).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.manual_seed(1)
    handles = Recording(method, **usual)
    for _ in range(2):
        run(method, batch, handles)
    torch.testing.assert_close(flat(method.network), flat(network), rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(method.network.buffers(), network.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_losses_alone_are_those_of_the_instance_perturbation():
    batch, progress = make_batch(), Progress(0, STEPS)
    settings = {"dropout": 0.5, "rampup_share": 0.2}
    _, stepped = run(make(**settings), batch)
    losses = make(**settings).losses(batch, progress)
    assert list(losses) == list(stepped) == ["supervised", "unsupervised"]
    assert all(torch.equal(value, stepped[key]) and value.requires_grad for key, value in losses.items())


def parts(**settings):
    """The gradient of the single update of a step."""
    handles, _ = run(make(**settings), make_batch())
    (whole,) = handles.gradients
    return whole


def test_without_epsilon_the_first_gradient_counts_twice():
    settings = {"dropout": 0.5, **STRONG_ONLY}
    own = parts(alpha=0.0, unsupervised_weight=0.0, **settings)
    first = parts(alpha=0.0, **settings) - own
    torch.testing.assert_close(parts(epsilon=0.0, alpha=0.7, **settings) - own, 1.7 * first, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("update", ["joint", "sequential"])
def test_a_tiny_epsilon_gives_the_same_gradient_where_dropout_is_replayed(update):
    settings = {"dropout": 0.5, "update": update, **STRONG_ONLY}
    results = {}
    for key, more in {
        "none": {"epsilon": 0.0},
        "replayed": {"epsilon": 1e-9},
        "fresh": {"epsilon": 1e-9, "replay_dropout": False},
    }.items():
        method = make(**settings, **more)
        run(method, make_batch())
        results[key] = flat(method.network)
    torch.testing.assert_close(results["replayed"], results["none"], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(results["fresh"], results["none"], rtol=1e-2, atol=1e-3)


def test_the_second_gradient_reaches_the_update_and_not_a_number_alone(monkeypatch):
    """A detached L_u* in the loss, as in one public re-implementation, would leave the first gradient alone."""
    ends = {alpha: parts(alpha=alpha, dtype=torch.float32) for alpha in (0.0, 1.0)}
    assert (ends[1.0] - ends[0.0]).norm() > 0.1 * ends[0.0].norm()
    method = make()
    original, calls = method._consistency, []

    def detached(*arguments):
        calls.append(original(*arguments))
        return calls[-1] if len(calls) == 1 else calls[-1].detach() + 0 * flat_sum(method.network)

    monkeypatch.setattr(method, "_consistency", detached)
    handles, _ = run(method, make_batch())
    torch.testing.assert_close(handles.gradients[0], ends[0.0])
    assert len(calls) == 2


def flat_sum(network):
    return sum(p.sum() for p in network.parameters())


# the perturbation


def test_the_direction_is_the_consistencys_and_not_the_totals():
    batch = make_batch(dtype=torch.float64)
    displaced = {}
    for source in ("unsupervised", "total"):
        settings = {"perturbation_source": source, "unsupervised_weight": 0.7, "dtype": torch.float64, **STRONG_ONLY}
        method = make(**settings)
        start, passes = copy.deepcopy(method.network), Passes(method.network)
        run(method, batch)
        displaced[source] = passes.displacement
    unsupervised, supervised = slow_losses(start, batch, passes.seen[1].images)
    first, own = gradient(start, unsupervised), gradient(start, supervised)
    assert cosine(displaced["unsupervised"], first) == pytest.approx(1, abs=1e-6)
    assert cosine(displaced["unsupervised"], first + own) < 0.99
    assert cosine(displaced["total"], own + 0.7 * first) == pytest.approx(1, abs=1e-6)
    assert cosine(displaced["total"], first) < 0.99


@pytest.mark.parametrize("perturbation", ["global_l2", "random"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-2)])
@pytest.mark.parametrize("epsilon", [0.1, 0.001])
def test_the_perturbation_has_norm_epsilon(perturbation, dtype, tolerance, epsilon):
    method = make(perturbation=perturbation, epsilon=epsilon, dtype=dtype)
    passes = Passes(method.network)
    run(method, make_batch(dtype=dtype))
    assert passes.displacement.norm().item() == pytest.approx(epsilon, rel=tolerance)
    assert method.pop_logged()["perturbation_norm"].item() == pytest.approx(epsilon, rel=tolerance)


def test_the_perturbation_does_not_depend_on_the_losss_scale(monkeypatch):
    seen = []
    for factor in (1, 1000):
        method = make(dtype=torch.float64)
        original, passes = method._consistency, Passes(method.network)
        monkeypatch.setattr(method, "_consistency", lambda *a, f=original, k=factor: k * f(*a))
        run(method, make_batch(dtype=torch.float64))
        seen.append(passes.displacement)
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-6, atol=1e-9)


def test_layerwise_and_adaptive_steps_and_weights_alone():
    batch = make_batch(dtype=torch.float64)
    moved = {}
    for key, settings in {
        "layer_relative": {"perturbation": "layer_relative"},
        "adaptive": {"perturbation": "adaptive"},
        "weights": {"perturbed": "weights"},
    }.items():
        method = make(dtype=torch.float64, epsilon=0.05, **settings, **STRONG_ONLY)
        start, passes = copy.deepcopy(method.network), Passes(method.network)
        run(method, batch)
        moved[key] = passes.displacement
    g, theta = gradient(start, slow_losses(start, batch, passes.seen[1].images)[0]), flat(start)
    slow = 0.05 * theta**2 * g / (theta.abs() * g).norm()
    assert (moved["adaptive"] - slow).norm() < 1e-4 * slow.norm()
    at = 0
    for p in start.parameters():
        part = slice(at, at := at + p.numel())
        step = 0.05 * theta[part].norm() * g[part] / (g[part].norm() + 1e-12)
        # A bias before a batch norm has a gradient of rounding alone, in whichever direction.
        if g[part].norm() > 1e-9:
            assert (moved["layer_relative"][part] - step).norm() <= 1e-4 * step.norm()
        assert (moved["weights"][part] == 0).all() == (p.ndim == 1)
    assert moved["weights"].norm().item() == pytest.approx(0.05, rel=1e-6)
    chosen = moved["weights"] != 0
    assert cosine(moved["weights"][chosen], g[chosen]) == pytest.approx(1, abs=1e-6)


def test_a_random_direction_knows_nothing_of_the_gradients():
    seen = []
    for seed, generator in [(0, 0), (1, 0), (0, 5)]:
        method = make(perturbation="random", epsilon=0.1)
        method.generator.manual_seed(generator)
        passes = Passes(method.network)
        run(method, make_batch(seed=seed))
        seen.append(passes.displacement)
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=1e-6)
    assert abs(cosine(seen[0], seen[2])) < 0.2
    assert (seen[0] > 0).float().mean().item() == pytest.approx(0.5, abs=0.1)


def test_ascent_in_two_steps_on_the_quadratic_and_on_a_line(monkeypatch):
    """Each of epsilon / 2 along the gradient where it begins: together at most epsilon, on a line exactly that."""
    factors, ends = torch.tensor([2.0, 1.0]).double(), {}
    for kind in ("quadratic", "line"):
        method = make(Quadratic(), dtype=torch.float64, epsilon=0.4, ascent_steps=2)
        theta, seen = method.network.theta, []

        def loss(*_, theta=theta, seen=seen, power=2 if kind == "quadratic" else 1):
            seen.append(theta.detach().clone())
            return (factors * theta**power).sum() / power

        monkeypatch.setattr(method, "_consistency", loss)
        monkeypatch.setattr(method, "_supervised", lambda _, theta=theta: 0 * theta.sum())
        run(method, make_batch(dtype=torch.float64))
        ends[kind] = (seen[-1] - 1).norm().item()
        place = torch.ones(2).double()
        for expected in seen:
            assert torch.allclose(expected, place, atol=1e-9)
            g = factors * (place if kind == "quadratic" else 1)
            place = place + 0.2 * g / g.norm()
        assert len(seen) == 3
    assert ends["line"] == pytest.approx(0.4, rel=1e-9)
    assert 0.39 < ends["quadratic"] < 0.4


@pytest.mark.parametrize(("source", "steps"), [("unsupervised", 1), ("unsupervised", 2), ("total", 1)])
def test_every_step_of_the_ascent_follows_the_chosen_gradient(source, steps, monkeypatch):
    """With losses that are lines each step has the same direction: (1, 0) of L_u, or (1, 1) of both."""
    method = make(Quadratic(), dtype=torch.float64, epsilon=0.4, ascent_steps=steps, perturbation_source=source)
    theta, seen = method.network.theta, []
    monkeypatch.setattr(method, "_consistency", lambda *_: (seen.append(theta.detach().clone()), theta[0])[1])
    monkeypatch.setattr(method, "_supervised", lambda _: theta[1])
    run(method, make_batch(dtype=torch.float64))
    step = [0.4, 0.0] if source == "unsupervised" else [0.4 / math.sqrt(2)] * 2
    assert (seen[-1] - 1).tolist() == pytest.approx(step, abs=1e-9)


@pytest.mark.parametrize(
    "settings",
    [
        {"perturbation_source": "total", "ascent_steps": 2},
        {"perturbation_source": "total", "update": "sequential"},
        {"perturbation_source": "total", "perturbation": "random"},
        {"second_targets": "recomputed", "ema_decay": 0.9},
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings):
    with pytest.raises(ConfigError, match=r"goes with update=joint|leave out ema_decay"):
        parse(GapMatch.Config, settings, where="method")


@pytest.mark.parametrize("perturbation", ["global_l2", "random"])
def test_several_steps_stay_within_epsilon(perturbation):
    method = make(dtype=torch.float32, epsilon=0.3, ascent_steps=3, perturbation=perturbation)
    run(method, make_batch())
    norm = method.pop_logged()["perturbation_norm"].item()
    assert norm == pytest.approx(0.3, rel=1e-2) if perturbation == "random" else norm < 0.3 * 1.01


@pytest.mark.parametrize("kind", ["ce", "dice", "ce_dice"])
def test_finite_differences_along_the_perturbation_give_the_gradients_norm(kind):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 1))
    errors = []
    for epsilon in (1e-2, 1e-3, 1e-4, 1e-5):
        method = make(
            copy.deepcopy(network), dtype=torch.float64, epsilon=epsilon, consistency_loss=kind, **STRONG_ONLY
        )
        _, terms = run(method, make_batch(dtype=torch.float64))
        logged = method.pop_logged()
        slope = (logged["loss_after"] - terms["unsupervised"]) / epsilon
        errors.append(abs((slope / logged["gradient_norm"]).item() - 1))
    assert terms["unsupervised"].dtype == torch.float64
    assert errors[-1] < 1e-3
    assert all(later < 0.2 * earlier for earlier, later in pairwise(errors))


# what the perturbed pass leaves alone


def watched_second(method, monkeypatch):
    """Weights and buffers when the perturbed pass begins, and when it ends or fails."""
    seen, original = [], method._second

    def second(*arguments):
        seen.append(snapshot(method.network))
        try:
            return original(*arguments)
        finally:
            seen.append(snapshot(method.network))

    monkeypatch.setattr(method, "_second", second)
    return seen


SECOND = [
    {},
    {"update": "sequential"},
    {"perturbation": "random", "ascent_steps": 2},
    {"perturbation": "layer_relative"},
    {"perturbation": "adaptive", "second_targets": "recomputed", "second_view": "new"},
    {"perturbed": "weights", "perturbation_source": "total", "strong_views": 2},
]


@pytest.mark.parametrize("clip", [None, 0.01])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("settings", SECOND, ids=lambda each: "-".join(map(str, each.values())) or "default")
def test_weights_and_statistics_are_bit_by_bit_what_they_were(settings, bf16, clip, monkeypatch):
    method = make(dropout=0.5, epsilon=0.3, **settings)
    seen, handles = watched_second(method, monkeypatch), Recording(method, gradient_clip=clip)
    start = flat(method.network)
    for _ in range(2):
        run(method, make_batch(), handles, bf16=bf16)
    assert len(seen) == 4
    assert_equal(seen[0], seen[1])
    assert_equal(seen[2], seen[3])
    counters = [value.item() for key, value in seen[1].items() if key.endswith("num_batches_tracked")]
    assert set(counters) == {2 + settings.get("strong_views", 1)}  # weak, strong, labeled
    norms = [module for module in method.network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert all(norm.track_running_stats and norm.training for norm in norms)
    assert flat(method.network).isfinite().all()
    assert not torch.equal(flat(method.network), start)
    assert all(p.grad is None for p in method.network.parameters())


def test_the_first_update_is_from_the_restored_weights_not_from_a_step_taken_back():
    method = make(epsilon=0.3)
    start, passes = flat(method.network), Passes(method.network)
    handles, _ = run(method, make_batch())
    assert not torch.equal(passes.displacement, torch.zeros_like(start))
    assert torch.equal(flat(method.network), start.add(handles.gradients[0], alpha=-0.1))


def test_the_step_ends_with_the_statistics_that_stood_before_the_perturbed_pass():
    method = make()
    passes = Passes(method.network)
    run(method, make_batch())
    assert len(passes.seen) == 4
    assert_equal(passes.seen[3].buffers, dict(method.network.named_buffers()))
    updated = make(second_statistics="updated")
    before = Passes(updated.network)
    run(updated, make_batch())
    counters = [b for key, b in updated.network.named_buffers() if key.endswith("num_batches_tracked")]
    assert {int(counter) for counter in counters} == {4}
    assert before.seen[3].buffers.keys() == passes.seen[3].buffers.keys()


def test_an_error_in_the_perturbed_pass_leaves_everything_as_it_was(monkeypatch):
    method = make(dropout=0.5, epsilon=0.3)
    seen, original, calls = watched_second(method, monkeypatch), method._consistency, []

    def breaks(*arguments):
        calls.append(original(*arguments))
        if len(calls) == 2:
            raise KeyError
        return calls[-1]

    monkeypatch.setattr(method, "_consistency", breaks)
    random = []
    monkeypatch.setattr(method, "_supervised", spied(method._supervised, lambda: random.append(torch.get_rng_state())))
    start = flat(method.network)
    with pytest.raises(KeyError):
        run(method, make_batch())
    assert_equal(*seen)
    assert torch.equal(flat(method.network), start)
    assert torch.equal(torch.get_rng_state(), random[0])
    assert all(m.track_running_stats for m in method.network.modules() if isinstance(m, nn.BatchNorm2d))


def spied(function, then):
    def spy(*arguments):
        result = function(*arguments)
        then()
        return result

    return spy


class Drawing(nn.Module):
    """A network that notes one number of torch's generator in every pass, as dropout draws them."""

    def __init__(self):
        super().__init__()
        self.conv, self.drawn, self.kinds = nn.Conv2d(1, 3, 3, padding=1), [], []

    def forward(self, images):
        self.drawn.append(torch.rand(()).item())
        self.kinds.append(torch.is_grad_enabled())
        return self.conv(images)


@pytest.mark.parametrize(
    ("settings", "times"),
    [
        ({}, 1),
        ({"update": "sequential"}, 2),
        ({"strong_views": 2}, 1),
        ({"second_view": "new"}, 1),
        ({"perturbation": "random"}, 1),
        ({"ascent_steps": 3}, 3),
        ({"second_targets": "recomputed"}, 1),
    ],
    ids=lambda each: "-".join(map(str, each.values())) or "default" if isinstance(each, dict) else "",
)
def test_every_perturbed_pass_drops_what_the_first_dropped(settings, times):
    """Otherwise two random networks are compared, not two places in weight space."""
    network = Drawing()
    method = make(network, epsilon=0.1, **settings)
    views = settings.get("strong_views", 1)
    run(method, make_batch())
    passes = [drawn for drawn, grad in zip(network.drawn, network.kinds, strict=True) if grad]  # labels come without
    first, labeled, later = passes[:views], passes[views], passes[views + 1 :]
    assert later == times * first
    assert labeled not in first
    state = torch.get_rng_state()
    without = make(Drawing(), alpha=0.0, **settings)
    run(without, make_batch())
    assert torch.equal(torch.get_rng_state(), state)  # the next iteration draws as if there were no perturbed pass


def test_without_replay_the_perturbed_pass_draws_anew():
    network = Drawing()
    run(make(network, replay_dropout=False), make_batch())
    assert len(set(network.drawn)) == 4


def test_the_perturbed_pass_sees_the_same_view_or_a_new_one():
    for kind in ("same", "new"):
        method = make(second_view=kind)
        passes = Passes(method.network)
        run(method, make_batch())
        assert torch.equal(passes.seen[3].images, passes.seen[1].images) == (kind == "same")


def test_labels_stay_those_of_the_first_pass_or_are_those_of_the_moved_weights(monkeypatch):
    for kind in ("same", "recomputed"):
        method = make(second_targets=kind, epsilon=3.0)
        original, seen = method._consistency, []
        monkeypatch.setattr(method, "_consistency", lambda v, t, f=original, s=seen: (s.append(t), f(v, t))[1])
        passes = Passes(method.network)
        run(method, make_batch())
        assert len(passes.seen) == (4 if kind == "same" else 5)
        if kind == "same":
            assert seen[0] is seen[1]
        else:
            assert not passes.seen[3].grad
            assert torch.equal(passes.seen[3].images, make_batch().unlabeled)
            assert (passes.displacement.norm() - 3).abs() < 0.1
            assert not torch.equal(seen[0].targets, seen[1].targets)


# pseudo-labels


@pytest.mark.parametrize("normalization", ["all", "masked"])
@pytest.mark.parametrize("kind", ["ce", "dice", "ce_dice"])
@pytest.mark.parametrize("update", ["joint", "sequential"])
def test_without_confident_voxels_a_step_is_that_of_supervised_training(update, kind, normalization):
    settings = {"update": update, "consistency_loss": kind, "mask_normalization": normalization}
    method = make(confidence_threshold=1.1, **settings)
    network, batch = copy.deepcopy(method.network), make_batch()
    handles, terms = run(method, batch)
    cross_entropy_dice(network(batch.labeled), batch.labels).backward()
    torch.optim.SGD(network.parameters(), lr=0.1).step()
    torch.testing.assert_close(flat(method.network), flat(network), rtol=1e-5, atol=1e-7)
    assert terms["unsupervised"].item() == 0
    logged = {name: value.item() for name, value in method.pop_logged().items()}
    assert all(math.isfinite(value) for value in logged.values())
    assert logged["confident"] == logged["gradient_norm"] == logged["perturbation_norm"] == 0
    assert logged["gradient_agreement"] == 0
    if update == "sequential":
        assert torch.equal(handles.gradients[1], torch.zeros_like(handles.gradients[1]))


@pytest.mark.parametrize("perturbation", ["layer_relative", "adaptive", "random"])
def test_no_perturbation_makes_numbers_of_an_empty_mask(perturbation):
    method = make(confidence_threshold=1.1, perturbation=perturbation)
    handles, _ = run(method, make_batch())
    own = parts(alpha=0.0, confidence_threshold=1.1)
    torch.testing.assert_close(handles.gradients[0], own)


def test_the_first_gradient_knows_nothing_of_the_labels(monkeypatch):
    seen = []
    for flip in (False, True):
        method, batch = make(dropout=0.5), make_batch()
        batch.labels = 2 - batch.labels if flip else batch.labels
        original = method._second

        def second(again, first, *rest, original=original):
            result = original(again, first, *rest)
            seen.append([torch.cat([g.flatten() for g in gradients]) for gradients in (first, result)])
            return result

        monkeypatch.setattr(method, "_second", second)
        handles, _ = run(method, batch)
        seen[-1].append(handles.gradients[0])
    (first, second, whole), (other_first, other_second, other_whole) = seen
    assert torch.equal(first, other_first)
    assert torch.equal(second, other_second)
    assert not torch.equal(whole, other_whole)


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("ema", [None, 0.9])
def test_pseudo_labels_carry_no_gradient(hard, ema):
    method = make(hard_labels=hard, ema_decay=ema)
    labels = method._label(make_batch().unlabeled.requires_grad_())
    assert not labels.targets.requires_grad
    assert not labels.mask.requires_grad


def test_soft_targets_are_sharpened_and_trusted_as_hard_ones_are():
    settings = {"sharpening_temperature": 0.5, "confidence_threshold": 0.6, "consistency_loss": "ce"}
    method = make(Scaled(), hard_labels=False, **settings)
    probs = torch.tensor([[0.5, 0.8], [0.3, 0.1], [0.2, 0.1]])
    labels = method._label(probs.log().view(1, 3, 1, 2))
    assert labels.mask.flatten().tolist() == [False, True]
    squared = probs**2 / (probs**2).sum(0)
    torch.testing.assert_close(labels.targets.view(3, 2), squared)
    logits = torch.zeros(1, 3, 1, 2)
    where = CutMix(torch.zeros(1, 1, 1, 2, dtype=torch.bool), torch.zeros(1, dtype=torch.long))
    assert method._consistency([StrongView(logits, where)], labels).item() == pytest.approx(math.log(3) / 2, abs=1e-6)


def test_soft_targets_train_with_cutmix_as_by_hand():
    method = make(hard_labels=False, cutmix={"probability": 1.0}, consistency_loss="ce")
    batch = make_batch()
    labels, views = method._label(batch.unlabeled), method._views(batch.unlabeled)
    loss = method._consistency(views, labels)
    box = views[0].box
    targets = torch.where(box.mask, labels.targets.flip(0), labels.targets)
    mask = torch.where(box.mask[:, 0], labels.mask.flip(0), labels.mask)
    logits = copy.deepcopy(method.network)(views[0].images)
    expected = (-(targets * logits.log_softmax(1)).sum(1) * mask).sum() / mask.numel()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_mode_of_the_pass_on_the_weak_view(mode):
    method = make(dropout=0.5, pseudo_label_mode=mode)
    method.network.encoder[0].eval()  # not every module need be in one mode
    modes = [module.training for module in method.modules()]
    before, images = snapshot(method.network), make_batch().unlabeled
    expected = copy.deepcopy(method.network).eval()(images).argmax(1)
    labels = method._label(images)
    assert [module.training for module in method.modules()] == modes
    same = all(torch.equal(value, before[key]) for key, value in method.network.state_dict().items())
    assert same == (mode == "eval")
    assert torch.equal(labels.targets, expected) == (mode == "eval")


def test_labels_of_the_moving_average():
    method = make(ema_decay=0.9)
    with torch.no_grad():
        for p in method.teacher.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    images = make_batch().unlabeled
    network, teacher = (copy.deepcopy(each)(images).argmax(1) for each in (method.network, method.teacher))
    assert torch.equal(method._label(images).targets, teacher)
    assert not torch.equal(teacher, network)
    before = flat(method.teacher)
    run(method, make_batch())
    torch.testing.assert_close(flat(method.teacher), 0.9 * before + 0.1 * flat(method.network))
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    assert not hasattr(make(), "teacher")
    assert method.predictor is method.network


# views


def test_two_strong_views_are_averaged():
    method, batch = make(strong_views=2, dropout=0.0), make_batch()
    labels, views = method._label(batch.unlabeled), method._views(batch.unlabeled)
    assert len(views) == 2
    assert not torch.equal(views[0].images, views[1].images)
    single = [method._consistency([view], labels).item() for view in views]
    assert method._consistency(views, labels).item() == pytest.approx(sum(single) / 2, rel=1e-5)
    assert single[0] != pytest.approx(single[1], rel=1e-5)


def test_boxes_carry_labels_and_trust_with_the_image():
    """The network copies its input: confident voxels agree with their labels only where both were pasted alike."""
    plain = {"p_jitter": 0.0, "p_blur": 0.0}
    settings = {"cutmix": {"probability": 1.0, "area": [0.3, 0.4]}, "strong": plain, "confidence_threshold": 0.9}
    method = make(Scaled(), channels=3, mask_normalization="masked", consistency_loss="ce", **settings)
    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(4, (3, 16, 16), generator=generator)  # 3: no class, not confident
    images = 20 * F.one_hot(classes, 4).movedim(-1, 1)[:, :3].float()
    labels, (view,) = method._label(images), method._views(images)
    assert view.box.mask.any(3).any(2).all()
    assert torch.equal(view.box.partner, torch.tensor([1, 2, 0]))
    for row in range(3):
        expected = torch.where(view.box.mask[row], images[(row + 1) % 3], images[row])
        assert torch.equal(view.images[row], expected)
    assert method._consistency([view], labels).item() < 1e-6
    untouched = CutMix(torch.zeros_like(view.box.mask), view.box.partner)
    assert method._consistency([StrongView(view.images, untouched)], labels).item() > 0.1


@pytest.mark.parametrize("dims", [2, 3])
def test_the_strong_view_keeps_voxels_where_they_are(dims):
    method = make(dims=dims, **STRONG_ONLY)
    images = torch.zeros(8, 1, *(16,) * dims)
    centers = torch.randint(3, 13, (8, dims), generator=torch.Generator().manual_seed(0)).tolist()
    for row, center in enumerate(centers):
        images[(row, 0, *center)] = 10
    (view,) = method._views(images)
    assert not torch.equal(view.images, images)
    assert torch.equal(view.images.flatten(1).argmax(1), images.flatten(1).argmax(1))


@pytest.mark.parametrize("name", ["unet", "unet3d", "vnet"])
def test_no_unlabeled_rows_are_refused(name):
    method, batch = make(name=name), make_batch()
    batch.unlabeled = batch.unlabeled[:0]
    for call in (method.losses, lambda *arguments: method.step(*arguments, Recording(method))):
        with pytest.raises(ConfigError, match="needs unlabeled rows"):
            call(batch, Progress(0, STEPS))


# schedules, ranks, training


@pytest.mark.parametrize("update", ["joint", "sequential"])
def test_before_its_start_there_is_no_perturbed_pass(update):
    method = make(update=update, perturbation_start=0.5)
    passes, handles = Passes(method.network), Recording(method)
    run(method, make_batch(), handles, iteration=4)
    assert (len(passes.seen), len(handles.gradients)) == (3, 1)
    run(method, make_batch(), handles, iteration=5)
    assert len(passes.seen) == 3 + (4 if update == "joint" else 5)
    assert len(handles.gradients) == (2 if update == "joint" else 3)


class Rank(Recording):
    """One of two ranks in one process: an average waits for the other's gradient."""

    def __init__(self, method, number, shared):
        super().__init__(method)
        self.number, self.shared = number, shared

    def average_gradients(self, name="main"):
        barrier, slots = self.shared
        parameters = self._parameters(name)
        slots[self.number] = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        barrier.wait()
        for p, pair in zip(parameters, zip(*slots, strict=True), strict=True):
            p.grad = (pair[0] + pair[1]) / 2
        barrier.wait()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"update": "sequential"},
        {"perturbation": "random"},
        {"perturbation": "layer_relative"},
        {"perturbation_source": "total"},
        {"ascent_steps": 2},
        {"ascent_steps": 2, "update": "sequential"},
    ],
    ids=lambda each: "-".join(map(str, each.values())) or "default",
)
def test_ranks_share_the_perturbed_weights_and_the_update(settings):
    methods = [make(epsilon=0.3, **settings, **STRONG_ONLY) for _ in range(2)]
    start = copy.deepcopy(methods[0].network)
    for number, method in enumerate(methods):
        method.generator.manual_seed(number)
    passes = [Passes(method.network) for method in methods]
    shared = threading.Barrier(2, timeout=60), [None, None]
    batches = [make_batch(seed=seed) for seed in range(2)]

    def train(number):
        run(methods[number], batches[number], Rank(methods[number], number, shared))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(train, range(2)))
    ours, theirs = ([each.weights for each in watched.seen] for watched in passes)
    assert len(ours) > 3
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert torch.equal(flat(methods[0].network), flat(methods[1].network))
    assert not torch.equal(ours[-1], ours[0])
    if not settings:
        first = sum(
            gradient(start, slow_losses(start, batch, watched.seen[1].images)[0])
            for batch, watched in zip(batches, passes, strict=True)
        )
        assert cosine(passes[0].displacement, first) == pytest.approx(1, abs=1e-3)


LOGGED = {"confident", "loss_before", "gradient_norm", "perturbation_norm", "loss_after", "gradient_agreement"}


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(
    "settings",
    [*SECOND, {"ema_decay": 0.9, "pseudo_label_mode": "eval"}, {"hard_labels": False}],
    ids=lambda each: "-".join(map(str, each.values())) or "default",
)
def test_every_variant_learns_and_stays_finite(settings, dims, bf16):
    method, batch = make(dims=dims, dropout=0.1, rampup_share=0.2, **settings), make_batch(dims)
    handles, supervised = Recording(method, momentum=0.9, lr=0.05), []
    for iteration in range(STEPS):
        _, terms = run(method, batch, handles, iteration=iteration, bf16=bf16)
        assert all(term.isfinite() for term in terms.values())
        supervised.append(terms["supervised"].item())
        assert set(method.pop_logged()) == LOGGED
    assert supervised[-1] < 0.8 * supervised[0]
    assert all(value.isfinite().all() for value in method.state_dict().values())


@pytest.mark.parametrize(
    "settings",
    [
        {"epsilon": -0.1},
        {"alpha": -1},
        {"ascent_steps": 0},
        {"strong_views": 0},
        {"sharpening_temperature": 0},
        {"ema_decay": 1},
        {"update": "both"},
        {"tau": 0.9},
    ],
    ids=lambda each: next(iter(each)),
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError):
        GapMatch.Config(**settings)
