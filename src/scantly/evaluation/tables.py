"""Tables of metrics: one row per case and class, summaries over cases and over seeds.

Averages are taken over cases first, per class, and then over classes, as the literature does. Standard
deviations are those of a sample (``n - 1``), and null where there is one value only.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from scantly.errors import ConfigError, RunError, unknown_name
from scantly.evaluation.metrics import (
    CONVENTIONS,
    TOLERANCE_MM,
    TOLERANCE_VOXELS,
    Convention,
    Row,
)
from scantly.files import atomic_path, normal_name, read_text

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "COUNTS",
    "DEFINITIONS",
    "Definition",
    "aggregate_seeds",
    "case_means",
    "check_convention",
    "load_table",
    "make_table",
    "save_table",
    "summarize",
]


class Definition(NamedTuple):
    """What a metric column holds.

    Attributes:
        title: Short name for a table's head.
        text: Definition in one sentence.
        unit: ``"1"`` for shares from 0 to 1, ``"voxels"`` or ``"mm"``.
        higher_is_better: Whether a greater value is a better segmentation.
    """

    title: str
    text: str
    unit: str
    higher_is_better: bool


def _distance_definitions(unit: str) -> dict[str, Definition]:
    measure = "voxels, spacing ignored" if unit == "voxels" else "mm, with the case's own spacing"
    surface = "Surface voxels are those with a face neighbor outside the mask"
    tolerance = f"{TOLERANCE_VOXELS:g} voxel" if unit == "voxels" else "the tolerance in mm named with the table"
    return {
        f"hd95_{unit}": Definition(
            "HD95",
            "95th percentile (linear interpolation) of the distances from each surface to the other, both "
            f"directions together, in {measure}. {surface}.",
            unit,
            False,
        ),
        f"asd_{unit}": Definition(
            "ASD",
            f"Mean distance from the prediction's surface to the reference's, one direction, in {measure}. {surface}.",
            unit,
            False,
        ),
        f"assd_{unit}": Definition(
            "ASSD",
            f"Mean of the surface distances of both directions together, in {measure}. {surface}.",
            unit,
            False,
        ),
        f"nsd_{unit}": Definition(
            "NSD",
            f"Normalized surface Dice: share of the surface voxels of both masks within {tolerance} of the "
            f"other surface. {surface}.",
            "1",
            True,
        ),
    }


DEFINITIONS: dict[str, Definition] = {
    "dice": Definition("Dice", "2 |P and R| / (|P| + |R|) of prediction P and reference R.", "1", True),
    "jaccard": Definition("Jaccard", "|P and R| / |P or R| of prediction P and reference R.", "1", True),
    **_distance_definitions("voxels"),
    **_distance_definitions("mm"),
}

COUNTS: dict[str, str] = {
    "cases": "Cases in the table.",
    "averaged": "Cases whose Dice enters the mean.",
    "scored": "Cases in which prediction and reference both have the class.",
    "missed": "Cases in which only the reference has the class.",
    "spurious": "Cases in which only the prediction has the class.",
    "both_empty": "Cases in which neither has the class.",
}

_TEXT_COLUMNS = ("case", "class", "status")


def make_table(rows: Iterable[Row]) -> pd.DataFrame:
    """Collect the rows of :func:`scantly.evaluation.score_case` of all cases.

    Args:
        rows: Rows of any number of cases, in the order that the table shall have.

    Returns:
        Columns ``case``, ``class``, ``status`` and those of :data:`DEFINITIONS`.
    """
    import pandas as pd

    return pd.DataFrame(list(rows), columns=[*_TEXT_COLUMNS, *DEFINITIONS])


def save_table(table: pd.DataFrame, path: Path) -> None:
    """Write the per-case table as CSV with one header line, whole or not at all; NaN is an empty field."""
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n")


def load_table(path: Path) -> pd.DataFrame:
    """Read a per-case table that :func:`save_table` wrote; numbers come back bit for bit.

    Raises:
        RunError: if the file is missing, is not CSV, lacks a column or holds a word in place of a number.
    """
    import pandas as pd

    if not path.exists():
        raise RunError(f"{path} does not exist; run `scantly evaluate` first.")
    try:
        text = read_text(path)
        table = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False)  # cases may be named "NA"
    except ConfigError as error:
        raise RunError(str(error)) from error
    except pd.errors.EmptyDataError:
        raise RunError(f"{path} is empty; evaluate again.") from None
    except pd.errors.ParserError as error:
        reason = " ".join(str(error).split())
        raise RunError(f"{path} is not a table of metrics ({reason}); evaluate again.") from error
    if text.startswith(f"{_TEXT_COLUMNS[0]};"):
        raise RunError(f"{path} is separated by semicolons, as a spreadsheet saved it; evaluate again.")
    missing = [name for name in (*_TEXT_COLUMNS, *DEFINITIONS) if name not in table.columns]
    if missing:
        raise RunError(f"{path} lacks the columns {', '.join(missing)}; evaluate again.")
    for name in ("case", "class"):  # tables of several runs are compared by them
        table[name] = [normal_name(value) for value in table[name]]
    for name in DEFINITIONS:
        try:
            table[name] = [float(value) if value else np.nan for value in table[name]]
        except ValueError as error:
            raise RunError(f"{path}: column {name} does not hold numbers ({error}); evaluate again.") from error
    return table


def case_means(table: pd.DataFrame, metric: str) -> pd.Series[float]:
    """Mean over classes of one metric, per case.

    Args:
        table: Per-case table.
        metric: Column of :data:`DEFINITIONS`.

    Returns:
        Values by case in the table's order. Values that are NaN, by the clean convention those of classes that neither
        mask has, are left out; NaN if all are.

    Raises:
        ConfigError: if the metric is unknown.
    """
    if metric not in DEFINITIONS:
        raise ConfigError(unknown_name("metric", metric, DEFINITIONS))
    means: pd.Series[float] = table.groupby("case", sort=False)[metric].mean()
    return means


def summarize(
    table: pd.DataFrame,
    *,
    protocol: str,
    convention: Convention = "clean",
    tolerance_mm: float = TOLERANCE_MM,
) -> dict[str, Any]:
    """Summary of a per-case table: per class over cases, then over classes.

    Args:
        table: Per-case table with each case and class once.
        protocol: Name of the protocol that the numbers belong to, for the record.
        convention: How empty masks were scored (:data:`scantly.evaluation.CONVENTIONS`).
        tolerance_mm: Tolerance with which ``nsd_mm`` was computed, for the record.

    Returns:
        Plain data for JSON, null where nothing can be said: ``protocol``, ``convention``, ``empty_masks``
        (what the convention means), ``tolerance_mm``, ``tolerance_voxels``, ``aggregation``, ``definitions``
        (column to title, text, unit, higher_is_better), ``classes`` and ``overall``. ``classes`` maps each
        class to its counts (:data:`COUNTS`) and to ``{"mean", "std_over_cases"}`` per metric. ``overall`` has
        ``cases``, the other counts added up over the classes, and per metric the mean of the class means
        and as ``std_over_cases`` the deviation of the per-case means over classes.

    Raises:
        RunError: if the table is empty, has a case and class twice, or was scored by another convention.
        ConfigError: if the convention is unknown.
    """
    if convention not in CONVENTIONS:
        raise ConfigError(unknown_name("convention", convention, CONVENTIONS))
    _check_rows(table)
    check_convention(table, convention)
    classes = {
        str(name): _counts(rows) | {metric: _spread(rows[metric], "cases") for metric in DEFINITIONS}
        for name, rows in table.groupby("class", sort=False)
    }
    overall: dict[str, Any] = _counts(table) | {"cases": int(table["case"].nunique())}
    for metric in DEFINITIONS:
        means = [scores[metric]["mean"] for scores in classes.values() if scores[metric]["mean"] is not None]
        deviation = _spread(case_means(table, metric), "cases")["std_over_cases"]
        overall[metric] = {"mean": float(np.mean(means)) if means else None, "std_over_cases": deviation}
    return {
        "protocol": protocol,
        "convention": convention,
        "empty_masks": CONVENTIONS[convention],
        "tolerance_mm": float(tolerance_mm),
        "tolerance_voxels": TOLERANCE_VOXELS,
        "aggregation": "mean over cases per class, then over classes; sample standard deviation",
        "definitions": {name: definition._asdict() for name, definition in DEFINITIONS.items()},
        "classes": classes,
        "overall": overall,
    }


def aggregate_seeds(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and spread over runs that differ in their seed only.

    Args:
        summaries: Results of :func:`summarize`, one per seed.

    Returns:
        The first summary's description, ``seeds`` (how many), ``classes`` and ``overall`` with
        ``{"mean", "std_over_seeds", "per_seed"}`` of each metric's mean and with the counts of all seeds
        added up.

    Raises:
        RunError: if there is no summary or they were not made in the same way.
    """
    if not summaries:
        raise RunError("there is no summary to aggregate; give at least one run.")
    first = summaries[0]
    for key in ("protocol", "convention", "tolerance_mm", "tolerance_voxels"):
        values = {summary[key] for summary in summaries}
        if len(values) > 1:
            listed = ", ".join(sorted(str(value) for value in values))
            raise RunError(f"runs with different {key} ({listed}) are not seeds of one; aggregate them apart.")
    names = list(first["classes"])
    if any(list(summary["classes"]) != names for summary in summaries):
        raise RunError("runs with different classes are not seeds of one; aggregate them apart.")
    described = {key: value for key, value in first.items() if key not in ("classes", "overall")}
    return described | {
        "aggregation": f"{first['aggregation']}; then mean and sample standard deviation over seeds",
        "seeds": len(summaries),
        "classes": {name: _over_seeds([summary["classes"][name] for summary in summaries]) for name in names},
        "overall": _over_seeds([summary["overall"] for summary in summaries]),
    }


def _check_rows(table: pd.DataFrame) -> None:
    if table.empty:
        raise RunError("the table of metrics has no rows; evaluate at least one case with a label.")
    twice = table[table.duplicated(["case", "class"])]
    if not twice.empty:
        row = twice.iloc[0]
        raise RunError(
            f"case {row['case']} has class {row['class']} more than once in the table of metrics; "
            "keep one run per table."
        )


def check_convention(table: pd.DataFrame, convention: Convention, what: str = "the table of metrics") -> None:
    """Refuse a table in which a class in neither mask has another score than the convention gives it.

    Args:
        table: Per-case table.
        convention: How its empty masks are to be scored.
        what: Where the table comes from, for the message.

    Raises:
        RunError: if a row differs; it was scored by another convention, or by an older version.
    """
    empty = table[table["status"] == "both_empty"]
    other = empty[empty["dice"] != 0] if convention == "literature" else empty[empty["dice"].notna()]
    if not other.empty:
        row = other.iloc[0]
        said = "nothing" if np.isnan(row["dice"]) else f"{row['dice']:g}"
        raise RunError(
            f"{what}: case {row['case']} has class {row['class']} in neither mask and a Dice of {said}, which is not "
            f"the convention '{convention}'; evaluate again."
        )


def _counts(rows: pd.DataFrame) -> dict[str, Any]:
    statuses = {status: int((rows["status"] == status).sum()) for status in list(COUNTS)[2:]}
    return {"cases": len(rows), "averaged": int(rows["dice"].notna().sum()), **statuses}


def _spread(values: pd.Series[float], over: str) -> dict[str, float | None]:
    known = values.dropna().to_numpy(dtype=np.float64)
    return {
        "mean": float(known.mean()) if known.size else None,
        f"std_over_{over}": float(known.std(ddof=1)) if known.size > 1 else None,
    }


def _over_seeds(scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    import pandas as pd

    result: dict[str, Any] = {name: sum(score[name] for score in scores) for name in COUNTS}
    for metric in DEFINITIONS:
        means = [score[metric]["mean"] for score in scores]
        result[metric] = _spread(pd.Series(means, dtype=np.float64), "seeds") | {"per_seed": means}
    return result
