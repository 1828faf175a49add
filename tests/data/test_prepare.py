"""Preparation against SciPy and an interpolation written out by hand, and the way back."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from scantly.data.plan import ChannelNormalization, Plan
from scantly.data.prepare import Record, normalize, prepare, prepare_label, restore, restore_label
from scantly.errors import ImageError
from scantly.imaging import Geometry, Image, Label, from_canonical

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
#: Files stored in (P, S, R) axes: permuted and flipped against LPS.
PSR = np.array([[0, 0, 3, 5], [-2, 0, 0, -4], [0, 1, 0, 9], [0, 0, 0, 1.0]])


def plan_of(dims: int = 2, channels: int = 1, **values: Any) -> Plan:
    given = {
        "spatial_dims": dims,
        "normalization": [{"scheme": "none"}] * channels,
        "patch_size": [16] * dims,
        "labeled_batch_size": 1,
        "unlabeled_batch_size": 1,
    }
    return Plan.model_validate({**given, **values})


def image_of(array: np.ndarray, affine: np.ndarray = LPS, **geometry: Any) -> Image:
    return Image(array.astype(np.float32), Geometry(array.shape[-3:], affine, **geometry))


def random_image(*shape: int, seed: int = 0) -> Image:
    return image_of(np.random.default_rng(seed).normal(size=shape))


def linear_on_areas(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Linear interpolation between pixel centers, edges repeated, one axis after the other."""
    for axis, size in enumerate(shape):
        old = array.shape[axis]
        at = np.clip((np.arange(size) + 0.5) * old / size - 0.5, 0, old - 1)
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, old - 1)
        weight = (at - low).reshape([-1 if i == axis else 1 for i in range(array.ndim)])
        array = array.take(low, axis) * (1 - weight) + array.take(high, axis) * weight
    return array


@pytest.mark.parametrize("shape", [(3, 154, 180), (2, 300, 256), (2, 428, 512)])
def test_nearest_is_the_literatures_zoom_slice_by_slice(shape: tuple[int, int, int]) -> None:
    plan = plan_of(size=[256, 256], interpolation="nearest", patch_size=[256, 256])
    image = random_image(1, *shape)
    label = Label(np.random.default_rng(1).integers(0, 4, shape), image.geometry)
    prepared, record = prepare(image, plan)
    labels = prepare_label(label, plan)
    back = restore_label(labels, record, plan)
    for z in range(shape[0]):
        factors = (256 / shape[1], 256 / shape[2])
        np.testing.assert_array_equal(prepared[0, z], ndimage.zoom(image.array[0, z], factors, order=0))
        np.testing.assert_array_equal(labels[z], ndimage.zoom(label.array[z], factors, order=0))
        inverse = ndimage.zoom(labels[z], (shape[1] / 256, shape[2] / 256), order=0)
        np.testing.assert_array_equal(back[z], inverse)


@pytest.mark.parametrize(("dims", "size"), [(2, [32, 16]), (3, [10, 32, 16])])
def test_linear_takes_the_pixel_area_grid(dims: int, size: list[int]) -> None:
    image = random_image(2, 7, 20, 27)
    prepared, record = prepare(image, plan_of(dims, channels=2, size=size))
    shape = (7, *size) if dims == 2 else tuple(size)
    assert record.prepared_shape == shape
    for channel in range(2):
        expected = linear_on_areas(image.array[channel], shape)
        np.testing.assert_allclose(prepared[channel], expected, atol=1e-5)


def test_cubic_keeps_a_slope_in_place() -> None:
    ramp = np.tile(np.arange(40.0), (1, 2, 8, 1))
    prepared, _ = prepare(image_of(ramp), plan_of(size=[8, 80], interpolation="cubic"))
    centers = (np.arange(80) + 0.5) / 2 - 0.5
    np.testing.assert_allclose(prepared[0, 0, 0, 10:-10], centers[10:-10], atol=1e-3)


def test_spacing_resamples_in_plane_in_2d_and_all_axes_in_3d() -> None:
    image = random_image(1, 4, 20, 30)
    image = image_of(image.array, np.diag([-1.5, -2.0, 10.0, 1]))
    target = {"spacing": [5.0, 1.0, 1.0]}
    assert prepare(image, plan_of(2, **target))[0].shape == (1, 4, 40, 45)
    assert prepare(image, plan_of(3, **target))[0].shape == (1, 8, 40, 45)
    unknown = image_of(image.array, has_spacing=False)
    np.testing.assert_array_equal(prepare(unknown, plan_of(3, **target))[0], image.array)


def test_normalization_sees_the_whole_image_and_the_crop_comes_after() -> None:
    array = np.full((1, 1, 10, 5), 3.0)
    array[0, 0, 0, 0], array[0, 0, 9, 4] = 1, 5
    prepared, record = prepare(image_of(array), plan_of(crop_fraction=0.7, normalization=[{"scheme": "minmax"}]))
    # 0.7 of 10 is 7, one of the three others comes before; 0.7 of 5 is 3.5: 4 stay, none before
    assert record.crop == ((0, 1), (1, 8), (0, 4))
    np.testing.assert_allclose(prepared, np.full((1, 1, 7, 4), 0.5))


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ({"scheme": "none"}, [0, 2, 4, 10]),
        ({"scheme": "minmax"}, [0, 0.2, 0.4, 1]),
        ({"scheme": "zscore"}, (np.array([0, 2, 4, 10]) - 4) / np.sqrt(14)),
        ({"scheme": "ct", "lower": 1, "upper": 5, "mean": 3, "std": 2}, [-1, -0.5, 0.5, 1]),
    ],
)
def test_normalization_by_hand(scheme: dict[str, Any], expected: list[float]) -> None:
    values = np.array([0, 2, 4, 10], dtype=np.float32).reshape(1, 2, 2)
    found = normalize(values, ChannelNormalization(**scheme))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.ravel(), expected, rtol=1e-6)


def test_percentiles_1_and_99_become_0_and_1_and_nothing_is_clipped() -> None:
    values = np.random.default_rng(0).permutation(np.arange(101, dtype=np.float32)).reshape(1, 1, 101)
    found = normalize(values, ChannelNormalization(scheme="percentile"))
    assert found.dtype == np.float32
    by_value = found.ravel()[np.argsort(values.ravel())]
    np.testing.assert_allclose(by_value[[0, 50, 100]], [-0.010204, 0.5, 1.010204], atol=1e-6)
    np.testing.assert_allclose(by_value, (np.arange(101) - 1) / 98, atol=1e-6)


def test_percentiles_are_of_the_whole_volume_and_interpolated_linearly() -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 2, 2) ** 2
    found = normalize(values, ChannelNormalization(scheme="percentile"))
    # ranks 0.11 and 10.89 of 0, 1, ..., 100, 121
    low, high = 0.11, 100 + 0.89 * 21
    np.testing.assert_allclose(found, (values - low) / (high - low), rtol=1e-5)


def test_equal_percentiles_of_an_image_that_varies_are_refused() -> None:
    values = np.zeros((1, 20, 20), dtype=np.float32)
    values[0, 0, 0] = 7
    with pytest.raises(ImageError, match=r"percentiles 1 and 99 of the image are both 0, .* choose another scheme"):
        normalize(values, ChannelNormalization(scheme="percentile"))


@pytest.mark.parametrize("scheme", ["zscore", "minmax", "percentile"])
def test_constant_image_becomes_zeros(scheme: str) -> None:
    constant = np.full((2, 3, 3), 0.1, dtype=np.float32)
    assert not normalize(constant, ChannelNormalization(scheme=scheme)).any()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_numbers_are_refused(value: float) -> None:
    array = np.zeros((1, 2, 4, 4))
    array[0, 1, 2, 3] = value
    with pytest.raises(ImageError, match="1 voxels are NaN or infinite"):
        prepare(image_of(array), plan_of())


def test_another_number_of_channels_is_refused() -> None:
    with pytest.raises(ImageError, match="has 2 channels, but the plan has 1"):
        prepare(random_image(2, 2, 4, 4), plan_of())


@pytest.mark.parametrize("orientation", ["LPS", "stored"])
def test_orientation_is_changed_and_undone(orientation: str) -> None:
    body = np.arange(3 * 4 * 5.0).reshape(3, 4, 5)  # along S, P, L
    # the stored array has axes (R, S, P) for (z, y, x): L reversed first
    stored = body[:, :, ::-1].transpose(2, 0, 1)
    geometry = Geometry(stored.shape, PSR)
    plan = plan_of(3, orientation=orientation)
    prepared, record = prepare(Image(stored[None].astype(np.float32), geometry), plan)
    np.testing.assert_array_equal(prepared[0], body if orientation == "LPS" else stored)
    labels = prepare_label(Label(stored.astype(np.int16), geometry), plan)
    np.testing.assert_array_equal(labels, prepared[0])
    np.testing.assert_array_equal(restore_label(labels, record, plan), stored)


def test_labels_beyond_255_classes_keep_their_values() -> None:
    array = np.array([0, 300, 255, 1]).reshape(1, 2, 2)
    geometry = Geometry(array.shape, LPS)
    assert prepare_label(Label(array, geometry), plan_of()).dtype == np.int16
    np.testing.assert_array_equal(prepare_label(Label(array, geometry), plan_of()), array)
    assert prepare_label(Label(array.clip(0, 255), geometry), plan_of()).dtype == np.uint8


shapes = st.tuples(st.integers(1, 6), st.integers(1, 14), st.integers(1, 14))


@settings(max_examples=60)
@given(
    shape=shapes,
    more=st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)),
    dims=st.sampled_from([2, 3]),
    interpolation=st.sampled_from(["nearest", "linear", "cubic"]),
    affine=st.sampled_from([LPS, PSR]),
)
def test_labels_survive_enlargement_and_return_exactly(
    shape: tuple[int, ...], more: tuple[int, ...], dims: int, interpolation: str, affine: np.ndarray
) -> None:
    label = Label(np.random.default_rng(0).integers(0, 5, shape), Geometry(shape, affine))
    oriented = plan_of(dims, interpolation=interpolation)
    image = Image(np.zeros((1, *shape), dtype=np.float32), label.geometry)
    size = [n + extra for n, extra in zip(prepare(image, oriented)[0].shape[1:], more, strict=True)]
    plan = plan_of(dims, interpolation=interpolation, size=size[3 - dims :])
    _, record = prepare(image, plan)
    back = restore_label(prepare_label(label, plan), record, plan)
    np.testing.assert_array_equal(back, label.array)


@settings(max_examples=60)
@given(
    shape=shapes,
    size=st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 20)),
    dims=st.sampled_from([2, 3]),
    interpolation=st.sampled_from(["nearest", "linear", "cubic"]),
    crop=st.sampled_from([None, 0.5, 0.8]),
)
def test_restored_probabilities_are_probabilities_on_the_original_grid(
    shape: tuple[int, ...], size: tuple[int, ...], dims: int, interpolation: str, crop: float | None
) -> None:
    plan = plan_of(dims, size=size[3 - dims :], interpolation=interpolation, crop_fraction=crop)
    prepared, record = prepare(image_of(np.zeros((1, *shape)), PSR), plan)
    logits = np.random.default_rng(0).normal(size=(3, *prepared.shape[1:]))
    probs = (np.exp(logits) / np.exp(logits).sum(axis=0)).astype(np.float32)
    back = restore(probs, record, plan)
    assert back.shape == (3, *shape)
    assert back.dtype == np.float32
    assert back.min() >= 0
    np.testing.assert_allclose(back.sum(axis=0), 1, atol=1e-5)
    outside = np.ones(record.oriented_shape, dtype=bool)
    outside[record.window] = False
    outside = from_canonical(outside, record.geometry)
    assert (back[0][outside] == 1).all()
    even = restore(np.full_like(probs, 1 / 3), record, plan)
    np.testing.assert_allclose(even[:, ~outside], 1 / 3, atol=1e-5)


def test_restored_probabilities_are_interpolated_linearly() -> None:
    plan = plan_of(size=[10, 12])
    _, record = prepare(image_of(np.zeros((1, 2, 25, 18))), plan)
    first = np.random.default_rng(0).random((2, 10, 12)).astype(np.float32)
    back = restore(np.stack([first, 1 - first]), record, plan)
    np.testing.assert_allclose(back[0], linear_on_areas(first, (2, 25, 18)), atol=1e-5)


def test_nearest_plans_restore_probabilities_on_their_own_grid() -> None:
    plan = plan_of(size=[10, 12], interpolation="nearest")
    _, record = prepare(image_of(np.zeros((1, 1, 25, 18))), plan)
    first = np.random.default_rng(0).random((1, 10, 12)).astype(np.float32)
    back = restore(np.stack([first, 1 - first]), record, plan)
    # corners coincide
    np.testing.assert_allclose(back[0, 0, [0, 0, -1, -1], [0, -1, 0, -1]], first[0, [0, 0, -1, -1], [0, -1, 0, -1]])


def test_labels_outside_the_crop_are_background() -> None:
    plan = plan_of(crop_fraction=0.5)
    image = image_of(np.zeros((1, 1, 8, 8)))
    prepared, record = prepare(image, plan)
    back = restore_label(np.ones(prepared.shape[1:], dtype=np.uint8), record, plan)
    expected = np.zeros((1, 8, 8))
    expected[:, 2:6, 2:6] = 1
    np.testing.assert_array_equal(back, expected)


def test_a_prediction_of_another_shape_is_refused() -> None:
    _, record = prepare(random_image(1, 2, 8, 8), plan_of())
    with pytest.raises(ImageError, match=r"\(2, 8, 9\), but the prepared image has \(2, 8, 8\)"):
        restore_label(np.zeros((2, 8, 9), dtype=np.uint8), record, plan_of())


def test_record_survives_json() -> None:
    image = image_of(np.zeros((1, 4, 9, 7)), PSR / 3)
    _, record = prepare(image, plan_of(size=[16, 16], crop_fraction=0.6))
    again = Record.from_dict(json.loads(json.dumps(record.to_dict())))
    assert again == record
    np.testing.assert_array_equal(again.geometry.affine, PSR / 3)
