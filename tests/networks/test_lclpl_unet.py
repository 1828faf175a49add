"""The six-level U-Net: its published shape, in 2D and 3D."""

import pytest
import torch
from torch import nn

from scantly.errors import ConfigError
from scantly.networks import EncoderDecoder, build, side_factors
from scantly.networks.lclpl_unet import UNet6, as_published

WIDTHS = (16, 32, 64, 128, 128, 128)


def test_the_published_layers():
    """Kernel, channels and bias of every convolution, from images to logits of four classes."""
    encoder = [(3, a, b, True) for w, v in zip((1, *WIDTHS), WIDTHS, strict=False) for a, b in ((w, v), (v, v))]
    decoder = []
    for deep, up in ((128, 128), (128, 128), (128, 64), (64, 32)):
        decoder += [(2, deep, up, True), (3, 2 * up, up, True), (3, up, up, True)]
    decoder += [(2, 32, 16, True), (3, 32, 16, True)]
    head = [(3, 16, 16, True), (3, 16, 16, True), (3, 16, 4, False)]
    network = build("unet6", spatial_dims=2, in_channels=1, out_channels=4)
    convs = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    found = [(m.kernel_size[0], m.in_channels, m.out_channels, m.bias is not None) for m in convs]
    assert found == encoder + decoder + head
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == len(convs) - 1
    assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.01)}
    weights = sum(k * k * a * b + (b if bias else 0) for k, a, b, bias in found)
    assert sum(p.numel() for p in network.parameters()) == weights + sum(2 * m.num_features for m in norms) == 2_095_760


def test_features_and_logits_at_the_published_size():
    network = UNet6(2, 1, 4).eval()
    images = torch.randn(2, 1, 192, 192, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = network.encode(images)
        u = network.decode_features(features)
        logits = network(images)
    assert [tuple(f.shape[1:]) for f in features] == [(w, 192 // 2**i, 192 // 2**i) for i, w in enumerate(WIDTHS)]
    assert u.shape == (2, 16, 192, 192)
    assert logits.shape == (2, 4, 192, 192)
    torch.testing.assert_close(network.head(u), logits, rtol=0, atol=0)


def test_volumes():
    network = build("unet6", spatial_dims=3, in_channels=2, out_channels=3, arguments={"widths": [4, 8, 8]})
    assert network(torch.zeros(1, 2, 4, 8, 12)).shape == (1, 3, 4, 8, 12)
    assert isinstance(network, EncoderDecoder)


def test_sides_must_be_multiples_of_32():
    assert side_factors("unet6", spatial_dims=2) == (32, 32)
    with pytest.raises(ConfigError, match=r"multiples of 32.*--size"):
        UNet6(2, 1, 2)(torch.zeros(1, 1, 64, 48))


def test_one_level_is_refused():
    with pytest.raises(ConfigError, match="two or more"):
        UNet6(2, 1, 2, widths=(16,))


def test_zeros_continue_the_image_below_and_to_the_right_of_the_small_kernel():
    network = UNet6(2, 1, 2, widths=(1, 1))
    upsample = network.decoder[0].upsample[:3]
    upsample[-1].weight.data.fill_(1.0)
    expected = torch.tensor([[4.0, 6, 8, 4], [8, 10, 12, 6], [12, 14, 16, 8], [6, 7, 8, 4]])
    # Each value of the 2 x 2 input fills a 2 x 2 block; kernels sum a voxel, its right, lower and diagonal neighbor.
    torch.testing.assert_close(upsample(torch.tensor([[[[1.0, 2], [3, 4]]]]))[0, 0], expected)


def test_weights_have_variance_two_over_fan_in():
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 128, 3)
    as_published(nn.Sequential(conv))
    assert conv.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    assert conv.bias.abs().sum() == 0
