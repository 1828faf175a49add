"""GapMatch: the worked numbers of its specification, its ramps, and its step against one written by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from gapmatch_steps import (
    PLAIN,
    STEPS,
    STRONG_ONLY,
    Passes,
    Quadratic,
    Recording,
    Scaled,
    flat,
    gradient,
    make,
    make_batch,
    parts,
    run,
    slow_consistency,
    slow_losses,
)
from torch import nn

from scantly.losses import cross_entropy_dice
from scantly.methods.base import Batch, Progress
from scantly.methods.gapmatch import GapMatch
from scantly.methods.parts.strong_views import StrongView, WeakLabels
from scantly.views import CutMix, apply_cutmix, sample_cutmix, strong


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
    assert (config.cutmix.probability, config.cutmix.area, config.cutmix.aspect) == (0.5, (0.02, 0.4), (0.3, 1 / 0.3))


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
