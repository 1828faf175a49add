"""Signed distance maps: numbers of the papers' conventions, exactness, degenerate masks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree
from torch import Tensor

from scantly.losses import distance_maps, signed_distance, soft_mask, squared_distance


def blobs(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Random masks with smooth outlines, neither empty nor full."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, shape[0], *[max(2, side // 5) for side in shape[1:]], generator=generator)
    mode = "bilinear" if len(shape) == 3 else "trilinear"
    fine = torch.nn.functional.interpolate(coarse, size=shape[1:], mode=mode)[0]
    return fine > fine.flatten(1).median(1).values.view(-1, *[1] * (len(shape) - 1))


def test_a_line():
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 0, 0, 0]]).bool()
    expected = [1, 2 / 3, 1 / 3, 0, -1, 0, 1 / 3, 2 / 3, 1]
    torch.testing.assert_close(signed_distance(mask)[0], torch.tensor(expected))


def test_a_square_of_three_in_seven():
    mask = torch.zeros(1, 7, 7, dtype=torch.bool)
    mask[0, 2:5, 2:5] = True
    found = signed_distance(mask)[0]
    assert found[3, 3] == -1
    assert not found[mask[0]][[0, 1, 2, 3, 5, 6, 7, 8]].any()
    assert found[0, 0] == found[0, 6] == found[6, 0] == found[6, 6] == 1
    assert found[1, 3].item() == pytest.approx(1 / math.sqrt(8))
    assert found[1, 1].item() == pytest.approx(0.5)


def test_a_square_of_three_in_five():
    mask = torch.zeros(1, 5, 5, dtype=torch.bool)
    mask[0, 1:4, 1:4] = True
    found = signed_distance(mask)[0]
    assert found[2, 2] == -1
    assert found[0, 0] == 1
    for side in (found[0, 1:4], found[4, 1:4], found[1:4, 0], found[1:4, 4]):
        torch.testing.assert_close(side, torch.full((3,), 0.7071), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(3, 17, 23), (2, 9, 12, 15), (4, 31)])
@pytest.mark.parametrize("transform", ["_by_scipy", "_by_parabolas"])
def test_squared_distances_are_exact(shape, transform):
    """Against the nearest of all voxels, in whole numbers."""
    mask = blobs(shape) if len(shape) > 2 else torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.7
    found = getattr(distance_maps, transform)(mask)
    for row, distances in zip(mask, found, strict=True):
        inside, everywhere = np.argwhere(row.numpy()), np.argwhere(np.ones(row.shape))
        nearest = inside[cKDTree(inside).query(everywhere)[1]]
        expected = ((everywhere - nearest) ** 2).sum(1)
        assert np.array_equal(distances.numpy().ravel(), expected)


@given(seed=st.integers(0, 10_000), sides=st.lists(st.integers(1, 12), min_size=1, max_size=3), share=st.floats(0, 1))
@settings(max_examples=60)
def test_both_transforms_give_the_same_bits(seed, sides, share):
    mask = torch.rand(2, *sides, generator=torch.Generator().manual_seed(seed)) < share
    mask[:, *[0] * len(sides)] = True
    assert torch.equal(distance_maps._by_scipy(mask), distance_maps._by_parabolas(mask))


def test_what_sides_are_too_long_for_whole_numbers_in_float32():
    with pytest.raises(ValueError, match="2364"):
        squared_distance(torch.ones(1, 2365, dtype=torch.bool))
    assert 3 * distance_maps._LONGEST_SIDE**2 < 2**24
    far = torch.zeros(1, 2364, dtype=torch.bool)
    far[0, 0] = True
    for found in (squared_distance(far), distance_maps._by_parabolas(far)):
        assert found[0, -1].item() == 2363**2


@pytest.mark.parametrize("dims", [2, 3])
def test_empty_and_full_masks(dims):
    masks = blobs((4, *(10,) * dims))
    alone = signed_distance(masks[[1, 3]])
    masks[0], masks[2] = False, True
    found = signed_distance(masks)
    assert (found[0] == 1).all()
    assert (found[2] == -1).all()
    assert torch.equal(found[[1, 3]], alone)
    zero = signed_distance(masks, empty="zero")
    assert not zero[0].any()
    assert torch.equal(zero[1:], found[1:])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shape", [(3, 20, 24), (2, 10, 12, 14)])
def test_where_it_is_negative_zero_and_positive(shape, seed):
    mask = blobs(shape, seed)
    found = signed_distance(mask)
    assert torch.equal(found > 0, ~mask)
    assert not (found < 0)[~mask].any()
    assert found.abs().max() <= 1
    assert found.isfinite().all()


def test_inner_boundary_voxels_have_a_face_neighbor_outside_within_the_patch():
    mask = torch.zeros(1, 6, 6, dtype=torch.bool)
    mask[0, :4, :4] = True  # cut by the patch at two sides
    rim = torch.zeros_like(mask)
    rim[0, 3, :4] = rim[0, :4, 3] = True
    assert torch.equal((signed_distance(mask) == 0), rim)


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_the_map_of_a_mirrored_mask_is_the_mirrored_map(axis):
    mask = blobs((2, 9, 11, 13), 3)
    torch.testing.assert_close(signed_distance(mask.flip(axis)), signed_distance(mask).flip(axis))


def test_rows_do_not_depend_on_each_other():
    mask = blobs((5, 16, 16))
    assert torch.equal(signed_distance(mask)[2:3], signed_distance(mask[2:3]))


def test_the_mask_that_distances_tell():
    told = soft_mask(torch.tensor([0.0, 0.001, -0.001, 0.01, -0.01], dtype=torch.float64))
    expected = torch.tensor([0.5, 0.18243, 0.81757, 3.06e-7, 1 - 3.06e-7], dtype=torch.float64)
    torch.testing.assert_close(told, expected, atol=5e-6, rtol=0)
    assert told[3].item() == pytest.approx(3.06e-7, rel=1e-3)


def test_the_inside_of_a_mask_is_told_inside():
    """The sign: a flipped one teaches the complement."""
    mask = blobs((2, 24, 24))
    told = soft_mask(signed_distance(mask))
    assert not (told[~mask] > 1e-6).any()
    rim = (signed_distance(mask) == 0) & mask
    assert (told[rim] == 0.5).all()
    assert (told[mask & ~rim] > 1 - 1e-6).all()


def test_only_a_thin_shell_has_gradient():
    distances = torch.tensor([0.0, 0.004, 0.1], requires_grad=True)
    (gradient,) = torch.autograd.grad(soft_mask(distances).sum(), distances)
    assert gradient[0].item() == pytest.approx(-375)
    assert abs(gradient[2].item()) < 1e-6


def test_half_precision_is_lifted_to_float32():
    near = torch.tensor([0.001]).bfloat16()
    assert soft_mask(near).dtype == torch.float32
    assert soft_mask(near).item() == pytest.approx(1 / (1 + math.exp(1500 * near.item())))
