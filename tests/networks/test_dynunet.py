"""The planned network: equal to MONAI's, flat kernels, deep supervision."""

import pytest
import torch
from monai.networks.nets import DynUNet as Reference
from torch import nn

from scantly.errors import ConfigError
from scantly.networks import build, side_factors
from scantly.networks.dynunet import DynUNet

FLAT = {
    "kernel_sizes": [[1, 3, 3], [1, 3, 3], [3, 3, 3], [3, 3, 3]],
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2], [1, 2, 2]],
    "widths": [4, 6, 8, 10],
}


@pytest.mark.parametrize("dims", [2, 3])
def test_it_is_monais_network(dims):
    kernels, strides = [[3] * dims] * 4, [[1] * dims, *[[2] * dims] * 3]
    ours = DynUNet(dims, 2, 3, kernel_sizes=kernels, strides=strides, widths=[4, 8, 12, 16])
    reference = Reference(dims, 2, 3, kernels, strides, strides[1:], filters=[4, 8, 12, 16])
    parts = [("encoder.0.", "input_block."), ("encoder.1.", "downsamples.0."), ("encoder.2.", "downsamples.1.")]
    parts += [("encoder.3.", "bottleneck."), ("decoder.", "upsamples."), ("head.", "output_block.")]
    theirs = reference.state_dict()
    renamed = {
        mine + key.removeprefix(name): value
        for key, value in theirs.items()
        for mine, name in parts
        if key.startswith(name)
    }
    ours.load_state_dict(renamed, strict=True)
    images = torch.randn(2, 2, *(16,) * dims)
    torch.testing.assert_close(ours(images), reference(images), rtol=0, atol=0)


@pytest.mark.parametrize(("dims", "widths"), [(2, (32, 64, 128, 256, 512, 512)), (3, (32, 64, 128, 256, 320, 320))])
def test_default_widths(dims, widths):
    arguments = {"kernel_sizes": [[3] * dims] * 6, "strides": [[1] * dims, *[[2] * dims] * 5]}
    with torch.device("meta"):
        network = build("dynunet", spatial_dims=dims, in_channels=1, out_channels=2, arguments=arguments)
    assert network.widths == widths


def test_flat_kernels_do_not_mix_slices():
    network = DynUNet(3, 1, 2, **FLAT)
    x = images = torch.randn(1, 1, 4, 8, 8, requires_grad=True)
    for conv in [module for module in network.encoder[:2].modules() if isinstance(module, nn.Conv3d)]:
        x = conv(x)  # without the norms, which look at all voxels
    x[:, :, 1].sum().backward()
    assert images.grad[:, :, 1].abs().sum() > 0
    assert images.grad[:, :, [0, 2, 3]].abs().sum() == 0


def test_shapes_follow_the_strides():
    network = DynUNet(3, 1, 2, **FLAT)
    features = network.encode(torch.randn(1, 1, 4, 16, 24))
    assert [tuple(f.shape[2:]) for f in features] == [(4, 16, 24), (4, 8, 12), (2, 4, 6), (2, 2, 3)]
    assert network.decode(features).shape == (1, 2, 4, 16, 24)
    assert network.factors == side_factors("dynunet", spatial_dims=3, arguments=FLAT) == (2, 8, 8)
    with pytest.raises(ConfigError, match="multiples of 2 x 8 x 8; got 3 x 16 x 16"):
        network(torch.zeros(1, 1, 3, 16, 16))


def test_deep_supervision_gives_coarser_logits_but_of_the_coarsest_level():
    network = DynUNet(3, 1, 2, **FLAT, deep_supervision=True).eval()
    images = torch.randn(1, 1, 4, 16, 16)
    every = network.decode_all(network.encode(images))
    assert [tuple(z.shape) for z in every] == [(1, 2, 4, 16, 16), (1, 2, 4, 8, 8)]
    assert torch.equal(every[0], network(images))
    plain = DynUNet(3, 1, 2, **FLAT)
    assert len(plain.decode_all(plain.encode(images))) == 1
    extra = {key for key in network.state_dict() if key not in plain.state_dict()}
    assert extra == {"coarser_heads.0.conv.conv.weight", "coarser_heads.0.conv.conv.bias"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strides": [[1, 1, 1]] * 3}, "4 kernel_sizes, 3 strides"),
        ({"widths": [4, 8]}, "2 widths"),
        ({"kernel_sizes": [[3, 3]] * 4}, r"\[3, 3\] in kernel_sizes .* give 3 numbers"),
        ({"strides": [[2, 2, 2]] * 4}, "starts with stride"),
    ],
)
def test_a_topology_that_does_not_fit_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        build("dynunet", spatial_dims=3, in_channels=1, out_channels=2, arguments=FLAT | changes)


def test_missing_topology_and_deep_supervision_elsewhere_are_refused():
    with pytest.raises(ConfigError, match=r"dynunet refuses network\.arguments .*kernel_sizes"):
        build("dynunet", spatial_dims=3, in_channels=1, out_channels=2)
    with pytest.raises(ConfigError, match=r"option of network dynunet, not of DynUNet"):
        build("DynUNet", spatial_dims=3, in_channels=1, out_channels=2, arguments={"deep_supervision": True})


@pytest.mark.parametrize(
    ("name", "dims", "arguments", "factors"),
    [
        ("unet", 2, {}, (16, 16)),
        ("vnet", 3, {"widths": [4, 8]}, (2, 2, 2)),
        ("unet3d", 3, {}, (16, 16, 16)),
        ("SegResNet", 3, {}, None),
    ],
)
def test_side_factors_without_building_or_drawing(name, dims, arguments, factors):
    state = torch.get_rng_state()
    assert side_factors(name, spatial_dims=dims, arguments=arguments) == factors
    assert torch.equal(torch.get_rng_state(), state)
