"""Distance maps of labels: one per class, kept on the CPU, and the network that tells them."""

from __future__ import annotations

import pytest
import torch
from consistency_tasks import ARGUMENTS

from scantly.errors import ConfigError
from scantly.losses import signed_distance
from scantly.methods.base import Task
from scantly.methods.parts import distances
from scantly.methods.parts.distances import DistanceConfig, LabelDistances, distance_network


def labels(count: int = 3, seed: int = 0, side: int = 12) -> torch.Tensor:
    return torch.randint(4, (count, side, side), generator=torch.Generator().manual_seed(seed))


def task(dims: int = 2, network: str = "unet", classes: int = 4, **arguments: object) -> Task:
    names = ("background", "a", "b", "c")[:classes]
    return Task(1, names, dims, (16,) * dims, network, arguments or ARGUMENTS)


def test_a_map_per_foreground_class():
    given = labels()
    found = LabelDistances(4, "outside")(given)
    assert found.shape == (3, 3, 12, 12)
    for label in (1, 2, 3):
        assert torch.equal(found[:, label - 1], signed_distance(given == label))


def test_patches_seen_before_are_not_transformed_again(monkeypatch):
    made = []
    monkeypatch.setattr(
        distances, "signed_distance", lambda masks, **how: made.append(len(masks)) or signed_distance(masks, **how)
    )
    targets, fresh = LabelDistances(4, "zero"), LabelDistances(4, "zero", limit=0)
    first, both = labels(2, 1), torch.cat([labels(2, 1), labels(1, 2)])
    targets(first)
    assert made == [6]
    again = targets(both)
    assert made == [6, 3]  # three classes of the row that is new
    assert torch.equal(again, fresh(both))


def test_a_repeated_row_is_right_and_what_is_returned_can_be_changed():
    given = labels(1).repeat(3, 1, 1)
    targets = LabelDistances(4, "outside")
    expected = targets(given).clone()
    targets(given).zero_()
    assert torch.equal(targets(given), expected)


def test_memory_is_bounded_and_the_oldest_goes_first():
    one = LabelDistances(4, "outside")(labels(1)).nbytes
    targets = LabelDistances(4, "outside", limit=2 * one)
    for seed in range(5):
        targets(labels(1, seed))
    assert targets._bytes == 2 * one == sum(maps.nbytes for maps in targets._kept.values())
    kept = list(targets._kept)
    targets(labels(1, 3))  # used again: 4 is now the older one
    targets(labels(1, 9))
    assert kept[0] in targets._kept
    assert kept[1] not in targets._kept


def test_maps_of_another_shape_with_the_same_bytes_are_not_mistaken():
    flat = torch.zeros(1, 4, 9, dtype=torch.long)
    flat[0, 1] = 1
    targets = LabelDistances(2, "outside")
    targets(flat)
    square = flat.view(1, 6, 6)
    assert torch.equal(targets(square), LabelDistances(2, "outside")(square))


def test_the_losses_by_hand():
    """Two voxels of one class: Dice 1 - (2 * 0.6 + s) / (0.6^2 + 0.2^2 + 1 + s), distances 0 and 1."""
    logits = torch.tensor([[[[0.6, 0.2]]]]).logit()
    found = DistanceConfig().distance_losses(
        logits, torch.tensor([[[[-0.5, 0.5]]]]), torch.tensor([[[1, 0]]]), LabelDistances(2, "outside")
    )
    assert found["supervised"].item() == pytest.approx(1 - 1.20001 / 1.40001, abs=1e-6)
    assert found["distance"].item() == pytest.approx(0.3 * (0.25 + 0.25) / 2)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("network", ["unet", "vnet", "unet3d", "dynunet"])
def test_masks_distances_and_classes(network, dims):
    arguments = {
        "unet": {"dropout": [0.0, 0.0]},
        "dynunet": {"kernel_sizes": [[3] * dims] * 2, "strides": [[1] * dims, [2] * dims]},
    }
    net = distance_network(task(dims, network, widths=[4, 8], **arguments.get(network, {}))).eval()
    images = torch.rand(2, 1, *(16,) * dims)
    masks, told = net.both(images)
    assert masks.shape == told.shape == (2, 3, *(16,) * dims)
    assert told.abs().max() <= 1
    classes = net(images)
    assert torch.equal(classes[:, 1:], masks)
    assert not classes[:, 0].any()
    largest, label = masks.max(1)
    assert torch.equal(classes.argmax(1), torch.where(largest > 0, label + 1, 0))


def test_of_one_class_the_softmax_is_the_sigmoid():
    net = distance_network(task(classes=2)).eval()
    images = torch.rand(2, 1, 16, 16)
    torch.testing.assert_close(net(images).softmax(1)[:, 1:], net.both(images)[0].sigmoid())


def test_the_published_number_of_parameters():
    net = distance_network(Task(1, ("background", "atrium"), 3, (80, 112, 112), "vnet"))
    assert sum(p.numel() for p in net.parameters()) == 9_448_866


def test_heads_at_several_resolutions_are_refused():
    topology = {"kernel_sizes": [[3, 3]] * 3, "strides": [[1, 1], [2, 2], [2, 2]]}
    with pytest.raises(ConfigError, match="remove deep_supervision"):
        distance_network(task(2, "dynunet", widths=[4, 8, 8], deep_supervision=True, **topology))


def test_a_network_that_gives_logits_only_is_refused():
    with pytest.raises(ConfigError, match="needs its features"):
        distance_network(task(2, "SegResNet", init_filters=8))
