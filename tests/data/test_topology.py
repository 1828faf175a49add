"""Depth, strides and kernels: nnU-Net's published plans, and properties."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scantly.data.topology import (
    anisotropy,
    default_network,
    fit_patch,
    plan_topology,
    side_factors,
    side_steps,
    training_bytes,
)


def test_published_plan_for_acdc() -> None:
    """nnU-Net's 3D plan for ACDC (Isensee et al. 2021, supplement): patch 20 x 256 x 224, 5 x 1.5625 x 1.5625 mm."""
    found = plan_topology((20, 256, 224), (5, 1.5625, 1.5625))
    assert found.strides == ((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2), (1, 2, 2))
    assert found.kernel_sizes == ((1, 3, 3), *[(3, 3, 3)] * 5)


def test_published_plan_for_prostate() -> None:
    """nnU-Net's 3D plan for the decathlon's prostate: patch 20 x 320 x 256, 3.6 x 0.62 x 0.62 mm."""
    found = plan_topology((20, 320, 256), (3.6, 0.62, 0.62))
    assert found.kernel_sizes == ((1, 3, 3), (1, 3, 3), *[(3, 3, 3)] * 5)
    assert side_factors(found.strides) == (4, 64, 64)


def test_left_atrium_is_halved_four_times() -> None:
    found = plan_topology((80, 112, 112), (0.625, 0.625, 0.625))
    assert found.strides == ((1, 1, 1), *[(2, 2, 2)] * 4)
    assert found.kernel_sizes == ((3, 3, 3),) * 5


def test_flat_images() -> None:
    assert plan_topology((256, 256)).strides == ((1, 1), *[(2, 2)] * 6)
    assert plan_topology((8, 8)).strides == ((1, 1), (2, 2))


def test_an_axis_alone_needs_twelve_voxels() -> None:
    assert plan_topology((16, 4, 4)).strides == ((1, 1, 1), (2, 1, 1))  # 16, 8, and 8 is fewer than 12
    assert plan_topology((8, 4, 4)).strides == ((1, 1, 1),)


def test_beyond_sixteenfold_only_whole_voxels_are_halved() -> None:
    assert side_factors(plan_topology((144, 144, 144)).strides) == (16, 16, 16)  # 144 = 16 * 9
    assert side_factors(plan_topology((128, 128, 128)).strides) == (32, 32, 32)
    assert side_factors(plan_topology((100, 100, 100)).strides) == (16, 16, 16)  # does not fit, and is refused


@pytest.mark.parametrize(
    ("spacing", "steps"),
    [
        ((1, 1, 1), (16, 16, 16)),
        ((1.9, 1, 1), (16, 16, 16)),
        ((2, 1, 1), (8, 16, 16)),
        ((5, 0.8, 0.8), (4, 16, 16)),
        ((10, 1.4, 1.4), (4, 16, 16)),
        ((40, 1, 2), (1, 16, 8)),
    ],
)
def test_axes_that_are_halved_later_have_finer_steps(spacing: tuple[float, ...], steps: tuple[int, ...]) -> None:
    assert side_steps(spacing) == steps


SPACINGS = st.tuples(*[st.floats(0.3, 12)] * 3)
SHAPES = st.tuples(*[st.integers(8, 300)] * 3)


@given(SHAPES, SPACINGS, st.floats(1e4, 1e7))
def test_every_planned_patch_fits_its_own_topology(
    shape: tuple[int, ...], spacing: tuple[float, ...], voxels: float
) -> None:
    steps = side_steps(spacing)
    patch = fit_patch(shape, steps, spacing, voxels)
    topology = plan_topology(patch, spacing)
    factors = side_factors(topology.strides)
    assert all(side % factor == 0 for side, factor in zip(patch, factors, strict=True))
    deepest = [side // factor for side, factor in zip(patch, factors, strict=True)]
    assert all(low >= 4 or factor == 1 for low, factor in zip(deepest, factors, strict=True))
    assert len(topology.kernel_sizes) == len(topology.strides)
    assert topology.strides[0] == (1, 1, 1)
    assert topology.kernel_sizes[-1] == (3, 3, 3)
    for finer, coarser in zip(topology.kernel_sizes, topology.kernel_sizes[1:], strict=False):
        assert all(a <= b for a, b in zip(finer, coarser, strict=True))  # once 3, they stay 3
    assert math.prod(patch) <= voxels or patch == steps
    first = topology.kernel_sizes[0] if len(topology.strides) > 1 else (3, 3, 3)
    assert (1 in first) == (anisotropy(spacing) >= 2 and len(topology.strides) > 1)


def test_the_axis_that_is_longest_in_mm_is_shortened_first() -> None:
    # 40 x 5 = 200 mm, 512 x 0.8 = 410 mm: the planes shrink to about 200 mm before any slice is given up
    patch = fit_patch((40, 512, 512), (4, 16, 16), (5.0, 0.8, 0.8), 40 * 256 * 256)
    assert patch == (40, 256, 256)
    assert fit_patch((40, 512, 512), (4, 16, 16), (5.0, 0.8, 0.8), 200_000)[0] < 40


def test_the_network_that_auto_stands_for() -> None:
    assert default_network(2, ((1, 3), (3, 3))) == "unet"
    assert default_network(3, ((3, 3, 3),)) == default_network(3, None) == "vnet"
    assert default_network(3, ((1, 3, 3), (3, 3, 3))) == "dynunet"


def test_memory_goes_with_the_width() -> None:
    assert training_bytes("vnet", 3, [8, 16]) == training_bytes("vnet", 3) / 2
    assert training_bytes("SegResNet", 2) == training_bytes("unet", 2)
