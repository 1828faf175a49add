"""DICOM-SEG: masks read back by pydicom and highdicom lie on the images they were made from."""

from __future__ import annotations

import sys
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from pydicom import uid

import dicom_series as dicoms
from scantly.errors import ConfigError, ImageError
from scantly.imaging.dicom import Series, find_series, read_series
from scantly.imaging.dicom_seg import write_segmentation

CLASSES = ("background", "left atrium", "strange part", "Tumor")


def labels(seed: int = 0) -> np.ndarray:
    """Class indices that leave class 2 out and have one empty slice."""
    array = np.random.default_rng(seed).choice(np.array([0, 1, 3], np.uint8), size=dicoms.SHAPE)
    array[3] = 0
    return array


def series_in(folder: Path) -> Series:
    (series,) = find_series(folder)
    return series


def directions(order: int) -> dicoms.Directions:
    return list(dicoms.axis_orders())[order]


@pytest.mark.parametrize(
    "along",
    [
        dicoms.AXIAL,
        (*dicoms.AXIAL[:2], (0.0, 0.0, -1.0)),
        dicoms.OBLIQUE,
        directions(13),
        directions(30),
        directions(47),
    ],
    ids=["axial", "written from above", "oblique", "order 13", "order 30", "order 47"],
)
def test_every_mask_refers_to_the_image_it_was_made_from(tmp_path: Path, along: dicoms.Directions) -> None:
    volume = dicoms.write(tmp_path / "series", dicoms.stack(directions=along))
    series = series_in(tmp_path / "series")
    array, _ = read_series(series)
    # labels that are a function of the image: any slip in order or orientation shows
    predicted = np.where(array[0] > 800, 3, np.where(array[0] < -300, 1, 0)).astype(np.uint8)
    write_segmentation(tmp_path / "seg.dcm", predicted, series, CLASSES, model_name="supervised")
    written = pydicom.dcmread(tmp_path / "seg.dcm")
    frames = written.pixel_array
    seen = set()
    for mask, groups in zip(frames, written.PerFrameFunctionalGroupsSequence, strict=True):
        segment = groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        source = groups.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        index = int(source.rsplit(".", 1)[1]) - 1
        stored = volume.stored[index]
        assert np.array_equal(mask, stored > 800 if segment == 3 else stored < -300)
        place = groups.PlanePositionSequence[0].ImagePositionPatient
        assert np.allclose(place, volume.position(index))
        seen.add((segment, index))
    assert seen == {(segment, index) for segment in (1, 3) for index in range(5)}


def test_it_refers_to_series_patient_and_frame_of_reference_and_names_its_classes(tmp_path: Path) -> None:
    dicoms.write(tmp_path / "series")
    write_segmentation(
        tmp_path / "seg.dcm", labels(), series_in(tmp_path / "series"), CLASSES, model_name="ua_mt", model_version="7"
    )
    seg = highdicom.seg.segread(tmp_path / "seg.dcm")
    assert seg.SOPClassUID == uid.SegmentationStorage
    assert seg.SegmentationType == "BINARY"
    source = pydicom.dcmread(tmp_path / "series" / "IM0000")
    assert seg.FrameOfReferenceUID == source.FrameOfReferenceUID
    assert seg.StudyInstanceUID == source.StudyInstanceUID
    assert seg.PatientID == source.PatientID
    (reference,) = seg.ReferencedSeriesSequence
    assert reference.SeriesInstanceUID == source.SeriesInstanceUID
    assert len(reference.ReferencedInstanceSequence) == 5
    assert [item.SegmentLabel for item in seg.SegmentSequence] == list(CLASSES[1:])
    kinds = [seg.get_segment_description(number).segmented_property_type for number in (1, 2, 3)]
    assert [kind.value for kind in kinds] == ["82471001", "85756007", "108369006"]
    (algorithm,) = seg.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence
    assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("ua_mt", "7")
    masks = seg.get_pixels_by_source_instance(
        [f"1.2.826.0.1.77.1.{index + 1}" for index in range(5)], assert_missing_frames_are_empty=True
    )
    assert np.array_equal(masks, np.stack([labels() == value for value in (1, 2, 3)], axis=-1))


def test_nothing_found_is_a_valid_object(tmp_path: Path) -> None:
    dicoms.write(tmp_path / "series")
    empty = np.zeros(dicoms.SHAPE, np.uint8)
    write_segmentation(tmp_path / "seg.dcm", empty, series_in(tmp_path / "series"), CLASSES, model_name="m")
    written = pydicom.dcmread(tmp_path / "seg.dcm")
    assert written.NumberOfFrames == 15
    assert not written.pixel_array.any()


def test_frames_of_a_multi_frame_source_are_matched(tmp_path: Path) -> None:
    order = [3, 0, 4, 1, 2]
    dicoms.write_enhanced(tmp_path / "series" / "all.dcm", dicoms.stack(), order=order)
    series = series_in(tmp_path / "series")
    predicted = labels()
    write_segmentation(tmp_path / "seg.dcm", predicted, series, CLASSES, model_name="m")
    written = pydicom.dcmread(tmp_path / "seg.dcm")
    for mask, groups in zip(written.pixel_array, written.PerFrameFunctionalGroupsSequence, strict=True):
        segment = groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        height = float(groups.PlanePositionSequence[0].ImagePositionPatient[2])
        index = round((height - dicoms.ORIGIN[2]) / dicoms.SPACING[0])
        assert np.array_equal(mask, predicted[index] == segment)
        source = groups.DerivationImageSequence[0].SourceImageSequence[0]
        assert source.ReferencedFrameNumber == order.index(index) + 1


def test_equal_input_gives_equal_content_but_for_uids_and_time(tmp_path: Path) -> None:
    dicoms.write(tmp_path / "series")
    for name in ("a.dcm", "b.dcm"):
        write_segmentation(tmp_path / name, labels(), series_in(tmp_path / "series"), CLASSES, model_name="m")
    one, two = (pydicom.dcmread(tmp_path / name) for name in ("a.dcm", "b.dcm"))
    assert {element.keyword for element in one if element != two[element.tag]} <= {
        "ContentDate",
        "ContentTime",
        "ContributingEquipmentSequence",  # holds the time too
        "DimensionIndexSequence",  # holds a UID made for the file
        "DimensionOrganizationSequence",
        "InstanceCreationDate",
        "InstanceCreationTime",
        "SOPInstanceUID",
        "SeriesInstanceUID",
    }
    assert len(one) == len(two)


def test_without_highdicom_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dicoms.write(tmp_path / "series")
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(ConfigError, match=r"pip install 'scantly\[dicom-seg\]'"):
        write_segmentation(tmp_path / "s.dcm", labels(), series_in(tmp_path / "series"), CLASSES, model_name="m")
    assert not (tmp_path / "s.dcm").exists()


def test_labels_off_the_grid_or_of_no_class_are_refused(tmp_path: Path) -> None:
    dicoms.write(tmp_path / "series")
    series = series_in(tmp_path / "series")
    with pytest.raises(ValueError, match="shape"):
        write_segmentation(tmp_path / "s.dcm", labels()[:4], series, CLASSES, model_name="m")
    with pytest.raises(ValueError, match="class indices 0 to 2"):
        write_segmentation(tmp_path / "s.dcm", labels(), series, CLASSES[:3], model_name="m")


def test_a_source_with_gaps_in_its_headers_is_refused_in_a_sentence(tmp_path: Path) -> None:
    def anonymous(dataset: pydicom.Dataset, index: int) -> None:
        del dataset.FrameOfReferenceUID

    dicoms.write(tmp_path / "series", edit=anonymous)
    with pytest.raises(
        ImageError, match=r"cannot be the source of a DICOM-SEG [(]Source images have no Frame Of Reference"
    ):
        write_segmentation(tmp_path / "s.dcm", labels(), series_in(tmp_path / "series"), CLASSES, model_name="m")

    def flat(dataset: pydicom.Dataset, index: int) -> None:
        del dataset.ImagePositionPatient

    dicoms.write(tmp_path / "flat", dicoms.stack(shape=(1, 7, 6)), edit=flat)
    with pytest.raises(ImageError, match="has no ImagePositionPatient"):
        write_segmentation(tmp_path / "s.dcm", labels()[:1], series_in(tmp_path / "flat"), CLASSES, model_name="m")
    assert not (tmp_path / "s.dcm").exists()


TYPE_2 = {
    "AccessionNumber": "",
    "PatientBirthDate": "",
    "PatientID": "",
    "PatientName": "",
    "PatientSex": "",
    "PositionReferenceIndicator": "",
    "ReferringPhysicianName": "",
    "StudyDate": "",
    "StudyID": "",
    "StudyTime": "",
}


@pytest.mark.parametrize("keywords", [*([keyword] for keyword in TYPE_2), list(TYPE_2)], ids=lambda names: names[0])
def test_what_the_source_may_leave_empty_is_written_empty(tmp_path: Path, keywords: list[str]) -> None:
    def without(dataset: pydicom.Dataset, index: int) -> None:
        for keyword in keywords:
            delattr(dataset, keyword)

    dicoms.write(tmp_path / "series", edit=without)
    write_segmentation(tmp_path / "s.dcm", labels(), series_in(tmp_path / "series"), CLASSES, model_name="m")
    written = pydicom.dcmread(tmp_path / "s.dcm")
    for keyword in keywords:
        assert keyword in written
        assert not written[keyword].value


def test_a_source_without_slice_thickness_gets_the_distance_of_its_slices(tmp_path: Path) -> None:
    for name, thickness in (("missing", ...), ("empty", None)):

        def thin(dataset: pydicom.Dataset, index: int, thickness: object = thickness) -> None:
            del dataset.SliceThickness
            if thickness is None:
                dataset.SliceThickness = None

        dicoms.write(tmp_path / name, edit=thin)
        path = tmp_path / f"{name}.dcm"
        write_segmentation(path, labels(), series_in(tmp_path / name), CLASSES, model_name="m")
        measures = pydicom.dcmread(path).SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
        assert float(measures.SliceThickness) == pytest.approx(dicoms.SPACING[0])


def test_a_sex_that_the_standard_does_not_know_is_left_empty(tmp_path: Path) -> None:
    dicoms.write(tmp_path / "series", edit=lambda dataset, index: setattr(dataset, "PatientSex", "W"))
    write_segmentation(tmp_path / "s.dcm", labels(), series_in(tmp_path / "series"), CLASSES, model_name="m")
    assert not pydicom.dcmread(tmp_path / "s.dcm").PatientSex
