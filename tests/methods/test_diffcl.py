"""Diff-CL: what supervises what, what stays apart, what is drawn, and who predicts."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from scantly.errors import ConfigError
from scantly.inference.memory import footprint
from scantly.methods.base import Batch, Progress, Stage, Task
from scantly.methods.diffcl import DiffCL
from scantly.methods.parts.agreement import foreground_dice
from scantly.networks.skips import SkipNetwork
from scantly.settings import merge
from scantly.training import engine
from scantly.training.checkpoint import load_checkpoint
from scantly.training.config import TrainingSection
from scantly.training.optimizers import TrainingHandles
from scantly.training.resolve import resolve
from scantly.training.train import train_config

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


def groups(method):
    return {
        "cs": [p for p in method.cs.parameters() if p.requires_grad],
        "ds": [p for p in method.ds.parameters() if p.requires_grad],
        "head": [] if method.contrast is None else list(method.contrast.head.parameters()),
    }


def reached(loss, parameters):
    """Whether there is a path at all: without one the query gives None, not zeros."""
    return [g is not None for g in torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)]


def of_each(terms):
    """The loss of each network."""
    return {
        "cs": terms["cs_supervised"] + terms["cs_pseudo"] + terms.get("contrast", 0),
        "ds": terms["ds_supervised"] + terms["ds_pseudo"],
    }


ISOLATED = [
    {},
    {"ds_pseudo": "ddim", "ds_pseudo_steps": 2},
    {"share_head": False},
    {"pseudo_confidence": 0.4},
    {"ds_mse": True, "hf_in": ("cs", "ds")},
    {"candidate_sampling": "stratified", "pair_level": "anchor", "proj_stride": 2},
]


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


# steps of the noise


def test_every_row_has_a_step_of_its_own_within_its_range():
    method = make(t_range_labeled=(0.0, 0.1), t_range_unlabeled=(0.25, 1.0))
    watch = Watch(method)
    for seed in range(10):
        method.losses(make_batch(seed=seed), at(0))
    t = torch.stack([values[1] for values in watch.noised])
    assert (t[:, :2] < 100).all()
    assert (t[:, 2:] >= 250).all()
    assert t.max() < 1000
    assert len(t[:, 2:].unique()) > 10
    assert (t[:, 2] != t[:, 3]).any()
    noises = torch.stack([values[2] for values in watch.noised]).flatten(0, 1).flatten(1)
    assert (torch.corrcoef(noises) - torch.eye(40)).abs().max() < 0.25


@pytest.mark.parametrize(
    ("shares", "steps", "expected"),
    [((0.0, 1.0), 1000, (0, 999)), ((0.25, 1.0), 1000, (250, 999)), ((0.0, 0.5), 4, (0, 1)), ((0.5, 0.501), 4, (2, 2))],
)
def test_steps_are_uniform_between_the_shares(shares, steps, expected):
    method = make(diffusion_steps=steps)
    t = method._times(20_000, shares)
    low, high = expected
    assert (t.min().item(), t.max().item()) == expected
    assert t.float().mean().item() == pytest.approx((low + high) / 2, abs=max(0.02 * (high - low), 1e-9))


@pytest.mark.parametrize(("steps", "shares"), [(2, (0.8, 1.0)), (1000, (0.9996, 1.0))])
def test_a_range_at_the_very_end_stays_within_the_schedule(steps, shares):
    t = make(diffusion_steps=steps)._times(10, shares)
    assert t.max() < steps


@pytest.mark.parametrize("value", [(0.9, 0.1), (-0.1, 1.0), (0.0, 1.1)])
@pytest.mark.parametrize("name", ["t_range_labeled", "t_range_unlabeled", "betas"])
def test_ranges_that_are_none_are_refused(name, value):
    with pytest.raises(ValueError, match="the smaller first"):
        DiffCL.Config(**{name: value})


def test_betas_may_be_constant_and_ranges_not_be_empty():
    assert DiffCL.Config(betas=(0.02, 0.02)).betas == (0.02, 0.02)
    with pytest.raises(ValueError, match="two shares"):
        DiffCL.Config(t_range_labeled=(0.5, 0.5))


# options


def test_doubtful_pseudo_labels_can_be_left_out_of_the_cross_entropy():
    method, batch = make(pseudo_confidence=0.36), make_batch()
    watch = Watch(method)
    terms = method.losses(batch, at(500))
    ((_, ds),), (cs,) = watch.ds, watch.cs
    for name, learner, teacher in (("ds_pseudo", ds[2:], cs[2:]), ("cs_pseudo", cs[2:], ds[2:])):
        confidence, labels = teacher.softmax(1).max(1)
        trusted = confidence >= 0.36
        assert 0 < trusted.float().mean() < 1
        entropy = (functional.cross_entropy(learner, labels, reduction="none") * trusted).mean()
        dice = 2 * seg(learner, labels) - functional.cross_entropy(learner, labels)
        assert terms[name].item() == pytest.approx(0.1 * 0.5 * (entropy + dice).item(), rel=1e-4), name


def test_a_confidence_that_all_have_changes_nothing():
    batch = make_batch()
    all_of_them, by_mask = (make(pseudo_confidence=value).losses(batch, at(500)) for value in (0.0, 0.01))
    for name in ("ds_pseudo", "cs_pseudo"):
        assert by_mask[name].item() == pytest.approx(all_of_them[name].item(), rel=1e-5)


def test_sampled_pseudo_labels_are_those_of_a_sample(monkeypatch):
    method, batch, sampled = make(ds_pseudo="ddim", ds_pseudo_steps=3), make_batch(), []
    original = method.ds.sample

    def spy(images, noise, **options):
        assert torch.equal(images, batch.unlabeled)
        assert options == {"steps": 3, "clip": False}
        assert not torch.is_grad_enabled()
        sampled.append(original(images, noise, **options))
        return sampled[-1]

    monkeypatch.setattr(method.ds, "sample", spy)
    watch = Watch(method)
    terms = method.losses(batch, at(500))
    expected = 0.1 * seg(watch.cs[0][2:], sampled[0].argmax(1)).item()
    assert terms["cs_pseudo"].item() == pytest.approx(expected, rel=1e-4)
    assert len(watch.ds) == 1 + 3
    one_step = 0.1 * seg(watch.cs[0][2:], watch.ds[0][1][2:].argmax(1)).item()
    assert terms["cs_pseudo"].item() != pytest.approx(one_step, rel=1e-4)


def test_sampling_pseudo_labels_leaves_the_running_averages_alone():
    batch, states = make_batch(), []
    for kind in ("one_step", "ddim"):
        method = make(ds_pseudo=kind)
        method.losses(batch, at(500))
        states.append({name: value.clone() for name, value in method.ds.named_buffers()})
        norms = [m for m in method.ds.modules() if isinstance(m, nn.BatchNorm2d)]
        assert all(norm.track_running_stats and norm.training for norm in norms)
        assert {int(norm.num_batches_tracked) for norm in norms} == {1}
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_the_squared_error_is_added_exactly():
    batch, terms = make_batch(), []
    for ds_mse in (False, True):
        method = make(ds_mse=ds_mse)
        watch = Watch(method)
        terms.append(method.losses(batch, at(500)))
    probs = watch.ds[0][1][:2].softmax(1)
    target = functional.one_hot(batch.labels, 3).movedim(-1, 1)
    squared = (probs - target).square().mean().item()
    added = terms[1]["ds_supervised"].item() - terms[0]["ds_supervised"].item()
    assert added == pytest.approx(squared, abs=1e-6)
    for name in ("cs_supervised", "ds_pseudo", "cs_pseudo"):
        assert terms[0][name] == terms[1][name]


@pytest.mark.parametrize(("network", "dims"), [("unet", 2), ("vnet", 3), ("unet3d", 3)])
def test_the_backbones_drop_nothing_unless_told_to(network, dims):
    for keep in (False, True):
        method = make(dims, network, network_dropout=keep)
        for part in (method.cs, method.ds):
            rates = {m.p for m in part.modules() if isinstance(m, nn.Dropout | nn.Dropout2d | nn.Dropout3d)}
            assert rates
            assert any(rates) == keep
    images = make_batch(dims).labeled
    method = make(dims, network)
    assert torch.equal(method.cs(images)[0], method.cs(images)[0])


@pytest.mark.parametrize(("count", "levels"), [(2, {1}), (3, {2}), (4, {3}), (5, {3, 4}), (6, {3, 4})], ids=str)
def test_the_mamba_blocks_are_on_levels_3_and_4_or_the_deepest_there_is(count, levels):
    method = make(widths=(4,) * count, size=32)
    assert set(method.cs.gates()) == levels
    assert method.ds.network.skips is None


def test_the_mamba_blocks_go_where_they_are_told():
    method = make(widths=(4, 8, 16), hf_in=("cs", "ds"), hf_levels=(1, 2))
    assert set(method.cs.gates()) == set(method.ds.network.gates()) == {1, 2}
    only = make(hf_in=("ds",))
    assert only.cs.skips is None
    assert set(only.ds.network.gates()) == {1}
    none = make(use_hf=False, hf_in=("cs", "ds"))
    assert none.cs.skips is None
    assert none.ds.network.skips is None
    for method in (only, none):
        train(method, make_batch(), 2)
    with pytest.raises(ConfigError, match=r"level 2 of method\.hf_levels has no skip connection"):
        make(hf_levels=(2,))


def test_settings_of_the_mamba_blocks_reach_them():
    method = make(
        3, hf_directions=6, hf_state=3, hf_reduction=4, hf_token_stride=3, hf_extractor="fft", hf_cutoff=0.3,
        hf_checkpoint=True,
    )  # fmt: skip
    (block,) = method.cs.skips.blocks
    assert (len(block.mixers), block.token_stride, block.extractor, block.cutoff) == (6, 3, "fft", 0.3)
    assert block.checkpoint
    assert block.reduce.out_channels == 1
    assert block.mixers[0].A_log.shape[1] == 3


def test_the_networks_begin_alike_with_and_without_the_parts():
    """Ablations compare like with like."""
    whole, bare = make(), make(use_ds=False, use_hf=False)
    for name, value in bare.cs.backbone.state_dict().items():
        assert torch.equal(value, whole.cs.backbone.state_dict()[name]), name


# switches


def test_without_the_diffusion_network_it_is_supervised_training():
    method, batch = make(use_ds=False, use_hf=False), make_batch(unlabeled=0)
    (stage,) = method.stages()
    assert stage.unlabeled.count == 0
    assert (method.ds, method.contrast) == (None, None)
    expected = seg(copy.deepcopy(method.cs)(batch.labeled)[0], batch.labels).item()
    terms = method.losses(batch, at(LATE))
    assert list(terms) == ["cs_supervised"]
    assert terms["cs_supervised"].item() == pytest.approx(expected, rel=1e-5)
    assert list(method.optimizers(stage)) == ["cs"]
    history = train(method, batch, 8)
    assert history[-1]["cs_supervised"] < history[0]["cs_supervised"]
    assert make().stages()[0].unlabeled.count is None


def test_what_needs_the_missing_network_is_refused():
    for infer in ("ds", "mean"):
        with pytest.raises(ConfigError, match=f"infer={infer} needs the diffusion network, and method.use_ds is false"):
            make(use_ds=False, infer=infer)


def test_a_batch_without_unlabeled_rows_is_refused():
    with pytest.raises(ConfigError, match=r"needs unlabeled rows; set plan\.unlabeled_batch_size"):
        make().losses(make_batch(unlabeled=0), at(0))


def test_networks_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"remove deep_supervision from network\.arguments"):
        make(2, "dynunet", widths=(4, 8, 16, 16), arguments={"deep_supervision": True})
    with pytest.raises(ConfigError, match="gives logits only"):
        DiffCL(Task(1, CLASSES, 2, (32, 32), "AttentionUnet", {"channels": [4, 8], "strides": [2]}), DiffCL.Config())
    with pytest.raises(ConfigError, match=r"told the step behind normalizations.*network\.arguments\.norm"):
        make(3, "vnet", arguments={"norm": "none"})


def test_fewer_voxels_than_pairs_are_refused():
    method = make(positives=100, negatives=500, candidates=600)
    with pytest.raises(ConfigError, match=r"have 512 voxels .*= 600; lower these"):
        method.losses(make_batch(), at(LATE))


def test_specified_settings_are_the_defaults():
    config = DiffCL.Config()
    assert (config.mu1, config.mu2, config.eta, config.rampup_share, config.contrast_start) == (0.1, 0.1, 0.1, 0.4, 0.1)
    assert (config.diffusion_steps, config.betas, config.t_range_labeled) == (1000, (1e-4, 0.02), (0, 1))
    assert (config.t_range_unlabeled, config.ds_pseudo, config.pseudo_confidence) == ((0, 1), "one_step", 0)
    assert (config.ds_optimizer, config.ds_lr, config.ds_weight_decay) == ("adamw", 1e-4, 1e-3)
    assert (config.ds_gradient_clip, config.ds_mse, config.network_dropout) == (1.0, False, False)
    assert (config.temperature, config.embedding, config.queue, config.pushed) == (0.1, 32, 2048, 256)
    assert (config.anchors, config.candidates, config.positives, config.negatives) == (64, 1024, 32, 256)
    assert (config.pair_level, config.candidate_sampling, config.correct_only) == ("class", "uniform", True)
    assert (config.share_head, config.proj_stride) == (True, 1)
    assert (config.hf_in, config.hf_extractor, config.hf_directions, config.hf_token_stride) == (
        ("cs",),
        "avgpool",
        2,
        1,
    )
    assert (config.hf_reduction, config.hf_state, config.hf_cutoff) == (2, 8, 0.125)
    assert (config.infer, config.sampling_steps, config.sampling_seed, config.sampling_clip) == ("cs", 10, 0, False)


# the log


def test_agreement_counts_voxels_of_the_same_structure():
    first, second = torch.tensor([[0, 1, 1, 2, 2]]), torch.tensor([[0, 1, 2, 2, 0]])
    assert foreground_dice(first, second).item() == pytest.approx(2 * 2 / (4 + 3), abs=1e-5)
    assert foreground_dice(first, first).item() == pytest.approx(1)
    assert foreground_dice(torch.zeros(1, 3), torch.zeros(1, 3)).item() == pytest.approx(1)
    assert foreground_dice(torch.ones(1, 3), torch.zeros(1, 3)).item() < 1e-4


def test_what_is_watched():
    method, batch = make(widths=(4,) * 5), make_batch(size=32)
    train(method, batch, 3)
    method.pop_logged()
    open_gates(method)
    train(method, batch, 2)
    logged = {name: value.item() for name, value in method.pop_logged().items()}
    assert set(logged) == {
        "network_agreement", "ds_restores", "bank_fill", "gamma/3", "gamma/4",
        "positive_similarity", "negative_similarity", "contrast_classes",
    }  # fmt: skip
    for name in ("network_agreement", "ds_restores", "bank_fill"):
        assert 0 <= logged[name] <= 1 + 1e-6
    assert logged["bank_fill"] > 0
    assert -1 <= logged["negative_similarity"] <= logged["positive_similarity"] <= 1
    assert logged["contrast_classes"] in {1, 2, 3}
    assert logged["gamma/3"] == pytest.approx(0.5, abs=0.1)
    assert not any(value.requires_grad for value in method.pop_logged().values())


def test_early_on_the_log_has_what_there_is():
    method = make(use_hf=False)
    method.losses(make_batch(), at(0))
    assert set(method.pop_logged()) == {"network_agreement", "ds_restores", "bank_fill"}
    plain = make(use_hf=False, use_cl=False)
    plain.losses(make_batch(), at(LATE))
    assert set(plain.pop_logged()) == {"network_agreement", "ds_restores"}


# optimizers


def sections(**values):
    return TrainingSection(**{"lr": 0.1, "weight_decay": 0.5, "momentum": 0.0, **values})


def test_each_network_has_its_optimizer_and_the_embedding_goes_with_cs():
    for settings in ({}, {"share_head": False}, {"hf_in": ("cs", "ds")}):
        method = make(**settings)
        handles = TrainingHandles(method, Stage(), sections(), 10)
        parts = groups(method)
        assert {id(p) for p in handles._parameters("cs")} == {id(p) for p in parts["cs"] + parts["head"]}
        assert {id(p) for p in handles._parameters("ds")} == {id(p) for p in parts["ds"]}
        assert isinstance(handles._optimizers["cs"], torch.optim.SGD)
        assert isinstance(handles._optimizers["ds"], torch.optim.AdamW)
        assert handles.rates() == {"cs": 0.1, "ds": 1e-4}
        handles.set_iteration(6)
        assert handles.rates() == pytest.approx({"cs": 0.1 * 0.5**0.9, "ds": 1e-4 * 0.5**0.9})


@pytest.mark.parametrize("lies", [False, True], ids=["", "a network that spares nothing"])
@pytest.mark.parametrize("ds_optimizer", ["adamw", "recipe"])
def test_decay_spares_what_the_mamba_blocks_say_and_nothing_else(ds_optimizer, lies, monkeypatch):
    if lies:  # and the test would see it
        monkeypatch.setattr(SkipNetwork, "undecayed", lambda self: [])
    method = make(hf_in=("cs", "ds"), ds_optimizer=ds_optimizer, ds_lr=0.1, ds_weight_decay=0.5)
    open_gates(method)
    handles = TrainingHandles(method, Stage(), sections(), 10)
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    handles.backward(0 * sum(p.sum() for p in method.parameters()))
    for name in ("cs", "ds"):
        handles.update(name)
    for name, parameter in method.named_parameters():
        spared = name.split(".")[-1] in {"gamma", "A_log", "Dskip"} and not lies
        expected = before[name] * (1.0 if spared else 1 - 0.1 * 0.5)
        torch.testing.assert_close(parameter.detach(), expected, msg=name)


def test_what_is_spared_the_decay_is_trained():
    method = make(hf_in=("cs", "ds"), ds_lr=0.01)
    open_gates(method)
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    train(method, make_batch(), 2)
    for name, parameter in method.named_parameters():
        if name.split(".")[-1] in {"gamma", "A_log", "Dskip"}:
            assert not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize(
    ("own", "recipe", "largest"), [(1.0, None, 1.0), (None, None, None), (None, 3.0, 3.0), (1.0, 3.0, 1.0)]
)
def test_the_gradient_of_ds_alone_is_clipped_unless_the_recipe_clips(own, recipe, largest):
    method = make(ds_optimizer="recipe", ds_gradient_clip=own)
    handles = TrainingHandles(method, Stage(), sections(weight_decay=0.0, gradient_clip=recipe), 10)
    parts = {"cs": groups(method)["cs"] + groups(method)["head"], "ds": groups(method)["ds"]}
    before = {name: [p.detach().clone() for p in part] for name, part in parts.items()}
    handles.backward(sum(p.sum() for p in method.parameters()))
    moved = {}
    for name, part in parts.items():
        handles.update(name)
        changes = [(p.detach() - q).flatten() for p, q in zip(part, before[name], strict=True)]
        moved[name] = torch.cat(changes).norm().item()
    numbers = {name: sum(p.numel() for p in part) for name, part in parts.items()}
    for name, limit in (("cs", recipe), ("ds", largest)):
        assert moved[name] == pytest.approx(0.1 * (math.sqrt(numbers[name]) if limit is None else limit), rel=1e-3)


def test_the_state_of_both_optimizers_is_restored():
    method, batch = make(hf_in=("cs", "ds")), make_batch()
    handles = TrainingHandles(method, Stage(), sections(momentum=0.9), STEPS)
    train(method, batch, 2, handles=handles)
    other = make(hf_in=("cs", "ds"))
    other.load_state_dict(method.state_dict())
    other.generator.set_state(method.generator.get_state())
    resumed = TrainingHandles(other, Stage(), sections(momentum=0.9), STEPS)
    resumed.load_state_dict(copy.deepcopy(handles.state_dict()))
    assert train(other, batch, 2, handles=resumed) == train(method, batch, 2, handles=handles)
    for name, value in method.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


# training


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("settings", ISOLATED[1:], ids=" ".join)
def test_every_option_trains(settings, bf16):
    method, batch = make(**settings), make_batch()
    history = train(method, batch, 12, bf16=bf16)
    assert all(math.isfinite(value) for terms in history for value in terms.values())
    assert history[-1]["cs_supervised"] < history[0]["cs_supervised"]


@pytest.mark.parametrize("dims", [2, 3])
def test_terms_under_bf16_are_single_precision_and_near_those_without(dims):
    batch, found = make_batch(dims), []
    for bf16 in (False, True):
        method = make(dims)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16, cache_enabled=False):
            terms = method.losses(batch, at(LATE))
        assert {term.dtype for term in terms.values()} == {torch.float32}
        found.append(terms["cs_supervised"].item())
    assert found[1] == pytest.approx(found[0], rel=0.05)


def test_equal_generators_draw_equally_and_the_global_one_is_left_alone():
    batch, state = make_batch(), None
    histories = []
    for seed in (1, 2):
        method = make()
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        histories.append(train(method, batch, 3))
        assert torch.equal(torch.get_rng_state(), state)
    assert histories[0] == histories[1]


def test_stopped_and_resumed_it_ends_with_the_same_bytes(cohort, tiny, tmp_path, monkeypatch):
    torch.set_num_threads(1)
    sets = merge(tiny, {"method": SMALL, "training": {"seed": 3}})
    flags = {"method": "diffcl", "labeled": 2, "workers": 0, "store": str(tmp_path / "store")}
    config = resolve(cohort, flags=flags, sets=sets)
    whole = train_config(config, tmp_path / "whole", quiet=True)
    original = engine.Engine._step

    def stepping(self, *args):
        if self.iteration == 8:
            raise InterruptedError
        return original(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(engine.Engine, "_step", stepping)
        with pytest.raises(InterruptedError):
            train_config(config, tmp_path / "stopped", quiet=True)
    resumed = train_config(config, tmp_path / "stopped", resume=True, quiet=True)
    assert resumed.model_path.read_bytes() == whole.model_path.read_bytes()
    ours, theirs = (load_checkpoint(run.last_checkpoint) for run in (resumed, whole))
    for name, value in theirs["method"].items():
        assert torch.equal(ours["method"][name], value), name
    assert theirs["method"]["contrast.banks.0.filled"] > 0
    log = whole.log()
    assert {"loss/contrast", "method/network_agreement", "lr/ds"} <= set(log["name"])


# who predicts


def predictor_of(infer="cs", dims=2, **settings):
    batch = make_batch(dims)
    method = warmed(batch, dims=dims, infer=infer, sampling_steps=3, **settings)
    return method, method.predictor.eval(), batch.unlabeled


@pytest.mark.parametrize("dims", [2, 3])
def test_the_convolutional_network_predicts_alone_by_default(dims):
    method, predictor, images = predictor_of(dims=dims)
    method.ds.register_forward_hook(lambda *_: pytest.fail("one pass is enough"))
    assert torch.equal(predictor(images), method.cs(images)[0])


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("clip", [False, True])
def test_a_sample_from_noise_of_the_seed_predicts(dims, clip):
    method, predictor, images = predictor_of("ds", dims, sampling_seed=5, sampling_clip=clip)
    noise = torch.randn(1, 3, *images.shape[2:], generator=torch.Generator().manual_seed(5))
    expected = method.ds.sample(images, noise.repeat(2, *[1] * (dims + 1)), steps=3, clip=clip)
    assert torch.equal(predictor(images), expected)
    assert not torch.allclose(expected, method.cs(images)[0])


def test_the_mean_is_that_of_the_probabilities():
    method, predictor, images = predictor_of("mean")
    noise = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    expected = (method.cs(images)[0].softmax(1) + method.ds.sample(images, noise, steps=3).softmax(1)) / 2
    torch.testing.assert_close(predictor(images).softmax(1), expected)
    torch.testing.assert_close(predictor(images).exp(), expected)


@pytest.mark.parametrize("infer", ["ds", "mean"])
def test_samples_are_the_same_every_time_and_for_a_row_in_any_batch(infer):
    _, predictor, images = predictor_of(infer)
    images = torch.cat([images, images.flip(2)])
    state = torch.get_rng_state()
    together = predictor(images)
    assert torch.equal(predictor(images), together)
    assert torch.equal(torch.get_rng_state(), state)
    for row in range(4):
        torch.testing.assert_close(predictor(images[row : row + 1])[0], together[row], atol=1e-4, rtol=1e-4)
    predictor.seed = 1
    assert not torch.allclose(predictor(images), together)


def test_both_networks_are_in_the_weights_of_the_predictor():
    method = make()
    names = set(method.predictor.state_dict())
    assert names == {f"cs.{name}" for name in method.cs.state_dict()} | {
        f"ds.{name}" for name in method.ds.state_dict()
    }
    assert not any(name.startswith("ds.") for name in make(use_ds=False).predictor.state_dict())


@pytest.mark.parametrize("infer", ["cs", "ds", "mean"])
def test_it_predicts_under_autocast(infer):
    _, predictor, images = predictor_of(infer)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = predictor(images)
    assert mixed.isfinite().all()
    assert mixed.shape == (2, 3, 16, 16)


@pytest.mark.parametrize("infer", ["cs", "ds", "mean"])
def test_the_memory_of_a_prediction_can_be_counted_beforehand(infer):
    """Else too large a window ends the process without a word."""
    counted = footprint(make(infer=infer).predictor.eval(), 1, (64, 64))
    assert counted is not None
    assert counted.classes == 3
