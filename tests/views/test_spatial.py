import itertools
import math

import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scantly import views
from scantly.views.spatial import Orthogonal

SIZES = [(24, 24), (20, 31), (5, 24, 24), (7, 18, 22), (1, 16, 16)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def smooth(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Images without steps, so that linear interpolation is accurate."""
    spatial = (0, 0, *[2.0] * (len(shape) - 2))
    noise = np.random.default_rng(seed).normal(size=shape)
    return torch.from_numpy(scipy.ndimage.gaussian_filter(noise, spatial)).float() * 5


# --- flips and quarter turns ---


def test_quarter_turns_and_flips_are_those_of_numpy() -> None:
    pattern = torch.arange(1, 10).reshape(3, 3)
    for turns, rows, columns in itertools.product(range(4), (False, True), (False, True)):
        expected = np.rot90(pattern.numpy(), turns)
        # One quarter turn is the transpose with its rows mirrored, three are that with its columns mirrored.
        flip = torch.tensor([[(turns in (1, 2)) ^ rows, (turns in (2, 3)) ^ columns]])
        params = Orthogonal(swap=torch.tensor([turns % 2 == 1]), flip=flip)
        expected = np.flip(expected, [axis for axis, on in enumerate((rows, columns)) if on])
        assert np.array_equal(views.apply_orthogonal(pattern[None], params)[0].numpy(), expected)


def outcomes(kind: str, size: tuple[int, ...] = (3, 3)) -> list[tuple[int, ...]]:
    pattern = torch.arange(math.prod(size)).reshape(1, *size).expand(4000, *size)
    params = views.sample_orthogonal(kind, 4000, size, generator=generator())
    return [tuple(row) for row in views.apply_orthogonal(pattern, params).flatten(1).tolist()]


def symmetries(size: tuple[int, int], turns: tuple[int, ...], flips: tuple[tuple[int, ...], ...]) -> set:
    pattern = np.arange(math.prod(size)).reshape(size)
    return {tuple(np.flip(np.rot90(pattern, k), axes).ravel().tolist()) for k in turns for axes in flips}


def test_official_rotflip_is_always_one_of_four_mirror_images() -> None:
    drawn = outcomes("official")
    mirrors = symmetries((3, 3), (0, 1, 2, 3), ((0,), (1,)))
    assert len(mirrors) == 4
    assert set(drawn) == mirrors
    assert tuple(range(9)) not in mirrors
    assert all(0.22 < drawn.count(each) / len(drawn) < 0.28 for each in mirrors)


def test_independent_rotflip_is_uniform_over_the_eight_symmetries() -> None:
    drawn = outcomes("independent")
    assert set(drawn) == symmetries((3, 3), (0, 1, 2, 3), ((), (0,)))
    assert all(0.1 < drawn.count(each) / len(drawn) < 0.15 for each in set(drawn))


def test_flips_leave_a_quarter_of_the_rows_as_they_are() -> None:
    drawn = outcomes("flips")
    assert set(drawn) == symmetries((3, 3), (0,), ((), (0,), (1,), (0, 1)))
    assert 0.22 < drawn.count(tuple(range(9))) / len(drawn) < 0.28


def test_sides_of_different_length_are_only_turned_by_half() -> None:
    size = (2, 3)
    assert set(outcomes("official", size)) == symmetries(size, (0,), ((0,), (1,)))
    assert set(outcomes("independent", size)) == symmetries(size, (0, 2), ((), (0,)))


def test_depth_is_mirrored_only_when_asked() -> None:
    volume = torch.arange(4.0).reshape(1, 4, 1, 1).expand(500, 4, 2, 2)
    for flip_depth, expected in [(False, {0.0}), (True, {0.0, 3.0})]:
        params = views.sample_orthogonal("flips", 500, (4, 2, 2), flip_depth=flip_depth, generator=generator())
        assert set(views.apply_orthogonal(volume, params)[:, 0, 0, 0].tolist()) == expected


def test_quarter_turns_refuse_sides_of_different_length() -> None:
    params = views.sample_orthogonal("official", 2, (8, 8), generator=generator())
    with pytest.raises(ValueError, match=r"\(8, 9\)"):
        views.apply_orthogonal(torch.zeros(2, 1, 8, 9), params)


@settings(max_examples=60)
@given(
    kind=st.sampled_from(["official", "flips", "independent"]),
    size=st.sampled_from([(4, 4), (3, 5), (2, 4, 4), (3, 2, 5)]),
    lead=st.sampled_from([(), (2,)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]),
    flip_depth=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_inverse_brings_every_value_back(kind, size, lead, dtype, flip_depth, seed) -> None:
    x = torch.randint(0, 100, (6, *lead, *size), generator=generator(seed)).to(dtype)
    params = views.sample_orthogonal(kind, 6, size, flip_depth=flip_depth, generator=generator(seed))
    there = views.apply_orthogonal(x, params)
    back = views.apply_orthogonal(there, views.invert_orthogonal(params))
    assert there.dtype == dtype
    assert torch.equal(back, x)


# --- affine ---


def expected_matrix(degrees: float, scale: float, axes: int) -> np.ndarray:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    matrix = np.eye(axes)
    matrix[-2:, -2:] = [[cos, sin], [-sin, cos]]
    return matrix / scale


def scipy_affine(x: np.ndarray, matrix: np.ndarray, shift: np.ndarray, order: int) -> np.ndarray:
    center = (np.array(x.shape) - 1) / 2
    offset = center - matrix @ (center + shift)
    return scipy.ndimage.affine_transform(x, matrix, offset, order=order, mode="grid-constant")


def near_a_tie(size: tuple[int, ...], matrix: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Voxels that read half way between two others, where single precision may tip over."""
    center = (np.array(size) - 1) / 2
    positions = (np.indices(size).reshape(len(size), -1).T - center - shift) @ matrix.T + center
    return (np.abs(positions % 1 - 0.5) < 1e-4).any(1).reshape(size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("through_plane", [False, True])
def test_affine_equals_scipy(size: tuple[int, ...], through_plane: bool) -> None:
    axes = len(size) if through_plane else 2
    images = smooth((3, 2, *size))
    labels = (images * 3).round().long()
    degrees, scale = torch.tensor([0.0, 17.0, -133.5]), torch.tensor([1.3, 0.8, 1.1])
    shift = torch.tensor([[1.37, -2.21, 0.4], [0.3, 3.14, -1.23], [-4.4, 0.77, 2.6]])[:, :axes]
    params = views.make_affine(degrees, scale, shift)
    results = [views.apply_affine(images, params), views.apply_affine(labels, params)]
    # The map acts on the last axes: everything before them is a stack of independent pictures.
    stacks = [each.reshape(3, -1, *size[-axes:]).numpy() for each in (images, labels, *results)]
    for row in range(3):
        matrix = expected_matrix(float(degrees[row]), float(scale[row]), axes)
        moved = shift[row].double().numpy()
        clear = ~near_a_tie(size[-axes:], matrix, moved)
        assert clear.mean() > 0.8
        for image, label, linear, nearest in zip(*[stack[row] for stack in stacks], strict=True):
            assert np.abs(linear - scipy_affine(image.astype(float), matrix, moved, order=1)).max() < 1e-4
            assert np.array_equal(nearest[clear], scipy_affine(label, matrix, moved, order=0)[clear])


@pytest.mark.parametrize("size", [(24, 24), (20, 31)])
@pytest.mark.parametrize("degrees", [-20, -7, 0, 13, 19])
def test_rotation_has_the_sign_of_scipy_rotate(size: tuple[int, int], degrees: int) -> None:
    image = smooth((1, 1, *size))
    params = views.make_affine(torch.tensor([float(degrees)]), torch.ones(1), torch.zeros(1, 2))
    turned = scipy.ndimage.rotate(image[0, 0].double(), degrees, reshape=False, order=1, mode="grid-constant")
    assert np.abs(views.apply_affine(image, params)[0, 0].numpy() - turned).max() < 1e-4
    labels = (image > 0).long()
    turned = scipy.ndimage.rotate(labels[0, 0], degrees, reshape=False, order=0, mode="grid-constant")
    assert np.array_equal(views.apply_affine(labels, params)[0, 0].numpy(), turned)


def test_scale_above_one_enlarges_and_shift_moves_the_content() -> None:
    image = torch.zeros(2, 1, 9, 9)
    image[:, :, 3:6, 3:6] = 1
    params = views.make_affine(torch.zeros(2), torch.tensor([2.0, 1.0]), torch.tensor([[0.0, 0.0], [1.0, -2.0]]))
    larger, moved = views.apply_affine(image, params, interpolation="nearest")[:, 0]
    assert larger.sum() > 25
    assert torch.equal(moved, image[0, 0].roll((1, -2), (0, 1)))


def test_in_plane_map_of_a_volume_is_that_of_each_slice() -> None:
    volume = smooth((2, 3, 5, 16, 16))
    params = views.sample_affine(2, (5, 16, 16), rotate_degrees=40, scale=(0.8, 1.2), generator=generator())
    expected = torch.stack([views.apply_affine(volume[:, :, i], params) for i in range(5)], dim=2)
    assert torch.equal(views.apply_affine(volume, params), expected)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    size=st.sampled_from([(9, 9), (3, 8, 11)]),
    dtype=st.sampled_from([torch.uint8, torch.int16, torch.int64]),
    through_plane=st.booleans(),
)
def test_no_label_value_is_invented(seed, size, dtype, through_plane) -> None:
    labels = torch.tensor([0, 3, 97])[torch.randint(0, 3, (4, *size), generator=generator(seed))].to(dtype)
    params = views.sample_affine(
        4,
        size,
        rotate_degrees=180,
        scale=(0.5, 2),
        translate=0.3,
        through_plane=through_plane,
        generator=generator(seed),
    )
    mapped = views.apply_affine(labels, params)
    assert mapped.dtype == dtype
    assert set(mapped.unique().tolist()) <= {0, 3, 97}


def test_large_label_values_survive() -> None:
    labels = torch.full((1, 4, 4), 2**53 - 1)
    params = views.make_affine(torch.zeros(1), torch.ones(1), torch.zeros(1, 2))
    assert torch.equal(views.apply_affine(labels, params), labels)


def test_inactive_rows_pass_bit_identical() -> None:
    images = torch.randn(4, 1, 16, 16, generator=generator())
    active = torch.tensor([True, False, True, False])
    params = views.sample_affine(4, (16, 16), rotate_degrees=30, active=active, generator=generator(1))
    same = (views.apply_affine(images, params) == images).flatten(1).all(1)
    assert same.tolist() == [False, True, False, True]


@pytest.mark.parametrize("size", [(64, 64), (16, 48, 48)])
def test_inverse_restores_what_stayed_in_view(size: tuple[int, ...]) -> None:
    spatial = (0, 0, *[6.0] * len(size))
    images = torch.from_numpy(
        scipy.ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(4, 1, *size)), spatial)
    )
    images = images / images.abs().amax()
    params = views.sample_affine(4, size, rotate_degrees=45, scale=(0.8, 1.2), translate=0.1, generator=generator())
    back = views.apply_affine(views.apply_affine(images, params), views.invert_affine(params))
    ones = views.apply_affine(torch.ones_like(images), params)
    seen = views.apply_affine(ones, views.invert_affine(params)) > 0.999
    assert seen.double().mean() > 0.5
    assert (back - images)[seen].abs().max() < 0.05


def test_the_two_directions_of_a_map_are_inverse_matrices() -> None:
    params = views.sample_affine(
        5,
        (9, 9, 9),
        rotate_degrees=180,
        scale=(0.5, 2),
        translate=0.5,
        through_plane=True,
        generator=generator(),
    )
    corner = torch.tensor([0.0, 0, 0, 1]).expand(5, 1, 4)
    there, back = (torch.cat([m, corner], dim=1).double() for m in (params.to_input, params.to_output))
    assert torch.allclose(there @ back, torch.eye(4, dtype=torch.float64), atol=1e-5)


def test_integer_degrees_are_those_of_the_literature() -> None:
    params = views.sample_affine(5000, (8, 8), rotate_degrees=20, rotate_integer=True, generator=generator())
    degrees = torch.rad2deg(torch.atan2(params.to_input[:, 0, 1], params.to_input[:, 0, 0]))
    assert sorted(set(degrees.round(decimals=2).tolist())) == list(range(-20, 20))


def test_interpolating_labels_linearly_is_refused() -> None:
    params = views.sample_affine(1, (4, 4), generator=generator())
    with pytest.raises(ValueError, match="nearest"):
        views.apply_affine(torch.ones(1, 4, 4, dtype=torch.long), params, interpolation="linear")


def test_warp_equals_scipy_map_coordinates() -> None:
    image = smooth((1, 1, 12, 15))
    positions = torch.rand(1, 2, 12, 15, generator=generator()) * torch.tensor([14.0, 17.0])[:, None, None] - 1.5
    for order, interpolation in [(0, "nearest"), (1, "linear")]:
        expected = scipy.ndimage.map_coordinates(
            image[0, 0].double(), positions[0].double(), order=order, mode="grid-constant"
        )
        ours = views.warp(image, positions.unbind(1), interpolation=interpolation)[0, 0]
        assert np.abs(ours.numpy() - expected).max() < 1e-4


def test_gradients_flow_through_the_geometry() -> None:
    images = smooth((2, 1, 8, 8)).requires_grad_()
    params = views.sample_orthogonal("official", 2, (8, 8), generator=generator())
    weights = torch.arange(64.0).reshape(1, 1, 8, 8).expand(2, 1, 8, 8)
    (views.apply_orthogonal(images, params) * weights).sum().backward()
    assert torch.equal(images.grad, views.apply_orthogonal(weights, views.invert_orthogonal(params)))
