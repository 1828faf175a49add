"""The published results of the literature, as data.

One row per number, as printed, in the CSV files of the folder ``published``. The same method on the same data
differs by ten points of Dice and more between protocols (UA-MT on ACDC with 3 patients: 46.04 or 61.0), so every
row names its lineage, and numbers of different lineages never belong in one table.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from types import MappingProxyType

from scantly.errors import ConfigError, unknown_name

__all__ = ["LABELED_UNITS", "LINEAGES", "MEAN", "METRICS", "PublishedResult", "published_results"]

MEAN = "mean"
"""``class_name`` of an average over the foreground classes."""

METRICS: Mapping[str, tuple[str, tuple[str, ...]]] = MappingProxyType(
    {
        "dice": ("Dice", ("%",)),
        "jaccard": ("Jaccard", ("%",)),
        "miou": ("mIoU", ("%",)),
        "hd95": ("HD95", ("voxel", "mm", "not stated")),
        "asd": ("ASD", ("voxel", "mm", "not stated")),
    }
)
"""Title and possible units of each metric. Shares are greater where better, distances smaller."""

LABELED_UNITS = ("patients", "scans", "cases", "images", "percent")
"""What ``labeled`` counts: as the publication says, percent where it gives no count."""

LINEAGES: Mapping[str, str] = MappingProxyType(
    {
        "62/20": "Pancreas-CT, 62 scans for training and 20 for test, as MC-Net and DTC",
        "arco": "comparison printed by the ARCO paper (NeurIPS 2023)",
        "caml": "LA, 80 scans for training and 20 for test, training logs of CAML",
        "coranet": "Pancreas-CT, 12 + 50 scans for training and 18 for test, as CoraNet and BCP",
        "crossmatch": "LA, 80 scans for training and 20 for test, run again by the CrossMatch project",
        "dualfete": "comparison printed by the DualFete paper (AAAI 2026)",
        "mcnet": "LA, 80 scans for training and 20 for test, MC-Net's code: no filter of components",
        "opmatch": "Pancreas-CT, mixed protocol of the OPMatch README, neither 62/20 nor CoraNet's split",
        "plgcl": "comparison on the poster of PLGCL (CVPR 2023); Dice is printed as a fraction there",
        "sfpc": "comparison printed by the SFPC paper (BIBM 2023), 3D networks, 100 cases for training",
        "ssl4mis": "ACDC, 70 patients for training, 10 for validation, 20 for test; checkpoint chosen on validation",
        "ssnet": "LA, 80 scans for training and 20 for test, checkpoint chosen on test, largest component kept",
        "uamt": "LA, 80 scans for training and 20 for test, as the papers print; last of 6,000 iterations unless noted",
        "ug_mcl": "LA, 80 scans for training and 20 for test, comparison printed by the UG-MCL paper",
        "unconfirmed": "a value in circulation of which the origin is not confirmed",
        "unimatch": "ACDC, validation and test patients together, best epoch chosen on the same patients",
        "unimatch-quoted": "ACDC, earlier work as quoted by UniMatch; protocol not confirmed",
    }
)
"""The protocol behind each lineage, in one sentence."""

_COLUMNS = (
    *("method", "variant", "dataset", "lineage", "labeled", "labeled_unit", "class", "metric"),
    *("value", "unit", "spread", "source", "note"),
)


@dataclass(frozen=True)
class PublishedResult:
    """One number of a published table.

    Attributes:
        method: Scantly's name where the method is in the catalogue, else a name in the same style (``bcp``).
            A network trained on the labeled cases alone, or on all labels, is ``supervised``.
        variant: What sets the row apart from the method's usual one: a sampler, a part left out, another epoch;
            empty for the usual one.
        dataset: For instance ``acdc``, ``la``, ``pancreas_ct``, ``brats2019``.
        lineage: A key of :data:`LINEAGES`; numbers of different lineages are not comparable.
        labeled: How many were labeled, in ``labeled_unit``: a whole number above 0, or above 0 to 100 for percent.
        labeled_unit: One of :data:`LABELED_UNITS`.
        class_name: ``mean`` (over the foreground classes), or a class as the publication calls it.
        metric: A key of :data:`METRICS`.
        value: The number in ``unit``: 0 to 100 for ``%``, 0 or greater for distances.
        decimals: How many decimals of it are printed, 0 or more.
        unit: ``%``, ``voxel``, ``mm``, or ``not stated`` for distances of which the publication tells no unit.
        spread: The ± beside the number, in the same unit; ``None`` where there is none.
        source: Where the number was read. Most papers' baselines are copies of copies.
        note: Warnings on this number, parted by semicolons; empty where there is none.
    """

    method: str
    variant: str
    dataset: str
    lineage: str
    labeled: float
    labeled_unit: str
    class_name: str
    metric: str
    value: float
    decimals: int
    unit: str
    spread: float | None
    source: str
    note: str


def published_results(
    method: str | None = None,
    dataset: str | None = None,
    *,
    lineage: str | None = None,
    metric: str | None = None,
    class_name: str | None = None,
) -> tuple[PublishedResult, ...]:
    """The published numbers that fit, in the order of the tables they come from.

    Args:
        method: Only this one; a name without published numbers gives none. ``None``, here and below: all.
        dataset: Only this one.
        lineage: Only this key of :data:`LINEAGES`.
        metric: Only this key of :data:`METRICS`.
        class_name: Only this class; ``"mean"`` for averages over the foreground classes.

    Returns:
        Shares in percent, distances in the unit that each row names.

    Raises:
        ConfigError: if no row has that dataset, lineage, metric or class; the nearest name is offered.

    Example:
        >>> rows = published_results("mc_net_plus", "acdc", lineage="ssl4mis", metric="dice")
        >>> [(row.labeled, row.labeled_unit, row.value, row.unit) for row in rows]
        [(7, 'patients', 87.1, '%'), (14, 'patients', 88.51, '%')]
    """
    rows = _read()
    wanted = {"dataset": dataset, "lineage": lineage, "metric": metric, "class_name": class_name}
    for field, name in wanted.items():
        if name is not None:
            known = {getattr(row, field) for row in rows}
            if name not in known:
                raise ConfigError(unknown_name(f"{field.removesuffix('_name')} of published results", name, known))
            rows = tuple(row for row in rows if getattr(row, field) == name)
    return rows if method is None else tuple(row for row in rows if row.method == method)


@cache
def _read() -> tuple[PublishedResult, ...]:
    """All rows of all files, checked.

    Raises:
        ValueError: if a file of the package is at fault, with its line.
    """
    rows: dict[tuple[object, ...], PublishedResult] = {}
    folder = files("scantly.benchmark").joinpath("published")
    for file in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if file.name.endswith(".csv"):
            for place, row in _rows(file):
                key = (
                    *(row.method, row.variant, row.dataset, row.lineage, row.labeled, row.labeled_unit),
                    *(row.class_name, row.metric, row.source),
                )
                if key in rows:
                    raise ValueError(f"{place}: this result is there twice: {key}")
                rows[key] = row
    return tuple(rows.values())


def _rows(file: Traversable) -> list[tuple[str, PublishedResult]]:
    """The rows of one file, each with its place in words."""
    reader = csv.DictReader(file.read_text(encoding="utf-8").splitlines(), strict=True)
    if tuple(reader.fieldnames or ()) != _COLUMNS:
        raise ValueError(f"{file.name}: the columns are {reader.fieldnames}, not {list(_COLUMNS)}")
    found = []
    for fields in reader:
        place = f"{file.name}, line {reader.line_num}"
        try:
            found.append((place, _row(fields)))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{place}: {error}") from error
    return found


def _row(fields: Mapping[str, str]) -> PublishedResult:
    """One row of a file, checked.

    Raises:
        ValueError: if a field is missing, of the wrong type, out of range or not known.
    """
    for column in ("method", "dataset"):
        _require(re.fullmatch(r"[a-z][a-z0-9_]*", fields[column]) is not None, column, fields[column])
    for column in ("class", "source"):
        _require(bool(fields[column]), column, fields[column])
    metric, unit, labeled_unit = fields["metric"], fields["unit"], fields["labeled_unit"]
    _require(fields["lineage"] in LINEAGES, "lineage", fields["lineage"])
    _require(metric in METRICS and unit in METRICS[metric][1], "metric and unit", f"{metric} in {unit}")
    _require(labeled_unit in LABELED_UNITS, "labeled_unit", labeled_unit)
    _require(re.fullmatch(r"\d+(\.\d+)?", fields["value"]) is not None, "value", fields["value"])
    labeled, value = float(fields["labeled"]), float(fields["value"])
    whole = labeled.is_integer()
    _require(labeled > 0 and (labeled <= 100 if labeled_unit == "percent" else whole), "labeled", fields["labeled"])
    _require(value <= 100 or unit != "%", "value", fields["value"])
    spread = float(fields["spread"]) if fields["spread"] else None
    _require(spread is None or 0 <= spread < math.inf, "spread", fields["spread"])
    return PublishedResult(
        method=fields["method"],
        variant=fields["variant"],
        dataset=fields["dataset"],
        lineage=fields["lineage"],
        labeled=int(labeled) if whole else labeled,
        labeled_unit=labeled_unit,
        class_name=fields["class"],
        metric=metric,
        value=value,
        decimals=len(fields["value"].partition(".")[2]),
        unit=unit,
        spread=spread,
        source=fields["source"],
        note=fields["note"],
    )


def _require(holds: bool, column: str, value: str) -> None:
    if not holds:
        raise ValueError(f"column {column} holds {value!r}")
