"""An encoder-decoder whose skips pass high-frequency blocks."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from scantly.networks import build
from scantly.networks.mamba import HighFrequencyMamba, HighFrequencySkips
from scantly.networks.skips import SkipNetwork

NETWORKS = ["unet", "unet3d", "vnet", "dynunet"]


def backbone_of(name, dims):
    torch.manual_seed(0)
    arguments = {"widths": [4, 8, 16]}
    if name == "unet":
        arguments["dropout"] = [0.0] * 3
    if name == "dynunet":
        arguments |= {"kernel_sizes": [[3] * dims] * 3, "strides": [[1] * dims, *[[2] * dims] * 2]}
    return build(name, spatial_dims=dims, in_channels=1, out_channels=3, arguments=arguments).eval()


def network_of(name="unet", dims=2, levels=(2,), gamma=0.0):
    backbone = backbone_of(name, dims)
    network = SkipNetwork(
        backbone, HighFrequencySkips(backbone.widths, levels, partial(HighFrequencyMamba, dims))
    ).eval()
    with torch.no_grad():
        for block in network.skips.blocks:
            block.gamma.fill_(gamma)
    return network


def images_of(dims):
    return torch.randn(2, 1, *(8,) * dims, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("skips", [False, True], ids=["no blocks", "new blocks"])
def test_without_blocks_and_with_new_ones_it_is_the_backbone(name, dims, skips):
    backbone, images = backbone_of(name, dims), images_of(dims)
    network = network_of(name, dims) if skips else SkipNetwork(backbone)
    logits, features = network(images)
    assert torch.equal(logits, backbone(images))
    assert torch.equal(features, backbone.decode_features(backbone.encode(images)))
    assert features.shape == (2, 4, *(8,) * dims)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_block_changes_the_skip_of_its_level_alone(name, dims):
    network, images = network_of(name, dims, levels=(2,), gamma=0.7), images_of(dims)
    fine, middle, deep = network.backbone.encode(images)
    replaced = network.skips.blocks[0](middle)
    assert not torch.allclose(replaced, middle)
    logits, features = network(images)
    # the deepest features are those that the encoder made of the unchanged ones
    assert torch.equal(features, network.backbone.decode_features([fine, replaced, deep]))
    assert torch.equal(logits, network.backbone.head(features))
    assert not torch.allclose(logits, network.backbone(images))


def test_gates_by_level_and_what_is_not_decayed():
    network = network_of(levels=(2, 1), gamma=0.25)
    assert {level: gate.item() for level, gate in network.gates().items()} == {1: 0.25, 2: 0.25}
    assert not any(gate.requires_grad for gate in network.gates().values())
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    undecayed = {names[id(parameter)].split(".")[-1] for parameter in network.undecayed()}
    assert undecayed == {"gamma", "A_log", "Dskip"}
    assert len(network.undecayed()) == 2 * (1 + 2 * 2)
    plain = SkipNetwork(backbone_of("unet", 2))
    assert (plain.gates(), plain.undecayed()) == ({}, [])


def test_the_gradient_reaches_backbone_and_blocks():
    network = network_of(levels=(1, 2), gamma=0.5).train()
    network(images_of(2))[0].square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert name.endswith("bias") or parameter.grad.abs().sum() > 0, name
