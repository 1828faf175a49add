"""``splits.json`` of a dataset folder, and what can be wrong with it.

::

    {"unit": "patient", "train": [cases], "val": [cases], "test": [cases],
     "dev_split": {"train": [cases], "val": [cases]},
     "labeled": {"7": [cases]}, "groups": {case: subject}}

All keys may be missing and others are ignored. Lists are in the official order: "the first seven patients" of
the literature are those of ``train``. A case without a group is its own subject.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, ConfigDict, Field

from scantly.data.layout import Case, Fault
from scantly.errors import ConfigError, DatasetError
from scantly.files import normal_name, read_json
from scantly.settings import Settings, parse

__all__ = [
    "Parts",
    "SplitFile",
    "left_out",
    "listed",
    "on_both_sides",
    "read_split_file",
    "shared_subjects",
    "split_faults",
]

_SIDES = (
    ("train", "val"),
    ("train", "test"),
    ("val", "test"),
    ("dev_split.train", "dev_split.val"),
    ("dev_split.train", "test"),
    ("dev_split.val", "test"),
)


Name = Annotated[str, AfterValidator(normal_name)]
"""Of a case or subject, compared with those of files and with each other."""


class Parts(Settings):
    """A pair of training and validation lists."""

    model_config = ConfigDict(extra="ignore")

    train: tuple[Name, ...] = Field(default=(), description="Training cases in the official order.")
    val: tuple[Name, ...] = Field(default=(), description="Validation cases.")


class SplitFile(Settings):
    """What ``splits.json`` says; None where a key is missing."""

    model_config = ConfigDict(extra="ignore")

    unit: str = Field(default="subject", description="What is counted, in words: patient, scan, image.")
    train: tuple[Name, ...] | None = Field(default=None, description="Training cases in the official order.")
    val: tuple[Name, ...] | None = Field(default=None, description="Validation cases.")
    test: tuple[Name, ...] | None = Field(default=None, description="Test cases.")
    dev_split: Parts | None = Field(default=None, description="Lists that the clean protocol uses instead.")
    labeled: dict[str, tuple[Name, ...]] = Field(
        default_factory=dict, description="Number of labeled units -> their cases."
    )
    groups: dict[Name, Name] = Field(default_factory=dict, description="Case -> subject.")

    def subject(self, case: str) -> str:
        """The subject a case belongs to: its group, else itself."""
        return self.groups.get(case, case)


def read_split_file(root: Path) -> SplitFile | None:
    """Read ``splits.json`` of a dataset folder; None if it has none.

    Raises:
        DatasetError: if it is not JSON or a key holds something else than what it should.
    """
    path = root / "splits.json"
    if not path.is_file():
        return None
    try:
        content = read_json(path)
    except ConfigError as error:
        raise DatasetError(str(error)) from error
    try:
        return parse(SplitFile, content, where="")
    except ConfigError as error:
        faults = (f"{path}: {fault.removeprefix('setting ')}" for fault in str(error).splitlines())
        raise DatasetError("\n".join(faults)) from error


def split_faults(file: SplitFile, path: Path, train: Mapping[str, Case], test: Mapping[str, Case]) -> Iterator[Fault]:
    """Find everything wrong with ``splits.json``, whatever protocol will be asked for.

    Args:
        file: What it says.
        path: Where it lies, for the sentences.
        train: Cases of ``imagesTr`` by name.
        test: Cases of ``imagesTs`` by name.
    """
    lists = _lists(file)
    for key, names in lists.items():
        training = key.endswith("train") or key.startswith("labeled")
        for code, sentence in _list_faults(key, names, train if training else {**test, **train}, training):
            yield Fault(code, str(path), f'{path}: "{key}" {sentence}')
    if file.train is not None:
        known = {*file.train, *lists.get("dev_split.train", ())}
        for number, names in file.labeled.items():
            outside = [name for name in names if name in train and name not in known]
            if outside:
                sentence = f'names cases that are not in "train": {listed(outside)}; take them out.'
                yield Fault("split_labeled_not_train", str(path), f'{path}: "labeled.{number}" {sentence}')
    for one, other in _SIDES:
        shared = shared_subjects(file, lists.get(one, ()), lists.get(other, ()))
        if shared:
            yield Fault(
                "subject_on_both_sides",
                str(path),
                f'{path}: "{one}" and "{other}" share the {file.unit} {shared}; '
                f"keep all cases of a {file.unit} on one side, or results mean nothing.",
            )


def left_out(file: SplitFile, train: Iterable[str]) -> list[str]:
    """Cases of ``imagesTr`` that no list names, where there is a list of training cases: no run uses them."""
    if file.train is None:
        return []
    parts = file.dev_split or Parts()
    named = {*file.train, *(file.val or ()), *(file.test or ()), *parts.train, *parts.val}
    return [name for name in train if name not in named]


def _list_faults(
    key: str, names: Sequence[str], known: Mapping[str, Case], training: bool
) -> Iterator[tuple[str, str]]:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        yield "split_repeats", f"names cases more than once: {listed(repeated)}; remove the repetitions."
    unknown = [name for name in names if name not in known]
    if unknown:
        folders = "imagesTr" if training else "imagesTr or imagesTs"
        yield (
            "split_unknown_case",
            f"names cases that are not in {folders}: {listed(unknown)}; add the scans or take the names out.",
        )
    bare = [name for name in names if name in known and known[name].label is None]
    if bare and not key.endswith("train"):
        yield (
            "split_no_label",
            f"names cases without a label file: {listed(bare)}; add the labels or take the names out.",
        )


def _lists(file: SplitFile) -> dict[str, tuple[str, ...]]:
    lists = {"train": file.train or (), "val": file.val or (), "test": file.test or ()}
    if file.dev_split is not None:
        lists |= {"dev_split.train": file.dev_split.train, "dev_split.val": file.dev_split.val}
    return lists | {f"labeled.{number}": names for number, names in file.labeled.items()}


def on_both_sides(file: SplitFile, one: str, other: str) -> bool:
    """Whether any pair of lists that must stay apart has one case in each."""
    lists = {key: set(names) for key, names in _lists(file).items()}
    pairs = [(lists.get(first, set()), lists.get(second, set())) for first, second in _SIDES]
    return any((one in first and other in second) or (other in first and one in second) for first, second in pairs)


def listed(names: Iterable[str]) -> str:
    """The first five names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def shared_subjects(file: SplitFile, one: Iterable[str], other: Iterable[str]) -> str:
    """Subjects that have cases in both lists, for a sentence; empty if there are none."""
    here = {file.subject(name) for name in one}
    return listed(dict.fromkeys(subject for subject in map(file.subject, other) if subject in here))
