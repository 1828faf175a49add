import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scantly import views
from scantly.views.intensity import Gamma, Jitter

SHAPES = [(3, 2, 17, 20), (3, 2, 6, 14, 11)]
ALL = torch.tensor([True])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def jitter(shift: float, brightness: float, contrast: float, clip: bool, rows: int = 1) -> Jitter:
    full = [torch.full((rows,), value) for value in (shift, brightness, contrast)]
    return Jitter(*full, active=torch.ones(rows, dtype=torch.bool), clip=clip)


# --- noise ---


@pytest.mark.parametrize("shape", SHAPES)
def test_noise_is_clamped_gaussian(shape: tuple[int, ...]) -> None:
    images = torch.full((40, *shape[1:]), 7.0, dtype=torch.float64)
    added = views.noise(images, sigma=0.1, clamp=0.2, generator=generator()) - 7
    assert added.abs().max() <= 0.2 + 1e-7
    # 4.55 % of a normal distribution lie beyond two sigma and are clamped: 0.0959 is what remains of 0.1.
    assert ((added.abs() > 0.2 - 1e-6).double().mean() - 0.0455).abs() < 0.005
    assert abs(float(added.std()) - 0.0959) < 0.001
    assert added.mean().abs() < 0.002


def test_noise_of_zero_sigma_is_the_image() -> None:
    images = torch.randn(2, 1, 5, 5)
    assert torch.equal(views.noise(images, sigma=0.0, generator=generator()), images)


def test_noise_sigma_may_differ_per_row() -> None:
    spread = views.sample_noise((200, 1, 30, 30), sigma=(0.1, 0.5), clamp=None, generator=generator()).values.std(
        (1, 2, 3)
    )
    assert 0.09 < spread.min() < 0.15
    assert 0.45 < spread.max() < 0.55


# --- brightness, contrast, gamma ---


def test_jitter_by_hand() -> None:
    image = torch.tensor([[[[0.0, 0.25], [0.75, 1.0]]]])
    # (x + 0.1) * 0.5 = .05 .175 .425 .55, mean .3; twice the distance from it: -.2 .05 .55 .8
    bare = views.apply_jitter(image, jitter(0.1, 0.5, 2.0, clip=False))
    assert torch.allclose(bare.flatten(), torch.tensor([-0.2, 0.05, 0.55, 0.8]), atol=1e-6)
    clipped = views.apply_jitter(image, jitter(0.1, 0.5, 2.0, clip=True))
    assert torch.allclose(clipped.flatten(), torch.tensor([0.0, 0.05, 0.55, 0.8]), atol=1e-6)


def test_gamma_by_hand() -> None:
    image = torch.tensor([[[[2.0, 3.0], [4.0, 6.0]]]])
    squared = views.apply_gamma(image, Gamma(torch.tensor([2.0]), ALL))
    assert torch.allclose(squared.flatten(), torch.tensor([2.0, 2.25, 3.0, 6.0]), atol=1e-6)


@settings(max_examples=30)
@given(scale=st.floats(0.01, 3000), offset=st.floats(-1000, 1000), seed=st.integers(0, 1000), clip=st.booleans())
def test_jitter_and_gamma_do_not_depend_on_the_unit(scale: float, offset: float, seed: int, clip: bool) -> None:
    images = torch.rand(3, 2, 6, 7, generator=generator(seed), dtype=torch.float64)
    params = views.sample_jitter(3, shift=0.2, clip=clip, generator=generator(seed))
    exponent = views.sample_gamma(3, generator=generator(seed))
    for apply, drawn in [(views.apply_jitter, params), (views.apply_gamma, exponent)]:
        expected = apply(images, drawn) * scale + offset
        assert torch.allclose(apply(images * scale + offset, drawn), expected, rtol=1e-6, atol=1e-6 * (1 + abs(offset)))


def test_clipped_jitter_stays_within_each_channels_range() -> None:
    images = torch.randn(8, 2, 9, 9, generator=generator()) * torch.tensor([1.0, 100.0])[:, None, None]
    changed = views.apply_jitter(images, views.sample_jitter(8, brightness=2, contrast=2, generator=generator()))
    slack = 1e-4 * images.abs().amax((2, 3))
    assert (changed.amin((2, 3)) >= images.amin((2, 3)) - slack).all()
    assert (changed.amax((2, 3)) <= images.amax((2, 3)) + slack).all()


def test_jitter_factors_cover_their_range() -> None:
    params = views.sample_jitter(4000, brightness=0.5, contrast=1.5, generator=generator())
    assert 0.5 <= params.brightness.min() < 0.51 and 1.49 < params.brightness.max() < 1.5
    assert 0.0 <= params.contrast.min() < 0.01 and 2.49 < params.contrast.max() < 2.5


def test_a_constant_image_stays_finite() -> None:
    images = torch.full((2, 1, 4, 4), -3.0)
    assert torch.equal(views.apply_jitter(images, jitter(0.3, 1.5, 0.5, clip=True, rows=2)), images)
    assert torch.equal(views.apply_gamma(images, Gamma(torch.full((2,), 0.7), torch.ones(2, dtype=torch.bool))), images)


# --- blur ---


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("through_plane", [False, True])
def test_blur_equals_scipy(shape: tuple[int, ...], through_plane: bool) -> None:
    images = torch.randn(shape, generator=generator())
    axes = len(shape) - 2 if through_plane else 2
    params = views.sample_blur(3, sigma=(0.1, 2.0), truncate=3.0, axes=axes, generator=generator(3))
    blurred = views.apply_blur(images, params)
    assert params.radius == 6
    for row in range(3):
        expected = scipy.ndimage.gaussian_filter(
            images[row].double().numpy(),
            float(params.sigma[row]),
            radius=6,
            mode="nearest",
            axes=tuple(range(-axes, 0)),
        )
        assert np.abs(blurred[row].numpy() - expected).max() < 1e-5


def test_blur_at_the_widest_sigma_equals_scipy_with_the_same_truncation() -> None:
    images = torch.randn(1, 1, 20, 20, generator=generator())
    params = views.sample_blur(1, sigma=(1.5, 1.5), truncate=4.0, generator=generator())
    expected = scipy.ndimage.gaussian_filter(images[0, 0].double().numpy(), 1.5, truncate=4.0, mode="nearest")
    assert np.abs(views.apply_blur(images, params)[0, 0].numpy() - expected).max() < 1e-5


def test_blur_keeps_its_precision_under_autocast() -> None:
    images = torch.randn(2, 1, 16, 16, generator=generator())
    params = views.sample_blur(2, sigma=(1.0, 2.0), generator=generator())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = views.apply_blur(images, params)
    assert torch.equal(inside, views.apply_blur(images, params))


# --- all of them ---


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["jitter", "gamma", "blur", "noise"])
def test_inactive_rows_pass_bit_identical_and_the_type_stays(shape, dtype, name) -> None:
    images = torch.randn(shape, generator=generator()).to(dtype)
    active = torch.tensor([True, False, True])
    sample, apply = getattr(views, f"sample_{name}"), getattr(views, f"apply_{name}")
    first = shape if name == "noise" else shape[0]
    changed = apply(images, sample(first, active=active, generator=generator(1)))
    assert changed.dtype == dtype and changed.shape == images.shape
    assert (changed == images).flatten(1).all(1).tolist() == [False, True, False]
