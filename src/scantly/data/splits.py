"""Which cases are labeled, unlabeled, for validation and for test.

Subjects (patients, scans) are what is counted, drawn and kept together; :mod:`scantly.data.splitfile` says
how a dataset folder names them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from scantly.data.dataset import Dataset
from scantly.data.splitfile import SplitFile, left_out, listed, read_split_file, shared_subjects, split_faults
from scantly.errors import ConfigError, DatasetError

__all__ = ["Split", "resolve_split"]

Protocol = Literal["clean", "literature"]


@dataclass(frozen=True)
class Split:
    """The cases of one experiment.

    Attributes:
        labeled: Training cases whose labels are used.
        unlabeled: All other training cases; their labels, if any, are hidden.
        val: Cases on which the model is chosen.
        test: Cases that are looked at only at the end.
        unit: What subjects are called, for instance ``"patient"``.
        groups: Case -> subject, for every case above.
        origin: Where the split comes from, in one sentence.
    """

    labeled: tuple[str, ...]
    unlabeled: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]
    unit: str
    groups: Mapping[str, str]
    origin: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data for YAML and JSON."""
        plain = asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Split:
        """Undo :meth:`to_dict`.

        Raises:
            DatasetError: if a key is missing or unknown.
        """
        plain: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        known = {field.name for field in fields(cls)}
        if set(plain) != known:
            odd = ", ".join(sorted(map(str, set(plain) ^ known)))
            raise DatasetError(f"the recorded split lacks or does not know {odd}; train the run again.")
        return cls(**plain)


def resolve_split(
    dataset: Dataset,
    *,
    labeled: int | str | None = None,
    protocol: Protocol = "clean",
    seed: int = 0,
    seed_labeled: int | None = None,
) -> Split:
    """Decide the part of every case.

    Args:
        dataset: The dataset folder.
        labeled: How many units keep their labels: a number (the listed subset of ``splits.json`` if there is
            one of that number, else the first so many of ``train`` that have labels); ``"10%"``, a share of
            the units of ``train``, rounded down but at least one; None, all.
        protocol: ``"clean"`` uses ``dev_split`` where there is one, ``"literature"`` the official lists.
        seed: Draws validation subjects where no lists are given.
        seed_labeled: Draw the labeled units at random with this seed instead; a smaller number draws a part
            of what a greater one does. None: no draw.

    Returns:
        The split. Validation and test cases are in no other part, nor is any case of the same subject.

    Raises:
        DatasetError: if ``splits.json`` is wrong, or fewer units have labels than asked for.
        ConfigError: if ``labeled`` is no number or share.
    """
    file = read_split_file(dataset.root)
    if file is not None:
        faults = list(split_faults(file, dataset.root / "splits.json", dataset.train, dataset.test))
        if faults:
            more = f" ({len(faults) - 1} more: run scantly check)" if len(faults) > 1 else ""
            raise DatasetError(faults[0].message + more)
    file = file or SplitFile(unit="case")
    train, val, test, origin = _sides(dataset, file, protocol, seed)
    _require_apart(dataset, file, train, val, test)
    chosen, how = _labeled(dataset, file, train, labeled, seed_labeled)
    return Split(
        labeled=tuple(name for name in train if name in chosen),
        unlabeled=tuple(name for name in train if name not in chosen),
        val=val,
        test=test,
        unit=file.unit,
        groups={name: file.subject(name) for name in (*train, *val, *test)},
        origin=f"{origin}; labeled: {how}.",
    )


def _require_apart(dataset: Dataset, file: SplitFile, *sides: tuple[str, ...]) -> None:
    """Catch what the lists of ``splits.json`` cannot show alone: test cases taken from ``imagesTs``."""
    names = ("training", "validation", "test")
    for (one, first), (other, second) in itertools.combinations(zip(names, sides, strict=True), 2):
        shared = shared_subjects(file, first, second)
        if shared:
            raise DatasetError(
                f"{dataset.root} has {file.unit}s in both its {one} and its {other} part: {shared}; "
                "keep all cases of one on one side, or results mean nothing."
            )


def _sides(
    dataset: Dataset, file: SplitFile, protocol: Protocol, seed: int
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], str]:
    test = file.test
    if test is None:
        test = tuple(name for name, case in dataset.test.items() if case.label is not None)
    if protocol == "clean" and file.dev_split is not None:
        return file.dev_split.train, file.dev_split.val, test, "dev_split of splits.json"
    held = {file.subject(name) for name in (*(file.val or ()), *test)}
    rest = tuple(name for name in dataset.train if file.subject(name) not in held)
    if file.train is not None or file.val is not None:
        unused = left_out(file, dataset.train)
        also = f" ({len(unused)} cases of imagesTr are in no list and not used)" if unused else ""
        origin = f"train and val of splits.json{also}"
        return rest if file.train is None else file.train, file.val or (), test, origin
    val = _draw_validation(dataset, file, rest, seed)
    sides = {file.subject(name) for name in val}
    train = tuple(name for name in rest if file.subject(name) not in sides)
    return train, val, test, f"drawn by {file.unit} with seed {seed}"


def _draw_validation(dataset: Dataset, file: SplitFile, names: Sequence[str], seed: int) -> tuple[str, ...]:
    """A fifth of the labeled subjects if there are ten or more, else none; their labeled cases."""
    with_label = [name for name in names if _has_label(dataset, name)]
    subjects = list(dict.fromkeys(file.subject(name) for name in with_label))
    if len(subjects) < 10:
        return ()
    drawn = np.random.default_rng(seed).permutation(len(subjects))[: len(subjects) // 5]
    chosen = {subjects[index] for index in drawn}
    return tuple(name for name in with_label if file.subject(name) in chosen)


def _labeled(
    dataset: Dataset,
    file: SplitFile,
    train: Sequence[str],
    labeled: int | str | None,
    seed_labeled: int | None,
) -> tuple[set[str], str]:
    """The labeled cases of ``train``, and how they were chosen."""
    with_label = [name for name in train if _has_label(dataset, name)]
    subjects = list(dict.fromkeys(file.subject(name) for name in with_label))
    if labeled is None:
        if seed_labeled is not None:
            raise ConfigError("a seed for the labeled cases needs their number; give --labeled too.")
        if not with_label:
            raise DatasetError(f"{dataset.root} has no labeled training case; put labels into labelsTr.")
        return set(with_label), f"all {len(subjects)} {file.unit}s that have labels"
    units = len({file.subject(name) for name in train})
    number = _number(labeled, units)
    if number > len(subjects):
        raise DatasetError(
            f"--labeled {labeled} asks for {number} {file.unit}s, but {dataset.root} has {len(subjects)} "
            f"with labels among the {units} of its training part; ask for {len(subjects)} or fewer."
        )
    official = file.labeled.get(str(number))
    if seed_labeled is not None:
        order = np.random.default_rng(seed_labeled).permutation(len(subjects))[:number]
        chosen = {subjects[index] for index in order}
        how = f"{number} {file.unit}s drawn with seed {seed_labeled}"
    elif official is not None:
        missing = [name for name in official if name not in set(train)]
        if missing:
            raise DatasetError(
                f'{dataset.root}/splits.json: "labeled.{number}" names cases outside the training part of '
                f"this protocol: {listed(missing)}; ask for another number, or for --protocol literature."
            )
        return set(official), f"the listed subset of {number} {file.unit}s"
    else:
        chosen, how = set(subjects[:number]), f"the first {number} {file.unit}s that have labels"
    return {name for name in with_label if file.subject(name) in chosen}, how


def _number(labeled: int | str, units: int) -> int:
    """Number of units that ``7``, ``"7"`` or ``"10%"`` of ``units`` mean."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*", str(labeled))
    value = Fraction(match[1]) if match else Fraction(0)
    if match and match[2] and 0 < value <= 100:
        return max(1, int(units * value / 100))
    if match and not match[2] and value > 0 and value.denominator == 1 and not isinstance(labeled, bool):
        return int(value)
    raise ConfigError(f"--labeled is {labeled!r}; give a whole number above 0, or a share such as 10%.")


def _has_label(dataset: Dataset, name: str) -> bool:
    return dataset.case(name).label is not None
