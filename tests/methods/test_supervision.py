"""Deep supervision: weights, labels of coarser grids, and the methods that use it."""

import pytest
import torch
from test_every_method import STEPS, Training, make_batch
from torch import nn

from scantly.losses import cross_entropy, cross_entropy_dice
from scantly.methods import catalogue
from scantly.methods.base import Task
from scantly.methods.parts.supervision import SupervisionConfig, outputs, supervised_loss
from scantly.networks import VNet


def logits_of(labels):
    return torch.nn.functional.one_hot(labels, 2).movedim(-1, 1).float()


def test_weights_halve_and_are_normalized():
    labels = torch.zeros(1, 4, 4, dtype=torch.long)
    levels = [torch.full((1, 2, side, side), 0.0) for side in (4, 2, 1)]
    for level, value in zip(levels, (1.0, 2.0, 3.0), strict=True):
        level[:, 1] = value
    each = [cross_entropy(level, torch.zeros(1, *level.shape[2:], dtype=torch.long)).item() for level in levels]
    expected = (4 * each[0] + 2 * each[1] + each[2]) / 7
    assert supervised_loss(levels, labels, cross_entropy).item() == pytest.approx(expected)


def test_one_resolution_is_the_loss_itself():
    logits, labels = torch.randn(2, 3, 4, 4, 4), torch.randint(0, 3, (2, 4, 4, 4))
    assert torch.equal(supervised_loss([logits], labels, cross_entropy_dice), cross_entropy_dice(logits, labels))


@pytest.mark.parametrize(("background", "dice"), [(False, 0.111110), (True, (0.111110 + 0.142856) / 2)])
def test_the_background_counts_in_dice_where_asked(background, dice):
    logits = torch.tensor([[0.2, 0.6], [0.8, 0.4]]).log().reshape(1, 2, 1, 2)
    labels = torch.tensor([[[1, 0]]])
    config = SupervisionConfig(dice_background=background)
    assert config.supervised_loss([logits], labels).item() == pytest.approx((0.366985 + dice) / 2, abs=1e-5)


def test_labels_of_a_coarser_grid_are_the_nearest_voxels_per_axis():
    labels = torch.arange(8).repeat_interleave(8).reshape(1, 8, 8).remainder(2)  # rows alternate 0 1 0 1
    seen = []
    supervised_loss(
        [torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 8, 4)],
        labels,
        lambda logits, labels: (seen.append(labels), logits.sum())[1],
    )
    assert torch.equal(seen[0], labels)
    assert seen[1].shape == (1, 4, 8)
    assert torch.equal(seen[1], labels[:, 1::2])
    assert torch.equal(seen[2], labels[:, :, 1::2])
    assert seen[1].dtype == torch.int64


def test_networks_without_it_are_called_as_they_are():
    network = VNet(2, 1, 2, widths=[2, 4]).eval()
    images = torch.randn(1, 1, 8, 8)
    (logits,) = outputs(network, images)
    assert torch.equal(logits, network(images))
    assert len(outputs(nn.Conv2d(1, 2, 1), images)) == 1


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", ["supervised", "mean_teacher"])
def test_coarser_heads_are_trained_and_the_prediction_is_at_full_resolution(name, dims):
    arguments = {
        "kernel_sizes": [[3] * dims] * 4,
        "strides": [[1] * dims, *[[2] * dims] * 3],
        "widths": [4, 6, 8, 10],
        "deep_supervision": True,
    }
    torch.manual_seed(0)
    method_class = catalogue.load(name)
    task = Task(1, ("background", "box"), dims, (16,) * dims, "dynunet", arguments)
    method = method_class(task, method_class.Config()).train()
    training, stage = Training(method, dims), method.stages()[0]
    training.enter(stage)
    before = {key: p.clone() for key, p in method.named_parameters() if p.requires_grad}
    assert [key for key in before if "coarser_heads" in key]
    sums = training.run(stage, range(STEPS))
    after = dict(method.named_parameters())
    assert not [key for key, value in before.items() if torch.equal(value, after[key])]
    assert sum(sums[-5:]) < 0.7 * sum(sums[:5])
    with torch.no_grad():
        assert method.predictor.eval()(make_batch(dims, "cpu").labeled).shape == (2, 2, *(16,) * dims)
