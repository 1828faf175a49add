"""PNG and TIFF: values, palettes, colors and resolution tags."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tifffile

from scantly import imaging
from scantly.errors import ImageError

PIXELS = np.arange(12, dtype=np.uint8).reshape(3, 4)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_gray_png(tmp_path: Path, dtype: type) -> None:
    array = (PIXELS.astype(dtype) * (5000 if dtype is np.uint16 else 1)).astype(dtype)
    PIL.Image.fromarray(array).save(tmp_path / "a.png")
    image = imaging.read_image([tmp_path / "a.png"])
    assert image.array.dtype == np.float32
    assert image.geometry.spatial_dims == 2
    assert not image.geometry.has_spacing
    assert image.geometry.spacing == (1, 1, 1)
    np.testing.assert_array_equal(image.array, array[np.newaxis, np.newaxis])


@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_color_gives_three_channels_and_opacity_is_left_out(tmp_path: Path, ending: str) -> None:
    array = np.random.default_rng(0).integers(0, 255, (3, 4, 4), dtype=np.uint8)
    PIL.Image.fromarray(array).save(tmp_path / f"a{ending}")
    image = imaging.read_image([tmp_path / f"a{ending}"])
    np.testing.assert_array_equal(image.array[:, 0], array[..., :3].transpose(2, 0, 1))


def test_a_palette_label_gives_its_indices_not_its_colors(tmp_path: Path) -> None:
    picture = PIL.Image.fromarray((PIXELS % 3).astype(np.uint8)).convert("P")
    picture.putdata(list((PIXELS % 3).ravel()))
    picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    picture.save(tmp_path / "a.png")
    np.testing.assert_array_equal(imaging.read_label(tmp_path / "a.png").array[0], PIXELS % 3)
    colors = imaging.read_image([tmp_path / "a.png"]).array
    assert colors[:, 0, 0, 0].tolist() == [255, 0, 0]


def test_gray_stored_as_color_is_a_label_but_color_is_not(tmp_path: Path) -> None:
    gray = np.stack([PIXELS] * 3, axis=-1)
    PIL.Image.fromarray(gray).save(tmp_path / "gray.png")
    np.testing.assert_array_equal(imaging.read_label(tmp_path / "gray.png").array[0], PIXELS)
    gray[0, 0, 1] = 200
    PIL.Image.fromarray(gray).save(tmp_path / "color.png")
    with pytest.raises(ImageError, match=r"color\.png is a color picture, not a label"):
        imaging.read_label(tmp_path / "color.png")


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
def test_tiff_values(tmp_path: Path, dtype: type, compression: str | None) -> None:
    tifffile.imwrite(tmp_path / "a.tif", PIXELS.astype(dtype), compression=compression)
    np.testing.assert_array_equal(imaging.read_image([tmp_path / "a.tif"]).array[0, 0], PIXELS)


def test_pixels_that_are_not_in_the_file_are_not_made_up(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.ones((40, 4), np.uint8), rowsperstrip=10)
    with tifffile.TiffFile(path, mode="r+") as file:
        counts = file.pages[0].tags["StripByteCounts"]
        assert len(counts.value) == 4
        counts.overwrite((40, 40, 0, 40))
    with pytest.raises(ImageError, match=r"a\.tif lacks a part of its pixels"):
        imaging.read_image([path])


def test_lzw_and_planar_tiff(tmp_path: Path) -> None:
    PIL.Image.fromarray(PIXELS).save(tmp_path / "lzw.tif", compression="tiff_lzw")
    np.testing.assert_array_equal(imaging.read_label(tmp_path / "lzw.tif").array[0], PIXELS)
    planes = np.random.default_rng(0).integers(0, 255, (3, 4, 5), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "planar.tif", planes, photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(imaging.read_image([tmp_path / "planar.tif"]).array[:, 0], planes)


def test_resolution_tags_give_the_pixel_size_and_are_kept(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", PIXELS, resolution=((50, 3), (40, 1)), resolutionunit="CENTIMETER")
    geometry = imaging.read_geometry(tmp_path / "a.tif")
    assert geometry.has_spacing
    assert geometry.spacing == pytest.approx((1.0, 10 / 40, 30 / 50))
    imaging.write_label(tmp_path / "out.tif", PIXELS[np.newaxis], geometry)
    with tifffile.TiffFile(tmp_path / "out.tif") as file:
        tags = file.pages[0].tags
        assert (tags["XResolution"].value, tags["YResolution"].value) == ((50, 3), (40, 1))
        assert tags["ResolutionUnit"].value == 3


def test_png_resolution_survives(tmp_path: Path) -> None:
    PIL.Image.fromarray(PIXELS).save(tmp_path / "a.png", dpi=(254.0, 508.0))
    geometry = imaging.read_geometry(tmp_path / "a.png")
    assert geometry.spacing == pytest.approx((1.0, 0.05, 0.1))
    imaging.write_label(tmp_path / "b.png", PIXELS[np.newaxis], geometry)
    assert imaging.read_geometry(tmp_path / "b.png").resolution == geometry.resolution
    imaging.write_label(tmp_path / "c.tif", PIXELS[np.newaxis], geometry)
    assert imaging.read_geometry(tmp_path / "c.tif").spacing == pytest.approx(geometry.spacing)


def test_a_screens_resolution_is_no_pixel_size(tmp_path: Path) -> None:
    PIL.Image.fromarray(PIXELS).save(tmp_path / "a.png", dpi=(72, 72))
    assert not imaging.read_geometry(tmp_path / "a.png").has_spacing


@pytest.mark.parametrize(("top", "mode"), [(3, "L"), (300, "I;16")])
def test_predictions_are_gray_pictures_of_the_class_indices(tmp_path: Path, top: int, mode: str) -> None:
    array = np.array([[[0, 1, top]]])
    geometry = imaging.Geometry((1, 1, 3), imaging.grid(), spatial_dims=2, has_spacing=False)
    imaging.write_label(tmp_path / "p.png", array, geometry)
    with PIL.Image.open(tmp_path / "p.png") as picture:
        assert picture.mode == mode
        assert np.array(picture).tolist() == [[0, 1, top]]


def test_what_pictures_cannot_hold_is_refused(tmp_path: Path) -> None:
    deep = imaging.Geometry((2, 1, 3), imaging.grid())
    with pytest.raises(ImageError, match=r"2 slices.*use \.nii\.gz"):
        imaging.write_label(tmp_path / "p.png", np.zeros((2, 1, 3), int), deep)
    flat = imaging.Geometry((1, 1, 3), imaging.grid(), spatial_dims=2)
    with pytest.raises(ImageError, match="real numbers"):
        imaging.write_scalar(tmp_path / "p.png", np.zeros((1, 1, 3)), flat)
    with pytest.raises(ImageError, match="-1 to 2"):
        imaging.write_label(tmp_path / "p.png", np.array([[[-1, 0, 2]]]), flat)
    imaging.write_scalar(tmp_path / "p.tif", np.array([[[0.5, -1, 2]]]), flat)
    assert imaging.read_image([tmp_path / "p.tif"]).array.ravel().tolist() == [0.5, -1, 2]


def test_stacks_and_16_bit_color_are_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "stack.tif", np.zeros((5, 3, 4), np.uint8), photometric="minisblack")
    with pytest.raises(ImageError, match=r"holds 5 pictures.*\.nii\.gz"):
        imaging.read_image([tmp_path / "stack.tif"])
    PIL.Image.fromarray(np.zeros((3, 4, 3), np.uint8)).save(tmp_path / "deep.png")
    raw = bytearray((tmp_path / "deep.png").read_bytes())
    raw[24] = 16
    (tmp_path / "deep.png").write_bytes(raw)
    with pytest.raises(ImageError, match="deep"):
        imaging.read_image([tmp_path / "deep.png"])


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_every_truncation_is_found_in_pictures(tmp_path: Path, name: str) -> None:
    array = np.random.default_rng(0).integers(0, 255, (1, 9, 8), dtype=np.uint8)
    path = tmp_path / name
    imaging.write_label(path, array, imaging.Geometry((1, 9, 8), imaging.grid(), spatial_dims=2))
    whole = path.read_bytes()
    last = len(whole) - 12 if name == "a.png" else len(whole)  # without its empty end mark a PNG is still whole
    for length in range(0, last, 3):
        path.write_bytes(whole[:length])
        with pytest.raises(ImageError):
            imaging.read_image([path])
