"""High-frequency extractors against worked numbers and explicit transforms."""

from __future__ import annotations

import math
from itertools import product
from typing import get_args

import pytest
import torch
from torch.nn import functional

from scantly.errors import ConfigError
from scantly.networks.high_frequency import Extractor, high_frequency

KINDS = get_args(Extractor)
SIZES = [(6, 8), (5, 7), (1, 4), (1, 1), (4, 6, 2), (5, 3, 7), (1, 4, 3), (3, 1, 1), (1, 1, 1)]


def random(*shape, dtype=torch.float64):
    torch.manual_seed(0)
    return torch.randn(*shape, dtype=dtype)


def padded(x, width=1):
    return functional.pad(x, [width] * 2 * (x.ndim - 2), mode="replicate")


def haar(x):
    """Bands of one level, by letters L and H in axis order; sides are even."""
    bands = {"": x}
    for axis in range(2, x.ndim):
        split = {}
        for name, band in bands.items():
            index = torch.arange(0, x.shape[axis], 2)
            a, b = band.index_select(axis, index), band.index_select(axis, index + 1)
            split[name + "L"], split[name + "H"] = (a + b) / math.sqrt(2), (a - b) / math.sqrt(2)
        bands = split
    return bands


def inverse_haar(bands):
    """The map that has these bands."""
    while "" not in bands:
        axis = 1 + len(next(iter(bands)))
        joined = {}
        for name in {name[:-1] for name in bands}:
            low, high = bands[name + "L"], bands[name + "H"]
            pair = torch.stack([(low + high) / math.sqrt(2), (low - high) / math.sqrt(2)], axis + 1)
            joined[name] = pair.flatten(axis, axis + 1)
        bands = joined
    return bands[""]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_constant_map_has_no_high_frequencies(kind, size):
    for value in (1.0, 1 / 3):
        high = high_frequency(torch.full((2, 3, *size), value), kind)
        assert high.shape == (2, 3, *size)
        assert high.abs().max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(5, 8), (4, 5, 6)], ids=str)
def test_channels_and_images_do_not_mix_and_any_number_of_channels_does(kind, size):
    x = random(2, 3, *size)
    high = high_frequency(x, kind)
    for image, channel in product(range(2), range(3)):
        part = (slice(image, image + 1), slice(channel, channel + 1))
        assert torch.allclose(high[part], high_frequency(x[part], kind), atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_two_dimensions_are_three_with_one_voxel_along_the_first(kind):
    x = random(2, 3, 5, 8)
    flat, deep = high_frequency(x, kind), high_frequency(x[:, :, None], kind)[:, :, 0]
    # Here the neighbors along the first axis count among the six, and are the voxel itself.
    assert torch.allclose(flat * 4 / 6 if kind == "laplacian" else flat, deep, atol=1e-12)


def test_the_impulse_of_the_average():
    x = torch.zeros(1, 1, 3, 3, 3)
    x[0, 0, 1, 1, 1] = 1
    expected = torch.full_like(x, -0.037037)
    expected[0, 0, 1, 1, 1] = 0.962963
    assert torch.allclose(high_frequency(x, "avgpool"), expected, atol=1e-6)
    assert torch.equal(high_frequency(x), high_frequency(x, "avgpool"))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_average_is_that_of_pooling_with_replicate_padding(size):
    x = random(2, 3, *size)
    pool = {2: functional.avg_pool2d, 3: functional.avg_pool3d}[len(size)]
    assert torch.allclose(high_frequency(x, "avgpool"), x - pool(padded(x), 3, 1), atol=1e-12)


def test_the_laplacian_by_hand():
    plane = torch.tensor([[[[1.0, 2.0, 0.0], [4.0, 8.0, 4.0]]]])
    # Corner 1: neighbors 2 and 4, and itself twice; center 8: neighbors 2, 4, 4 and, below the border, itself.
    by_hand = torch.tensor([[[[-1.0, -0.75, -1.5], [-0.25, 3.5, 0.0]]]])
    assert torch.allclose(high_frequency(plane, "laplacian"), by_hand)
    impulse = torch.zeros(1, 1, 3, 3, 3)
    impulse[0, 0, 1, 1, 1] = 6
    found = high_frequency(impulse, "laplacian")[0, 0]
    faces = [(0, 1, 1), (2, 1, 1), (1, 0, 1), (1, 2, 1), (1, 1, 0), (1, 1, 2)]
    assert found[1, 1, 1] == 6
    assert all(found[face] == -1 for face in faces)
    assert found.count_nonzero() == 7


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_laplacian_is_a_depthwise_convolution(size):
    x, n = random(2, 3, *size), len(size)
    kernel = torch.zeros([3] * n, dtype=x.dtype)
    center = [1] * n
    kernel[tuple(center)] = 2 * n
    for axis, place in product(range(n), (0, 2)):
        kernel[(*center[:axis], place, *center[axis + 1 :])] = -1
    conv = {2: functional.conv2d, 3: functional.conv3d}[n]
    expected = conv(padded(x), kernel.expand(3, 1, *kernel.shape) / (2 * n), groups=3)
    assert torch.allclose(high_frequency(x, "laplacian"), expected, atol=1e-12)


def test_haar_bands_of_a_block_and_its_energy():
    block = torch.arange(8.0, dtype=torch.float64).view(1, 1, 2, 2, 2)
    bands = haar(block)
    values = {"LLL": 9.899495, "LLH": -1.414214, "LHL": -2.828427, "HLL": -5.656854}
    for name, band in bands.items():
        assert band.item() == pytest.approx(values.get(name, 0), abs=1e-6)
    assert sum(band.square().sum() for band in bands.values()).item() == pytest.approx(140)
    assert block.square().sum() == 140
    assert torch.allclose(inverse_haar(bands), block)
    assert torch.allclose(high_frequency(block, "haar"), block - 3.5)
    without = {name: band * (name != "LLL") for name, band in bands.items()}
    assert torch.allclose(high_frequency(block, "haar"), inverse_haar(without), atol=1e-12)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_haar_zeroes_the_lowest_band_with_odd_sides_made_even_by_the_last_voxel(size):
    x = random(2, 3, *size)
    bands = haar(functional.pad(x, [n for side in reversed(size) for n in (0, side % 2)], mode="replicate"))
    lowest = "L" * len(size)
    bands[lowest] = torch.zeros_like(bands[lowest])
    expected = inverse_haar(bands)[(..., *(slice(side) for side in size))]
    assert torch.allclose(high_frequency(x, "haar"), expected, atol=1e-12)


def wave(cycles, size):
    phase = sum(
        2 * math.pi * k * torch.arange(n, dtype=torch.float64).view(-1, *[1] * (len(size) - 1 - axis)) / n
        for axis, (k, n) in enumerate(zip(cycles, size, strict=True))
    )
    return torch.cos(phase)[None, None]


@pytest.mark.parametrize(
    ("cycles", "size", "kept"),
    [
        ((1, 1), (16, 16), False),
        ((2, 2), (16, 16), False),  # both exactly at the cutoff
        ((3, 0), (16, 16), True),
        ((0, 3), (16, 16), True),
        ((-3, 1), (16, 16), True),  # the highest of the axes counts
        ((3, 3), (24, 24), False),  # 3 * (1 / 24) is more than 0.125 in float32
        ((1, 1, 1), (16, 12, 10), False),
        ((0, 2, 0), (16, 12, 10), True),
        ((1, 0, 2), (9, 9, 9), True),
        ((1, 1, 1), (9, 9, 9), False),
        ((0, 0, 4), (8, 8, 8), True),
    ],
)
def test_a_wave_passes_whole_or_not_at_all(cycles, size, kept):
    x = wave(cycles, size)
    high = high_frequency(1 + x, "fft")
    assert torch.allclose(high, x * kept, atol=1e-12)


def test_the_cutoff():
    x = wave((4, 0), (16, 16))
    assert torch.allclose(high_frequency(x, "fft", cutoff=0.25), torch.zeros_like(x), atol=1e-12)
    assert torch.allclose(high_frequency(x, "fft", cutoff=0.2), x, atol=1e-12)
    noise = random(1, 2, 6, 7)
    assert torch.allclose(high_frequency(noise, "fft", cutoff=0), noise - noise.mean((2, 3), keepdim=True), atol=1e-12)
    assert not high_frequency(noise, "fft", cutoff=0.5).any()


@pytest.mark.parametrize("size", [(6, 7), (5, 4, 6), (5, 4, 7)], ids=str)
def test_the_spectrum_has_a_hole(size):
    x = random(1, 2, *size)
    axes = tuple(range(2, x.ndim))
    spectrum = torch.fft.fftn(x, dim=axes)
    norm = torch.stack(torch.meshgrid(*(torch.fft.fftfreq(n) for n in size), indexing="ij")).abs().amax(0)
    expected = torch.fft.ifftn(spectrum * (norm > 0.2), dim=axes)
    assert expected.imag.abs().max() < 1e-12
    assert torch.allclose(high_frequency(x, "fft", cutoff=0.2), expected.real, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(5, 8), (3, 4, 6), (1, 1, 2)], ids=str)
def test_low_precision_is_left_for_the_computation(kind, size):
    x = 100 + random(2, 3, *size, dtype=torch.float32)
    exact = high_frequency(x.bfloat16().float(), kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(high_frequency(x.bfloat16().float(), kind), exact)
        low = high_frequency(x.bfloat16(), kind)
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, exact.bfloat16())
    assert high_frequency(x.double(), kind).dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(3, 4), (2, 3, 2)], ids=str)
def test_gradients(kind, size):
    x = random(1, 2, *size).requires_grad_()
    assert torch.autograd.gradcheck(lambda features: high_frequency(features, kind), (x,))


def test_an_unknown_extractor_is_refused():
    with pytest.raises(ConfigError, match=r"unknown extractor in method\.hf_extractor 'har'; did you mean 'haar'\?"):
        high_frequency(torch.zeros(1, 1, 2, 2), "har")
