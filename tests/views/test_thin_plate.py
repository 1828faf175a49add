"""The thin-plate warp against SciPy's spline and resampling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.interpolate import RBFInterpolator
from scipy.ndimage import map_coordinates

from scantly.views import ThinPlate, apply_thin_plate, sample_thin_plate

STILL = {"rotate_degrees": 0.0, "scale": (1.0, 1.0), "translate": 0.0, "mirror": 0.0, "jitter": 0.0}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(batch, size, *, seed=0, **limits):
    return sample_thin_plate(batch, size, **(STILL | limits), generator=generator(seed))


def expected(image, params, row):
    """One slice, in double precision."""
    sides = np.array(image.shape)
    centers = np.stack(np.meshgrid(*[np.linspace(-1, 1, params.displacement.shape[-1])] * 2, indexing="ij"), -1)
    voxels = np.stack(np.meshgrid(*[np.arange(n) for n in sides], indexing="ij"), -1).reshape(-1, 2)
    moved = params.displacement[row].double().flatten(1).T.numpy()
    spline = RBFInterpolator(centers.reshape(-1, 2), moved, kernel="thin_plate_spline", degree=1)
    matrix = params.to_input[row].double().numpy()
    centered = voxels - (sides - 1) / 2
    positions = centered @ matrix[:, :2].T + matrix[:, 2] + (sides - 1) / 2 + spline(2 * voxels / (sides - 1) - 1)
    return map_coordinates(image.numpy(), positions.T, order=1, mode="grid-constant").reshape(sides)


@pytest.mark.parametrize("size", [(32, 32), (17, 40)])
@pytest.mark.parametrize("jitter", [0.01, 0.3])
def test_it_agrees_with_scipy(size, jitter):
    x = torch.rand(2, 3, *size, generator=generator(), dtype=torch.float64)
    params = sample_thin_plate(2, size, jitter=jitter, generator=generator(1))
    warped = apply_thin_plate(x, params)
    for row in range(2):
        for channel in range(3):
            assert np.abs(warped[row, channel].numpy() - expected(x[row, channel], params, row)).max() < 1e-4


@pytest.mark.parametrize("size", [(16, 16), (7, 20), (5, 9, 11)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_without_limits_it_is_exactly_the_identity(size, dtype):
    x = (10 * torch.rand(3, 2, *size)).to(dtype)
    assert torch.equal(apply_thin_plate(x, draw(3, size)), x)


def test_a_mirror_alone_flips_the_columns_of_all_rows():
    x = torch.rand(4, 1, 9, 12)
    assert torch.allclose(apply_thin_plate(x, draw(4, (9, 12), mirror=1.0)), x.flip(-1), atol=1e-5)


def test_the_mirror_is_decided_once_for_all_rows():
    determinants = [torch.linalg.det(draw(5, (8, 8), seed=s, mirror=0.5).to_input[:, :, :2]) for s in range(40)]
    signs = torch.stack(determinants).sign()
    assert (signs == signs[:, :1]).all()
    assert 8 < (signs[:, 0] < 0).sum() < 32


def test_a_quarter_turn_about_the_center_is_exact_for_squares():
    params = draw(1, (9, 9))
    turned = ThinPlate(torch.tensor([[[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]]]), params.displacement, torch.tensor([True]))
    x = torch.rand(1, 1, 9, 9)
    assert torch.allclose(apply_thin_plate(x, turned), x.rot90(1, (-2, -1)), atol=1e-5)


def test_draws_stay_within_the_published_limits_and_reach_them():
    size = (101, 51)
    params = sample_thin_plate(4000, size, generator=generator())
    matrix, offset = params.to_input[:, :, :2], params.to_input[:, :, 2]
    factor = torch.linalg.det(matrix).abs().sqrt()
    angle = torch.rad2deg(torch.atan2(-matrix[:, 1, 0], matrix[:, 0, 0]))
    half = torch.tensor([50.0, 25.0])
    jitter = params.displacement / half.view(1, 2, 1, 1)
    for values, low, high in (
        (factor, 1 / 1.2, 1 / 0.8),
        (angle, -60, 60),
        (offset / half, -0.1, 0.1),
        (jitter, -0.01, 0.01),
    ):
        reach = high - low
        assert low - 1e-4 * reach <= values.min() < low + 0.01 * reach
        assert high - 0.01 * reach < values.max() <= high + 1e-4 * reach
        assert abs(float(values.double().mean()) - (low + high) / 2) < 0.02 * reach
    turn = matrix / factor[:, None, None]
    assert torch.allclose(turn @ turn.transpose(1, 2), torch.eye(2).expand(4000, -1, -1), atol=1e-5)
    assert params.displacement.shape == (4000, 2, 5, 5)
    assert params.active.all()


def test_control_points_move_as_drawn():
    """The spline passes through the control points, which lie on voxels of a 9 x 9 image."""
    params = draw(1, (9, 9), jitter=0.2)
    ramp = torch.stack(torch.meshgrid(torch.arange(9.0), torch.arange(9.0), indexing="ij"))[None]
    inner = params.displacement[:, :, 1:-1, 1:-1]
    read = apply_thin_plate(ramp, params)[:, :, ::2, ::2][:, :, 1:-1, 1:-1]
    assert torch.allclose(read, ramp[:, :, ::2, ::2][:, :, 1:-1, 1:-1] + inner, atol=1e-5)


def test_what_comes_from_outside_is_zero():
    params = draw(1, (8, 8))
    params.to_input[:, 0, 2] = 3.0
    shifted = ThinPlate(params.to_input, params.displacement, torch.tensor([True]))
    x = torch.rand(1, 1, 8, 8) + 1
    moved = apply_thin_plate(x, shifted)
    assert torch.allclose(moved[:, :, :5], x[:, :, 3:], atol=1e-5)
    assert (moved[:, :, 5:] == 0).all()


def test_a_volume_is_warped_slice_by_slice():
    x = torch.rand(2, 3, 5, 12, 12)
    params = sample_thin_plate(2, x.shape[2:], generator=generator())
    warped = apply_thin_plate(x, params)
    for z in range(5):
        assert torch.allclose(warped[:, :, z], apply_thin_plate(x[:, :, z], params), atol=1e-6)


def test_labels_keep_their_values_and_rows_their_own_warp():
    labels = torch.randint(0, 4, (2, 16, 16))
    params = sample_thin_plate(2, (16, 16), generator=generator())
    warped = apply_thin_plate(labels, params)
    assert warped.dtype == labels.dtype
    assert set(warped.unique().tolist()) <= {0, 1, 2, 3}
    same = labels[:1].expand(2, -1, -1).contiguous()
    assert not torch.equal(*apply_thin_plate(same, params))


def test_gradient_passes_to_what_is_warped():
    x = torch.rand(2, 1, 8, 8, requires_grad=True)
    params = sample_thin_plate(2, (8, 8), generator=generator())
    apply_thin_plate(x, params).square().sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0


def test_autocast_changes_nothing():
    x = torch.rand(2, 1, 32, 32)
    params = sample_thin_plate(2, (32, 32), generator=generator())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        warped = apply_thin_plate(x, params)
    assert torch.equal(warped, apply_thin_plate(x, params))


def test_equal_states_draw_equal_warps():
    a, b, c = (sample_thin_plate(2, (8, 8), generator=generator(s)) for s in (3, 3, 4))
    assert torch.equal(a.to_input, b.to_input)
    assert torch.equal(a.displacement, b.displacement)
    assert not torch.equal(a.to_input, c.to_input)
