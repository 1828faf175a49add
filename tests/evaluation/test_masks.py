from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scantly.errors import ImageError
from scantly.evaluation.masks import Mask, Pair, class_masks


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["uint8", "int16", "int64", "bool"]))
def test_class_masks_hold_the_voxels_of_each_class(seed: int, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    last = 1 if dtype == "bool" else 4
    labels = rng.integers(0, last + 1, rng.integers(1, 8, size=rng.integers(2, 4)))
    labels = (labels * (rng.random(labels.shape) < 0.3)).astype(dtype)
    masks = class_masks(labels, [str(c) for c in range(last + 1)], "labels")
    assert len(masks) == last
    for value, mask in enumerate(masks, start=1):
        whole = np.zeros(labels.shape, bool)
        whole[mask.box] = mask.voxels
        np.testing.assert_array_equal(whole, labels == value)
        assert mask.size == np.count_nonzero(labels == value)


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1))
def test_overlap_counts_shared_voxels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = rng.random((2, *rng.integers(1, 8, size=3))) < rng.uniform(0, 0.4)
    assert Pair.of(first, second).overlap == np.count_nonzero(first & second)


def test_status_says_which_mask_is_empty() -> None:
    empty, full = np.zeros((2, 2)), np.ones((2, 2))
    statuses = [Pair.of(a, b).status for a, b in ((full, full), (empty, full), (full, empty), (empty, empty))]
    assert statuses == ["scored", "missed", "spurious", "both_empty"]


def test_an_empty_mask_has_neither_size_nor_surface() -> None:
    mask = Mask.empty(3)
    assert mask.size == 0
    assert mask.surface().shape == (0, 3)


def test_labels_must_be_classes() -> None:
    with pytest.raises(ImageError, match="scan holds label 7, but the classes are 0 to 1"):
        class_masks(np.array([[0, 7]]), ("background", "x"), "scan")
    with pytest.raises(ImageError, match="scan holds float64 values; labels must be integers"):
        class_masks(np.array([[0.0, 1.0]]), ("background", "x"), "scan")
    assert class_masks(np.zeros((2, 2), int), ("background",), "scan") == []
