"""Patients told apart as the DICOM standard compares names, without keeping a name or number.

A person's name has up to three groups (alphabetic, ideographic, phonetic) of five components each, in a character
set that the file names (PS3.5, section 6.2). Components that are left out at the end, upper and lower case, spaces and
the way in which letters are encoded make no difference; nor does a group that only one of two files has.
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

from scantly.files import normal_name

__all__ = ["Person", "count_persons", "person_of"]


@dataclass(frozen=True)
class Person:
    """Check sums of a patient's ID and of the groups of the name; empty where there is none.

    Attributes:
        number: Of PatientID.
        names: Of the alphabetic, ideographic and phonetic group of PatientName.
    """

    number: str
    names: tuple[str, ...]

    def same(self, other: Person) -> bool:
        """Whether two files can be of one patient: equal IDs, and names that agree as far as both are known."""
        if self.number != other.number:
            return False
        both = [(one, two) for one, two in zip(self.names, other.names, strict=True) if one and two]
        unnamed = not (any(self.names) and any(other.names))
        return unnamed or any(one == two for one, two in both)


def count_persons(persons: Iterable[Person]) -> int:
    """How many patients there are; files that agree with a third one are of one patient."""
    groups: list[list[Person]] = []
    for person in dict.fromkeys(persons):
        alike = [group for group in groups if any(person.same(other) for other in group)]
        groups = [group for group in groups if group not in alike]
        groups.append([person, *(other for group in alike for other in group)])
    return len(groups)


@functools.lru_cache(maxsize=256)
def person_of(number: bytes, name: bytes, character_set: str) -> Person:
    r"""The patient of a file.

    Args:
        number: PatientID as stored.
        name: PatientName as stored, groups separated by ``=``.
        character_set: SpecificCharacterSet; several separated by ``\``.
    """
    from pydicom.charset import convert_encodings, decode_bytes
    from pydicom.valuerep import PersonName

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an unknown character set is read as the default one; it must not end a run
        encodings = convert_encodings([part.strip() for part in character_set.split("\\")])
        person = PersonName(name, encodings).decode()
        groups = [str(person.alphabetic), str(person.ideographic), str(person.phonetic)]
        plain = decode_bytes(number, encodings, set())
    return Person(_sum(normal_name(plain.strip("\0 "))), tuple(_sum(_plain(group)) for group in groups))


def _plain(group: str) -> str:
    """A group of a name without what makes no difference: case, spaces, empty components at the end."""
    components = [" ".join(part.split()) for part in normal_name(group.strip("\0")).casefold().split("^")]
    return "^".join(components).rstrip("^")


def _sum(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16] if text else ""
