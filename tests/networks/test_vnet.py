"""The V-Net: size, shapes, where it drops, further decoders."""

import pytest
import torch
from torch import nn

from scantly.errors import ConfigError
from scantly.networks import UNet, VNet, build


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def small(dims=3, **arguments):
    return VNet(dims, 1, 2, widths=[4, 8, 16], **arguments)


def test_the_community_vnet_has_its_published_size():
    assert parameters(build("vnet", spatial_dims=3, in_channels=1, out_channels=2)) == 9_448_866


def test_decoders_of_mc_net_on_one_encoder_have_their_published_sizes():
    network = build("vnet", spatial_dims=3, in_channels=1, out_channels=2)
    first, second, head = network.new_decoder("linear"), network.new_decoder("nearest"), network.head
    assert parameters(network) + parameters(first) + parameters(head) == 12_347_716
    assert parameters(network) + parameters(first) + parameters(second) + 2 * parameters(head) == 15_246_566
    flat = UNet(2, 1, 4)
    first, second, head = flat.new_decoder("transposed"), flat.new_decoder("nearest"), flat.head
    assert parameters(flat) + parameters(first) + parameters(head) == 2_577_624
    assert parameters(flat) + parameters(first) + parameters(second) + 2 * parameters(head) == 3_210_924


@pytest.mark.parametrize("size", [(2, 16, 32), (3, 16, 32, 16)])
@pytest.mark.parametrize("upsampling", ["transposed", "linear", "nearest"])
def test_output_has_the_input_size(size, upsampling):
    network = VNet(size[0], 2, 3, widths=[2, 4, 6, 8, 10], upsampling=upsampling)
    assert network(torch.randn(2, 2, *size[1:])).shape == (2, 3, *size[1:])


def test_encoder_decoder_and_head_make_forward():
    network = small().eval()
    images = torch.randn(1, 1, 8, 8, 16)
    features = network.encode(images)
    assert [tuple(f.shape[1:]) for f in features] == [(4, 8, 8, 16), (8, 4, 4, 8), (16, 2, 2, 4)]
    assert [tuple(f.shape[1:]) for f in network.decoder(features)] == [(4, 8, 8, 16), (8, 4, 4, 8)]
    assert torch.equal(network.head(network.decode_features(features)), network(images))
    assert torch.equal(network.decode(features), network(images))


def test_convolutions_per_level():
    network = VNet(3, 1, 2)
    convs = [
        sum(isinstance(layer, nn.Conv3d) and layer.stride == (1, 1, 1) for layer in level) for level in network.encoder
    ]
    assert convs == [1, 2, 3, 3, 3]
    assert [sum(isinstance(layer, nn.Conv3d) for layer in step.block) for step in network.decoder] == [3, 3, 2, 1]
    kinds = [type(layer).__name__ for layer in network.encoder[1]][:4]
    assert kinds == ["Conv3d", "BatchNorm3d", "ReLU", "Conv3d"]


def test_the_skip_is_added():
    step = small().eval().decoder[0]
    deep, skip = torch.randn(1, 16, 2, 2, 2), torch.randn(1, 8, 4, 4, 4)
    assert torch.equal(step(deep, skip), step.block(step.upsample(deep) + skip))


def test_whole_channels_are_dropped_at_both_places_and_in_training_only():
    torch.manual_seed(0)
    network = small(dropout=0.5)
    features = network.encode(torch.randn(4, 1, 16, 16, 16))

    def dropped(values):
        channels = values.flatten(2)
        empty = (channels == 0).all(2)
        return empty.float().mean().item()

    assert 0.3 < dropped(features[-1]) < 0.7
    assert dropped(features[0]) < 0.2
    assert 0.2 < dropped(network.decode_features(features)) < 0.9
    places = [name for name, module in network.named_modules() if isinstance(module, nn.Dropout3d)]
    assert places == ["encoder.2.12", "decoder.1.block.3"]
    network.eval()
    images = torch.randn(1, 1, 16, 16, 16)
    assert torch.equal(network(images), network(images))


@pytest.mark.parametrize(
    ("norm", "kind"), [("batch", nn.BatchNorm3d), ("instance", nn.InstanceNorm3d), ("group", nn.GroupNorm)]
)
def test_normalization_by_name(norm, kind):
    network = small(norm=norm)
    others = (nn.BatchNorm3d, nn.InstanceNorm3d, nn.GroupNorm)
    assert {type(module) for module in network.modules() if isinstance(module, others)} == {kind}
    assert not any(isinstance(module, others) for module in small(norm="none").modules())
    assert network(torch.randn(2, 1, 8, 8, 8)).shape == (2, 2, 8, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "layer"}, "unknown normalization.* 'layer'"),
        ({"upsampling": "cubic"}, "unknown upsampling.* 'cubic'"),
        ({"blocks": [1, 2]}, "5 levels, blocks 2"),
        ({"widths": []}, "vnet refuses network.arguments"),
        ({"residual": True}, "unknown argument of network vnet 'residual'"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        build("vnet", spatial_dims=3, in_channels=1, out_channels=2, arguments=arguments)


def test_sides_that_cannot_be_halved_are_refused_with_the_cure():
    with pytest.raises(ConfigError, match=r"VNet takes 3D images .* multiples of 4; got 8 x 6 x 8\. .*--size"):
        small()(torch.zeros(1, 1, 8, 6, 8))
    with pytest.raises(ConfigError, match="takes 3D images"):
        small()(torch.zeros(1, 1, 8, 8))
