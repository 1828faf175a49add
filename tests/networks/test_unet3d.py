"""The 3D U-Net of the BraTS experiments, and the transposed variant of the 2D one."""

import pytest
import torch
from torch import nn

from scantly.errors import ConfigError
from scantly.networks import UNet3D, build


def parameters(network):
    return sum(p.numel() for p in network.parameters())


def test_published_sizes():
    assert parameters(build("unet3d", spatial_dims=3, in_channels=1, out_channels=2)) == 5_884_050
    flat = build("unet", spatial_dims=2, in_channels=1, out_channels=4, arguments={"upsampling": "transposed"})
    assert parameters(flat) == 1_944_324
    assert flat(torch.zeros(2, 1, 16, 16)).shape == (2, 4, 16, 16)


@pytest.mark.parametrize("size", [(2, 16, 24), (3, 8, 16, 8)])
def test_output_has_the_input_size(size):
    network = UNet3D(size[0], 2, 3, widths=[4, 8, 16])
    assert network(torch.randn(2, 2, *size[1:])).shape == (2, 3, *size[1:])


def test_instance_norm_keeps_nothing():
    network = UNet3D(3, 1, 2, widths=[4, 8])
    norms = [module for module in network.modules() if isinstance(module, nn.InstanceNorm3d)]
    assert len(norms) == 6
    assert not list(network.buffers())
    assert not [p for norm in norms for p in norm.parameters()]


def test_values_are_dropped_after_the_bottom_and_before_the_head():
    network = UNet3D(3, 1, 2, widths=[4, 8, 16])
    places = [name for name, module in network.named_modules() if isinstance(module, nn.Dropout)]
    assert places == ["encoder.2.6", "decoder.1.block.6"]
    assert {network.get_submodule(name).p for name in places} == {0.3}


def test_kaiming_initialization():
    torch.manual_seed(0)
    weight = UNet3D(3, 1, 2).encoder[3][0].weight  # fan-in 64 * 27
    assert weight.std().item() == pytest.approx((2 / (64 * 27)) ** 0.5, rel=0.02)


def test_it_offers_no_other_decoder_and_says_which_networks_do():
    with pytest.raises(ConfigError, match=r"UNet3D has no decoder with nearest upsampling; choose network\.name unet"):
        UNet3D(3, 1, 2, widths=[4, 8]).new_decoder("nearest")
