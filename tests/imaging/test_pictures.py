"""PNG and TIFF are pictures: one content means one array, however it is packed, laid out, turned or colored."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest

from scantly import imaging
from scantly.errors import ImageError
from tiff_files import COMPRESSIONS, stored_for, write_tiff

RNG = np.random.default_rng(0)
HEIGHT, WIDTH = 5, 7
ORIENTATIONS = range(1, 9)
NO_DECODER = "imagecodecs"


def random(dtype: type, bits: int | None = None, channels: int | None = None) -> np.ndarray:
    shape = (HEIGHT, WIDTH) if channels is None else (HEIGHT, WIDTH, channels)
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return RNG.normal(size=shape).astype(dtype)
    low, high = (0, 2**bits - 1) if bits else (int(np.iinfo(kind).min), int(np.iinfo(kind).max))
    array = RNG.integers(low, high, size=shape, endpoint=True).astype(dtype)
    array.flat[:2] = low, high
    return array


def label(path: Path) -> np.ndarray:
    """(H, W), and that header and voxels agree."""
    read = imaging.read_label(path)
    assert read.geometry.shape == imaging.read_geometry(path).shape == read.array.shape
    return read.array[0]


def image(path: Path) -> np.ndarray:
    """(C, H, W), and that header and voxels agree."""
    read = imaging.read_image([path])
    assert read.geometry.shape == imaging.read_geometry(path).shape == read.array.shape[1:]
    return read.array[:, 0]


def turn(orientation: int) -> dict[int, tuple[str, list[int]]]:
    return {274: ("H", [orientation])} if orientation > 1 else {}


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_gray_tiff(tmp_path: Path, bits: int, compression: str) -> None:
    """Black or white as 0, every orientation, byte order and size of offsets."""
    codes = random(np.uint16 if bits == 16 else np.uint8, bits)
    seen = codes if bits >= 8 else codes * (255 // (2**bits - 1))
    small = itertools.product((False, True), ORIENTATIONS, "<>", (False,))
    for white, turned, order, big in (*small, *itertools.product((False, True), (1, 6), "<>", (True,))):
        path = tmp_path / "a.tif"
        stored = stored_for(2**bits - 1 - codes if white else codes, turned).astype(codes.dtype)
        photometric = 0 if white else 1
        write_tiff(
            path,
            stored,
            photometric=photometric,
            bits=bits,
            compression=compression,
            order=order,
            big=big,
            tags=turn(turned),
        )
        unknown_to_pillow = order == ">" and (big or (bits == 16 and white))
        if unknown_to_pillow and (compression == "lzw" or bits in (2, 4)):  # which tifffile unpacks only with a package
            for read in (label, image):
                with pytest.raises(ImageError, match=NO_DECODER):
                    read(path)
            continue
        np.testing.assert_array_equal(label(path), codes)
        np.testing.assert_array_equal(image(path), seen[np.newaxis])


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize(
    "dtype", [np.int8, np.int16, np.int32, np.uint32, np.float16, np.float32, np.float64], ids=lambda t: t.__name__
)
def test_other_types_of_gray_tiff(tmp_path: Path, dtype: type, compression: str) -> None:
    values = random(dtype)
    for turned, order in itertools.product(ORIENTATIONS, "<>"):
        path = tmp_path / "a.tif"
        stored = stored_for(values, turned)
        write_tiff(path, stored, photometric=1, compression=compression, order=order, tags=turn(turned))
        by_pillow = order == "<" and dtype in (np.int16, np.int32, np.float32)
        if compression == "lzw" and not by_pillow:
            with pytest.raises(ImageError, match=rf"a\.tif needs a decoder .*LZW of {values.dtype}.*{NO_DECODER}"):
                image(path)
            continue
        np.testing.assert_array_equal(image(path)[0], values.astype(np.float32))


def test_signed_codes_of_which_0_is_white(tmp_path: Path) -> None:
    values = random(np.int16)
    write_tiff(tmp_path / "a.tif", ~values, photometric=0)
    np.testing.assert_array_equal(image(tmp_path / "a.tif")[0], values)


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("opacity", [(), (2,)], ids=["opaque", "opacity"])
def test_color_tiff(tmp_path: Path, dtype: type, compression: str, planar: bool, opacity: tuple[int, ...]) -> None:
    colors = random(dtype, channels=3)
    extra = {338: ("H", list(opacity))} if opacity else {}
    for turned, order in itertools.product(ORIENTATIONS, "<>"):
        path = tmp_path / "a.tif"
        stored = stored_for(np.concatenate([colors, random(dtype, channels=len(opacity))], axis=-1), turned)
        write_tiff(
            path,
            stored,
            photometric=2,
            compression=compression,
            planar=planar,
            order=order,
            tags={**turn(turned), **extra},
        )
        if compression == "lzw" and dtype is not np.uint8:
            with pytest.raises(ImageError, match=NO_DECODER):
                image(path)
            continue
        np.testing.assert_array_equal(image(path), np.moveaxis(colors, -1, 0).astype(np.float32))
        with pytest.raises(ImageError, match=r"a\.tif is a color picture, not a label|label is not a whole number"):
            label(path)


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_palette_tiff(tmp_path: Path, bits: int, compression: str) -> None:
    """A label is the number of the entry, a scan its color."""
    codes = random(np.uint16 if bits == 16 else np.uint8, bits)
    table = RNG.integers(0, 256, (3, 2**bits))
    for turned in ORIENTATIONS:
        path = tmp_path / "a.tif"
        tags = {**turn(turned), 320: ("H", [int(value) * 257 for value in table.ravel()])}
        write_tiff(path, stored_for(codes, turned), photometric=3, bits=bits, compression=compression, tags=tags)
        if bits == 16 and compression == "lzw":
            continue
        np.testing.assert_array_equal(label(path), codes)
        np.testing.assert_array_equal(image(path), table[:, codes])


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("planar", [False, True])
def test_inks_and_television_colors_become_rgb(tmp_path: Path, compression: str, planar: bool) -> None:
    path = tmp_path / "a.tif"
    for turned in ORIENTATIONS:
        inks = random(np.uint8, channels=4)
        write_tiff(
            path,
            stored_for(inks, turned),
            photometric=5,
            compression=compression,
            planar=planar,
            tags={**turn(turned), 332: ("H", [1])},
        )
        kept = (255.0 - inks[..., :3]) * (255.0 - inks[..., 3:]) / 255
        np.testing.assert_allclose(image(path), np.moveaxis(kept, -1, 0), atol=1.01)
        with pytest.raises(ImageError, match=r"a\.tif is a color picture \(CMYK\), not a label"):
            label(path)

        colors = random(np.uint8, channels=3)
        write_tiff(
            path,
            stored_for(colors, turned),
            photometric=6,
            compression=compression,
            planar=planar,
            tags={**turn(turned), 530: ("H", [1, 1])},
        )
        luma, blue, red = np.moveaxis(colors.astype(float), -1, 0)  # Recommendation ITU-R BT.601, as TIFF 6.0 says
        blue, red = blue - 128, red - 128
        rgb = np.stack([luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue])
        np.testing.assert_allclose(image(path), np.clip(rgb, 0, 255), atol=2)
        with pytest.raises(ImageError, match=r"a\.tif is a color picture \(YCbCr\), not a label"):
            label(path)


def test_color_of_fewer_columns_and_rows(tmp_path: Path) -> None:
    """Uncompressed YCbCr in blocks of 2 x 2 with one pair of color values, as most files have it."""
    samples = np.zeros((4, 3, 3), np.uint8)  # room for 6 blocks of four brightnesses and two colors
    samples.ravel()[:36] = [120, 120, 120, 120, 90, 200] * 6
    path = tmp_path / "a.tif"
    write_tiff(path, samples, photometric=6, strip=4, tags={530: ("H", [2, 2]), 256: ("I", [6])})
    expected = [120 + 1.402 * 72, 120 - 0.344136 * -38 - 0.714136 * 72, 120 + 1.772 * -38]
    np.testing.assert_allclose(image(path), np.broadcast_to(np.reshape(expected, (3, 1, 1)), (3, 4, 6)), atol=2)


def test_gray_with_opacity_and_without_the_tag_that_says_so(tmp_path: Path) -> None:
    for dtype, tags in itertools.product((np.uint8, np.uint16), ({}, {338: ("H", [2])})):
        both = random(dtype, channels=2)
        write_tiff(tmp_path / "a.tif", both, photometric=1, tags=tags)
        np.testing.assert_array_equal(label(tmp_path / "a.tif"), both[..., 0])
    premultiplied = random(np.uint8, channels=4) // 2
    premultiplied[..., 3] = 128
    write_tiff(tmp_path / "b.tif", premultiplied, photometric=2, tags={338: ("H", [1])})
    colors = np.moveaxis(premultiplied[..., :3], -1, 0) * 255.0 / 128
    np.testing.assert_allclose(image(tmp_path / "b.tif"), np.clip(colors, 0, 255), atol=1)
    write_tiff(tmp_path / "c.tif", premultiplied.astype(np.uint16), photometric=2, tags={338: ("H", [1])})
    with pytest.raises(ImageError, match=r"c\.tif holds uint16 colors multiplied by opacity"):
        image(tmp_path / "c.tif")


def test_three_gray_channels_are_three_channels(tmp_path: Path) -> None:
    for planar, dtype in itertools.product((False, True), (np.uint8, np.uint16)):
        values = random(dtype, channels=3)
        write_tiff(tmp_path / "a.tif", values, photometric=1, planar=planar, tags={338: ("H", [0, 0])})
        np.testing.assert_array_equal(image(tmp_path / "a.tif"), np.moveaxis(values, -1, 0))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"photometric": None}, r"does not say whether 0 is black or white \(tag 262 is missing\)"),
        ({"photometric": 32803}, "holds CFA pixels"),
        ({"photometric": 77}, "holds 77 pixels"),
        ({"photometric": 8, "samples": random(np.uint8, channels=3)}, "holds CIELAB pixels"),
        (
            {"photometric": 0, "samples": random(np.float32)},
            r"0 is white \(WhiteIsZero\), which has no meaning for float32",
        ),
        ({"photometric": 0, "samples": random(np.float64)}, "no meaning for float64"),
        ({"samples": random(np.uint8, channels=4)}, "has 4 channels"),
        ({"photometric": 2, "samples": random(np.uint8, channels=5)}, "has 5 channels"),
        (
            {"photometric": 2, "samples": random(np.uint8, channels=4), "tags": {338: ("H", [0])}},
            "has 4 channels that are not gray or color with opacity",
        ),
        ({"photometric": 2, "samples": random(np.uint8, channels=2)}, "has 2 channels"),
        ({"photometric": 5, "samples": random(np.uint16, channels=4)}, "CMYK colors of 16 bits"),
        ({"compression": 50001}, r"needs a decoder that is not installed \(WEBP .*pip install imagecodecs"),
        ({"compression": 34712}, r"needs a decoder that is not installed \(JPEG2000 .*pip install imagecodecs"),
        ({"compression": 12345}, r"needs a decoder that is not installed \(12345"),
        ({"tags": {279: ("I", [14, 14, 3])}}, "lacks a part of its pixels"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:30],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, changes: dict, words: str) -> None:
    samples = changes.pop("samples", random(np.uint8))
    path = write_tiff(tmp_path / "a.tif", samples, **{"photometric": 1, **changes})
    with pytest.raises(ImageError, match=words) as told:
        image(path)
    assert str(path) in str(told.value)


@pytest.mark.parametrize("compression", ["jpeg", "webp", "jpeg2000"])
def test_labels_are_not_packed_with_loss(tmp_path: Path, compression: str) -> None:
    if compression == "jpeg":
        PIL.Image.fromarray(random(np.uint8)).save(tmp_path / "a.tif", compression="jpeg")
        assert image(tmp_path / "a.tif").shape == (1, HEIGHT, WIDTH)  # a scan may be
    else:
        code = {"webp": 50001, "jpeg2000": 34712}[compression]
        write_tiff(tmp_path / "a.tif", random(np.uint8), photometric=1, compression=code)
    with pytest.raises(ImageError, match=rf"packed with {compression.upper()}, which may change pixels"):
        label(tmp_path / "a.tif")


@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize(
    "compression", [None, "packbits", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate", "lzma", "zstd"]
)
def test_what_pillow_saves_is_read_as_it_was_given(tmp_path: Path, compression: str | None, photometric: int) -> None:
    mask = random(np.uint8) % 4
    path = tmp_path / "a.tif"
    PIL.Image.fromarray(mask).save(path, compression=compression, tiffinfo={262: photometric})
    np.testing.assert_array_equal(label(path), mask)
    np.testing.assert_array_equal(image(path)[0], mask)


@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("compression", ["group3", "group4"])
def test_fax_pictures(tmp_path: Path, compression: str, photometric: int) -> None:
    mask = random(np.uint8, 1)
    path = tmp_path / "a.tif"
    PIL.Image.fromarray(mask.astype(bool)).save(path, compression=compression, tiffinfo={262: photometric})
    with PIL.Image.open(path) as viewer:
        seen = np.array(viewer)
    np.testing.assert_array_equal(label(path), seen)
    np.testing.assert_array_equal(image(path)[0], seen * 255)


def test_the_limit_on_pictures_is_ours_and_pillow_s_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = random(np.uint8)
    for name in ("a.png", "a.tif"):
        PIL.Image.fromarray(codes).save(tmp_path / name)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 4)
    for name in ("a.png", "a.tif"):
        np.testing.assert_array_equal(label(tmp_path / name), codes)
        np.testing.assert_array_equal(image(tmp_path / name)[0], codes)
    assert PIL.Image.MAX_IMAGE_PIXELS == 4
    assert PIL.TiffImagePlugin.READ_LIBTIFF is False


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_gray_and_palette_png(tmp_path: Path, bits: int) -> None:
    codes = random(np.uint16 if bits == 16 else np.uint8, bits)
    for turned in ORIENTATIONS:
        path = tmp_path / "a.png"
        exif = PIL.Image.Exif()
        exif[274] = turned
        stored = stored_for(codes, turned)
        if bits < 8:  # Pillow writes gray of 2 and 4 bits only as palettes: the header is changed to say gray
            write_gray_png(path, stored, bits, exif)
        else:
            PIL.Image.fromarray(stored).save(path, exif=exif)
        np.testing.assert_array_equal(label(path), codes)
        np.testing.assert_array_equal(image(path)[0], codes if bits >= 8 else codes * (255 // (2**bits - 1)))
        if bits == 16:
            continue
        picture = PIL.Image.fromarray(stored).convert("P")
        picture.putdata([int(code) for code in stored.ravel()])
        table = RNG.integers(0, 256, (2**bits, 3))
        picture.putpalette([int(value) for value in table.ravel()])
        picture.save(path, exif=exif, bits=bits)
        np.testing.assert_array_equal(label(path), codes)
        np.testing.assert_array_equal(image(path), np.moveaxis(table[codes], -1, 0))


def write_gray_png(path: Path, codes: np.ndarray, bits: int, exif: PIL.Image.Exif) -> None:
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    spread = (codes[..., np.newaxis] >> np.arange(bits)[::-1]) & 1
    rows = [b"\0" + np.packbits(row.ravel().astype(np.uint8)).tobytes() for row in spread]
    head = struct.pack(">IIBBBBB", codes.shape[1], codes.shape[0], bits, 0, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"".join(rows)))
    # behind the pixels, where the standard allows it
    parts += chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


def test_color_png_is_turned_too_and_animations_are_refused(tmp_path: Path) -> None:
    colors = random(np.uint8, channels=4)
    for turned in ORIENTATIONS:
        exif = PIL.Image.Exif()
        exif[274] = turned
        PIL.Image.fromarray(stored_for(colors, turned)).save(tmp_path / "a.png", exif=exif)
        np.testing.assert_array_equal(image(tmp_path / "a.png"), np.moveaxis(colors[..., :3], -1, 0))
    frames = [PIL.Image.fromarray(random(np.uint8)) for _ in range(2)]
    frames[0].save(tmp_path / "b.png", save_all=True, append_images=frames[1:])
    with pytest.raises(ImageError, match=r"b\.png is an animation"):
        image(tmp_path / "b.png")


@pytest.mark.parametrize("ending", [".tif", ".png"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_prediction_overlays_its_picture_in_a_viewer(tmp_path: Path, orientation: int, ending: str) -> None:
    """The viewer is Pillow, which turns pictures by their tag."""
    codes = random(np.uint8)
    scan = tmp_path / f"scan{ending}"
    stored = stored_for(codes, orientation)
    exif = PIL.Image.Exif()
    exif[274] = orientation
    dpi = (508.0, 254.0) if orientation in (5, 6, 7, 8) else (254.0, 508.0)  # as displayed: 0.1 mm wide, 0.05 mm high
    # uncompressed, Pillow itself does not turn a TIFF by a quarter
    options = {"compression": "tiff_lzw"} if ending == ".tif" else {}
    PIL.Image.fromarray(stored).save(scan, exif=exif, dpi=dpi, **options)
    read = imaging.read_image([scan])
    assert read.geometry.spacing == pytest.approx((1.0, 0.05, 0.1))
    predicted = (read.array[0] > 100).astype(np.uint8)
    imaging.write_label(tmp_path / f"label{ending}", predicted, read.geometry)
    with PIL.Image.open(scan) as one, PIL.Image.open(tmp_path / f"label{ending}") as other:
        shown, over = (np.array(PIL.ImageOps.exif_transpose(picture)) for picture in (one, other))
        assert other.getexif().get(274, 1) == 1
        assert other.info["dpi"] == pytest.approx((254.0, 508.0))
    np.testing.assert_array_equal(over, shown > 100)
    np.testing.assert_array_equal(label(tmp_path / f"label{ending}"), predicted[0])
    again = imaging.read_geometry(tmp_path / f"label{ending}")
    assert imaging.geometry_difference(again, read.geometry) is None
