"""The pyramid of decoder maps, and its dense head against the plain chain."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from scantly.networks import PyramidHead, UNet, VNet, build

NETWORKS = {
    "unet": {"widths": [2, 4, 6, 8, 10]},
    "unet6": {"widths": [2, 4, 6]},
    "unet3d": {"widths": [2, 4, 6]},
    "vnet": {"widths": [2, 4, 6, 8, 10]},
    "dynunet": {"kernel_sizes": [[3] * 3, [3] * 3], "strides": [[1] * 3, [1, 2, 2]], "widths": [4, 6]},
}


def chain(head, maps):
    """The public definition, with all channels."""
    mixes = [mix.weight for mix in head.mixes]
    conv = {2: functional.conv2d, 3: functional.conv3d}[head.spatial_dims]
    mode = {2: "bilinear", 3: "trilinear"}[head.spatial_dims]
    x = maps[0] + conv(maps[0], mixes[0])
    for level, features in enumerate(maps[1:], 1):
        x = functional.interpolate(x, features.shape[2:], mode=mode, align_corners=True)
        x = torch.cat([x, features], 1)
        mixed = conv(x, mixes[level])
        x = x + mixed if level < len(maps) - 1 else mixed
    return x


CASES = {
    "2d": (2, (8, 6, 4, 3), [(2, 3), (4, 6), (8, 12), (16, 24)], 10),
    "2d odd": (2, (5, 4, 3), [(3, 5), (5, 7), (11, 13)], 4),
    "3d": (3, (6, 4, 3), [(2, 2, 1), (4, 4, 2), (8, 8, 4)], 3),
    "3d, last two alike, anisotropic": (3, (5, 4, 3, 3), [(3, 2, 2), (3, 4, 4), (3, 8, 8), (3, 8, 8)], 7),
    "3d odd": (3, (4, 3), [(3, 2, 4), (5, 3, 7)], 2),
}


@pytest.fixture(params=CASES)
def case(request):
    dims, widths, sizes, channels = CASES[request.param]
    torch.manual_seed(0)
    maps = [torch.randn(2, w, *size, dtype=torch.float64) for w, size in zip(widths, sizes, strict=True)]
    return PyramidHead(dims, widths, channels).double(), maps


def agree(case, fast, slow, dtype):
    """Values, and gradients with respect to maps and weights."""
    head, maps = case
    results = []
    for evaluate in (fast, slow):
        head = head.to(dtype).requires_grad_()
        leaves = [m.to(dtype).requires_grad_() for m in maps]
        value = evaluate(head, leaves)
        torch.manual_seed(1)
        weights = torch.randn(value.shape, dtype=torch.float64).to(dtype)
        grads = torch.autograd.grad((value * weights).sum(), [*leaves, *head.parameters()])
        results.append([value, *grads])
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-10}[dtype]
    for a, b in zip(*results, strict=True):
        assert a.dtype == dtype
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * max(float(b.detach().abs().max()), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_composed_weights_give_what_the_chain_gives(case, dtype):
    agree(case, lambda head, maps: head(maps), chain, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_drawn_voxels_are_those_of_the_dense_features(case, dtype):
    voxels = case[1][-1][:, 0].numel()
    torch.manual_seed(2)
    index = torch.cat([torch.arange(voxels), torch.randint(voxels, (20,))])

    def slow(head, maps):
        return chain(head, maps).movedim(1, -1).flatten(0, -2)[index]

    agree(case, lambda head, maps: head.at(maps, index), slow, dtype)


@pytest.mark.parametrize("boxes", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_averages_are_those_of_the_dense_features(case, boxes, dtype):
    dims = case[0].spatial_dims
    pool = {2: functional.adaptive_avg_pool2d, 3: functional.adaptive_avg_pool3d}[dims]
    size = (boxes, *[2] * (dims - 1))

    def slow(head, maps):
        return pool(chain(head, maps), size)

    agree(case, lambda head, maps: head.pooled(maps, size), slow, dtype)


def test_no_voxel_and_one_channels_last_batch():
    head = PyramidHead(2, (3, 2), 4)
    maps = [torch.randn(2, 3, 2, 2), torch.randn(2, 2, 4, 4)]
    assert head.at(maps, torch.zeros(0, dtype=torch.int64)).shape == (0, 4)
    last = [m.contiguous(memory_format=torch.channels_last) for m in maps]
    assert torch.allclose(head(last), head(maps), atol=1e-6)
    assert torch.equal(head.at(last, torch.arange(32)), head.at(maps, torch.arange(32)))


def test_parameters_are_those_of_the_paper():
    """Widths are the running sums 256, 384, 448, 480, then 496 -> D in 2D, and 256 -> 16 in 3D."""
    flat, volume = PyramidHead(2, UNet(2, 1, 4).pyramid_widths, 496), PyramidHead(3, VNet(3, 1, 2).pyramid_widths, 16)
    assert [tuple(mix.weight.shape[:2]) for mix in flat.mixes] == [
        (256, 256),
        (384, 384),
        (448, 448),
        (480, 480),
        (496, 496),
    ]
    assert sum(p.numel() for p in flat.parameters()) == 256**2 + 384**2 + 448**2 + 480**2 + 496**2
    assert [tuple(mix.weight.shape[:2]) for mix in volume.mixes] == [
        (128, 128),
        (192, 192),
        (224, 224),
        (240, 240),
        (16, 256),
    ]


def test_under_autocast_draws_and_averages_stay_exact_and_dense_features_finite():
    head = PyramidHead(2, (6, 4, 3), 5)
    maps = [torch.randn(2, w, 4 * 2**i, 4 * 2**i) for i, w in enumerate((6, 4, 3))]
    index = torch.arange(0, 512, 7)
    expected = head.at(maps, index), head.pooled(maps, (4, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head.at(maps, index), expected[0])
        assert torch.equal(head.pooled(maps, (4, 4)), expected[1])
        dense = head(maps)
    assert dense.dtype == torch.bfloat16
    assert torch.allclose(dense.float().movedim(1, -1).flatten(0, -2)[index], expected[0], atol=0.1)
    low = [m.bfloat16().requires_grad_() for m in maps]
    head.at(low, index).square().sum().backward()
    head.pooled(low, (4, 4)).square().sum().backward()
    assert all(m.grad.isfinite().all() and m.grad.abs().sum() > 0 for m in low)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_head_on_the_last_map_gives_the_logits(name, dims):
    arguments = dict(NETWORKS[name])
    if name == "dynunet":
        arguments["kernel_sizes"] = [[3] * dims] * 2
        arguments["strides"] = [[1] * dims, [1, 2, 2][-dims:]]
    network = build(name, spatial_dims=dims, in_channels=1, out_channels=3, arguments=arguments).eval()
    images = torch.randn(2, 1, *[16, 32, 16][:dims])
    pyramid = network.pyramid(network.encode(images))
    assert torch.equal(network.head(pyramid[-1]), network(images))
    assert tuple(m.shape[1] for m in pyramid) == network.pyramid_widths
    sizes = [m.shape[2:].numel() for m in pyramid]
    assert sizes == sorted(sizes)
    assert pyramid[-1].shape[2:] == images.shape[2:]
    assert PyramidHead(dims, network.pyramid_widths, 4)(pyramid).shape == (2, 4, *images.shape[2:])


def test_the_deepest_map_of_the_unet_is_the_bottleneck():
    network = UNet(2, 1, 4)
    features = network.encode(torch.randn(1, 1, 32, 32))
    pyramid = network.pyramid(features)
    assert pyramid[0] is features[-1]
    assert [tuple(m.shape[1:]) for m in pyramid] == [(256, 2, 2), (128, 4, 4), (64, 8, 8), (32, 16, 16), (16, 32, 32)]


def test_the_maps_of_the_vnet_are_the_sums_with_the_skips():
    network = VNet(3, 1, 2, widths=[2, 4, 8], dropout=0).eval()
    features = network.encode(torch.randn(1, 1, 8, 8, 4))
    pyramid = network.pyramid(features)
    assert [tuple(m.shape[1:]) for m in pyramid] == [(4, 4, 4, 2), (2, 8, 8, 4), (2, 8, 8, 4)]
    first, second = network.decoder
    assert torch.equal(pyramid[0], first.upsample(features[2]) + features[1])
    assert torch.equal(pyramid[1], second.upsample(first.block(pyramid[0])) + features[0])
    assert torch.equal(pyramid[2], second.block(pyramid[1]))
    assert VNet(3, 1, 2).pyramid_widths == (128, 64, 32, 16, 16)


SMALL = {"unet": {"widths": [2, 4, 8], "dropout": [0] * 3}, "vnet": {"widths": [2, 4, 8], "dropout": 0}}


@pytest.fixture(params=SMALL)
def small(request):
    torch.manual_seed(0)
    return build(request.param, spatial_dims=2, in_channels=1, out_channels=2, arguments=SMALL[request.param])


def test_a_pyramid_costs_one_decoding(small):
    network, calls = small, []
    for module in network.decoder.modules():
        module.register_forward_hook(lambda module, *_: calls.append(module))
    features = network.encode(torch.randn(1, 1, 8, 8))
    network.decode_features(features)
    once, blocks = len(calls), len(network.decoder)
    calls.clear()
    network.pyramid(features)
    assert once - 1 - blocks <= len(calls) <= once


def test_gradient_reaches_every_weight_through_the_pyramid(small):
    head = PyramidHead(2, small.pyramid_widths, 3)
    head(small.pyramid(small.encode(torch.randn(2, 1, 8, 8)))).square().sum().backward()
    for part in (small.encoder, small.decoder, head):
        for name, parameter in part.named_parameters():
            assert parameter.grad is not None, name
            # A bias before a normalization has no effect, and a few ReLUs of so small a network are off.
            assert parameter.grad.abs().sum() > 0 or "bias" in name, name
    assert all(p.grad is None for p in small.head.parameters())


def test_gradients_of_voxels_drawn_often_keep_their_precision_in_bf16():
    torch.manual_seed(0)
    head = PyramidHead(2, (8, 4), 16)
    maps = [torch.randn(2, 8, 8, 8), torch.randn(2, 4, 16, 16)]
    index = torch.randint(20, (1024,))
    upstream = torch.randn(1024, 16)
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [m.bfloat16().to(dtype).requires_grad_() for m in maps]
        (head.at(leaves, index) * upstream).sum().backward()
        gradients.append([leaf.grad.float() for leaf in leaves])
    for exact, rounded in zip(*gradients, strict=True):
        assert (exact - rounded).norm() < 0.01 * exact.norm()
