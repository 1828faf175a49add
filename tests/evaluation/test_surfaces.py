from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_pairs import random_pairs
from scipy.ndimage import binary_erosion

from scantly.evaluation.surfaces import bounding_box, checked_spacing, drop_single_slice, surface_voxels


def test_surface_is_the_mask_without_its_erosion_by_the_face_cross() -> None:
    for _, prediction, reference, _ in random_pairs():
        for mask in (prediction != 0, reference != 0):
            expected = np.argwhere(mask & ~binary_erosion(mask))
            np.testing.assert_array_equal(surface_voxels(mask), expected)
            box = bounding_box(mask)
            assert box is not None
            cropped = surface_voxels(mask[box], [part.start for part in box])
            np.testing.assert_array_equal(cropped, expected)


def test_surface_of_a_block_that_fills_the_array() -> None:
    assert len(surface_voxels(np.ones((3, 4, 5), bool))) == 60 - 1 * 2 * 3
    assert surface_voxels(np.zeros((3, 4), bool)).shape == (0, 2)


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3))
def test_bounding_box_is_the_smallest(seed: int, ndim: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random(rng.integers(1, 9, size=ndim)) < rng.uniform(0, 0.3)
    places = np.argwhere(mask)
    box = bounding_box(mask)
    if len(places) == 0:
        assert box is None
    else:
        expected = tuple(slice(*ends) for ends in zip(places.min(0), places.max(0) + 1, strict=True))
        assert box == expected


def test_single_slice_is_dropped_from_volumes_only() -> None:
    assert drop_single_slice(np.zeros((1, 4, 5))).shape == (4, 5)
    assert drop_single_slice(np.zeros((2, 4, 5))).shape == (2, 4, 5)
    assert drop_single_slice(np.zeros((1, 5))).shape == (1, 5)


def test_spacing_of_a_2d_image_leaves_out_the_slice_distance() -> None:
    assert checked_spacing((10, 0.5, 1.5), 2) == (0.5, 1.5)
    assert checked_spacing((0.5, 1.5), 2) == (0.5, 1.5)
    assert checked_spacing(None, 3) is None
    with pytest.raises(ValueError, match=r"spacing \(1, 2\) does not fit: give 3 positive numbers"):
        checked_spacing((1, 2), 3)
