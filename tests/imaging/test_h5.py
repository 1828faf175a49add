"""The literature's HDF5 files."""

from __future__ import annotations

import logging
from pathlib import Path

import h5py
import numpy as np
import pytest

from scantly import imaging
from scantly.errors import ImageError
from scantly.imaging.decoding import say_no_spacing


def make(path: Path, **arrays: np.ndarray) -> Path:
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            file[key] = array
    return path


@pytest.mark.parametrize(("shape", "dims"), [((3, 4), 2), ((2, 3, 4), 3)])
def test_image_and_label(tmp_path: Path, shape: tuple[int, ...], dims: int) -> None:
    values = np.random.default_rng(0).random(shape)
    path = make(tmp_path / "a.h5", image=values, label=(values > 0.5).astype(np.float64))
    image, label = imaging.read_image([path]), imaging.read_label(path)
    full = (1, *shape)[-3:]
    np.testing.assert_array_equal(image.array[0], values.reshape(full).astype(np.float32))
    np.testing.assert_array_equal(label.array, (values > 0.5).reshape(full))
    assert image.geometry.spatial_dims == label.geometry.spatial_dims == dims
    assert image.geometry.spacing == (1, 1, 1)
    assert not image.geometry.has_spacing
    assert imaging.read_geometry(path).shape == full
    assert imaging.has_label(path)


def test_missing_spacing_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    say_no_spacing.cache_clear()
    path = make(tmp_path / "a.h5", image=np.zeros((3, 4)))
    with caplog.at_level(logging.WARNING, logger="scantly"):
        for _ in range(3):
            imaging.read_image([path])
    assert [record.getMessage() for record in caplog.records] == [
        ".h5 files hold no voxel size: the spacing is taken as 1, and there will be no distances in mm."
    ]


def test_predictions_round_trip(tmp_path: Path) -> None:
    source = make(tmp_path / "a.h5", image=np.zeros((3, 4)))
    geometry = imaging.read_geometry(source)
    labels = np.arange(12).reshape(1, 3, 4)
    imaging.write_label(tmp_path / "p.h5", labels, geometry)
    with h5py.File(tmp_path / "p.h5") as file:
        assert file["label"].shape == (3, 4)
    np.testing.assert_array_equal(imaging.read_label(tmp_path / "p.h5").array, labels)
    imaging.write_scalar(tmp_path / "u.h5", labels / 12, geometry)
    np.testing.assert_allclose(imaging.read_image([tmp_path / "u.h5"]).array[0], labels / 12, atol=1e-7)


def test_other_keys_and_shapes_are_explained(tmp_path: Path) -> None:
    path = make(tmp_path / "a.h5", img=np.zeros((3, 4)))
    with pytest.raises(ImageError, match=r"no array 'image' \(it holds img\)"):
        imaging.read_image([path])
    assert not imaging.has_label(path)
    path = make(tmp_path / "b.h5", image=np.zeros((1, 2, 3, 4)))
    with pytest.raises(ImageError, match=r"shape \(1, 2, 3, 4\)"):
        imaging.read_image([path])


def test_an_impossible_size_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("image", shape=(1000, 10000, 100000), dtype="f8", chunks=(1, 100, 100))
    with pytest.raises(ImageError, match="says it holds 8e"):
        imaging.read_image([tmp_path / "a.h5"])
