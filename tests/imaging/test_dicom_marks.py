"""DICOM files without preamble or file meta information: read like the others; nothing else is taken for DICOM."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import uid

import dicom_series as dicoms
from scantly import imaging
from scantly.errors import ImageError
from scantly.imaging.dicom import find_cases, find_series, read_series, series_of_file
from scantly.imaging.dicom_marks import is_dicom, read_head
from scantly.imaging.dicom_seg import write_segmentation

CODINGS = [uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian]


def without_preamble(path: Path) -> None:
    path.write_bytes(path.read_bytes()[132:])


def without_meta(path: Path) -> None:
    length = pydicom.dcmread(path).file_meta.FileMetaInformationGroupLength
    path.write_bytes(path.read_bytes()[132 + 12 + length :])


CUTS = [without_preamble, without_meta]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("syntax", CODINGS, ids=[syntax.name for syntax in CODINGS])
@pytest.mark.parametrize("every", [True, False], ids=["all files", "one file"])
def test_files_without_preamble_are_read_like_the_others(tmp_path: Path, cut, syntax: str, every: bool) -> None:
    def swapped(dataset: pydicom.Dataset, index: int) -> None:
        if syntax == uid.ExplicitVRBigEndian:
            dataset.PixelData = np.frombuffer(dataset.PixelData, "<i2").astype(">i2").tobytes()

    volume = dicoms.write(tmp_path / "case", syntax=syntax, edit=swapped)
    for path in sorted((tmp_path / "case").iterdir())[: None if every else 1]:
        cut(path)
        assert is_dicom(path)
        head = read_head(path)
        assert head is not None
        assert head == (uid.CTImageStorage, syntax if cut is without_preamble else "")
    array, _ = read_series(find_cases(tmp_path)[tmp_path.name])
    assert np.array_equal(array[0], volume.stored)


@pytest.mark.parametrize("cut", CUTS)
def test_multi_frame_files_and_segmentations_of_files_without_preamble(tmp_path: Path, cut) -> None:
    volume = dicoms.stack()
    dicoms.write_enhanced(tmp_path / "all.dcm", volume)
    cut(tmp_path / "all.dcm")
    assert np.array_equal(read_series(series_of_file(tmp_path / "all.dcm"))[0][0], volume.stored - 1024.0)
    dicoms.write(tmp_path / "series")
    for path in (tmp_path / "series").iterdir():
        cut(path)
    (series,) = find_series(tmp_path / "series")
    write_segmentation(tmp_path / "s.dcm", np.ones(dicoms.SHAPE, np.uint8), series, ("background", "a"), model_name="m")
    assert pydicom.dcmread(tmp_path / "s.dcm").NumberOfFrames == 5


@pytest.mark.parametrize("cut", CUTS)
def test_what_is_no_scan_is_told_by_its_kind_without_preamble_too(tmp_path: Path, cut, caplog) -> None:
    dicoms.write(tmp_path)
    dicoms.save(dicoms.bare(uid.RTStructureSetStorage, "1.9", "1.9", "P1"), tmp_path / "rt")
    cut(tmp_path / "rt")
    with caplog.at_level(logging.INFO, logger="scantly"):
        assert len(find_series(tmp_path)) == 1
    assert "1 RT structure set (rt)" in caplog.text


def test_a_language_sequence_before_the_class_is_passed_over(tmp_path: Path) -> None:
    def languages(dataset: pydicom.Dataset, index: int) -> None:
        item = pydicom.Dataset()
        item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = "de", "RFC5646", "German"
        dataset.LanguageCodeSequence = [item]
        dataset["LanguageCodeSequence"].is_undefined_length = True

    dicoms.write(tmp_path, edit=languages)
    for path in tmp_path.iterdir():
        without_meta(path)
        assert is_dicom(path)


def test_meta_elements_of_odd_length_do_not_hide_a_lossy_coding(tmp_path: Path) -> None:
    """What has the mark is read however badly it is written."""
    dicoms.write(tmp_path)
    path = tmp_path / "IM0000"
    plain = path.read_bytes()
    at = plain.index(b"1.2.840.10008.1.2.1\0")
    odd = plain[: at - 2] + b"\x17\0" + b"1.2.840.10008.1.2.4.50" + b"\0" + plain[at + 20 :]
    path.write_bytes(odd)
    head = read_head(path)
    assert head is not None and head.syntax == "1.2.840.10008.1.2.4.50"


def _element(group: int, number: int, kind: bytes, value: bytes) -> bytes:
    return group.to_bytes(2, "little") + number.to_bytes(2, "little") + kind + len(value).to_bytes(2, "little") + value


LAST = _element(8, 0x16, b"UI", b"1.2.840.10008.5.1.4.1.1.2\0")
STARTS = [b"\x02\0", b"\x08\0", b"\0\x08", b"\x08\0\x05\0CS", b"\x02\0\0\0UL\x04\0"]
NOT_DICOM = {
    "zeros": bytes(4096),
    "only a group": b"\x08\0",
    "no class": _element(8, 5, b"CS", b"ISO_IR 100") + _element(8, 0x18, b"UI", b"1.2.3\0") + bytes(300),
    "class that is no UID": _element(8, 0x16, b"UI", b"CT image"),
    "tags that descend": _element(8, 0x12, b"DA", b"20200101") + _element(8, 5, b"CS", b"") + LAST,
    "a type that does not exist": _element(8, 5, b"XX", b"ISO_IR 100") + LAST,
    "odd length": _element(8, 5, b"CS", b"ISO") + LAST,
    "length beyond the end": LAST[:-4],
    "another group first": _element(6, 1, b"CS", b"AB") + LAST,
    "numbers": np.arange(8, 4000, dtype="<u2").tobytes(),
    "eights": np.full(4000, 8, "<u2").tobytes(),
    "twos": np.full(4000, 2, "<u2").tobytes(),
}


@pytest.mark.parametrize("name", NOT_DICOM)
def test_what_only_begins_like_dicom_is_none(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.raw"
    path.write_bytes(NOT_DICOM[name])
    assert not is_dicom(path)
    assert find_cases(tmp_path) == {}


def test_the_smallest_file_that_names_its_class_is_dicom(tmp_path: Path) -> None:
    path = tmp_path / "a.raw"
    path.write_bytes(LAST)
    assert read_head(path) == ("1.2.840.10008.5.1.4.1.1.2", "")


def test_files_of_other_formats_are_not_taken_for_dicom(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(2, 8, 8)).astype(np.float32)
    geometry = imaging.Geometry((2, 8, 8), np.eye(4))
    imaging.write_scalar(tmp_path / "a.nii", values, geometry)
    imaging.write_scalar(tmp_path / "a.nii.gz", values, geometry)
    imaging.write_scalar(tmp_path / "a.h5", values, imaging.Geometry((2, 8, 8), np.eye(4), has_spacing=False))
    imaging.write_label(tmp_path / "a.png", np.ones((1, 8, 8), np.uint8), imaging.Geometry((1, 8, 8), np.eye(4)))
    np.save(tmp_path / "a.npy", values)
    (tmp_path / "a.txt").write_text("hello")
    for path in tmp_path.iterdir():
        assert not is_dicom(path), path


@settings(max_examples=200)
@given(st.binary(max_size=300), st.sampled_from(STARTS))
def test_random_bytes_are_never_dicom_and_never_a_fault(tmp_path_factory, content: bytes, first: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.raw"
    path.write_bytes(first + content)
    assert not is_dicom(path)


@pytest.mark.parametrize("cut", CUTS)
def test_a_damaged_header_is_no_fault_of_ours(tmp_path: Path, cut) -> None:
    dicoms.write(tmp_path)
    path = tmp_path / "IM0000"
    cut(path)
    whole = path.read_bytes()
    draw = random.Random(0)
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[draw.randrange(200)] = draw.randrange(256)
        path.write_bytes(damaged)
        assert is_dicom(path) in (True, False)


def test_all_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    dicoms.write(tmp_path / "case")
    for name in ("IM0001", "IM0003"):
        path = tmp_path / "case" / name
        path.write_bytes(path.read_bytes()[:600])
    (tmp_path / "case" / "x.dcm").write_bytes(b"")
    with pytest.raises(ImageError) as caught:
        find_cases(tmp_path)
    named = "holds 3 files that cannot be read as DICOM images, case/IM0001, case/IM0003, case/x.dcm"
    assert f"{named}; of the first: {path.parent}" in str(caught.value) and "\n" not in str(caught.value)
    broken: list[tuple[str, ImageError]] = []
    assert find_cases(tmp_path, broken=broken) == {}
    assert [(name, str(error)) for name, error in broken] == [(tmp_path.name, str(caught.value))]


def test_every_file_that_is_not_used_is_named_with_its_reason(tmp_path: Path, caplog) -> None:
    dicoms.write(tmp_path)
    for name in ("sr1", "sub/sr2"):
        dicoms.save(dicoms.bare(uid.BasicTextSRStorage, "1.9.1", "1.9", "P1"), tmp_path / name)
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "DICOMDIR").write_bytes(b"")
    with caplog.at_level(logging.INFO, logger="scantly"):
        assert len(find_series(tmp_path)) == 1
    named = "1 DICOMDIR (DICOMDIR), 1 not DICOM (notes.txt), 2 report (sr1, sub/sr2)"
    assert f"{tmp_path}: passed over what is no DICOM scan: {named}." in caplog.text
