"""Geometry: words for differences, and the way to the common orientation and back."""

from __future__ import annotations

import itertools

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

from scantly.imaging import Geometry, from_canonical, geometry_difference, grid, to_canonical

CODES = [
    "".join(letters) for axes in itertools.permutations(("LR", "PA", "IS")) for letters in itertools.product(*axes)
]


def affine_of(codes: str, spacing: tuple[float, float, float] = (0.5, 0.75, 3.0)) -> np.ndarray:
    """Affine of a file whose (x, y, z) axes grow to ``codes``; spacing in file order."""
    affine = np.eye(4)
    affine[:3, 3] = (-10.0, 20.0, 30.5)
    for axis, code in enumerate(codes):
        world = next(index for index, pair in enumerate(("LR", "PA", "IS")) if code in pair)
        affine[:3, axis] = 0
        affine[world, axis] = spacing[axis] * (1 if code in "RAS" else -1)
    return affine


def test_spacing_is_z_y_x_and_orientation_that_of_the_file_axes() -> None:
    geometry = Geometry((4, 3, 2), affine_of("LPS"))
    assert geometry.spacing == (3.0, 0.75, 0.5)
    assert geometry.orientation == "LPS"


@pytest.mark.parametrize("codes", CODES)
def test_canonical_agrees_with_nibabel_and_is_undone_exactly(codes: str) -> None:
    geometry = Geometry((4, 3, 2), affine_of(codes), header=b"stored")
    array = np.arange(2 * 4 * 3 * 2).reshape(2, 4, 3, 2)

    turned, new = to_canonical(array, geometry)

    file = nibabel.Nifti1Image(array[1].T.astype(np.int32), geometry.affine)
    to_lps = ornt_transform(io_orientation(file.affine), axcodes2ornt("LPS"))
    expected = file.as_reoriented(to_lps)
    np.testing.assert_array_equal(turned[1], np.asarray(expected.dataobj).T)
    np.testing.assert_allclose(new.affine, expected.affine)
    np.testing.assert_allclose(new.affine, geometry.affine @ inv_ornt_aff(to_lps, (2, 3, 4)))
    assert new.orientation == "LPS"
    assert new.shape == turned.shape[1:]
    assert new.header == (b"stored" if codes == "LPS" else None)
    np.testing.assert_array_equal(from_canonical(turned, geometry), array)


@given(
    shape=st.tuples(*[st.integers(1, 4)] * 3),
    codes=st.sampled_from(CODES),
    angle=st.floats(-0.7, 0.7),
    channels=st.integers(1, 2),
)
@settings(max_examples=60)
def test_oblique_grids_round_trip_too(shape: tuple[int, int, int], codes: str, angle: float, channels: int) -> None:
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    geometry = Geometry(shape, turn @ affine_of(codes))
    array = np.arange(channels * np.prod(shape)).reshape(channels, *shape)
    turned, new = to_canonical(array, geometry)
    np.testing.assert_array_equal(from_canonical(turned, geometry), array)
    # a voxel keeps its place in the world
    index = np.array([size - 1 for size in turned.shape[:0:-1]])
    place = new.affine @ [*index, 1]
    value = turned[0, -1, -1, -1]
    z, y, x = (int(where[0]) for where in np.nonzero(array[0] == value))
    np.testing.assert_allclose(geometry.affine @ [x, y, z, 1], place, atol=1e-9)


def test_files_without_orientation_are_left_as_they_are() -> None:
    geometry = Geometry((1, 3, 2), grid((1.0, 0.2, 0.3)), spatial_dims=2)
    array = np.arange(6).reshape(1, 3, 2)
    turned, new = to_canonical(array, geometry)
    assert turned is array
    assert new is geometry
    assert geometry.spacing == (1.0, 0.2, 0.3)


def test_wrong_shapes_are_refused() -> None:
    geometry = Geometry((4, 3, 2), affine_of("RAS"))
    with pytest.raises(ValueError, match="should be"):
        to_canonical(np.zeros((2, 3, 4)), geometry)
    with pytest.raises(ValueError, match="should be"):
        from_canonical(np.zeros((5, 3, 2)), geometry)


def test_differences_are_told_in_words() -> None:
    base = Geometry((4, 3, 2), affine_of("LPS"))
    assert geometry_difference(base, Geometry((4, 3, 2), affine_of("LPS") + 5e-4)) is None
    shape = geometry_difference(base, Geometry((4, 2, 3), base.affine))
    assert shape == "shape 4 x 3 x 2 against 4 x 2 x 3 (z, y, x)"
    spacing = geometry_difference(base, Geometry((4, 3, 2), affine_of("LPS", (0.5, 0.75, 5.0))))
    assert spacing == "spacing (3, 0.75, 0.5) against (5, 0.75, 0.5) mm (z, y, x)"
    assert geometry_difference(base, Geometry((4, 3, 2), affine_of("LAS"))) == "orientation LPS against LAS"
    moved = base.affine.copy()
    moved[1, 3] += 2
    assert geometry_difference(base, Geometry((4, 3, 2), moved)) == (
        "origin (-10, 20, 30.5) against (-10, 22, 30.5) mm"
    )
    turned = base.affine.copy()
    turned[:3, :2] = turned[:3, :2] @ [[np.cos(0.1), 0], [0, 1]]
    turned[1, 0] = 0.5 * np.sin(0.1)
    assert "direction of the axes" in str(geometry_difference(base, Geometry((4, 3, 2), turned)))


def test_only_shapes_are_compared_where_a_file_holds_no_spacing() -> None:
    with_size = Geometry((1, 3, 2), grid((1.0, 0.2, 0.3)), spatial_dims=2)
    without = Geometry((1, 3, 2), grid(), spatial_dims=2, has_spacing=False)
    assert geometry_difference(with_size, without) is None
    assert geometry_difference(Geometry((1, 2, 2), grid(), spatial_dims=2), without) is not None
