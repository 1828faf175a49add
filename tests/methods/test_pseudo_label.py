"""Self-training: the online term, and rounds that begin anew."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from consistency_tasks import make, make_batch

from scantly.losses import IGNORED
from scantly.methods.base import Progress

AT = Progress(10, 10)
FULL = {"consistency": 1.0, "rampup_iterations": 0}


def test_without_a_threshold_it_is_cross_entropy_with_the_guess_and_above_one_nothing():
    method, batch = make("pseudo_label", confidence_threshold=0.0, **FULL).eval(), make_batch()
    logits = method.network(batch.unlabeled)
    torch.testing.assert_close(method.losses(batch, AT)["pseudo"], F.cross_entropy(logits, logits.argmax(1)))
    never = make("pseudo_label", confidence_threshold=1.1, dice_weight=1.0, **FULL)
    term = never.losses(batch, AT)["pseudo"]
    assert term.item() == 0
    term.backward()
    assert all(p.grad is None or not p.grad.any() for p in never.network.parameters())


@pytest.mark.parametrize("normalization", ["all", "masked"])
def test_doubtful_voxels_give_no_gradient_and_count_in_the_divisor_or_not(normalization):
    method = make("pseudo_label", confidence_threshold=0.6, mask_normalization=normalization, **FULL)
    batch, seen = make_batch(), []
    method.network.head.register_forward_hook(lambda module, args, output: seen.append(output))
    term = method.losses(batch, AT)["pseudo"]
    unlabeled = seen[0][2:]
    confidence, labels = unlabeled.softmax(1).max(1)
    mask = confidence >= 0.6
    assert 0 < mask.float().mean() < 1
    total = (F.cross_entropy(unlabeled, labels, reduction="none") * mask).sum()
    torch.testing.assert_close(term, total / (mask.numel() if normalization == "all" else mask.sum()))
    gradient = torch.autograd.grad(term, seen[0])[0][2:]
    assert not gradient.movedim(1, -1)[~mask].any()
    assert gradient.movedim(1, -1)[mask].any()


def test_rounds_relabel_and_begin_anew():
    method = make("pseudo_label", form="rounds", rounds=2)
    stages = method.stages()
    assert [(stage.name, stage.relabel, stage.unlabeled.count) for stage in stages] == [
        ("supervised", False, 0),
        ("round1", True, None),
        ("round2", True, None),
    ]
    begun = {key: value.clone() for key, value in method.network.state_dict().items()}
    method.network(make_batch().labeled)  # statistics move
    with torch.no_grad():
        for p in method.network.parameters():
            p.add_(1)
    trained = {key: value.clone() for key, value in method.network.state_dict().items()}
    method.enter_stage(stages[1], first=False)  # resumed inside
    assert all(torch.equal(value, trained[key]) for key, value in method.network.state_dict().items())
    method.enter_stage(stages[1], first=True)
    assert all(torch.equal(value, begun[key]) for key, value in method.network.state_dict().items())


def test_in_a_round_labels_of_the_pool_count_as_much_as_given_ones():
    method, batch = make("pseudo_label", form="rounds").eval(), make_batch()
    batch.pseudo_labels = torch.randint(2, batch.unlabeled[:, 0].shape)
    labels = torch.cat([batch.labels, batch.pseudo_labels])
    expected = method.config.supervised_loss([method.network(batch.images)], labels)
    assert set(method.losses(batch, AT)) == {"supervised"}
    torch.testing.assert_close(method.losses(batch, AT)["supervised"], expected)
    assert not any(p.requires_grad for p in method.initial.parameters())


def test_in_rounds_doubtful_voxels_of_the_pool_get_no_label():
    probs = torch.tensor([[0.9, 0.4, 0.3], [0.1, 0.6, 0.7]]).view(2, 1, 1, 3)
    assert make("pseudo_label", form="rounds").pseudo_labels(probs).flatten().tolist() == [0, 1, 1]
    some = make("pseudo_label", form="rounds", rounds_threshold=0.65)
    assert some.pseudo_labels(probs).flatten().tolist() == [0, IGNORED, 1]


@pytest.mark.parametrize("normalization", ["all", "masked"])
def test_voxels_without_a_label_count_nowhere(normalization):
    settings = {"form": "rounds", "rounds_threshold": 0.8, "mask_normalization": normalization}
    method, batch = make("pseudo_label", **settings).eval(), make_batch()
    logits = method.network(batch.images).detach().requires_grad_()
    drawn = torch.rand(batch.unlabeled[:, 0].shape, generator=torch.Generator().manual_seed(1))
    batch.pseudo_labels = torch.where(drawn < 0.5, IGNORED, (drawn > 0.75).long())
    labels = torch.cat([batch.labels, batch.pseudo_labels])
    method.network.forward = lambda images: logits
    found = method.losses(batch, AT)["supervised"]

    mask = labels >= 0
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    dice = 0.0
    for index in range(2):  # each class over the voxels with a label, written out
        p, y = logits.softmax(1)[:, index][mask], (labels[mask] == index).float()
        dice += (1 - (2 * (p * y).sum() + 1e-5) / (p.square().sum() + y.sum() + 1e-5)) / 2
    divisor = mask.numel() if normalization == "all" else mask.sum()
    torch.testing.assert_close(found, 0.5 * (total / divisor + dice))

    gradient = torch.autograd.grad(found, logits)[0].movedim(1, -1)
    assert not gradient[~mask].any()
    assert gradient[mask].any()


def test_rounds_with_a_threshold_where_all_have_a_label_are_those_without():
    with_threshold, batch = make("pseudo_label", form="rounds", rounds_threshold=0.6).eval(), make_batch()
    batch.pseudo_labels = torch.randint(2, batch.unlabeled[:, 0].shape)
    without = make("pseudo_label", form="rounds").eval()
    without.load_state_dict(with_threshold.state_dict())
    torch.testing.assert_close(with_threshold.losses(batch, AT), without.losses(batch, AT))
