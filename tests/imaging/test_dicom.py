"""DICOM series: order, place and values of the voxels; what is passed over and what is refused."""

from __future__ import annotations

import logging
import pickle
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import uid

import dicom_series as dicoms
from scantly import imaging
from scantly.errors import ImageError
from scantly.imaging.dicom import find_cases, find_series, read_series, series_of_file


def read(folder: Path) -> tuple[np.ndarray, imaging.Geometry]:
    (series,) = find_series(folder)
    array, geometry = read_series(series)
    assert array.dtype == np.float32
    assert array.shape == (1, *geometry.shape)
    return array[0], geometry


def refusal(folder: Path) -> str:
    """The sentence; it never holds a patient's name or number."""
    with pytest.raises(ImageError) as caught:
        for case in find_cases(folder).values():
            read_series(case)
    message = str(caught.value)
    assert "Secret" not in message and "P1" not in message.replace(str(folder), "")
    assert str(folder) in message
    assert message.endswith(".") and "\n" not in message
    return message


@pytest.mark.parametrize("directions", list(dicoms.axis_orders()), ids=str)
def test_every_voxel_keeps_its_place_in_all_48_axis_orders(tmp_path: Path, directions: dicoms.Directions) -> None:
    volume = dicoms.write(tmp_path, dicoms.stack(directions=directions))
    array, geometry = read(tmp_path)
    assert dicoms.by_place(array, geometry.affine) == dicoms.by_place(volume.stored, volume.affine)
    # rows and columns stay as stored; slices ascend along rows x columns
    ascending = np.dot(np.cross(*directions[:2]), directions[2]) > 0
    assert np.array_equal(array, volume.stored if ascending else volume.stored[::-1])
    assert geometry.spacing == pytest.approx(dicoms.SPACING)


@pytest.mark.parametrize("directions", [dicoms.AXIAL, dicoms.OBLIQUE], ids=["axial", "oblique"])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_grid_is_that_of_itks_own_series_reader(tmp_path: Path, directions: dicoms.Directions, sign: int) -> None:
    across = tuple(sign * value for value in directions[2])
    volume = dicoms.write(tmp_path, dicoms.stack(directions=(*directions[:2], across)), scale=lambda index: (0.5, -7.0))
    array, geometry = read(tmp_path)
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path)))
    reference = reader.Execute()
    assert np.allclose(array, SimpleITK.GetArrayFromImage(reference))
    lps = np.eye(4)
    lps[:3, :3] = np.array(reference.GetDirection()).reshape(3, 3) * np.array(reference.GetSpacing())
    lps[:3, 3] = reference.GetOrigin()
    assert np.allclose(geometry.affine, np.diag([-1, -1, 1, 1]) @ lps, atol=1e-5)
    expected = dicoms.by_place(volume.stored, volume.affine)
    found = dicoms.by_place(array, geometry.affine)
    assert np.allclose(sorted(expected), sorted(found), atol=2e-3)


@pytest.mark.parametrize("directions", [dicoms.AXIAL, dicoms.OBLIQUE], ids=["axial", "oblique"])
def test_a_nifti_file_written_on_the_grid_lies_where_the_series_does(
    tmp_path: Path, directions: dicoms.Directions
) -> None:
    volume = dicoms.write(tmp_path / "series", dicoms.stack(directions=directions))
    array, geometry = read(tmp_path / "series")
    imaging.write_scalar(tmp_path / "scan.nii.gz", array, geometry)
    nifti = nib.load(tmp_path / "scan.nii.gz")
    assert np.allclose(nifti.affine, volume.affine, atol=1e-4)
    assert np.array_equal(np.asarray(nifti.dataobj).transpose(2, 1, 0), volume.stored)
    itk = SimpleITK.ReadImage(str(tmp_path / "scan.nii.gz"))
    place = itk.TransformIndexToPhysicalPoint((2, 3, 4))
    column, row, across = (np.array(direction) for direction in directions)
    expected = np.array(dicoms.ORIGIN) + 2 * 0.75 * column + 3 * 0.5 * row + 4 * 3.0 * across
    assert np.allclose(place, expected, atol=1e-3)


def test_each_slice_has_its_own_slope_and_intercept(tmp_path: Path) -> None:
    volume = dicoms.write(tmp_path, scale=lambda index: (0.25 + index, 3.5 - 10 * index))
    array, _ = read(tmp_path)
    for index, plane in enumerate(volume.stored):
        assert np.allclose(array[index], plane * (0.25 + index) + 3.5 - 10 * index, rtol=1e-6)


@pytest.mark.parametrize("sop_class", [uid.MRImageStorage, uid.PositronEmissionTomographyImageStorage])
def test_slope_and_intercept_apply_to_every_kind_of_scan(tmp_path: Path, sop_class: str) -> None:
    def as_kind(dataset: pydicom.Dataset, index: int) -> None:
        dataset.SOPClassUID = sop_class
        dataset.Modality = "MR"

    volume = dicoms.write(tmp_path, scale=lambda index: (2.0, -5.0), edit=as_kind)
    assert np.array_equal(read(tmp_path)[0], volume.stored * 2.0 - 5.0)


# GDCM neither decodes run lengths of a few noisy pixels nor encodes JPEG 2000 of fewer pixels than its blocks have
LARGER = dicoms.stack(shape=(3, 64, 64))
SYNTAXES = [
    uid.ImplicitVRLittleEndian,
    uid.DeflatedExplicitVRLittleEndian,
    uid.RLELossless,
    uid.JPEGLSLossless,
]


@pytest.mark.parametrize("syntax", SYNTAXES, ids=[syntax.name for syntax in SYNTAXES])
def test_lossless_coding_is_decoded(tmp_path: Path, syntax: str) -> None:
    volume = dicoms.write(tmp_path, LARGER, syntax=syntax)
    assert np.array_equal(read(tmp_path)[0], volume.stored)


@pytest.mark.parametrize("coding", ["JPEG", "JPEG2000"])
def test_lossless_jpegs_of_itk_are_decoded(tmp_path: Path, coding: str) -> None:
    volume = dicoms.write(tmp_path / "plain", LARGER)
    (tmp_path / "coded").mkdir()
    for path in (tmp_path / "plain").iterdir():
        reader = SimpleITK.ImageFileReader()
        reader.SetImageIO("GDCMImageIO")
        reader.SetFileName(str(path))
        writer = SimpleITK.ImageFileWriter()
        writer.SetFileName(str(tmp_path / "coded" / f"{path.name}.dcm"))
        writer.KeepOriginalImageUIDOn()
        writer.UseCompressionOn()
        writer.SetCompressor(coding)
        writer.Execute(reader.Execute())
    one = pydicom.dcmread(next((tmp_path / "coded").iterdir()))
    assert one.file_meta.TransferSyntaxUID in (uid.JPEGLosslessSV1, uid.JPEG2000Lossless)
    assert np.array_equal(read(tmp_path / "coded")[0], volume.stored)


@settings(max_examples=20)
@given(
    angles=st.tuples(*[st.floats(-3, 3)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 8).map(lambda value: round(value, 4))] * 3),
    depth=st.integers(2, 6),
)
def test_any_orientation_and_spacing_is_recovered(tmp_path_factory, angles, spacing, depth) -> None:
    from scipy.spatial.transform import Rotation

    directions = tuple(tuple(map(float, row)) for row in Rotation.from_euler("xyz", angles).as_matrix())
    folder = tmp_path_factory.mktemp("series")
    volume = dicoms.write(folder, dicoms.stack(shape=(depth, 3, 4), directions=directions, spacing=spacing))
    array, geometry = read(folder)
    assert np.allclose(geometry.affine, volume.affine, atol=1e-4)
    assert np.array_equal(array, volume.stored)


def test_positions_rounded_to_a_tenth_are_even_enough(tmp_path: Path) -> None:
    volume = dicoms.stack(shape=(8, 4, 4), spacing=(1.25, 0.7, 0.7))

    def rounded(dataset: pydicom.Dataset, index: int) -> None:
        dataset.ImagePositionPatient = [round(float(value), 1) for value in dataset.ImagePositionPatient]

    dicoms.write(tmp_path, volume, edit=rounded)
    assert read(tmp_path)[1].spacing[0] == pytest.approx(1.25, abs=0.02)


def test_one_slice_takes_its_thickness_for_depth(tmp_path: Path) -> None:
    volume = dicoms.write(tmp_path, dicoms.stack(shape=(1, 4, 5)))
    array, geometry = read(tmp_path)
    assert np.array_equal(array, volume.stored)
    assert geometry.spacing == pytest.approx(dicoms.SPACING)


def _radiograph(dataset: pydicom.Dataset, index: int) -> None:
    dataset.SOPClassUID = uid.DigitalXRayImageStorageForPresentation
    dataset.Modality = "DX"
    for tag in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        delattr(dataset, tag)


def test_a_radiograph_is_flat_and_takes_the_detectors_pixel_spacing(tmp_path: Path) -> None:
    def imager(dataset: pydicom.Dataset, index: int) -> None:
        _radiograph(dataset, index)
        dataset.ImagerPixelSpacing = ["0.2", "0.3"]

    volume = dicoms.write(tmp_path, dicoms.stack(shape=(1, 4, 5)), edit=imager)
    array, geometry = read(tmp_path)
    assert np.array_equal(array, volume.stored)
    assert geometry.spatial_dims == 2
    assert geometry.spacing == pytest.approx((1.0, 0.2, 0.3))
    (path,) = tmp_path.iterdir()
    assert np.array_equal(imaging.read_image([series_of_file(path)]).array[0], volume.stored)


def test_a_radiograph_without_size_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dicoms.write(tmp_path, dicoms.stack(shape=(1, 4, 5)), edit=_radiograph)
    assert not read(tmp_path)[1].has_spacing
    assert "no pixel spacing" in caplog.text


def test_an_inverted_radiograph_is_turned_so_that_brighter_is_larger(tmp_path: Path) -> None:
    def inverted(dataset: pydicom.Dataset, index: int) -> None:
        _radiograph(dataset, index)
        dataset.PhotometricInterpretation = "MONOCHROME1"

    volume = dicoms.write(tmp_path, dicoms.stack(shape=(1, 4, 5)), edit=inverted)
    assert np.array_equal(read(tmp_path)[0], -1.0 - volume.stored)


def test_several_series_are_listed_and_chosen_by_uid(tmp_path: Path) -> None:
    first = dicoms.write(tmp_path / "a", series="1.2.3.1", description="T1 axial")
    second = dicoms.write(tmp_path / "b", dicoms.stack(1), series="1.2.3.2", description="Schädel")
    message = refusal(tmp_path)
    assert "2 DICOM series" in message and "--series UID" in message
    assert "1.2.3.1 (CT, T1 axial, 5 images)" in message
    assert "1.2.3.2 (CT, Sch" in message
    message.encode()  # another character set does not make the message unprintable
    for series, volume in (("1.2.3.1", first), ("1.2.3.2", second)):
        cases = find_cases(tmp_path, series=series)
        assert list(cases) == [tmp_path.name]
        assert np.array_equal(read_series(cases[tmp_path.name])[0][0], volume.stored)
    with pytest.raises(ImageError, match=r"has no DICOM series 9\.9; choose one of: 1\.2\.3\.1"):
        find_cases(tmp_path, series="9.9")


def test_one_series_in_subfolders_is_one_case(tmp_path: Path) -> None:
    volume = dicoms.write(tmp_path / "x")
    (tmp_path / "y").mkdir()
    for path in list((tmp_path / "x").iterdir())[:2]:
        path.rename(tmp_path / "y" / path.name)
    cases = find_cases(tmp_path)
    assert list(cases) == [tmp_path.name]
    assert np.array_equal(read_series(cases[tmp_path.name])[0][0], volume.stored)


def test_each_subfolder_with_a_series_is_a_case(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        folder = tmp_path / f"case{number}" / "deep" / "er"
        dicoms.write(
            folder, dicoms.stack(number), series=f"1.2.{number}.1", study=f"1.2.{number}", patient=f"N{number}"
        )
    cases = find_cases(tmp_path)
    assert list(cases) == ["case1", "case2", "case3"]
    assert np.array_equal(read_series(cases["case2"])[0][0], dicoms.stack(2).stored)
    assert list(find_cases(tmp_path / "case1", collection=True)) == ["deep"]
    dicoms.write(tmp_path / "case2" / "other", series="1.2.2.2", study="1.2.2", patient="N2")
    with pytest.raises(ImageError, match=r"case2 holds 2 DICOM series; choose one with predict --series UID"):
        find_cases(tmp_path)


def test_no_dicom_is_no_case(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    assert find_cases(tmp_path) == {}
    with pytest.raises(ImageError, match="holds no DICOM images"):
        find_cases(tmp_path, series="1.2")
    with pytest.raises(ImageError, match="is not a folder"):
        find_series(tmp_path / "nothing")


def test_what_is_no_scan_is_passed_over_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    volume = dicoms.write(tmp_path)
    for name, sop_class in (
        ("sr", uid.BasicTextSRStorage),
        ("rt", uid.RTStructureSetStorage),
        ("seg", uid.SegmentationStorage),
        ("pr", uid.GrayscaleSoftcopyPresentationStateStorage),
    ):
        dicoms.save(dicoms.bare(sop_class, f"1.9.{len(name)}", "1.9", "P1"), tmp_path / name)

    def scout(dataset: pydicom.Dataset, index: int) -> None:
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]

    dicoms.write(tmp_path / "scout", dicoms.stack(shape=(1, 4, 4)), series="1.9.9", edit=scout)
    shutil.copy(tmp_path / "sr", tmp_path / "DICOMDIR")
    (tmp_path / ".hidden").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "LICENSE").write_text("hello")
    with caplog.at_level(logging.INFO, logger="scantly"):
        array, _ = read(tmp_path)
    assert np.array_equal(array, volume.stored)
    kinds = (
        "1 DICOMDIR (DICOMDIR), 1 RT structure set (rt), 1 localizer (scout/IM0000), 2 not DICOM (LICENSE, notes.txt), "
        "1 presentation state (pr), 1 raw data, registration or segmentation (seg), 1 report (sr)"
    )
    assert f"passed over what is no DICOM scan: {kinds}." in caplog.text
    assert "Secret" not in caplog.text


def test_links_are_followed_and_broken_ones_told(tmp_path: Path) -> None:
    volume = dicoms.write(tmp_path / "archive")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "case").symlink_to(tmp_path / "archive")
    (tmp_path / "archive" / "circle").symlink_to(tmp_path / "work")
    cases = find_cases(tmp_path / "work", collection=True)
    assert list(cases) == ["case"]
    assert np.array_equal(read_series(cases["case"])[0][0], volume.stored)
    (tmp_path / "archive" / "IM0009").symlink_to(tmp_path / "gone")
    assert "IM0009 does not exist" in refusal(tmp_path / "work")


def test_several_patients_with_one_study_uid_are_cases(tmp_path: Path) -> None:
    for number in (1, 2):
        dicoms.write(tmp_path / f"case{number}", series=f"1.2.{number}", patient=f"N{number}")
    assert list(find_cases(tmp_path)) == ["case1", "case2"]


def test_a_missing_slice_is_found(tmp_path: Path) -> None:
    dicoms.write(tmp_path, dicoms.stack(shape=(7, 4, 4)), shuffle=False)
    (tmp_path / "IM0002").unlink()
    (tmp_path / "IM0003").unlink()
    assert "lacks 2 slices: there are 9 mm between slices 2 and 3 of 5 in order of position, 3 mm elsewhere" in refusal(
        tmp_path
    )


def test_one_of_four_slices_missing_is_found(tmp_path: Path) -> None:
    dicoms.write(tmp_path, dicoms.stack(shape=(4, 4, 4)), shuffle=False)
    (tmp_path / "IM0001").unlink()
    assert "lacks 1 slice: there are 6 mm between slices 1 and 2 of 3" in refusal(tmp_path)


def test_varying_distances_are_refused(tmp_path: Path) -> None:
    def squeeze(dataset: pydicom.Dataset, index: int) -> None:
        if index >= 3:
            dataset.ImagePositionPatient[2] -= 1.25

    dicoms.write(tmp_path, edit=squeeze)
    assert "slices at varying distances (1.75 to 3 mm)" in refusal(tmp_path)


def test_two_time_points_in_one_series_are_refused(tmp_path: Path) -> None:
    dicoms.write(tmp_path / "first")

    def later(dataset: pydicom.Dataset, index: int) -> None:
        dataset.SOPInstanceUID = f"1.5.{index + 1}"

    dicoms.write(tmp_path / "second", dicoms.stack(1), edit=later)
    assert "10 images at 5 positions" in refusal(tmp_path)


def test_a_copied_file_is_named(tmp_path: Path) -> None:
    dicoms.write(tmp_path)
    shutil.copy(tmp_path / "IM0003", tmp_path / "IM0003 (1)")
    assert "are the same image twice; remove one" in refusal(tmp_path)


def test_a_tilted_gantry_is_refused_with_its_angle(tmp_path: Path) -> None:
    def tilted(dataset: pydicom.Dataset, index: int) -> None:
        dataset.ImagePositionPatient[1] += index * 3.0 * np.tan(np.radians(12))

    dicoms.write(tmp_path, edit=tilted)
    message = refusal(tmp_path)
    assert "tilted gantry" in message and "12 degrees" in message and "dcm2niix" in message


def test_slices_shifted_sideways_are_refused(tmp_path: Path) -> None:
    def jump(dataset: pydicom.Dataset, index: int) -> None:
        dataset.ImagePositionPatient[0] += 4.0 * (index >= 2)

    dicoms.write(tmp_path, edit=jump)
    assert "shifted sideways against each other, by 4 mm (slice 3 of 5" in refusal(tmp_path)


def _set(**values: object) -> dicoms.Edit:
    def change(dataset: pydicom.Dataset, index: int) -> None:
        if index == 2:
            for tag, value in values.items():
                setattr(dataset, tag, value)

    return change


def _drop(*tags: str) -> dicoms.Edit:
    def change(dataset: pydicom.Dataset, index: int) -> None:
        for tag in tags:
            delattr(dataset, tag)

    return change


def _smaller(dataset: pydicom.Dataset, index: int) -> None:
    if index == 2:
        dicoms.pixels(dataset, np.zeros((3, 4)))


def _color(dataset: pydicom.Dataset, index: int) -> None:
    dicoms.pixels(dataset, np.zeros((7, 6)))
    dataset.SamplesPerPixel, dataset.PlanarConfiguration = 3, 0
    dataset.PhotometricInterpretation = "RGB"
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation = 7, 0
    dataset.PixelData = bytes(7 * 6 * 3)


BAD = {
    "orientation": (_set(ImageOrientationPatient=[1, 0, 0, 0, 0.98, 0.199]), "different ImageOrientationPatient"),
    "size": (_smaller, r"different image size \(rows, columns\): \(7, 6\)"),
    "spacing": (_set(PixelSpacing=[0.5, 0.8]), "different PixelSpacing"),
    "frame of reference": (_set(FrameOfReferenceUID="1.2.7"), "different frame of reference"),
    "patients": (_set(PatientID="N2"), "mixes images of 2 patients under one series UID"),
    "no position": (_drop("ImagePositionPatient"), "has no ImagePositionPatient"),
    "empty position": (_set(ImagePositionPatient=None), "has no ImagePositionPatient"),
    "no pixel spacing": (_drop("PixelSpacing"), "has no PixelSpacing"),
    "no orientation": (_drop("ImageOrientationPatient"), "has no ImageOrientationPatient"),
    "odd orientation": (lambda d, i: setattr(d, "ImageOrientationPatient", [1, 0, 0, 1, 0, 0]), "no usable orient"),
    "lossy": (_set(LossyImageCompression="01"), "compressed with loss .LossyImageCompression is 01.; fetch the orig"),
    "color": (_color, r"holds color \(RGB, 3 samples per pixel\)"),
    "inverted CT": (_set(PhotometricInterpretation="MONOCHROME1"), "inverted CT image"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_series_are_refused_in_a_sentence(tmp_path: Path, name: str) -> None:
    edit, words = BAD[name]
    dicoms.write(tmp_path, edit=edit)
    message = refusal(tmp_path)
    with pytest.raises(ImageError, match=words):
        raise ImageError(message)


def test_a_lossy_transfer_syntax_is_refused(tmp_path: Path) -> None:
    from io import BytesIO

    import PIL.Image
    from pydicom.encaps import encapsulate

    def jpeg(dataset: pydicom.Dataset, index: int) -> None:
        picture = BytesIO()
        PIL.Image.fromarray(np.full((7, 6), 10 * index, np.uint8)).save(picture, "jpeg")
        dataset.BitsAllocated = dataset.BitsStored = 8
        dataset.HighBit, dataset.PixelRepresentation = 7, 0
        dataset.PixelData = encapsulate([picture.getvalue()])
        dataset["PixelData"].is_undefined_length = True

    dicoms.write(tmp_path, edit=jpeg, syntax=uid.JPEGBaseline8Bit)
    assert "compressed with loss (transfer syntax 1.2.840.10008.1.2.4.50)" in refusal(tmp_path)


def test_pixels_that_are_no_integers_are_refused(tmp_path: Path) -> None:
    def floats(dataset: pydicom.Dataset, index: int) -> None:
        dataset.FloatPixelData = np.zeros((7, 6), "<f4").tobytes()
        dataset.BitsAllocated = 32
        for tag in ("PixelData", "BitsStored", "HighBit", "PixelRepresentation"):
            delattr(dataset, tag)

    dicoms.write(tmp_path, edit=floats)
    assert "without pixels or coded in an unknown way" in refusal(tmp_path)


@pytest.mark.parametrize("size", [0, 1, 127, 128, 130, 131])
def test_a_file_cut_before_the_mark_is_refused(tmp_path: Path, size: int) -> None:
    dicoms.write(tmp_path)
    path = tmp_path / "IM0001"
    path.write_bytes(path.read_bytes()[:size])
    assert f"{path} is called like a DICOM file but lacks the mark DICM" in refusal(tmp_path)


def test_a_header_that_claims_more_than_the_file_can_hold_is_refused(tmp_path: Path) -> None:
    def huge(dataset: pydicom.Dataset, index: int) -> None:
        dataset.Rows = dataset.Columns = 60000

    dicoms.write(tmp_path, dicoms.stack(shape=(1, 24, 24)), edit=huge, syntax=uid.DeflatedExplicitVRLittleEndian)
    message = refusal(tmp_path)
    assert "says it holds 7.2e+09 bytes" in message or "cannot be read as a DICOM image" in message


def test_a_series_can_be_sent_to_another_process(tmp_path: Path) -> None:
    dicoms.write(tmp_path)
    (series,) = find_series(tmp_path)
    there = pickle.loads(pickle.dumps(series))  # noqa: S301
    assert np.array_equal(read_series(there)[0], read_series(series)[0])


def test_two_patients_in_one_folder_are_refused(tmp_path: Path) -> None:
    dicoms.write(tmp_path, series="1.2.3.1")
    for path in list(tmp_path.iterdir()):
        path.rename(tmp_path / f"first-{path.name}")
    dicoms.write(tmp_path, series="1.2.3.2", patient="N2")
    message = refusal(tmp_path)
    assert "mixes DICOM series of 2 patients" in message and "1.2.3.2" in message and "N2" not in message


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.RLELossless, uid.JPEGLSLossless])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.7, 0.99])
def test_a_truncated_file_is_refused(tmp_path: Path, share: float, syntax: str) -> None:
    dicoms.write(tmp_path, dicoms.stack(shape=(3, 24, 24)), syntax=syntax)
    path = tmp_path / "IM0001"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    message = refusal(tmp_path)
    assert str(path) in message
    assert "again" in message


def test_damaged_voxels_are_told_without_the_decoders_words(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    dicoms.write(tmp_path, dicoms.stack(shape=(3, 24, 24)), syntax=uid.JPEGLSLossless)
    dataset = pydicom.dcmread(tmp_path / "IM0001")
    dataset.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8" + bytes(400)])
    dataset.save_as(tmp_path / "IM0001")
    assert refusal(tmp_path) == (
        f"{tmp_path / 'IM0001'} cannot be decoded as a DICOM image: it is truncated or damaged; fetch or export it "
        "again."
    )
    assert "0x" not in capfd.readouterr().err


def test_several_series_of_a_case_of_a_collection_have_no_option(tmp_path: Path) -> None:
    """``init`` makes datasets of collections and cannot be told a series."""
    for number in (1, 2):
        dicoms.write(tmp_path / "case" / f"{number}", series=f"1.2.3.{number}")
    with pytest.raises(ImageError, match=r"holds 2 DICOM series; leave one and move the others away: 1\.2\.3\.1"):
        find_cases(tmp_path, collection=True)
    for path in (tmp_path / "case").iterdir():
        for file in path.iterdir():
            file.rename(tmp_path / f"{path.name}-{file.name}")
    dicoms.write(tmp_path, series="1.2.3.4", patient="N2")
    with pytest.raises(ImageError, match=r"series of 2 patients; give each patient a folder of its own: 1\.2\.3\.1"):
        find_cases(tmp_path, collection=True)


@pytest.mark.parametrize("content", [b"", b"not DICOM at all" * 20])
def test_a_file_called_like_dicom_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    dicoms.write(tmp_path)
    (tmp_path / "1.dcm").write_bytes(content)
    assert f"{tmp_path / '1.dcm'} is called like a DICOM file" in refusal(tmp_path)


def test_one_slice_given_as_a_file_is_refused(tmp_path: Path) -> None:
    dicoms.write(tmp_path)
    with pytest.raises(ImageError, match="is one slice of a DICOM series; give the folder"):
        series_of_file(tmp_path / "IM0000")


@pytest.mark.parametrize("directions", [dicoms.AXIAL, dicoms.OBLIQUE], ids=["axial", "oblique"])
def test_frames_of_one_file_are_ordered_by_position(tmp_path: Path, directions: dicoms.Directions) -> None:
    volume = dicoms.stack(directions=directions)
    dicoms.write_enhanced(tmp_path / "all.dcm", volume, order=[3, 0, 4, 1, 2])
    array, geometry = read(tmp_path)
    assert np.array_equal(
        array, volume.stored - 1024.0 if np.linalg.det(directions) > 0 else volume.stored[::-1] - 1024
    )
    assert np.allclose(
        sorted(dicoms.by_place(array, geometry.affine)), sorted(dicoms.by_place(array, volume.affine)), atol=2e-3
    )
    assert np.array_equal(read_series(series_of_file(tmp_path / "all.dcm"))[0][0], array)


def test_frames_that_differ_in_scale_are_refused(tmp_path: Path) -> None:
    dicoms.write_enhanced(tmp_path / "all.dcm", dicoms.stack(), scales=[(1.0 + index, 0.0) for index in range(5)])
    assert "frames of different rescale slope and intercept" in refusal(tmp_path)


def test_missing_frames_and_frames_without_positions_are_refused(tmp_path: Path) -> None:
    dicoms.write_enhanced(tmp_path / "a" / "all.dcm", dicoms.stack(), order=[0, 1, 3, 4])
    assert "lacks 1 slice:" in refusal(tmp_path / "a")
    dataset = pydicom.dcmread(tmp_path / "a" / "all.dcm")
    del dataset.PerFrameFunctionalGroupsSequence
    dicoms.save(dataset, tmp_path / "b" / "all.dcm")
    assert "holds 4 frames in one file without a position for each (0 given)" in refusal(tmp_path / "b")


def test_image_functions_take_a_series_in_place_of_a_file(tmp_path: Path) -> None:
    volume = dicoms.write(tmp_path / "scan.nii.gz")  # a folder may be called anything
    (series,) = find_series(tmp_path / "scan.nii.gz")
    image = imaging.read_image([series])
    assert np.array_equal(image.array[0], volume.stored)
    assert imaging.geometry_difference(image.geometry, imaging.read_geometry(series)) is None
    assert imaging.file_ending(series) is None
    assert imaging.read_image([series, series]).array.shape == (2, *dicoms.SHAPE)


def test_broken_cases_are_collected(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        dicoms.write(tmp_path / f"case{number}", series=f"1.2.{number}", study=f"1.{number}", patient=f"N{number}")
    (tmp_path / "case1" / "IM0001").write_bytes(b"")
    (tmp_path / "case1" / "IM0002").write_bytes(b"")
    broken: list[tuple[str, ImageError]] = []
    assert list(find_cases(tmp_path, broken=broken)) == ["case2", "case3"]
    ((name, error),) = broken
    assert name == "case1"
    assert "case1/IM0001" in str(error)
    dicoms.write(tmp_path / "case3" / "other", series="1.2.9", study="1.3", patient="N3")
    broken.clear()
    assert list(find_cases(tmp_path, broken=broken)) == ["case2"]
    assert [name for name, _ in broken] == ["case1", "case3"]
    assert "case3 holds 2 DICOM series" in str(broken[1][1])


@pytest.mark.parametrize("given", [{}, {"series": "1.2.826.0.1.77.1"}])
def test_a_broken_slice_of_the_only_series_is_never_left_out(tmp_path: Path, given: dict[str, str]) -> None:
    """Also where the series lies in several subfolders, the rest of which is sound."""
    dicoms.write(tmp_path / "x")
    (tmp_path / "y").mkdir()
    for path in list((tmp_path / "x").iterdir())[:2]:
        path.rename(tmp_path / "y" / path.name)
    next((tmp_path / "y").iterdir()).write_bytes(b"")
    broken: list[tuple[str, ImageError]] = []
    assert find_cases(tmp_path, broken=broken, **given) == {}
    assert len(broken) == 1
