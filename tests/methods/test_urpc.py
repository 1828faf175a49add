"""URPC: the worked numbers of its specification, its scales and their perturbation."""

from __future__ import annotations

import pytest
import torch
from consistency_tasks import make_batch

from scantly.errors import ConfigError
from scantly.losses import pyramid_consistency
from scantly.methods import catalogue
from scantly.methods.base import Method, Progress, Task

AT = Progress(10, 10)


def make(dims: int = 2, network: str = "unet", **settings: object) -> Method:
    torch.manual_seed(0)
    kind = catalogue.load("urpc")
    arguments = {"widths": [4, 8, 8, 8], **({"dropout": [0.0] * 4} if network == "unet" else {})}
    method = kind(Task(1, ("background", "a"), dims, (16,) * dims, network, arguments), kind.Config(**settings)).train()
    method.generator.manual_seed(0)
    return method


def logits_of(*probs: float) -> torch.Tensor:
    return torch.tensor(probs).log()[None, :, None]


def test_worked_pyramid():
    loss, divergence = pyramid_consistency([logits_of(0.9, 0.1), logits_of(0.7, 0.3)])
    assert loss.item() == pytest.approx(0.045068, abs=1e-6)
    assert divergence.item() == pytest.approx((0.044403 + 0.025732) / 2, abs=1e-6)


def test_divergent_voxels_weigh_less():
    """Two voxels, both scales; written out."""
    p = [torch.tensor([[0.9, 0.5], [0.1, 0.5]]), torch.tensor([[0.2, 0.5], [0.8, 0.5]])]
    mean = (p[0] + p[1]) / 2
    expected = 0.0
    for each in p:
        d = (mean * (mean / each).log()).sum(0)
        w = torch.exp(-d)
        expected += (((mean - each) ** 2 * w).mean() / (w.mean() + 1e-8) + d.mean()).item() / 2
    assert pyramid_consistency([each.log()[None] for each in p])[0].item() == pytest.approx(expected, abs=1e-6)


def test_equal_scales_cost_nothing_and_certain_ones_are_finite():
    logits = torch.randn(2, 3, 4, 4)
    assert pyramid_consistency([logits] * 4)[0].item() == pytest.approx(0, abs=1e-6)
    certain = torch.tensor([300.0, -300.0]).view(1, 2, 1).requires_grad_()
    loss, _ = pyramid_consistency([certain, -certain])
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(certain.grad).all()


def test_the_published_number_of_parameters():
    kind = catalogue.load("urpc")
    method = kind(Task(1, ("background", "a", "b", "c"), 2, (64, 64)), kind.Config())
    assert sum(p.numel() for p in method.parameters()) == 1_821_840


@pytest.mark.parametrize(("dims", "network"), [(2, "unet"), (3, "vnet"), (3, "unet3d")])
def test_every_scale_has_the_size_of_the_image_and_the_finest_is_the_networks(dims, network):
    method = make(dims, network).eval()
    images = make_batch(dims=dims).labeled
    scales = method._scales(images)
    assert [scale.shape for scale in scales] == [(2, 2, *(16,) * dims)] * 3
    assert torch.equal(scales[0], method.predictor(images))
    for scale, again in zip(scales, method._scales(images), strict=True):
        assert torch.equal(scale, again)


def test_the_coarser_heads_alone_are_perturbed_and_only_in_training():
    method, images = make(), make_batch().labeled
    with torch.no_grad():
        first, second = method._scales(images), method._scales(images)
    assert torch.equal(first[0], second[0])
    for one, other in zip(first[1:], second[1:], strict=True):
        assert not torch.equal(one, other)


@pytest.mark.parametrize(("dims", "expected"), [(2, "features"), (3, "channels")])
def test_what_is_perturbed_is_that_of_the_public_code_for_the_dimension(dims, expected):
    assert make(dims, "vnet").perturbation == expected
    assert make(dims, "vnet", perturbation="features").perturbation == "features"
    assert make(dims, "vnet", perturbation="channels").perturbation == "channels"


@pytest.mark.parametrize(
    ("levels", "rates"), [(2, [0.2, 0.1]), (4, [0.5, 0.3, 0.2, 0.1]), (5, [0.5, 0.5, 0.3, 0.2, 0.1])]
)
def test_dropout_belongs_to_the_scale(levels, rates):
    kind = catalogue.load("urpc")
    task = Task(
        1, ("background", "a"), 3, (64,) * 3, "vnet", {"widths": [2] * (levels + 1), "blocks": [1] * (levels + 1)}
    )
    assert [drop.p for drop in kind(task, kind.Config()).drops] == rates


def test_channels_are_dropped_on_the_way_up_and_the_finer_levels_see_it():
    """The whole way up, written out, with nothing else random; with rates of 0 it is the network's own."""
    method = make(3, "vnet")
    for part in method.network.modules():
        if isinstance(part, torch.nn.Dropout3d):
            part.p = 0.0
    images = make_batch(dims=3).labeled
    torch.manual_seed(3)
    scales = method._scales(images)
    features, network = method.network.encode(images), method.network
    torch.manual_seed(3)
    deep = torch.nn.functional.dropout3d(network.decoder[0](features[3], features[2]), 0.3)
    middle = torch.nn.functional.dropout3d(network.decoder[1](deep, features[1]), 0.2)
    finest = torch.nn.functional.dropout3d(network.decoder[2](middle, features[0]), 0.1)
    dropped = (deep.flatten(2).abs().sum(2) == 0).float().mean()
    assert 0 < dropped < 1  # whole channels, some of them
    size = tuple(images.shape[2:])
    expected = [network.head(finest)]
    for level, head in ((deep, method.heads[0]), (middle, method.heads[1])):
        expected.append(torch.nn.functional.interpolate(head(level), size, mode="trilinear"))
    for scale, by_hand in zip(scales, expected, strict=True):
        torch.testing.assert_close(scale, by_hand)
    for drop in method.drops:
        drop.p = 0.0
    assert torch.equal(method._scales(images)[0], method.network(images))


def test_the_supervised_loss_is_the_mean_over_scales_and_labels_stay_with_labeled_rows():
    method, batch = make().eval(), make_batch()
    scales = method._scales(batch.labeled)
    expected = torch.stack([method.config.supervised_loss([scale], batch.labels) for scale in scales]).mean()
    torch.testing.assert_close(method.losses(batch, AT)["supervised"], expected)
    unlabeled = pyramid_consistency(method._scales(batch.unlabeled))[0]
    method.losses(batch, AT)
    assert method.pop_logged()["disagreement"].item() == pytest.approx(unlabeled.item(), abs=1e-6)


def test_a_network_with_one_decoder_level_is_refused():
    kind = catalogue.load("urpc")
    task = Task(1, ("background", "a"), 2, (16, 16), "unet", {"widths": [4, 8], "dropout": [0.0, 0.0]})
    with pytest.raises(ConfigError, match="three numbers or more"):
        kind(task, kind.Config())


@pytest.mark.parametrize(("network", "gain"), [("unet3d", 2.0), ("dynunet", 2 / (1 + 0.01**2))])
def test_heads_are_initialized_as_the_networks_own(network, gain):
    """Kaiming's variance, 2 / (1 + a^2) over the inputs, where the backbone has it: 4096 weights, 10 errors."""
    torch.manual_seed(0)
    kind = catalogue.load("urpc")
    arguments = {"widths": [8, 16, 256, 256]}
    if network == "dynunet":
        arguments |= {"kernel_sizes": [[3] * 3] * 4, "strides": [[1] * 3, *[[2] * 3] * 3]}
    method = kind(Task(1, tuple("abcdefghijklmnop"), 3, (16,) * 3, network, arguments), kind.Config())
    weights = method.heads[0].weight
    assert weights.shape == (16, 256, 1, 1, 1)
    assert weights.var().item() * 256 == pytest.approx(gain, rel=10 * (2 / 4096) ** 0.5)


def test_heads_of_a_network_without_an_initialization_of_its_own_have_torchs():
    """Uniform within 1 / sqrt(inputs)."""
    heads = make(3, "vnet").heads
    assert all(head.weight.abs().max() <= head.in_channels**-0.5 for head in heads)
