"""The benchmark file: which methods on which data, with how many labels and which seeds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, field_validator, model_validator

from scantly.errors import ConfigError
from scantly.files import read_yaml
from scantly.settings import Settings, parse

__all__ = ["NNUNET", "PLANNED", "BenchmarkSpec", "DatasetEntry", "MethodEntry", "read_spec"]

#: Rows that a benchmark adds.
PLANNED = "supervised_planned"
NNUNET = "nnunetv2"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
_LONGEST = 100
#: Settings that the benchmark file says in another place -> where.
_SAID_ELSEWHERE = {
    "data.dataset": "path",
    "data.labeled": "labeled",
    "method.name": "methods",
    "training.seed": "seeds",
}


E = TypeVar("E", bound=Settings)


def _as_name(value: str, what: str) -> str:
    if not _NAME.fullmatch(value) or len(value) > _LONGEST:
        raise ValueError(
            f"{what} names a folder; use letters, digits, '_', '-', '.' and '+', {_LONGEST} of them at most"
        )
    return value


def _refuse_said_elsewhere(sections: Mapping[str, Any]) -> None:
    for key, place in _SAID_ELSEWHERE.items():
        section, setting = key.split(".")
        values = sections.get(section)
        if isinstance(values, Mapping) and setting in values:
            raise ValueError(f"{key} is said by '{place}'; leave it out here")


def _twice(values: Iterable[Any]) -> list[Any]:
    """What is there more than once."""
    listed = list(values)
    return [value for number, value in enumerate(listed) if listed.index(value) == number and listed.count(value) > 1]


def _row_faults(methods: Sequence[MethodEntry]) -> list[str]:
    """What is wrong with the names of the rows together."""
    twice = _twice(method.row for method in methods)
    faults = [f"{', '.join(twice)}: rows of one name; give each a label of its own"] if twice else []
    taken = [
        method.row
        for method in methods
        if method.row in {PLANNED, NNUNET} or (method.row == "supervised" and method.name != "supervised")
    ]
    return faults + [f"{row}: a row that the benchmark adds; choose another label" for row in taken]


class DatasetEntry(Settings):
    """One dataset under one protocol."""

    path: str = Field(description="Dataset folder; a relative one is relative to the benchmark file.")
    recipe: str | None = Field(None, description="Recipe by name, or a YAML file; null: as the data are planned.")
    protocol: Literal["clean", "literature"] | None = Field(None, description="Kind of protocol; null: clean.")
    labeled: tuple[int | str, ...] = Field(
        min_length=1, description="Labeled subjects: numbers, or shares such as '10%'."
    )
    split: Literal["val", "test"] | None = Field(
        None, description="Cases that are reported on; null: test where there are test cases, else val."
    )
    steps: int | None = Field(None, ge=1, description="Iterations of every cell; null: as the recipe says.")
    settings: dict[str, Any] = Field(
        default_factory=dict, description="Sections of the configuration, for every cell on these data."
    )

    @field_validator("labeled", mode="before")
    @classmethod
    def _counts(cls, value: object) -> tuple[int | str, ...]:
        if not isinstance(value, list | tuple):
            raise ValueError("write a list, for instance [3, 7]")
        counts: list[int | str] = []
        faults: list[str] = []
        for item in value:
            match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", str(item))
            amount = Fraction(match[1]) if match and not isinstance(item, bool) else Fraction(0)
            if match and match[2] and 0 < amount <= 100:
                counts.append(str(item))
            elif match and not match[2] and amount > 0 and amount.denominator == 1:
                counts.append(int(amount))
            else:
                faults.append(
                    f"{item!r} is no number above 0 and no share such as '10%'; all labels are upper_bound's matter"
                )
        amounts = [count if isinstance(count, int) else str(Fraction(count[:-1])) for count in counts]
        twice = [str(counts[amounts.index(amount)]) for amount in _twice(amounts)]
        faults += [f"listed more than once: {', '.join(twice)}"] if twice else []
        if faults:
            raise ValueError("; ".join(faults))
        return tuple(counts)

    @field_validator("settings")
    @classmethod
    def _said_once(cls, value: dict[str, Any]) -> dict[str, Any]:
        _refuse_said_elsewhere(value)
        return value


class MethodEntry(Settings):
    """One row of the benchmark: a method, perhaps with settings of its own."""

    name: str = Field(description="Name of a method.")
    label: str | None = Field(None, description="What the row is called, and its folders; null: the name.")
    settings: dict[str, Any] = Field(default_factory=dict, description="Settings of the method.")
    training: dict[str, Any] = Field(default_factory=dict, description="Settings of the section training.")
    network: dict[str, Any] = Field(default_factory=dict, description="Settings of the section network.")

    @property
    def row(self) -> str:
        """What the row is called."""
        return self.label or self.name

    @model_validator(mode="after")
    def _own_name(self) -> MethodEntry:
        _as_name(self.row, "a method's label")
        return self

    @model_validator(mode="after")
    def _said_once(self) -> MethodEntry:
        _refuse_said_elsewhere({"method": self.settings, "training": self.training})
        return self


class BenchmarkSpec(Settings):
    """A benchmark: every method on every dataset, with every number of labels and every seed."""

    title: str = Field("", description="Title of the report.")
    datasets: dict[str, DatasetEntry] = Field(min_length=1, description="Datasets by a name of one's own.")
    methods: tuple[MethodEntry, ...] = Field(min_length=1, description="Methods by name, or with settings.")
    seeds: tuple[int, ...] = Field((1, 2, 3), min_length=1, description="Seeds of every cell.")
    lower_bound: bool = Field(True, description="A row 'supervised' where the methods do not have it.")
    upper_bound: bool = Field(True, description="'supervised' with all training cases labeled.")
    planned: bool = Field(
        True,
        description="A row 'supervised_planned': preparation, patch, network, deep supervision and augmentation as "
        "Scantly plans them from the labeled cases, after nnU-Net, for as many iterations.",
    )
    nnunetv2: bool = Field(
        False, description="A row 'nnunetv2': nnU-Net itself on the same labeled cases, where it is installed."
    )

    @field_validator("datasets")
    @classmethod
    def _folder_names(cls, value: dict[str, DatasetEntry]) -> dict[str, DatasetEntry]:
        for name in value:
            _as_name(name, f"dataset {name!r}")
        return value

    @field_validator("methods", mode="before")
    @classmethod
    def _names_alone(cls, value: object) -> object:
        return (
            [{"name": item} if isinstance(item, str) else item for item in value]
            if isinstance(value, list | tuple)
            else value
        )

    @field_validator("methods")
    @classmethod
    def _rows_apart(cls, value: tuple[MethodEntry, ...]) -> tuple[MethodEntry, ...]:
        faults = _row_faults(value)
        if faults:
            raise ValueError("; ".join(faults))
        return value

    @field_validator("seeds")
    @classmethod
    def _seeds(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        faults = [f"{seed} is no number from 0 to 2^32 - 1" for seed in value if not 0 <= seed < 2**32]
        twice = _twice(value)
        faults += [f"listed more than once: {', '.join(map(str, twice))}"] if twice else []
        if faults:
            raise ValueError("; ".join(faults))
        return value


def read_spec(path: Path) -> BenchmarkSpec:
    """A benchmark file; paths of datasets and recipe files in it become absolute.

    Whether datasets, methods and settings exist is :func:`~scantly.benchmark.cells.resolve_cells`'s matter.

    Raises:
        ConfigError: if it is missing, no YAML, or naming every fault in it.
    """
    values = read_yaml(path)
    try:
        spec = _parse(values)
    except ConfigError as error:
        raise ConfigError("\n".join(f"{path}: {fault}" for fault in str(error).splitlines())) from None
    home = path.resolve().parent
    datasets = {}
    for name, entry in spec.datasets.items():
        changed: dict[str, Any] = {"path": str(_place(home, entry.path))}
        if entry.recipe and entry.recipe.endswith((".yaml", ".yml")):
            changed["recipe"] = str(_place(home, entry.recipe))
        datasets[name] = entry.model_copy(update=changed)
    return spec.model_copy(update={"datasets": datasets})


def _place(home: Path, name: str) -> Path:
    return (home / Path(name).expanduser()).resolve()


def _parse(values: Mapping[str, Any]) -> BenchmarkSpec:
    """Entries first, each by its own class: so an unknown key in one is told with the nearest that is known."""
    faults: list[str] = []
    own = dict(values)
    if isinstance(values.get("datasets"), Mapping):
        given = {f"datasets.{name}": entry for name, entry in values["datasets"].items()}
        sound = _sound(DatasetEntry, given, faults)
        own["datasets"] = {place.partition(".")[2]: entry for place, entry in sound.items()}
    if isinstance(values.get("methods"), list):
        given = {
            f"methods.{number}": {"name": entry} if isinstance(entry, str) else entry
            for number, entry in enumerate(values["methods"], start=1)
        }
        rows = list(_sound(MethodEntry, given, faults).values())
        faults_of_rows = _row_faults(rows)  # here, since the sentence of a settings class would print all rows
        faults += [f"methods: {fault}." for fault in faults_of_rows]
        own["methods"] = [] if faults_of_rows else rows
    stand_ins = {"datasets": {"none": DatasetEntry(path="", labeled=(1,))}, "methods": [MethodEntry(name="none")]}
    own |= {key: stand_in for key, stand_in in stand_ins.items() if values.get(key) and not own[key]}
    try:
        spec = parse(BenchmarkSpec, own, where="")
    except ConfigError as error:
        faults += str(error).splitlines()
    if faults:
        raise ConfigError("\n".join(faults))
    return spec


def _sound(kind: type[E], given: Mapping[str, Any], faults: list[str]) -> dict[str, E]:
    """Entries that are right, by their place in the file; what is wrong with the others comes to the faults."""
    found = {}
    for place, values in given.items():
        if not isinstance(values, Mapping):
            faults.append(f"{place} is {values!r}; write settings, for instance 'name: value' lines.")
            continue
        try:
            found[place] = parse(kind, values, where=place)
        except ConfigError as error:
            faults += str(error).splitlines()
    return found
