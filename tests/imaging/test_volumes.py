"""Choice of reader by name, and that damaged files never end in anything but a sentence."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scantly import imaging
from scantly.errors import ImageError, RunError

ARRAY = np.random.default_rng(0).integers(0, 3, (1, 7, 6)).astype(np.uint8)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Bytes of a sound file per ending."""
    folder = tmp_path_factory.mktemp("sound")
    geometry = imaging.Geometry((1, 7, 6), imaging.grid((5.0, 0.7, 0.8)), spatial_dims=2)
    files = {}
    for ending in imaging.ENDINGS:
        path = folder / f"a{ending}"
        imaging.write_label(path, ARRAY, geometry)
        if ending == ".h5":
            with h5py.File(path, "a") as file:
                file["image"] = ARRAY[0].astype(np.float32)
        files[ending] = path.read_bytes()
    return files


@pytest.mark.parametrize("ending", imaging.ENDINGS)
def test_every_ending_round_trips(tmp_path: Path, sound: dict[str, bytes], ending: str) -> None:
    path = tmp_path / f"b{ending.upper()}"
    path.write_bytes(sound[ending])
    np.testing.assert_array_equal(imaging.read_label(path).array, ARRAY)
    np.testing.assert_array_equal(imaging.read_image([path]).array[0], ARRAY)
    assert imaging.read_geometry(path).shape == (1, 7, 6)


@pytest.mark.parametrize("ending", imaging.ENDINGS)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_only_ever_raise_image_errors(
    tmp_path: Path, sound: dict[str, bytes], ending: str, data: st.DataObject
) -> None:
    content = bytearray(sound[ending])
    places = st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255))
    for place, value in data.draw(st.lists(places, max_size=6)):
        content[place] = value
    cut = data.draw(st.none() | st.integers(0, len(content)))
    path = tmp_path / f"damaged{ending}"
    path.write_bytes(content[:cut])
    for read in (lambda: imaging.read_image([path]), lambda: imaging.read_label(path)):
        try:
            result = read()
        except ImageError as error:
            assert str(path) in str(error)
            assert "\n" not in str(error)
        else:
            assert result.array.shape[-3:] == result.geometry.shape


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=600), ending=st.sampled_from(imaging.ENDINGS))
def test_arbitrary_bytes_are_no_image(tmp_path: Path, content: bytes, ending: str) -> None:
    path = tmp_path / f"noise{ending}"
    path.write_bytes(content)
    for read in (lambda: imaging.read_image([path]), lambda: imaging.read_geometry(path)):
        with pytest.raises(ImageError, match="noise"):
            read()


def test_missing_files_folders_and_unknown_types_are_named(tmp_path: Path) -> None:
    for ending in imaging.ENDINGS:
        with pytest.raises(ImageError, match="does not exist"):
            imaging.read_geometry(tmp_path / f"none{ending}")
        folder = tmp_path / f"folder{ending}"
        folder.mkdir()
        with pytest.raises(ImageError, match="folder"):
            imaging.read_label(folder)
    with pytest.raises(ImageError, match=r"scan\.mha is of no known type; use one of \.nii\.gz"):
        imaging.read_image([tmp_path / "scan.mha"])


def test_names_are_told_from_endings() -> None:
    assert imaging.file_ending(Path("a/b.c.NII.GZ")) == ".nii.gz"
    assert imaging.stem(Path("a/b.c.NII.GZ")) == "b.c"
    assert imaging.file_ending(Path("a.gz")) is None
    assert imaging.file_ending(Path(".png")) is None
    assert imaging.stem(Path("a.gz")) == "a.gz"


def test_labels_must_be_integers_on_the_images_grid(tmp_path: Path) -> None:
    geometry = imaging.Geometry((1, 7, 6), imaging.grid())
    with pytest.raises(ValueError, match="integers"):
        imaging.write_label(tmp_path / "a.nii", ARRAY.astype(float), geometry)
    with pytest.raises(ValueError, match="shape"):
        imaging.write_label(tmp_path / "a.nii", ARRAY[:, 1:], geometry)


def test_a_failed_write_leaves_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = imaging.Geometry((1, 7, 6), imaging.grid())
    path = tmp_path / "a.nii"
    imaging.write_label(path, ARRAY, geometry)
    before = path.read_bytes()

    def full(path: Path, *_: object) -> None:
        path.write_bytes(b"half of")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("scantly.imaging.nifti.write", full)
    with pytest.raises(RunError, match=r"a\.nii: No space left"):
        imaging.write_label(path, ARRAY + 1, geometry)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.nii"]
