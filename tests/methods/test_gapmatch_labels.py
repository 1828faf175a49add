"""GapMatch: pseudo-labels, views, schedules and ranks."""

from __future__ import annotations

import copy
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from gapmatch_steps import (
    SECOND,
    STEPS,
    STRONG_ONLY,
    Passes,
    Recording,
    Scaled,
    cosine,
    flat,
    gradient,
    make,
    make_batch,
    parts,
    run,
    slow_losses,
    snapshot,
)

from scantly.errors import ConfigError
from scantly.losses import cross_entropy_dice
from scantly.methods.base import Progress
from scantly.methods.gapmatch import GapMatch
from scantly.methods.parts.strong_views import StrongView
from scantly.views import CutMix


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
    shared = threading.Barrier(2, timeout=300), [None, None]
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
