"""Patients are compared as the standard says; a case that was copied is told."""

from __future__ import annotations

import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pydicom
import pytest

import dicom_series as dicoms
from scantly.errors import ImageError
from scantly.imaging.dicom import find_cases, find_series
from scantly.imaging.dicom_persons import Person, count_persons, person_of


def person(name: str, number: str = "7", *, charset: str = "ISO_IR 192", coding: str = "utf-8") -> Person:
    return person_of(number.encode(coding), name.encode(coding), charset)


@pytest.mark.parametrize(
    "other",
    ["Doe^John^^^", "Doe^John^", "Doe^John ", "DOE^JOHN", "doe^john", " Doe ^ John", "Doe^John\0", "Doe^John^^^=", ""],
)
def test_one_name_written_in_several_ways_is_one_person(other: str) -> None:
    assert person("Doe^John").same(person(other)) and person(other).same(person("Doe^John"))
    assert count_persons([person("Doe^John"), person(other)]) == 1


@pytest.mark.parametrize("other", ["Doe^Jane", "Doe^John^X", "Doe", "^John", "John^Doe", "Doe^John^^Dr"])
def test_other_names_are_other_persons(other: str) -> None:
    assert not person("Doe^John").same(person(other))
    assert count_persons([person("Doe^John"), person(other)]) == 2


def test_ids_tell_persons_apart_but_not_their_spaces() -> None:
    assert person("Doe^John", "7").same(person("Doe^John", " 7 "))
    assert not person("Doe^John", "7").same(person("Doe^John", "07"))
    assert not person("", "7").same(person("", "8"))


def test_the_character_set_makes_no_difference() -> None:
    sets = [("ISO_IR 100", "latin-1"), ("ISO_IR 192", "utf-8"), ("GB18030", "gb18030"), ("ISO_IR 109", "iso8859-3")]
    people = [person("Müller^Jürgen", charset=charset, coding=coding) for charset, coding in sets]
    people.append(person(unicodedata.normalize("NFD", "Müller^Jürgen")))
    people.append(person("MÜLLER^JÜRGEN"))
    assert len(set(people)) == 1
    assert not people[0].same(person("Muller^Jurgen"))


def test_groups_that_only_one_file_has_make_no_difference() -> None:
    whole = b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B=\x1b$B$d$^$@\x1b(B^\x1b$B$?$m$&\x1b(B"
    japanese = person_of(b"7", whole, "\\ISO 2022 IR 87")
    unicode = person("Yamada^Tarou=山田^太郎=やまだ^たろう")
    assert japanese == unicode
    assert japanese.same(person("YAMADA^TAROU")) and japanese.same(person("=山田^太郎"))
    assert not japanese.same(person("Yamada^Jirou")) and not japanese.same(person("=山田^次郎"))
    assert count_persons([person("Yamada^Tarou"), person("=山田^太郎"), unicode]) == 1
    assert count_persons([person("Yamada^Tarou"), person("=山田^太郎")]) == 2


@pytest.mark.parametrize("charset", ["nonsense", "", "ISO 2022 IR 87\\\\"])
def test_an_unknown_character_set_is_no_fault(charset: str) -> None:
    assert person("Doe^John", charset=charset) == person("doe^john^")


def test_nothing_of_the_name_is_kept() -> None:
    assert "doe" not in repr(person("Doe^John", "P1")).lower() and "P1" not in repr(person("Doe^John", "P1"))


def test_slices_of_one_patient_may_write_the_name_in_several_ways(tmp_path: Path) -> None:
    names = ["Müller^Jürgen", "Müller^Jürgen^^^", "MÜLLER^JÜRGEN ", unicodedata.normalize("NFD", "Müller^Jürgen"), ""]

    def named(dataset: pydicom.Dataset, index: int) -> None:
        dataset.SpecificCharacterSet = "ISO_IR 192" if index % 2 else "ISO_IR 100"
        if index == 3:
            dataset.SpecificCharacterSet = "ISO_IR 192"
        dataset.PatientName = names[index]

    dicoms.write(tmp_path, edit=named)
    (case,) = find_cases(tmp_path).values()
    assert case.geometry.shape == dicoms.SHAPE


def test_a_copied_case_folder_is_told_as_a_copy(tmp_path: Path) -> None:
    for number in (1, 2):
        place = tmp_path / f"case{number}"
        dicoms.write(place, dicoms.stack(number), series=f"1.2.{number}", study=f"1.{number}", patient=f"N{number}")
    shutil.copytree(tmp_path / "case1", tmp_path / "case1 - copy")
    said = (
        f"{tmp_path / 'case1'} and {tmp_path / 'case1 - copy'} hold the same series (1.2.1, 5 images in both): one is "
        "a copy of the other; move one away."
    )
    for collection in (True, False):
        with pytest.raises(ImageError) as caught:
            find_cases(tmp_path, collection=collection)
        assert str(caught.value) == said
    broken: list[tuple[str, ImageError]] = []
    assert list(find_cases(tmp_path, broken=broken)) == ["case1", "case2"]
    assert [(name, str(error)) for name, error in broken] == [("case1 - copy", said)]
    with pytest.raises(ImageError, match="hold the same series"):
        find_cases(tmp_path, series="1.2.1")


def test_a_copy_of_the_only_case_is_told_as_a_copy(tmp_path: Path) -> None:
    dicoms.write(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "IM0001").unlink()
    with pytest.raises(ImageError, match=r"a and .*b hold the same series \(1\.2\.826\.0\.1\.77\.1, 4 images in both"):
        find_cases(tmp_path)
    broken: list[ImageError] = []
    assert list(find_cases(tmp_path, broken=broken)) == ["a"]
    assert len(broken) == 1


def test_equal_uids_of_several_patients_are_no_copy(tmp_path: Path) -> None:
    for number in (1, 2):
        dicoms.write(tmp_path / f"case{number}", dicoms.stack(number), patient=f"N{number}")
    assert list(find_cases(tmp_path, collection=True)) == ["case1", "case2"]


def test_cases_are_named_in_the_normal_form(tmp_path: Path) -> None:
    for number, name in ((1, "Müller"), (2, "Schäfer")):
        place = tmp_path / unicodedata.normalize("NFD", name)
        dicoms.write(place, series=f"1.2.{number}", study=f"1.{number}", patient=f"N{number}")
    assert list(find_cases(tmp_path)) == ["Müller", "Schäfer"]
    assert np.prod([len(series.slices) for series in find_series(tmp_path)]) == 25
