"""The cells of a benchmark: one training and its evaluation each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from scantly.benchmark.nnunet import require_nnunet
from scantly.benchmark.spec import NNUNET, PLANNED, BenchmarkSpec, DatasetEntry, MethodEntry
from scantly.errors import ConfigError, ScantlyError
from scantly.methods import catalogue
from scantly.settings import merge
from scantly.training.config import RunConfig
from scantly.training.recipes import read_recipe
from scantly.training.resolve import resolve

__all__ = ["ALL", "NNUNET", "PLANNED", "Cell", "cells_of", "resolve_cells"]

#: ``labeled`` of the upper bound.
ALL = "all"


@dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
        dataset: Name of the dataset in the benchmark file.
        row: Name of the method's row.
        labeled: Number or share of labeled subjects, or :data:`ALL`.
        seed: Its seed.
        split: Cases that are reported on; ``None``: not known before it is resolved.
        config: What is trained; ``None`` before it is resolved.
    """

    dataset: str
    row: str
    labeled: int | str
    seed: int
    split: Literal["val", "test"] | None = None
    config: RunConfig | None = None

    @property
    def name(self) -> str:
        """Unique in the benchmark, and the path of its run folder below ``cells``."""
        labeled = str(self.labeled).replace("%", "pct")
        return str(PurePosixPath(self.dataset, f"{self.row}-{labeled}-seed{self.seed}"))


def cells_of(spec: BenchmarkSpec) -> list[Cell]:
    """All cells, one seed after the other, so that every row is there once before any is there twice."""
    return list(_each(spec))


def _each(spec: BenchmarkSpec) -> Iterator[Cell]:
    rows = [method.row for method in _methods(spec)]
    rows += [NNUNET] if spec.nnunetv2 else []
    for seed in spec.seeds:
        for dataset, entry in spec.datasets.items():
            for labeled in entry.labeled:
                for row in rows:
                    yield Cell(dataset, row, labeled, seed)
            if spec.upper_bound:
                yield Cell(dataset, "supervised", ALL, seed)


def _methods(spec: BenchmarkSpec) -> list[MethodEntry]:
    methods = list(spec.methods)
    known = {method.row for method in methods}
    if "supervised" not in known and spec.lower_bound:
        methods.insert(0, MethodEntry(name="supervised"))
    if spec.planned and PLANNED not in known:
        methods.append(
            MethodEntry(
                name="supervised",
                label=PLANNED,
                network={"name": "dynunet", "arguments": {"deep_supervision": True}},
            )
        )
    return methods


def resolve_cells(spec: BenchmarkSpec, *, flags: dict[str, Any] | None = None) -> list[Cell]:
    """Every cell with its configuration, before anything is trained.

    Args:
        spec: The benchmark.
        flags: ``device`` and ``precision`` for every cell, see :func:`~scantly.training.resolve.flags_to_layer`.

    Raises:
        ConfigError: naming every fault of every cell, each once.
    """
    faults: dict[str, list[str]] = {}
    if spec.nnunetv2:
        try:
            require_nnunet()
        except ConfigError as error:
            faults[str(error)] = [NNUNET]
    # nnU-Net takes the labels, dimensions and length of the supervised row
    methods = {name: MethodEntry(name="supervised") for name in ("supervised", NNUNET)}
    methods |= {method.row: method for method in _methods(spec)}
    known: dict[tuple[str, str, int | str], Cell | list[str]] = {}  # but for the seed, which decides nothing else
    resolved = []
    for cell in cells_of(spec):
        key = (cell.dataset, cell.row, cell.labeled)
        if key not in known:
            known[key] = _resolved(cell, spec.datasets[cell.dataset], methods[cell.row], flags or {})
        found = known[key]
        if isinstance(found, Cell):
            resolved.append(_with_seed(found, cell.seed))
            continue
        for sentence in found:
            faults.setdefault(sentence, []).append(cell.name)
    if faults:
        raise ConfigError("\n".join(f"{_some(names)}: {sentence}" for sentence, names in faults.items()))
    return resolved


def _with_seed(cell: Cell, seed: int) -> Cell:
    assert cell.config is not None
    training = cell.config.training.model_copy(update={"seed": seed})
    return replace(cell, seed=seed, config=cell.config.model_copy(update={"training": training}))


def _resolved(cell: Cell, entry: DatasetEntry, method: MethodEntry, flags: dict[str, Any]) -> Cell | list[str]:
    """The cell with its configuration, or everything that is wrong with it."""
    if not Path(entry.path).is_dir():
        gone = f"the dataset folder {entry.path} does not exist; correct the path in the benchmark file."
        of_recipe = _faults(partial(read_recipe, entry.recipe)) if entry.recipe else []
        return [gone, *_faults(partial(catalogue.find, method.name)), *of_recipe]
    own = _own_sections(method)
    resolving = partial(_resolve, cell, entry, _flags(cell, entry, method.name, flags))
    try:
        config = resolving(common=entry.settings, own=own)
    except ScantlyError as error:
        # resolving ends at the first section with a fault; without those of one side the other's show, and the count's
        data = {key: values for key, values in entry.settings.items() if key == "data"}
        besides = _faults(partial(resolving, common=data, own=own), partial(resolving, common=data, own={}))
        return list(dict.fromkeys([*str(error).splitlines(), *besides]))
    split = entry.split or ("test" if config.split["test"] else "val")
    unfit = _unfit(cell, config, split)
    return replace(cell, split=split, config=config) if unfit is None else [unfit]


def _unfit(cell: Cell, config: RunConfig, split: Literal["val", "test"]) -> str | None:
    """Why a configuration that could be trained is no cell."""
    if config.training.devices * config.training.nodes > 1:
        return "a cell trains on one device; leave out training.devices and training.nodes."
    if cell.labeled == ALL and config.data.labeled is not None:
        return "the recipe says data.labeled, so all labels cannot be had; set upper_bound to false."
    if not config.split[split]:
        return f"there are no {split} cases to report on; choose another split."
    if split == "val" and config.evaluation.selection == "best":
        return "val cases choose the checkpoint, so they cannot be reported on; set evaluation.selection to last."
    return None


def _faults(*attempts: Callable[[], object]) -> list[str]:
    sentences: list[str] = []
    for attempt in attempts:
        try:
            attempt()
        except ScantlyError as error:
            sentences += str(error).splitlines()
    return sentences


def _own_sections(method: MethodEntry) -> dict[str, Any]:
    sections = {"method": method.settings, "training": method.training, "network": method.network}
    return {key: values for key, values in sections.items() if values}


def _resolve(
    cell: Cell, entry: DatasetEntry, given: dict[str, Any], *, common: dict[str, Any], own: dict[str, Any]
) -> RunConfig:
    if cell.row != PLANNED:
        return resolve(entry.path, recipe=entry.recipe, flags=given, sets=merge(common, own))
    # cases, dimensions and length are those of the others; all else is planned
    plain = resolve(entry.path, recipe=entry.recipe, flags=given, sets=common)
    return resolve(entry.path, flags=given, sets=merge(own, _shared(plain)))


def _shared(plain: RunConfig) -> dict[str, Any]:
    """What the planned row has in common with the others."""
    settings = {
        "data": ("seed_labeled", "seed_split", "store", "workers"),
        "plan": ("spatial_dims",),
        "training": ("steps", "precision", "device", "log_every"),
        "evaluation": ("selection",),
    }
    values = plain.model_dump(mode="json")
    return {section: {key: values[section][key] for key in keys} for section, keys in settings.items()}


def _flags(cell: Cell, entry: DatasetEntry, method: str, flags: dict[str, Any]) -> dict[str, Any]:
    return {
        "method": method,
        "labeled": None if cell.labeled == ALL else cell.labeled,
        "seed": cell.seed,
        "protocol": entry.protocol,
        "steps": entry.steps,
        **flags,
    }


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
