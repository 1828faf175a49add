"""FixMatch: confidence, views, and what the specification works out."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from consistency_tasks import make, make_batch

from scantly.errors import ConfigError
from scantly.methods.base import Progress
from scantly.views import StrongConfig, apply_cutmix, sample_cutmix, strong

AT = Progress(0, 10)
SAME = {"strong": StrongConfig(p_jitter=0, p_blur=0), "cutmix": {"probability": 0.0}}


def test_above_one_nothing_is_trusted():
    method, batch = make("fixmatch", confidence_threshold=1.1), make_batch()
    term = method.losses(batch, AT)["unsupervised"]
    assert term.item() == 0
    assert method.pop_logged()["confident"].item() == 0


def test_without_a_strong_view_and_a_threshold_it_is_the_likelihood_of_the_guess():
    method, batch = make("fixmatch", confidence_threshold=0.0, **SAME).eval(), make_batch()
    expected = -0.5 * method.network(batch.unlabeled).softmax(1).amax(1).log().mean()
    torch.testing.assert_close(method.losses(batch, AT)["unsupervised"], expected)


@pytest.mark.parametrize("dims", [2, 3])
def test_boxes_move_images_labels_and_trust_together(dims):
    settings = {"confidence_threshold": 0.55, "cutmix": {"probability": 1.0}}
    method = make("fixmatch", dims=dims, **settings).eval()
    other, batch = copy.deepcopy(method), make_batch(unlabeled=3, dims=dims)
    other.generator = torch.Generator().manual_seed(0)
    loss = method.losses(batch, AT)["unsupervised"]
    probs = other.network(batch.unlabeled).softmax(1)
    box = sample_cutmix(other.config.cutmix, 3, batch.unlabeled.shape[2:], generator=other.generator)
    view = strong(other.config.strong_settings(dims), batch.unlabeled, generator=other.generator)
    confidence, labels = (apply_cutmix(x, box) for x in probs.max(1))
    per_voxel = F.cross_entropy(other.network(apply_cutmix(view, box)), labels, reduction="none")
    torch.testing.assert_close(loss, 0.5 * (per_voxel * (confidence >= 0.55)).mean())


def test_labeled_and_weak_rows_pass_in_one_batch():
    """Batch norm sees both, as in the public code: two passes in a step, the first of all weak rows."""
    method, batch, seen = make("fixmatch"), make_batch(labeled=2, unlabeled=3), []
    method.network.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    method.losses(batch, AT)
    assert [len(images) for images in seen] == [5, 3]
    assert torch.equal(seen[0], torch.cat([batch.labeled, batch.unlabeled]))


def test_labels_carry_no_gradient_and_do_not_depend_on_the_given_labels():
    method, batch = make("fixmatch", confidence_threshold=0.0), make_batch()
    state = method.state_dict()
    losses = []
    for labels in (batch.labels, 1 - batch.labels):
        other = make("fixmatch", confidence_threshold=0.0)
        other.load_state_dict(state)
        batch.labels = labels
        losses.append(other.losses(batch, AT)["unsupervised"])
    assert torch.equal(*losses)


def test_both_weights_multiply():
    one, other = make("fixmatch"), make("fixmatch", supervised_weight=1.0, unsupervised_weight=0.25)
    batch = make_batch()
    ours, theirs = one.losses(batch, AT), other.losses(batch, AT)
    torch.testing.assert_close(2 * ours["supervised"], theirs["supervised"])
    torch.testing.assert_close(0.5 * ours["unsupervised"], theirs["unsupervised"])


def test_without_unlabeled_rows_it_says_what_to_set():
    with pytest.raises(ConfigError, match="unlabeled_batch_size to 1 or more"):
        make("fixmatch").losses(make_batch(unlabeled=0), AT)
