"""UniMatch: its terms by formula, and the two strong views."""

from __future__ import annotations

import copy

import pytest
import torch
from consistency_tasks import make, make_batch

from scantly.errors import ConfigError
from scantly.losses import soft_dice
from scantly.methods.base import Progress
from scantly.views import StrongConfig, apply_cutmix

AT = Progress(0, 10)
PLAIN = {"strong": StrongConfig(p_jitter=0, p_blur=0), "cutmix": {"probability": 0.0}, "feature_dropout": 0.0}


def test_the_published_weights():
    config = make("unimatch").config
    assert (config.supervised_weight, config.strong_weight, config.feature_weight) == (0.5, 0.25, 0.25)
    assert config.strong_weight + config.feature_weight == 0.5 * (0.25 + 0.25 + 0.5)


def test_without_perturbations_and_threshold_every_term_is_plain_dice_with_the_guess():
    method, batch = make("unimatch", confidence_threshold=0.0, **PLAIN).eval(), make_batch()
    terms = method.losses(batch, AT)
    logits = method.network(batch.unlabeled)
    expected = 0.25 * soft_dice(logits.softmax(1), logits.argmax(1))
    torch.testing.assert_close(terms["strong"], expected)
    torch.testing.assert_close(terms["features"], expected)
    supervised = 0.5 * method.config.supervised_loss([method.network(batch.labeled)], batch.labels)
    torch.testing.assert_close(terms["supervised"], supervised)


@pytest.mark.parametrize("dims", [2, 3])
def test_two_strong_views_are_drawn_apart_and_labels_follow_their_boxes(dims):
    settings = {"confidence_threshold": 0.52, "cutmix": {"probability": 1.0}, "feature_dropout": 0.0}
    method = make("unimatch", dims=dims, **settings).eval()
    other, batch = copy.deepcopy(method), make_batch(unlabeled=3, dims=dims)
    other.generator = torch.Generator().manual_seed(0)
    terms = method.losses(batch, AT)
    views = [other.config.strong_view(batch.unlabeled, other.generator) for _ in range(2)]
    assert not torch.equal(views[0].images, views[1].images)
    assert not torch.equal(views[0].box.mask, views[1].box.mask)
    confidence, labels = other.network(batch.unlabeled).softmax(1).max(1)
    losses = []
    for view in views:
        target, trust = apply_cutmix(labels, view.box), apply_cutmix(confidence, view.box) >= 0.52
        losses.append(soft_dice(other.network(view.images).softmax(1), target, mask=trust))
    torch.testing.assert_close(terms["strong"], 0.25 * (losses[0] + losses[1]) / 2)


def test_above_one_nothing_is_trusted_and_only_the_labels_teach():
    method = make("unimatch", confidence_threshold=1.1)
    terms = method.losses(make_batch(), AT)
    assert terms["strong"].item() == terms["features"].item() == 0
    (terms["strong"] + terms["features"]).backward()
    assert all(p.grad is None or not p.grad.any() for p in method.network.parameters())


def test_whole_channels_are_dropped_at_every_level_of_the_perturbed_half(monkeypatch):
    method, seen = make("unimatch"), []
    decode = method.network.decode

    def watched(features):
        seen.append(features)
        return decode(features)

    monkeypatch.setattr(method.network, "decode", watched)
    method.losses(make_batch(), AT)
    for level in seen[0]:
        clean, perturbed = (half.flatten(2).flatten(0, 1) for half in level.chunk(2))
        dropped = (perturbed == 0).all(1)
        torch.testing.assert_close(perturbed[~dropped], 2 * clean[~dropped])
        assert dropped.any()
        assert not dropped.all()


def test_labels_of_the_weak_view_carry_no_gradient():
    method, outputs = make("unimatch", confidence_threshold=0.0), []
    method.network.head.register_forward_hook(lambda module, args, output: outputs.append(output))
    strong = method.losses(make_batch(), AT)["strong"]
    weak, of_strong_views = outputs
    assert torch.autograd.grad(strong, weak, allow_unused=True, retain_graph=True) == (None,)
    assert torch.autograd.grad(strong, of_strong_views)[0].any()


def test_without_unlabeled_rows_it_says_what_to_set():
    with pytest.raises(ConfigError, match="unlabeled_batch_size to 1 or more"):
        make("unimatch").losses(make_batch(unlabeled=0), AT)
