import pytest
import torch

from scantly.errors import ConfigError
from scantly.networks import UNet, build, known_networks


def parameters(network):
    return sum(p.numel() for p in network.parameters())


def test_the_community_unet_has_its_published_size():
    assert parameters(build("unet", spatial_dims=2, in_channels=1, out_channels=4)) == 1_813_764


def test_half_width():
    network = build("unet", spatial_dims=2, in_channels=1, out_channels=4, arguments={"widths": [8, 16, 32, 64, 128]})
    assert parameters(network) == 454_788


@pytest.mark.parametrize("size", [(2, 32, 48), (3, 16, 32, 16)])
def test_output_has_the_input_size(size):
    network = build("unet", spatial_dims=size[0], in_channels=2, out_channels=3)
    assert network(torch.zeros(2, 2, *size[1:])).shape == (2, 3, *size[1:])


def test_encode_and_decode_make_forward():
    network = UNet(2, 1, 3).eval()
    images = torch.randn(1, 1, 32, 32)
    features = network.encode(images)
    assert [tuple(f.shape[1:]) for f in features] == [
        (16, 32, 32),
        (32, 16, 16),
        (64, 8, 8),
        (128, 4, 4),
        (256, 2, 2),
    ]
    torch.testing.assert_close(network.decode(features), network(images), rtol=0, atol=0)


def test_block_order_and_slope():
    block = UNet(2, 1, 2).encoder[0]
    kinds = [type(layer).__name__ for layer in block]
    assert kinds == ["Conv2d", "BatchNorm2d", "LeakyReLU", "Dropout", "Conv2d", "BatchNorm2d", "LeakyReLU"]
    assert block[2].negative_slope == 0.01
    assert block[3].p == 0.05


def test_a_side_that_cannot_be_halved_is_refused_with_the_cure():
    with pytest.raises(ConfigError, match=r"multiples of 16.*--size"):
        UNet(2, 1, 2)(torch.zeros(1, 1, 40, 32))


def test_a_network_of_monai_by_name():
    network = build("SegResNet", spatial_dims=2, in_channels=1, out_channels=3, arguments={"init_filters": 8})
    assert type(network).__module__.startswith("monai.")
    assert network(torch.zeros(1, 1, 32, 32)).shape == (1, 3, 32, 32)
    assert {"unet", "DynUNet", "SwinUNETR"} <= set(known_networks())


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("SegResNett", {}, "did you mean 'SegResNet'"),
        ("os.system", {}, "unknown network"),
        ("unet", {"width": [8]}, "did you mean 'widths'"),
        ("unet", {"widths": [8, 16]}, "2 levels, dropout 5"),
        ("SegResNet", {"init_filters": "many"}, "SegResNet refuses"),
    ],
)
def test_bad_names_and_arguments_are_refused(name, arguments, message):
    with pytest.raises(ConfigError, match=message):
        build(name, spatial_dims=2, in_channels=1, out_channels=2, arguments=arguments)
