"""Diff-CL: what supervises what, what stays apart, and when."""

from __future__ import annotations

import copy

import pytest
import torch
from diffcl_steps import ISOLATED, LATE, STEPS, Watch, at, groups, make, make_batch, open_gates, seg, train, warmed
from torch import nn
from torch.nn import functional

from scantly.methods.base import Stage
from scantly.training.config import TrainingSection
from scantly.training.optimizers import TrainingHandles

# what supervises what


@pytest.mark.parametrize(("dims", "network"), [(2, "unet"), (3, "vnet"), (2, "unet3d"), (3, "dynunet")])
def test_every_term_is_its_formula(dims, network):
    method, batch = make(dims, network), make_batch(dims)
    watch = Watch(method)
    terms = method.losses(batch, at(500))
    ((clean, t, noise),), ((inputs, ds),), (cs,) = watch.noised, watch.ds, watch.cs
    y, pseudo, back = batch.labels, cs[2:].argmax(1), ds[2:].argmax(1)
    # what is noised: the labels, and the hard prediction of the convolutional network
    assert torch.equal(clean.argmax(1), torch.cat([y, pseudo]))
    assert set(clean.unique().tolist()) == {-1, 1}
    assert torch.equal(inputs[0], batch.images)
    assert torch.equal(inputs[2], t)
    kept = method.ds.schedule.kept[t].view(-1, *[1] * (dims + 1)).float()
    torch.testing.assert_close(inputs[1], kept.sqrt() * clean + (1 - kept).sqrt() * noise)
    assert terms["cs_supervised"].item() == pytest.approx(seg(cs[:2], y).item(), rel=1e-4)
    assert terms["ds_supervised"].item() == pytest.approx(seg(ds[:2], y).item(), rel=1e-4)
    assert terms["ds_pseudo"].item() == pytest.approx(0.1 * seg(ds[2:], pseudo).item(), rel=1e-4)
    assert terms["cs_pseudo"].item() == pytest.approx(0.1 * seg(cs[2:], back).item(), rel=1e-4)


def test_the_foreground_alone_counts_in_dice_if_so_set():
    batch = make_batch()
    full, foreground = (make(dice_background=value).losses(batch, at(500)) for value in (True, False))
    for name in ("cs_supervised", "ds_supervised", "ds_pseudo", "cs_pseudo"):
        assert full[name].item() != foreground[name].item(), name


@pytest.mark.parametrize(("dims", "network"), [(2, "unet"), (3, "vnet"), (2, "unet3d"), (3, "dynunet")])
def test_the_first_convolution_of_ds_takes_image_and_map(dims, network):
    method = make(dims, network, channels=2)
    first = {name: next(m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Conv3d))
             for name, net in (("cs", method.cs), ("ds", method.ds))}  # fmt: skip
    assert (first["cs"].in_channels, first["ds"].in_channels) == (2, 2 + 3)
    method.losses(make_batch(dims, channels=2), at(LATE))


# gradients


def reached(loss, parameters):
    """Whether there is a path at all: without one the query gives None, not zeros."""
    return [g is not None for g in torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)]


def of_each(terms):
    """The loss of each network."""
    return {
        "cs": terms["cs_supervised"] + terms["cs_pseudo"] + terms.get("contrast", 0),
        "ds": terms["ds_supervised"] + terms["ds_pseudo"],
    }


@pytest.mark.parametrize("settings", ISOLATED, ids=lambda s: " ".join(s) or "defaults")
def test_neither_loss_has_a_path_to_the_other_network(settings):
    method = warmed(**settings)
    losses, parts = of_each(method.losses(make_batch(), at(LATE))), groups(method)
    assert not any(reached(losses["ds"], parts["cs"] + parts["head"]))
    assert not any(reached(losses["cs"], parts["ds"]))
    assert all(reached(losses["ds"], parts["ds"]))
    assert all(reached(losses["cs"], parts["cs"] + parts["head"]))


def test_the_contrast_reaches_the_convolutional_network_and_the_embedding_only():
    method = warmed()
    contrast, parts = method.losses(make_batch(), at(LATE))["contrast"], groups(method)
    last = {id(p) for p in method.cs.backbone.head.parameters()}
    before = [p for p in parts["cs"] if id(p) not in last]
    assert not any(reached(contrast, list(method.cs.backbone.head.parameters()) + parts["ds"]))
    assert all(reached(contrast, before + parts["head"]))
    for part in (before, parts["head"]):
        values = torch.autograd.grad(contrast, part, retain_graph=True)
        assert sum(g.abs().sum() for g in values) > 0
    bank = method.contrast.banks[0]
    assert not bank.values.requires_grad


def test_a_path_between_the_networks_would_be_seen(monkeypatch):
    """The queries above are able to fail."""
    method = warmed()
    parts, batch = groups(method), make_batch()
    with monkeypatch.context() as patch:
        patch.setattr(
            "scantly.methods.diffcl.signed_one_hot",
            lambda labels, classes: (
                2 * functional.one_hot(labels, classes).movedim(-1, 1) - 1.0 + 0 * parts["cs"][0].sum()
            ),
        )
        losses = of_each(method.losses(batch, at(LATE)))
    assert reached(losses["ds"], parts["cs"])[0]
    original = method.contrast.loss
    monkeypatch.setattr(
        method.contrast, "loss", lambda features, *rest: original(features + 0 * parts["ds"][0].sum(), *rest)
    )
    assert reached(of_each(method.losses(batch, at(LATE)))["cs"], parts["ds"])[0]


def test_without_weights_a_step_is_supervised_training_of_both():
    """Three steps against a loop of its own; unlabeled rows share the batch norm."""
    method, batch = make(mu1=0.0, mu2=0.0, use_cl=False, ds_lr=0.01, ds_weight_decay=0.1), make_batch()
    open_gates(method)
    cs, ds = copy.deepcopy(method.cs), copy.deepcopy(method.ds)
    handles = TrainingHandles(method, Stage(), TrainingSection(lr=0.05, weight_decay=0.01), 10)
    for iteration in range(3):
        handles.set_iteration(iteration)
        method.step(batch, at(iteration, 10), handles)

    spared = [p for name, p in cs.named_parameters() if name.split(".")[-1] in {"gamma", "A_log", "Dskip"}]
    others = [p for p in cs.parameters() if all(p is not q for q in spared)]
    assert len(spared) == 5
    sgd = torch.optim.SGD([{"params": others, "weight_decay": 0.01}, {"params": spared}], lr=0.05, momentum=0.9)
    adamw = torch.optim.AdamW(ds.parameters(), lr=0.01, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    images, y = batch.images, batch.labels
    for iteration in range(3):
        factor = (1 - max(iteration - 1, 0) / 10) ** 0.9
        for group in sgd.param_groups:
            group["lr"] = 0.05 * factor
        adamw.param_groups[0]["lr"] = 0.01 * factor
        logits = cs(images)[0]
        clean = functional.one_hot(torch.cat([y, logits[2:].argmax(1)]), 3).movedim(-1, 1) * 2.0 - 1
        t = torch.cat([torch.randint(1000, (2,), generator=generator) for _ in range(2)])
        noise = torch.randn(clean.shape, generator=generator)
        kept = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)[t].view(-1, 1, 1, 1)
        noisy = kept.sqrt().float() * clean + (1 - kept).sqrt().float() * noise
        restored = ds(images, noisy, t)[0]
        sgd.zero_grad()
        adamw.zero_grad()
        seg(logits[:2], y).backward()
        seg(restored[:2], y).backward()
        nn.utils.clip_grad_norm_(ds.parameters(), 1.0)
        sgd.step()
        adamw.step()
    # AdamW makes steps of the rounding errors that are the gradients of biases before a normalization
    for ours, theirs, blurred in ((method.cs, cs, ()), (method.ds, ds, (".0.bias", ".4.bias", "running_mean"))):
        expected = theirs.state_dict()
        for name, value in ours.state_dict().items():
            if not name.endswith(blurred):
                torch.testing.assert_close(value, expected[name], atol=1e-4, rtol=1e-3, msg=name)


def test_without_weights_the_contrast_changes_neither_network():
    batch, states = make_batch(), []
    for use_cl in (True, False):
        method = make(mu1=0.0, mu2=0.0, use_cl=use_cl)
        if use_cl:
            for bank in method.contrast.banks:
                bank.push(functional.normalize(torch.randn(20, 8, generator=torch.Generator().manual_seed(1)), dim=1))
        history = train(method, batch, 1)
        assert ("contrast" in history[0]) == use_cl
        states.append({**method.cs.state_dict(prefix="cs."), **method.ds.state_dict(prefix="ds.")})
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_with_empty_banks_the_contrast_is_zero_and_gradients_are_finite():
    method, batch = make(), make_batch()
    terms = method.losses(batch, at(LATE))
    assert terms["contrast"].item() == 0
    sum(terms.values()).backward()
    assert all(p.grad.isfinite().all() for p in method.parameters())
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in method.contrast.head.parameters())
    assert "contrast" not in make(use_cl=False).losses(batch, at(LATE))


# when


@pytest.mark.parametrize(
    ("iteration", "factor"), [(0, 0.00674), (100, 0.06005), (200, 0.28650), (300, 0.73162), (400, 1), (999, 1)]
)
def test_the_ramp_over_the_first_two_fifths(iteration, factor, monkeypatch):
    method = make(mu1=0.5, mu2=2.0, eta=0.25, contrast_start=0.0)
    monkeypatch.setattr(method, "_pseudo", lambda *_: torch.tensor(3.0))
    monkeypatch.setattr(method.contrast, "loss", lambda *_: (torch.tensor(7.0), {}))
    terms = method.losses(make_batch(), at(iteration))
    assert terms["ds_pseudo"].item() == pytest.approx(0.5 * factor * 3, abs=3e-5)
    assert terms["cs_pseudo"].item() == pytest.approx(2 * factor * 3, abs=6e-5)
    assert terms["contrast"].item() == pytest.approx(2 * factor * 0.25 * 7, abs=6e-5)


def test_without_a_ramp_the_weights_are_whole_at_once(monkeypatch):
    method = make(rampup_share=0.0)
    monkeypatch.setattr(method, "_pseudo", lambda *_: torch.tensor(1.0))
    assert method.losses(make_batch(), at(0))["cs_pseudo"].item() == pytest.approx(0.1)


def test_the_banks_are_filled_from_the_first_step_and_the_contrast_begins_later():
    method, batch = make(), make_batch()
    handles = TrainingHandles(method, Stage(), TrainingSection(), STEPS)
    assert "contrast" not in method.step(batch, at(0), handles)
    method.after_step(at(0))
    assert method.contrast.fill > 0
    assert "contrast" not in method.losses(batch, at(99))
    assert "contrast" in method.losses(batch, at(100))
    assert "contrast" in make(contrast_start=0.0).losses(batch, at(0))
    assert "contrast" not in make(contrast_start=1.0).losses(batch, at(LATE))


def test_what_is_contrasted_are_the_unlabeled_rows_of_the_convolutional_network(monkeypatch):
    method, batch, asked, seen = make(), make_batch(), [], []
    original = method.contrast.loss
    monkeypatch.setattr(method.contrast, "loss", lambda *values: asked.append(values) or original(*values))
    watch = Watch(method)
    method.cs.backbone.head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    method.losses(batch, at(LATE))
    ((features, predicted, generator),) = asked
    assert torch.equal(features, seen[0][2:])
    assert features.requires_grad
    assert torch.equal(predicted, watch.cs[0][2:].argmax(1))
    assert generator is method.generator


def test_what_is_stored_are_the_labeled_rows_of_the_diffusion_network(monkeypatch):
    method, batch, stored = make(), make_batch(), []
    monkeypatch.setattr(method.contrast, "store", lambda *values: stored.append(values))
    watch, seen = Watch(method), []
    method.ds.network.backbone.head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    method.losses(batch, at(0))
    method.after_step(at(0))
    method.after_step(at(1))  # nothing new came
    ((features, labels, predicted, generator),) = stored
    assert torch.equal(features, seen[0][:2])
    assert not features.requires_grad
    assert torch.equal(labels, batch.labels)
    assert torch.equal(predicted, watch.ds[0][1][:2].argmax(1))
    assert generator is method.generator


def test_the_head_that_stores_is_that_of_after_the_step():
    method, batch = make(correct_only=False, pushed=512, queue=512), make_batch()
    handles = TrainingHandles(method, Stage(), TrainingSection(), STEPS)
    method.step(batch, at(LATE), handles)
    features, labels, _ = (value.clone() for value in method._arrived)
    method.after_step(at(LATE))
    head = copy.deepcopy(method.contrast.head).eval()
    vectors = functional.normalize(head(features).movedim(1, -1).flatten(0, -2), dim=1)
    for k, bank in enumerate(method.contrast.banks):
        expected = vectors[labels.flatten() == k]
        assert int(bank.filled) == len(expected)
        held = bank.values[: len(expected)]
        # as sets: every stored one is one of the expected ones, and their sums agree
        assert (held[:, None] - expected).norm(dim=2).min(1).values.max() < 1e-5
        torch.testing.assert_close(held.sum(0), expected.sum(0), atol=1e-3, rtol=1e-3)
