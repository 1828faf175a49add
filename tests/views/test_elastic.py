"""Elastic deformation by a coarse grid."""

import numpy as np
import pytest
import scipy.ndimage
import torch

from scantly.views import Elastic, apply_elastic, sample_elastic


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def constant(rows: float, columns: float, batch: int = 1) -> Elastic:
    displacement = torch.tensor([rows, columns]).view(1, 2, 1, 1).expand(batch, 2, 3, 3)
    return Elastic(displacement, torch.ones(batch, dtype=torch.bool))


def test_displacements_have_the_deviation_asked_for():
    drawn = sample_elastic(2000, sigma=5.0, generator=generator())
    assert drawn.displacement.shape == (2000, 2, 3, 3)
    assert drawn.displacement.std().item() == pytest.approx(5.0, rel=0.02)
    assert drawn.displacement.mean().item() == pytest.approx(0.0, abs=0.1)
    assert drawn.active.all()


def test_a_constant_field_shifts_and_continues_the_border():
    x = torch.arange(20.0).view(1, 1, 4, 5)
    moved = apply_elastic(x, constant(1.0, -2.0))
    expected = x[:, :, [1, 2, 3, 3]][..., [0, 0, 0, 1, 2]]
    torch.testing.assert_close(moved, expected)


def test_the_field_takes_the_grid_values_at_corners_sides_and_center():
    # Reading a ramp along one axis shows where it was read.
    params = sample_elastic(1, sigma=0.3, generator=generator(1))
    size = 41
    ramp = torch.arange(size, dtype=torch.float32)
    places = torch.tensor([0, 20, 40])
    for axis in (0, 1):
        image = (ramp[:, None] if axis == 0 else ramp[None]).expand(size, size)[None, None]
        read = apply_elastic(image, params)[0, 0][places][:, places]
        there = ramp[places][:, None] if axis == 0 else ramp[places][None]
        expected = (there + params.displacement[0, axis]).clamp(0, size - 1)
        torch.testing.assert_close(read, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 2, 24, 31), (3, 2, 4, 20, 18)])
def test_it_reads_like_scipy_with_positions_kept_inside(shape):
    x = torch.randn(shape, generator=generator())
    params = sample_elastic(3, sigma=4.0, generator=generator(2))
    moved = apply_elastic(x, params)
    field = torch.nn.functional.interpolate(params.displacement, shape[-2:], mode="bicubic", align_corners=True)
    grid = np.stack(np.meshgrid(np.arange(shape[-2]), np.arange(shape[-1]), indexing="ij"))
    for row in range(3):
        positions = grid + field[row].numpy()
        for index in np.ndindex(shape[1:-2]):
            expected = scipy.ndimage.map_coordinates(x[(row, *index)].numpy(), positions, order=1, mode="nearest")
            np.testing.assert_allclose(moved[(row, *index)].numpy(), expected, atol=1e-4)


def test_inactive_rows_pass_bit_identical():
    x = torch.randn(4, 1, 16, 16, generator=generator())
    active = torch.tensor([False, True, False, True])
    moved = apply_elastic(x, sample_elastic(4, active=active, generator=generator()))
    assert torch.equal(moved[~active], x[~active])
    assert not torch.equal(moved[1], x[1])


def test_one_hot_labels_stay_a_distribution_and_label_maps_stay_labels():
    labels = torch.randint(0, 3, (2, 20, 20), generator=generator())
    one_hot = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).float()
    params = sample_elastic(2, generator=generator(3))
    moved = apply_elastic(one_hot, params)
    torch.testing.assert_close(moved.sum(1), torch.ones(2, 20, 20))
    assert moved.min() >= 0
    nearest = apply_elastic(labels, params)
    assert nearest.dtype == labels.dtype
    assert set(nearest.unique().tolist()) <= {0, 1, 2}
    # Where the linear view is sure of a class, the nearest view has it.
    sure = moved.amax(1) > 0.999
    assert torch.equal(moved.argmax(1)[sure], nearest[sure])


def test_draws_depend_on_the_generator_alone():
    first, second = (sample_elastic(2, generator=generator(5)).displacement for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, sample_elastic(2, generator=generator(6)).displacement)
